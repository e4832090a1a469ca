"""The parts' published weights, which checkpoints may leave out: fetched by name or path."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, WhisperConfig, WhisperModel

from llama_smop.models.avhubert import AvHubertVideoEncoder
from llama_smop.models.checkpoint_checks import refuse_non_finite
from llama_smop.models.hub import fetch

PARTS = ("audio_tower", "video_tower", "language_model")


def part_weights(part: str, source: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """State dict of a part, under its names without LoRA: Whisper's encoder, a causal language model, or AV-HuBERT
    from a fairseq file or the folder it was converted to.

    Raises:
        ValueError: a source that cannot be found or is of another kind.
    """
    if part == "audio_tower":
        return fetch(WhisperModel, source, dtype=dtype).encoder.state_dict()
    if part == "language_model":
        return fetch(AutoModelForCausalLM, source, dtype=dtype).state_dict()
    if part == "video_tower":
        return _video_tower(source).to(dtype).state_dict()
    raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)}")


def part_config(part: str, source: str | Path) -> PreTrainedConfig:
    """Configuration of a part; ValueError as in `part_weights`."""
    if part == "audio_tower":
        return fetch(WhisperConfig, source)
    if part == "language_model":
        return fetch(AutoConfig, source)
    if part == "video_tower":
        return _video_tower(source).config
    raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)}")


def _video_tower(source: str | Path) -> AvHubertVideoEncoder:
    if Path(source).is_dir():
        return fetch(AvHubertVideoEncoder, source)
    from llama_smop.models.formats.fairseq import load_avhubert

    return load_avhubert(source)[0]


@torch.no_grad()
def load_part(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Put `weights` into a part that may have LoRA inside, and embeddings of more tokens than its source.

    Raises:
        ValueError: a tensor that is missing, of another shape, or with numbers that are not finite.
    """
    refuse_non_finite(weights, source)
    embeddings = (module.get_input_embeddings(), module.get_output_embeddings())
    growing = {id(e.weight) for e in embeddings if e is not None}
    for name, own in module.state_dict(keep_vars=True).items():
        if "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        value = weights.get(name)
        if value is None:
            raise ValueError(f"{source}: has no {name}; name the model this was made from")
        if value.shape != own.shape and not (id(own) in growing and value.shape[1:] == own.shape[1:]):
            raise ValueError(f"{source}: {name} has shape {tuple(value.shape)}, expected {tuple(own.shape)}")
        if own.dim() == 0:
            own.copy_(value)
        else:
            rows = min(len(value), len(own))
            own[:rows].copy_(value[:rows])
