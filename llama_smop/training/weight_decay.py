"""The rule that decides which parameters have weight decay."""

from collections.abc import Sequence
from itertools import chain

from torch import nn
from transformers import Trainer

from llama_smop.projector import FORMER_NAMES, StackedMLPs


def decayed_names(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: matrices, convolution kernels and embeddings.

    Parameters with fewer than two dimensions have none: biases, scales and shifts of norms, slopes of PReLU. In a
    module with `stacked_parameters` the first dimension counts experts and is left out: b1 (X, H) is X biases.
    Parameters that transformers' Trainer excludes by name have none either.
    """
    by_name = set(Trainer.get_decay_parameter_names(None, model))
    names = []
    for prefix, module in model.named_modules():
        least = 3 if getattr(module, "stacked_parameters", False) else 2
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name in by_name and parameter.dim() >= least:
                names.append(name)
    return names


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups for an optimizer: trained parameters with weight decay, then those without."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = set(decayed_names(model))
    return [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]


def regrouped(state: dict, model: nn.Module) -> dict:
    """An optimizer's state dict from a checkpoint of any version, with the parameters in this version's groups.

    Earlier versions grouped by transformers' rule. A state with any other groups is returned unchanged.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    before = _split(trained, [*Trainer.get_decay_parameter_names(None, model), *_formerly_decayed(model)])
    now = _split(trained, decayed_names(model))
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes == [len(names) for names in now] or sizes != [len(names) for names in before]:
        return state
    saved = chain(*(group["params"] for group in state["param_groups"]))
    numbers = dict(zip(chain(*before), saved, strict=True))
    places = {numbers[name]: place for place, name in enumerate(chain(*now))}
    groups, start = [], 0
    for group, names in zip(state["param_groups"], now, strict=True):
        groups.append(group | {"params": list(range(start, start + len(names)))})
        start += len(names)
    return state | {"state": {places[number]: v for number, v in state["state"].items()}, "param_groups": groups}


def _formerly_decayed(model: nn.Module) -> list[str]:
    """Parameters of projectors that transformers' rule spares now, and did not by their names in earlier versions."""
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, StackedMLPs)
        for former, name in FORMER_NAMES.items()
        if "bias" not in former
    ]


def _split(names: Sequence[str], decayed: Sequence[str]) -> tuple[list[str], list[str]]:
    chosen = set(decayed)
    return [n for n in names if n in chosen], [n for n in names if n not in chosen]
