"""`python -m benchmarks memory`: the peak resident memory of a training step with each memory-saving option.

The model is a Llama with the published vocabulary and LoRA, scaled down in all other sizes, with small frozen towers.
Each case runs two steps, forward and backward, in a fresh process and records the peak resident memory above that of
the model, beside the estimate of `llama-smop info`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, WhisperConfig

from benchmarks import environment, results, say
from llama_smop import estimate
from llama_smop.models import lm_loss
from llama_smop.models.configuration_llama_smop import LLAMA_3_2_1B, AvHubertVideoConfig, LlamaSmopConfig
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration

FOLDER = results.FOLDER / "training_memory"
WORKLOAD = estimate.Workload(clips=4, seconds=6.0, text_tokens=100)
ONE_CHUNK = 10**9
# Name and differences from the default: fused_loss, gradient_checkpointing, recompute of the projector, chunk.
CASES = (
    ("logits of all positions", {"fused_loss": "plain"}),
    ("logits of labelled positions", {"chunk": ONE_CHUNK}),
    ("… in chunks (the default)", {}),
    ("… and the projector recomputed", {"recompute": "hz"}),
    ("… and gradient checkpointing", {"gradient_checkpointing": True}),
    ("… and both", {"recompute": "hz", "gradient_checkpointing": True}),
)


def scaled(
    recompute: str = "none", vocabulary: int = LLAMA_3_2_1B["vocab_size"], hidden_features: int = 4096
) -> LlamaSmopConfig:
    """Llama 3.2's vocabulary, rates (4, 2), DEDR E 4 K 2."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    audio = {"d_model": 128, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 512}
    video = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512}
    marks = ("audio_token_id", "audio_end_token_id", "video_token_id", "video_end_token_id", "pad_token_id")
    return LlamaSmopConfig(
        text_config=LlamaConfig(**LLAMA_3_2_1B | text),
        audio_config=WhisperConfig(**audio, max_source_positions=300),
        video_config=AvHubertVideoConfig(
            **video, frontend_channels=8, frontend_stride=4, trunk_channels=(16, 32, 64), trunk_blocks=(1, 1, 1)
        ),
        projector_config={"hidden_features": hidden_features, "recompute": recompute},
        lora={"language_model": {"r": 8, "alpha": 8}},
        **{name: vocabulary - 1 - i for i, name in enumerate(marks)},
        bos_token_id=0,
        eos_token_id=1,
    )


def run(path: Path | None = None, quick: bool = False, say: Callable[[str], None] = say) -> dict:
    """Measure every case and save; `path` defaults to the device's file under benchmarks/results/training_memory/."""
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("peak resident memory is read from /proc/self/clear_refs, which this system does not have")
    found = {"schema": results.SCHEMA, "environment": environment.describe(torch.device("cpu"))}
    config = _config(quick)
    workload = _workload(quick)
    ids = estimate.batch(config, workload, torch.float32)
    found["sizes"] = {
        "vocabulary": config.text_config.vocab_size,
        "width": config.text_config.hidden_size,
        "clips": workload.clips,
        "positions": ids["input_ids"].numel(),
        "labelled": ids["target_positions"].numel(),
        "chunk": lm_loss.CHUNK,
    }
    found["cases"] = []
    for name, options in CASES:
        measured = _in_a_child(options, quick)
        found["cases"].append({"case": name, **measured, "estimated_bytes": estimated(options, quick)})
        say(f"{measured['peak_bytes'] / 1e6:7.0f} MB  {name}")
    path = path or FOLDER / f"{results.slug('cpu', found['environment'])}.json"
    results.save(found, path)
    say(f"saved {path}")
    return found


def _config(quick: bool, **options) -> LlamaSmopConfig:
    return scaled(**options, vocabulary=2000, hidden_features=256) if quick else scaled(**options)


def _workload(quick: bool) -> estimate.Workload:
    return estimate.Workload(2, 1.0, 10) if quick else WORKLOAD


def estimated(options: dict, quick: bool) -> int:
    """Bytes of the step, as `llama-smop info` computes them."""
    config = _config(quick, recompute=options.get("recompute", "none"))
    chosen = {k: options[k] for k in ("fused_loss", "gradient_checkpointing") if k in options}
    rows, lm_loss.CHUNK = lm_loss.CHUNK, options.get("chunk", lm_loss.CHUNK)
    try:
        return estimate.training(config, _workload(quick), dtype=torch.float32, **chosen).step
    finally:
        lm_loss.CHUNK = rows


def _in_a_child(options: dict, quick: bool) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_memory", json.dumps({"quick": quick, "options": options})],
        capture_output=True,
        text=True,
        cwd=environment.ROOT,
    )
    if done.returncode:
        raise ValueError(f"the case {options} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(options: dict, quick: bool) -> dict:
    """Resident bytes of the process with the model, and the peak above them over two steps."""
    torch.manual_seed(0)
    lm_loss.CHUNK = options.get("chunk", lm_loss.CHUNK)
    config = _config(quick, recompute=options.get("recompute", "none"))
    model = LlamaSmopForConditionalGeneration(config).train()
    model.fused_loss = options.get("fused_loss", "auto")
    if options.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = estimate.batch(config, _workload(quick), torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
    return {"model_bytes": before, "peak_bytes": _resident("VmHWM") - before}


def _resident(field: str) -> int:
    """Bytes of VmRSS, the present resident memory, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(child(**json.loads(sys.argv[1]))))
