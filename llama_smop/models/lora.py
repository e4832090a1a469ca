"""LoRA through peft: where the published recipe puts it, with its sizes."""

import math
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

# The recipe's `rank` divides the width: r = hidden / rank, scale alpha / rank; these are the same as peft writes them.
PRESETS = {
    "llama-3.2-1b": {"r": 64, "alpha": 8},
    "llama-3.2-3b": {"r": 96, "alpha": 12},
    "llama-3.1-8b": {"r": 64, "alpha": 8},
    "av-hubert-large": {"r": 64, "alpha": 128},
}
TARGETS = ("q_proj", "v_proj")


def lora_settings(lora: str | dict) -> dict:
    """{"r", "alpha", "targets", "init"} of a preset's name or of a dict with at least "r" and "alpha".

    `targets` are the q and v projections by default. `init` is "zero", a delta of zero at the start, or "normal":
    both factors N(0, 0.02²), which is how the published run started.

    Raises:
        ValueError: an unknown preset, a missing or unknown key, r below 1.
    """
    if isinstance(lora, str):
        if lora.lower() not in PRESETS:
            raise ValueError(f"unknown LoRA preset {lora!r}; known: {', '.join(PRESETS)}")
        lora = PRESETS[lora.lower()]
    if not isinstance(lora, dict):
        raise ValueError(f"LoRA settings are a preset's name or r, alpha, targets and init, got {lora!r:.60}")
    if set(lora) - {"r", "alpha", "targets", "init"} or not {"r", "alpha"} <= set(lora):
        raise ValueError(f"LoRA settings are r, alpha, targets and init, got {sorted(lora)}")
    r, alpha, targets = lora["r"], lora["alpha"], lora.get("targets", TARGETS)
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= 2**17:
        raise ValueError(f"LoRA r must be a whole number of at least 1, got {r!r:.60}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"LoRA alpha must be a number, got {alpha!r:.60}")
    if not isinstance(targets, list | tuple) or not targets or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"LoRA targets must be a list of modules' names, got {targets!r:.60}")
    if lora.get("init", "zero") not in ("zero", "normal"):
        raise ValueError(f'LoRA init must be "zero" or "normal", got {lora["init"]!r}')
    return {
        "r": r,
        "alpha": alpha,
        "targets": list(targets),
        "init": lora.get("init", "zero"),
    }


def peft_config(lora: str | dict, **settings) -> "LoraConfig":
    """peft's configuration of the same LoRA; `settings` are further fields. Raises ValueError as `lora_settings`."""
    from peft import LoraConfig

    lora = lora_settings(lora)
    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        target_modules=lora["targets"],
        lora_dropout=0.0,
        bias="none",
        **settings,
    )


def inject_lora(module: nn.Module, lora: str | dict) -> None:
    """Put LoRA into `module` in place; its own weights are frozen.

    Raises:
        ValueError: no module of the targets' names.
    """
    from peft import inject_adapter_in_model

    lora = lora_settings(lora)
    inject_adapter_in_model(peft_config(lora), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and lora["init"] == "normal":
            nn.init.normal_(parameter, std=0.02)
