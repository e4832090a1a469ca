"""Which parameters weight decay shrinks. The rule stands here alone."""

from collections.abc import Sequence
from itertools import chain

from torch import nn
from transformers import Trainer


def decayed_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay acts on: matrices, convolution kernels and embeddings.

    Biases, the scales and shifts of norms and the slopes of PReLU are spared: all that has fewer than two dimensions.
    In a module with `stacked_parameters` the first dimension counts experts, so that the rule is applied to one
    expert's part: b1 (X, H) holds X biases. What transformers' Trainer spares by its name is spared here too.
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
    """Two groups for an optimizer, of the parameters that learn: decayed ones first, then those that are spared."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = set(decayed_names(model))
    return [
        {"params": [p for name, p in learning if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in learning if name not in decayed], "weight_decay": 0.0},
    ]


def by_this_rule(state: dict, model: nn.Module) -> dict:
    """An optimizer's state dict, of a checkpoint of any version, with the parameters in this version's groups.

    Earlier versions grouped by transformers' rule alone. A state that is already in this version's groups, or in
    groups that neither made, is returned as it is.
    """
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    before = _split(learning, Trainer.get_decay_parameter_names(None, model))
    now = _split(learning, decayed_names(model))
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


def _split(names: Sequence[str], decayed: Sequence[str]) -> tuple[list[str], list[str]]:
    chosen = set(decayed)
    return [n for n in names if n in chosen], [n for n in names if n not in chosen]
