"""A whole Llama-SMoP: training step and generation with our projector, the eager loop, and a dense one.

All models are copies of one model with different projectors; weights are random, inputs synthetic. Sizes: the tiny
model (CPU) and the published one (Whisper medium, AV-HuBERT Large, Llama 3.2-1B with LoRA; GPU).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import Timing
from benchmarks.rivals.eager_projector import EagerProjector
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.units import IGNORED_LABEL
from llama_smop.projector import DenseProjector, SMoPProjector

PROJECTORS = ("smop", "eager", "dense")


@dataclass(frozen=True)
class Setting:
    """name: of the model. seconds: of every clip. text: tokens of every transcript. new: tokens to generate."""

    name: str
    clips: int
    seconds: float
    text: int
    new: int
    budget_s: float
    min_rounds: int


def tiny(device: torch.device, quick: bool = False) -> list[dict]:
    """The model that is trained from scratch on a CPU."""
    from llama_smop.models.tiny import build_tiny

    torch.manual_seed(0)
    model, _ = build_tiny([f"word{i}" for i in range(50)])
    setting = Setting("tiny", clips=2 if quick else 8, seconds=0.4 if quick else 2.0, text=6, new=2 if quick else 8,
                      budget_s=0.1 if quick else 14, min_rounds=1 if quick else 5)  # fmt: skip
    return compare(model.to(device), setting, device)


def llama_1b(device: torch.device, quick: bool = False) -> list[dict]:
    """The published size with random weights, bfloat16, LoRA on q and v; a batch of 1500 video frames."""
    lora = {"r": 64, "alpha": 8, "targets": ["q_proj", "v_proj"]}
    config = LlamaSmopConfig(lora={"language_model": lora})
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            model = LlamaSmopForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return compare(model, Setting("Llama 3.2-1B", 10, 6.0, 24, 32, 25, 5), device)


def exchange(model: LlamaSmopForConditionalGeneration, kind: str) -> LlamaSmopForConditionalGeneration:
    """A copy of the model with the projector `kind`; "dense" has K·H hidden units, the same active FLOPs."""
    model = copy.deepcopy(model)
    source: SMoPProjector = model.multi_modal_projector
    if kind == "eager":
        model.multi_modal_projector = EagerProjector(source)
    elif kind == "dense":
        hidden = source.hidden_features * source.top_k
        dense = DenseProjector(source.in_features, hidden, source.out_features)
        model.multi_modal_projector = dense.to(source.w1.device, source.w1.dtype)
        model.config.projector_config.kind = "dense"
    return model


def compare(model: LlamaSmopForConditionalGeneration, setting: Setting, device: torch.device) -> list[dict]:
    """One record per projector. Steps and generations are interleaved over the projectors."""
    inputs = batch(model.config, setting, device, next(model.multi_modal_projector.parameters()).dtype)
    prompt = {k: v for k, v in inputs.items() if k != "labels"}
    cut = inputs["input_ids"].shape[1] - setting.text
    prompt |= {name: prompt[name][:, :cut] for name in ("input_ids", "attention_mask")}
    models = {kind: exchange(model, kind).train() for kind in PROJECTORS}
    steps = {kind: _step(m, inputs) for kind, m in models.items()}
    alone = {kind: _projector_alone(m, inputs) for kind, m in models.items()}
    clock = measure.clock(device, cold=False)
    third = setting.budget_s / 3
    step_times, step_noise = measure.interleaved(steps, clock, third, setting.min_rounds)
    projector_times, _ = measure.interleaved(alone, clock, third / 2, setting.min_rounds)
    peaks = {kind: measure.peak_bytes(run, device) for kind, run in steps.items()}
    generate = {kind: _generation(m.eval(), prompt, setting.new) for kind, m in models.items()}
    generate_times, generate_noise = measure.interleaved(generate, clock, third, setting.min_rounds)
    tokens = _speech_tokens(model.config, setting)
    return [
        {
            "model": setting.name,
            "projector": kind,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "clips": setting.clips,
            "speech_tokens": tokens,
            "step": step_times[kind].json(),
            "step_noise": round(step_noise, 4),
            "speech_tokens_per_s": round(tokens / step_times[kind].median_us * 1e6, 1),
            "projector_alone": projector_times[kind].json(),
            "projector_share": round(_share(projector_times[kind], step_times[kind]), 4),
            "generate": generate_times[kind].json(),
            "generate_noise": round(generate_noise, 4),
            "new_tokens_per_s": round(setting.clips * setting.new / generate_times[kind].median_us * 1e6, 1),
            "peak_bytes": peaks[kind],
        }
        for kind in PROJECTORS
    ]


def batch(config: LlamaSmopConfig, setting: Setting, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Synthetic clips, all of one length: noise for sound and picture, random words for text."""
    generator = torch.Generator().manual_seed(0)
    B, audio, video = setting.clips, round(setting.seconds * 50), round(setting.seconds * 25)
    positions = config.audio_config.max_source_positions

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    ids = [config.bos_token_id]
    for mark, end, count in (
        (config.audio_token_id, config.audio_end_token_id, audio // config.rate_audio),
        (config.video_token_id, config.video_end_token_id, video // config.rate_video),
    ):
        ids += [mark] * (count + 1) + [end]
    speech = torch.tensor(ids).expand(B, -1)
    words = torch.tensor([i for i in range(min(1000, config.text_config.vocab_size)) if i not in _special(config)])
    text = words[torch.randint(len(words), (B, setting.text), generator=generator)]
    input_ids = torch.cat([speech, text], 1)
    labels = torch.cat([torch.full_like(speech, IGNORED_LABEL), text], 1)
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": torch.ones_like(input_ids).to(device),
        "labels": labels.to(device),
        "input_features": noise(B, config.audio_config.num_mel_bins, 2 * positions),
        "audio_mask": torch.ones(B, audio, dtype=torch.bool, device=device),
        "video_values": noise(B, video, 1, 88, 88),
        "video_mask": torch.ones(B, video, dtype=torch.bool, device=device),
    }


def _special(config: LlamaSmopConfig) -> set[int | None]:
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    names = ("audio_token_id", "audio_end_token_id", "video_token_id", "video_end_token_id", "pad_token_id")
    return {config.bos_token_id, *eos, *(getattr(config, name) for name in names)}


def _speech_tokens(config: LlamaSmopConfig, setting: Setting) -> int:
    audio = round(setting.seconds * 50) // config.rate_audio
    return setting.clips * (audio + round(setting.seconds * 25) // config.rate_video)


def _step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, backward and an AdamW step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def run():
        optimizer.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        optimizer.step()

    return run


def _projector_alone(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward of the projector on the inputs that it gets in the model."""
    caught = []
    hook = model.multi_modal_projector.register_forward_pre_hook(lambda module, args: caught.append(args))
    with torch.no_grad():
        model(**{k: v for k, v in inputs.items() if k != "labels"})
    hook.remove()
    projector, arguments = model.multi_modal_projector, caught[0]
    parameters = list(projector.parameters())
    dy = torch.randn_like(projector(*arguments).hidden_states)

    def run():
        out = projector(*arguments)
        roots, grads = [out.hidden_states], [dy]
        for loss in (out.load_balancing_loss, out.router_z_loss):
            if loss.requires_grad:
                roots.append(loss)
                grads.append(torch.ones_like(loss))
        torch.autograd.grad(roots, parameters, grads, allow_unused=True)

    return run


def _generation(model: nn.Module, prompt: dict[str, Tensor], new: int) -> Callable[[], object]:
    return lambda: model.generate(**prompt, max_new_tokens=new, min_new_tokens=new)


def _share(part: Timing, whole: Timing) -> float:
    return part.median_us / whole.median_us
