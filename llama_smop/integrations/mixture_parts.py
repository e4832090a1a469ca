"""What a mixture is made of, recognised by structure: which child is the router, which the experts, and what else."""

import math
from typing import Any, NamedTuple

from torch import nn

ACTIVATIONS = ("silu", "gelu", "relu")  # tried in this order where an expert has no module for it


class Expert(NamedTuple):
    """All that the experts of one mixture must share: an MLP D → H → O, with or without a gate."""

    first: tuple[str, ...]  # names of the layers from D: one, or the gate's and the other's
    second: str
    norm: str | None  # a LayerNorm at its end
    gated: bool
    activation: str | None  # None: it is not a module, and has to be tried
    eps: float | None
    parameters: tuple  # names, shapes, dtypes, devices, and what is frozen


class Parts(NamedTuple):
    """Where a mixture keeps what: names of its children."""

    router: str
    experts: str
    expert: Expert
    shared: str | None = None  # an expert for every token
    norm: str | None = None  # of the input
    front: str | None = None  # convolutions over time before all else


def find(module: nn.Module) -> Parts | str | None:
    """None: not a mixture at all. A string: nearly one, and why it is left alone."""
    lists = [(n, c) for n, c in module.named_children() if isinstance(c, nn.ModuleList) and len(c)]
    if len(lists) != 1:
        return None
    experts_name, experts = lists[0]
    routers = [n for n, c in module.named_children() if _logits(c) == len(experts)]
    if len(routers) != 1:
        return None
    router = module.get_submodule(routers[0])
    if not _is_router(router):
        return "its router is not a Linear, or Linear, ReLU, Linear"
    kinds = {_expert(e) for e in experts}
    if None in kinds:
        return "its experts are not Linear, ReLU | GELU | SiLU, Linear[, LayerNorm], with or without a gate"
    if len(kinds) > 1:
        return "its experts differ in shape, activation, biases, dtype or in what is frozen"
    if len(list(module.parameters(recurse=False))):
        return "it has parameters of its own"
    expert = kinds.pop()
    assert expert is not None
    found: dict[str, str] = {}
    for name, child in module.named_children():
        if name in (experts_name, routers[0]) or _does_nothing(child):
            continue
        place = _other_part(child, expert, width(expert, experts[0]))
        if place is None or place in found:
            return "it has more parts than router, experts, a shared one, a norm and convolutions before them"
        found[place] = name
    return Parts(routers[0], experts_name, expert, **found)


def width(expert: Expert, module: nn.Module) -> int:
    """D of an expert."""
    first: Any = module.get_submodule(expert.first[0])
    return first.in_features


def _logits(child: nn.Module) -> int | None:
    last = child[-1] if isinstance(child, nn.Sequential) and len(child) else child
    return last.out_features if isinstance(last, nn.Linear) else None


def _is_router(router: nn.Module) -> bool:
    layers = list(router) if type(router) is nn.Sequential else [router]
    return [type(layer) for layer in layers] in ([nn.Linear], [nn.Linear, nn.ReLU, nn.Linear])


def _does_nothing(child: nn.Module) -> bool:
    return isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)


def _other_part(child: nn.Module, expert: Expert, D: int) -> str | None:
    """The field of `Parts` that a child is for."""
    if _expert(child) == expert:
        return "shared"
    parameters = dict(child.named_parameters())
    if isinstance(child, nn.LayerNorm) or (not list(child.children()) and list(parameters) == ["weight"]):
        return "norm" if parameters and parameters["weight"].shape == (D,) else None
    if isinstance(child, nn.Sequential) and len(child) and isinstance(child[0], nn.Conv1d):
        plain = all(isinstance(c, nn.Conv1d) or activation_name(c) for c in child)
        return "front" if plain else None
    return None


def _expert(module: nn.Module) -> Expert | None:
    """What an expert is; None for another kind of module."""
    if list(module.parameters(recurse=False)):
        return None
    layers = [(n, c) for n, c in module.named_children() if not _does_nothing(c)]
    linears = [(n, c) for n, c in layers if type(c) is nn.Linear]
    acts = [activation_name(c) for _, c in layers if activation_name(c)]
    norms = [(n, c) for n, c in layers if type(c) is nn.LayerNorm]
    if len(linears) + len(acts) + len(norms) < len(layers) or len(acts) > 1 or len(norms) > 1:
        return None
    if len(linears) not in (2, 3):
        return None
    *first, (second_name, second) = linears
    widths = {(c.in_features, c.out_features, c.bias is None) for _, c in first}
    if len(widths) > 1:
        return None
    gated = len(first) == 2 or first[0][1].out_features == 2 * second.in_features
    if first[0][1].out_features != second.in_features and (len(first) == 2 or not gated):
        return None
    norm = None
    if norms:
        norm, layer = norms[0]
        if layer.normalized_shape != (second.out_features,) or layer.bias is None or layers[-1][0] != norm:
            return None
    kinds = tuple((n, tuple(p.shape), p.dtype, p.device, p.requires_grad) for n, p in module.named_parameters())
    eps = None if norm is None else layer.eps
    names = tuple(n for n, _ in first)
    return Expert(names, second_name, norm, gated, acts[0] if acts else None, eps, kinds)


def activation_name(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else None
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def numbers(module: nn.Module, kind: type, *words: str) -> list[Any]:
    """Plain settings of a module: finite numbers of a kind above 0, whose names have one of the words in them."""
    settings: dict[str, Any] = {n: v for n, v in vars(module).items() if type(v) is kind}
    named = [v for n, v in settings.items() if not words or any(w in n for w in words)]
    return [v for v in named if math.isfinite(v) and v > 0]
