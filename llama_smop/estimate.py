"""Estimates the memory and arithmetic of a configuration without running it.

One step runs on fake tensors: operators report shapes and dtypes, and nothing is computed or allocated. The peak is the
largest number of live bytes. A GPU's context, workspaces and allocator rounding are not included.

`python -m llama_smop.estimate` computes those of the published sizes anew and writes them beside this file.
"""

import json
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_smop.models.assemble import assembled_config
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.lm_loss import resolve
from llama_smop.models.lora import lora_settings
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.published import PUBLISHED, published
from llama_smop.models.rates import Rate, rate_text
from llama_smop.models.tiny import build_tiny
from llama_smop.models.units import IGNORED_LABEL, WHISPER_RATE
from llama_smop.system import files
from llama_smop.training.config import TrainConfig

GIB = 2**30
ADAMW_STATES = 2
PROMPT_TOKENS = 7
PUBLISHED_ESTIMATES = "published_estimates.json"  # which take a quarter of a minute, and depend on nothing of a user's


@dataclass(frozen=True)
class Workload:
    """A batch: `clips` of `seconds` each, with `text_tokens` of text. The default is 1500 video frames."""

    clips: int = 10
    seconds: float = 6.0
    text_tokens: int = 40

    def __post_init__(self):
        if self.clips < 1 or self.seconds <= 0 or self.text_tokens < 1:
            raise ValueError(f"clips, seconds and text_tokens must be positive, got {self}")


@dataclass(frozen=True)
class Estimate:
    """Peak bytes of one step and its floating-point operations; a multiply-add counts as two."""

    name: str
    mode: str
    parameters: dict[str, int]
    trainable: int
    weights: int
    optimizer: int
    step: int  # activations, gradients, key-value cache and temporaries together
    flops: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the live storages that are created under it. Those of `known` tensors do not count."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def training(
    config: LlamaSmopConfig,
    workload: Workload,
    *,
    name: str = "",
    dtype: torch.dtype = torch.bfloat16,
    fused_loss: str = "auto",
    gradient_checkpointing: bool = False,
    rate: Rate | None = None,
) -> Estimate:
    """Forward, backward and AdamW of one batch; frozen parameters have neither gradients nor optimizer states.

    dtype: of frozen parameters and products; trained parameters are float32, as in `train`. fused_loss: as in a
    training file; "liger" counts as "chunked". gradient_checkpointing: recompute trained layers in backward. The
    estimate is then up to a quarter too high, because fake tensors split SiLU's backward into several operators. The
    CTC heads, which only models from scratch have, are not included. rate: the compression rate; None = the default.
    """

    def step(model):
        model.fused_loss = "chunked" if fused_loss == "liger" else fused_loss
        skip_logits = resolve(model.fused_loss, model.language_model) != "plain"
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            model.train()  # only the checkpointed layers: dropout and layer drop would draw numbers
            for module in model.modules():
                module.training = module.training and isinstance(module, GradientCheckpointingLayer)
        model(**batch(config, workload, dtype, rate), skip_logits=skip_logits, rate=rate).loss.backward()

    return _estimate(config, step, name, "training", dtype, trained_dtype=torch.float32)


def inference(
    config: LlamaSmopConfig,
    workload: Workload,
    *,
    name: str = "",
    dtype: torch.dtype = torch.bfloat16,
    num_beams: int = 1,
    rate: Rate | None = None,
) -> Estimate:
    """Towers, projector, and the language model over prompt and `text_tokens` new tokens, with `num_beams` per clip."""

    @torch.no_grad()
    def step(model):
        inputs = batch(config, workload, dtype, rate)
        speech = model.get_speech_features(
            **{k: v for k, v in inputs.items() if k.startswith(("input_f", "audio", "video"))}, rate=rate
        )
        embeds = model.place_speech(inputs["input_ids"], speech)
        del speech
        model(
            inputs_embeds=embeds.repeat_interleave(num_beams, 0),
            attention_mask=inputs["attention_mask"].repeat_interleave(num_beams, 0),
            use_cache=True,
            logits_to_keep=1,
        )

    return _estimate(config, step, name, f"inference, {num_beams} beam{'s' * (num_beams > 1)}", dtype, dtype)


def batch(
    config: LlamaSmopConfig, workload: Workload, dtype: torch.dtype, rate: Rate | None = None
) -> dict[str, Tensor]:
    """Inputs with the workload's shapes, as the processor makes them; the values are arbitrary."""
    B, (rate_audio, rate_video) = workload.clips, config.rate(rate)
    ids = [config.bos_token_id or 0]
    inputs = {}
    if "audio" in config.modalities:
        audio = config.audio_config
        frames = min(math.floor(workload.seconds * WHISPER_RATE), audio.max_source_positions)
        inputs["input_features"] = torch.zeros(B, audio.num_mel_bins, 2 * audio.max_source_positions, dtype=dtype)
        inputs["audio_mask"] = torch.ones(B, frames, dtype=torch.bool)
        ids += [config.audio_token_id] * (frames // rate_audio + 1) + [config.audio_end_token_id]
    if "video" in config.modalities:
        frames = math.floor(workload.seconds * 25) // rate_video * rate_video
        size = config.video_config.image_size
        inputs["video_values"] = torch.zeros(B, frames, 1, size, size, dtype=dtype)
        inputs["video_mask"] = torch.ones(B, frames, dtype=torch.bool)
        ids += [config.video_token_id] * (frames // rate_video + 1) + [config.video_end_token_id]
    prompt, text = len(ids) + PROMPT_TOKENS, workload.text_tokens + 1
    ids = torch.tensor(ids + [0] * (PROMPT_TOKENS + text)).repeat(B, 1)
    labels = torch.cat([torch.full((B, prompt), IGNORED_LABEL), ids[:, prompt:]], 1)
    # Computed here, because fake tensors have no values to read them from.
    positions = (torch.arange(B)[:, None] * ids.shape[1] + torch.arange(prompt - 1, ids.shape[1] - 1)).flatten()
    text_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return inputs | text_inputs | {"target_positions": positions}


def _estimate(
    config: LlamaSmopConfig, step, name: str, mode: str, dtype: torch.dtype, trained_dtype: torch.dtype
) -> Estimate:
    config = LlamaSmopConfig(**config.to_dict() | {"ctc_weight": 0.0})
    with torch.device("meta"):
        # In eval mode: the published parts have no dropout, and layer drop would draw random numbers.
        model = LlamaSmopForConditionalGeneration(config).to(dtype).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained_dtype)
    with FakeTensorMode():
        _put_on_fake_cpu(model)
        tensors = [*model.parameters(), *model.buffers()]
        autocast = torch.autocast("cpu", dtype, enabled=trained_dtype != dtype)
        with LiveBytes(tensors) as memory, FlopCounterMode(display=False, custom_mapping=_FLOPS) as flops, autocast:
            step(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        return Estimate(
            name=name,
            mode=mode,
            parameters={part: _count(module.parameters()) for part, module in model.named_children()},
            trainable=_count(trained),
            weights=_bytes(tensors),
            optimizer=ADAMW_STATES * _bytes(trained) if mode == "training" else 0,
            step=memory.peak,
            flops=flops.get_total_flops(),
        )


def _put_on_fake_cpu(model: nn.Module) -> None:
    """Move from the meta device, where attention is a different operator, to a fake CPU; tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                store[name] = made[id(tensor)]


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in {id(t): t for t in tensors}.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _experts_forward(x, weights, experts, order, inverse, offs, w1, b1, w2, *args, **kwargs) -> int:
    """T·K rows through D·H + H·O weights."""
    return 2 * math.prod(weights) * (math.prod(w1[1:]) + math.prod(w2[1:]))


def _experts_backward(dy, x, weights, experts, order, inverse, offs, w1, b1, w2, *args, **kwargs) -> int:
    """dh and dW2, dW1; the towers are frozen, so dx is rarely needed and not counted."""
    return 2 * math.prod(weights) * (math.prod(w1[1:]) + 2 * math.prod(w2[1:]))


def _attention_forward(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


# Operators that torch's counter does not count.
_FLOPS = {
    torch.ops.smop.expert_projection: _experts_forward,
    torch.ops.smop.expert_projection_bwd: _experts_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def info(config: TrainConfig) -> str:
    """The output of `llama-smop info`: the model of a training file and the three published sizes.

    Raises:
        ValueError: a part that cannot be read and is not one of the recipe's.
    """
    model, remark = model_config(config)
    dtype = torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32
    longest = model.audio_config.max_source_positions / WHISPER_RATE
    seconds = min(6.0, longest)
    own = Workload(max(1, round(config.data.max_frames / (25 * seconds))), seconds, text_tokens=40)
    rows = []
    for rate in model.known_rates:
        name = f"this file, rate {rate_text(rate)}" if model.rates else "this file"
        optimizer = config.optimizer
        loss, checkpointing = optimizer.fused_loss, optimizer.gradient_checkpointing
        common = {"name": name, "dtype": dtype, "rate": rate}
        rows.append(training(model, own, fused_loss=loss, gradient_checkpointing=checkpointing, **common))
        rows.append(inference(model, own, **common))
    rows += published_estimates()
    default = Workload()
    parts = ", ".join(f"{part} {_short(count)}" for part, count in rows[0].parameters.items())
    return "\n".join(
        [
            f"Parameters: {parts}; trained {_short(rows[0].trainable)}.",
            *([remark] if remark else []),
            f"Batches: this file {own.clips} clips of {own.seconds:g} s, the published sizes {default.clips} of "
            f"{default.seconds:g} s in bfloat16. Computed, not measured; a GPU's context and workspaces come on top.",
            "",
            table(rows),
        ]
    )


def published_estimates() -> list[Estimate]:
    """Those of the published sizes, as they were computed when this package was made."""
    text = (resources("llama_smop") / PUBLISHED_ESTIMATES).read_text()
    return [Estimate(**row) for row in json.loads(text)]


def estimated_published(name: str) -> list[Estimate]:
    """Of one published size, computed: training, and inference with 1 and 15 beams."""
    config, default = published(name), Workload()
    rows = [inference(config, default, name=name, num_beams=beams) for beams in (1, 15)]
    return [training(config, default, name=name), *rows]


def model_config(config: TrainConfig) -> tuple[LlamaSmopConfig, str]:
    """The configuration of a training file's model, and a remark if the recipe's sizes replace absent files."""
    section = config.model
    common = section.common()
    if section.tiny is not None:
        with torch.device("meta"):
            words = [f"word{i}" for i in range(50)]
            return build_tiny(words, **section.tiny.model_dump(), **section.projector.model_dump(), **common)[
                0
            ].config, ""
    parts = {"lora": section.lora, "projector": section.projector.model_dump()}
    try:
        towers = {"audio_tower": section.audio_tower, "video_tower": section.video_tower}
        return assembled_config(language_model=section.language_model, **towers, **parts, **common)[0], ""
    except (ValueError, FileNotFoundError) as error:
        size = Path(section.language_model).name.lower()
        if size not in PUBLISHED:
            raise
        lora = section.lora if isinstance(section.lora, dict) or section.lora is None else lora_settings(section.lora)
        assumed = LlamaSmopConfig(
            text_config=published(size).text_config,
            projector_config=section.projector.model_dump(),
            lora={} if lora is None else lora if "r" not in lora else {"language_model": lora},
            **common,
        )
        return assumed, f"Sizes of {size}, Whisper medium and AV-HuBERT Large assumed: {error}."


def table(estimates: Sequence[Estimate], *, tflops: float = 300.0) -> str:
    """Markdown table of parameters, memory, arithmetic, and seconds at a sustained `tflops`."""
    lines = [
        "| model | step | parameters | trained | weights GiB | optimizer GiB | activations, gradients GiB | total GiB "
        f"| TFLOP | s at {tflops:g} TFLOP/s |",
        "|" + "---|" * 10,
    ]
    for e in estimates:
        gib = [f"{n / GIB:.2f}" for n in (e.weights, e.optimizer, e.step, e.total)]
        flops = e.flops / 1e12
        cells = [e.name, e.mode, _short(sum(e.parameters.values())), _short(e.trainable), *gib]
        lines.append("| " + " | ".join([*cells, f"{flops:.1f}", f"{flops / tflops:.2f}"]) + " |")
    return "\n".join(lines)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


if __name__ == "__main__":
    files.write_json(
        Path(__file__).parent / PUBLISHED_ESTIMATES,
        [asdict(row) for name in PUBLISHED for row in estimated_published(name)],
    )
