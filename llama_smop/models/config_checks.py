"""Types and bounds of configurations: invalid values are refused before a model is built.

Each function raises a ValueError of one line that names the field, what it must be, and what it is.
"""

import math
from collections.abc import Collection

import torch
from transformers import PreTrainedConfig

# Far above any published model; they catch a typing error that would exhaust the memory.
LAYERS, WIDTH, VOCABULARY = (1, 1024), (1, 2**17), (1, 2**23)
# Bounds for the fields of transformers' own configurations, where those have them.
TRANSFORMERS_FIELDS = {
    "num_hidden_layers": LAYERS,
    "encoder_layers": LAYERS,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "head_dim": WIDTH,
    "intermediate_size": (1, 2**20),
    "encoder_ffn_dim": (1, 2**20),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "encoder_attention_heads": (1, 4096),
    "vocab_size": VOCABULARY,
    "num_mel_bins": (1, 4096),
    "max_source_positions": (1, 2**20),
    "max_position_embeddings": (1, 2**31),
}
PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _refuse(part: str, name: str, what: str, value: object) -> None:
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    raise ValueError(f"{part}{name} must be {what}, got {shown}")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(config: object, part: str = "", **bounds: tuple[int, int]) -> None:
    """Each named field is an int within its bounds, both included."""
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if not is_whole(value) or not least <= value <= most:
            _refuse(part, name, f"a whole number from {least} to {most}", value)


def wholes(config: object, part: str = "", **bounds: tuple[int, int]) -> None:
    """Each named field is a list of such ints, not empty."""
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        listed = isinstance(value, list | tuple) and len(value) > 0
        if not listed or not all(is_whole(entry) and least <= entry <= most for entry in value):
            _refuse(part, name, f"a list of whole numbers from {least} to {most}", value)


def number(config: object, part: str = "", **bounds: tuple[float, float]) -> None:
    """Each named field is a finite number within its bounds, both included."""
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not (real and least <= value <= most):  # False for NaN
            _refuse(part, name, f"a number from {least:g} to {most:g}", value)


def flag(config: object, part: str = "", *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            _refuse(part, name, "true or false", getattr(config, name))


def choice(config: object, part: str = "", **choices: Collection[str]) -> None:
    for name, known in choices.items():
        value = getattr(config, name)
        if not isinstance(value, str) or value not in known:
            _refuse(part, name, f"one of {', '.join(known)}", value)


def transformer(config: PreTrainedConfig, part: str = "") -> None:
    """Check what transformers leaves unchecked in a configuration of its own: bounds, probabilities, RoPE's base."""
    for name, bounds in TRANSFORMERS_FIELDS.items():
        if is_whole(getattr(config, name, None)):
            whole(config, part, **{name: bounds})
    for name in PROBABILITIES:
        if hasattr(config, name):
            number(config, part, **{name: (0, 1)})
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", 1.0)
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not theta > 0:
        _refuse(part, "rope_parameters.rope_theta", "a positive number", theta)
    finite_with_dtype(config, part)


def finite_with_dtype(config: PreTrainedConfig, part: str = "") -> None:
    """All numbers are finite, and the dtype is one that models are made in."""
    if config.dtype not in DTYPES:
        _refuse(part, "dtype", "float32, float16, bfloat16 or float64", config.dtype)
    for name, value in vars(config).items():
        _finite(part, name, value)


def _finite(part: str, name: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(part, name, "finite", value)
    if isinstance(value, dict):
        for key, entry in value.items():
            _finite(part, f"{name}.{key}", entry)
