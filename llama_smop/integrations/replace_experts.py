"""`replace_experts`: swap the mixtures of a finished model for the fast one, weights, state-dict keys and all.

The known shape is a gate `Linear` without bias beside a `ModuleList` of
`Sequential(Linear, ReLU | GELU | SiLU, Linear[, LayerNorm])`, called with hidden states (..., D) and returning
`(output (..., O), router_logits (tokens, E))`; the authors' release of Llama-SMoP is exactly that. Whether a module of
that shape also computes the same function is not guessed but tried: both run on a few random tokens, and a module whose
numbers differ is left alone.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama_smop import functional
from llama_smop.ops import dispatch

PROBE_TOKENS = 8
PROBE_TOLERANCE = 2e-3  # of the largest value

# Stacked parameter -> its place in each expert's Sequential, in the order of smop's arguments. transformers' Trainer
# spares from weight decay by these names what it spared as a bias or a LayerNorm before.
PLACES = {
    "w1": (0, "weight"),
    "bias1": (0, "bias"),
    "w2": (2, "weight"),
    "bias2": (2, "bias"),
    "layernorm_weight": (3, "weight"),
    "layernorm_bias": (3, "bias"),
}


class Parts(NamedTuple):
    """Where a mixture keeps what: names of the gate and of the expert list, and what all its experts share."""

    gate: str
    experts: str
    activation: str
    eps: float | None  # None without LayerNorm


@dataclass
class Replacement:
    """What `replace_experts` found, by module name."""

    replaced: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)  # name -> why
    _sites: list[tuple[nn.Module, str, nn.Module, "StackedMixture"]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the original modules back, with the weights as they are now."""
        for parent, name, original, mixture in self._sites:
            mixture.copy_into(original)
            setattr(parent, name, original)
        self._sites.clear()

    def __str__(self) -> str:
        lines = [f"{name or '(the module itself)'}: replaced" for name in self.replaced]
        return "\n".join(
            lines + [f"{name or '(the module itself)'}: left alone, {why}" for name, why in self.left_alone.items()]
        )


def replace_experts(
    module: nn.Module, *, dry_run: bool = False, backend: str = "auto", recompute: str | int = "none"
) -> Replacement:
    """Swap every mixture of the known shape inside `module` for a `StackedMixture` with the same weights.

    Do it before the optimizer is made: parameters become stacked tensors. State dicts keep their keys both ways.

    Args:
        dry_run: only report what would be replaced.
        backend, recompute: as in `llama_smop.functional.smop`.

    Returns:
        A `Replacement`: names replaced, names left alone and why; `undo()` puts the originals back.

    Raises:
        ValueError: `module` itself is a mixture: there is no parent to put the new one into.
    """
    dispatch.check_backend(backend)
    report, made = Replacement(), {}
    for name, found in list(module.named_modules(remove_duplicate=False)):
        parts = _parts(found)
        if parts is None:
            continue
        if isinstance(parts, str):
            report.left_alone[name] = parts
            continue
        if found is module:
            raise ValueError("module is itself a mixture: wrap it, or pass the module that contains it")
        if id(found) not in made:
            made[id(found)] = _fitting_mixture(found, parts, backend, recompute)
        mixture = made[id(found)]
        if isinstance(mixture, str):
            report.left_alone[name] = mixture
            continue
        report.replaced.append(name)
        if not dry_run:
            parent, _, child = name.rpartition(".")
            parent = module.get_submodule(parent)
            report._sites.append((parent, child, found, mixture))
            setattr(parent, child, mixture)
    return report


def _parts(module: nn.Module) -> Parts | str | None:
    """None: not a mixture at all. A string: nearly one, and why it is left alone."""
    lists = [(n, c) for n, c in module.named_children() if isinstance(c, nn.ModuleList) and len(c)]
    gates = [(n, c) for n, c in module.named_children() if isinstance(c, nn.Linear)]
    if len(lists) != 1 or len(gates) != 1 or isinstance(module, StackedMixture):
        return None
    (gate_name, gate), (experts_name, experts) = gates[0], lists[0]
    if gate.out_features != len(experts):
        return None
    if type(gate) is not nn.Linear or gate.bias is not None:
        return "its gate is not a plain Linear without bias"
    if len(list(module.children())) != 2 or len(list(module.parameters(recurse=False))):
        return "it has more parts than a gate and experts"
    shapes = {_expert_shape(e) for e in experts}
    if None in shapes:
        return "its experts are not Sequential(Linear, ReLU | GELU | SiLU, Linear[, LayerNorm])"
    if len(shapes) > 1:
        return "its experts differ in shape, activation, biases, dtype or in what is frozen"
    (*_, activation, eps) = shapes.pop()
    return Parts(gate_name, experts_name, activation, eps)


def _expert_shape(expert: nn.Module) -> tuple | None:
    """All that experts of one mixture must share, activation and eps last; None for another kind of module."""
    if type(expert) is not nn.Sequential or len(expert) not in (3, 4):
        return None
    layers: list[Any] = [*expert, None]
    first, act, second, norm = layers[:4]
    activation = _activation(act)
    if type(first) is not nn.Linear or type(second) is not nn.Linear or activation is None:
        return None
    if norm is not None and (
        type(norm) is not nn.LayerNorm or norm.normalized_shape != (second.out_features,) or norm.bias is None
    ):
        return None
    kinds = tuple((n, tuple(p.shape), p.dtype, p.device, p.requires_grad) for n, p in expert.named_parameters())
    return kinds, activation, None if norm is None else norm.eps


def _activation(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else None
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def _fitting_mixture(original: nn.Module, parts: Parts, backend: str, recompute: str | int) -> "StackedMixture | str":
    """The stacked mixture that reproduces `original`, or why there is none."""
    known = getattr(original, "top_k", None)
    weight = getattr(original, parts.experts)[0][0].weight
    if weight.device.type == "meta":  # no numbers to try
        if not isinstance(known, int):
            return "its top_k is not known: it lies on the meta device and has no attribute top_k"
        return StackedMixture(original, parts, known, backend, recompute)
    # In low precision a near tie may be routed either way: such a mixture is tried as a float32 copy.
    trial = original if weight.dtype in (torch.float32, torch.float64) else deepcopy(original).float()
    expected = _probe(trial, getattr(trial, parts.experts)[0][0])
    if isinstance(expected, str):
        return expected
    candidate = StackedMixture(trial, parts, 1, backend, recompute)
    for top_k in [known] if isinstance(known, int) else range(1, len(getattr(trial, parts.experts)) + 1):
        candidate.top_k = top_k
        found = _probe(candidate, getattr(trial, parts.experts)[0][0])
        if not isinstance(found, str) and _same(found, expected):
            return candidate if trial is original else StackedMixture(original, parts, top_k, backend, recompute)
    return "it computes another function than the weighted mean of its top-K experts"


def _probe(mixture: nn.Module, first: nn.Linear) -> tuple[Tensor, Tensor] | str:
    """What `mixture` returns for a few random tokens, in eval mode; or why that is not what a mixture returns."""
    tokens = torch.randn(1, PROBE_TOKENS, first.in_features, generator=torch.Generator().manual_seed(0))
    modes = [(m, m.training) for m in mixture.modules()]
    mixture.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = mixture(tokens.to(first.weight.device, first.weight.dtype))
    except Exception as error:
        return f"it cannot be called with hidden states alone ({type(error).__name__}: {error})"
    finally:
        for module, training in modes:
            module.training = training
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, Tensor) for t in result)):
        return "it does not return (output, router_logits)"
    return result


def _same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    """Equal but for rounding, TF32's included; another function is off by far more."""
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        tolerance = PROBE_TOLERANCE * max(b.abs().max().item(), 1e-6)
        if (a - b).abs().max().item() > tolerance:
            return False
    return True


class StackedMixture(nn.Module):
    """A mixture on stacked parameters, with the original's names: its gate, and `StackedExperts` where its list was.

    forward(hidden_states (..., D)) -> (output (..., O), router_logits (tokens, E)), both in hidden_states' dtype.
    """

    def __init__(self, original: nn.Module, parts: Parts, top_k: int, backend: str, recompute: str | int):
        super().__init__()
        for name, value in vars(original).items():  # plain settings that other code may read: top_k, num_experts, …
            if not name.startswith("_") and isinstance(value, int | float | str | None):
                setattr(self, name, value)
        self.parts, self.top_k, self.backend, self.recompute = parts, top_k, backend, recompute
        for name, child in original.named_children():
            setattr(self, name, StackedExperts(child) if isinstance(child, nn.ModuleList) else child)
        self.train(original.training)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        gate, experts = getattr(self, self.parts.gate), getattr(self, self.parts.experts)
        out = functional.smop(
            hidden_states, gate.weight[None], *(getattr(experts, n) for n in PLACES), top_k=self.top_k, sharing="JEJR",
            activation=self.parts.activation, eps=self.parts.eps or 1e-5, recompute=self.recompute,
            backend=self.backend,
        )  # fmt: skip
        y, logits = out.hidden_states, out.router_logits
        assert logits is not None
        return y, logits.flatten(0, -2).to(y.dtype)

    def copy_into(self, original: nn.Module) -> None:
        """Write the present weights, with their device, dtype and what is frozen, into the module replaced."""
        setattr(original, self.parts.gate, getattr(self, self.parts.gate))
        getattr(self, self.parts.experts).copy_into(getattr(original, self.parts.experts))
        original.train(self.training)

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, activation={self.parts.activation}, backend={self.backend}"


class StackedExperts(nn.Module):
    """Parameters of all experts (the names in PLACES), saved and loaded under each expert's own keys."""

    stacked_parameters = True  # for `weight_decay`: the first dimension counts experts

    def __init__(self, experts: nn.ModuleList):
        super().__init__()
        self.count = len(experts)
        for name, (place, kind) in PLACES.items():
            layers: list[Any] = list(experts)
            slices: list[Any] = [getattr(e[place], kind) if place < len(e) else None for e in layers]
            parameter = None
            if slices[0] is not None:
                stacked = torch.stack([s.detach() for s in slices])
                parameter = nn.Parameter(stacked, requires_grad=slices[0].requires_grad)
            self.register_parameter(name, parameter)

    def copy_into(self, experts: nn.ModuleList) -> None:
        expert: Any
        for e, expert in enumerate(experts):
            for name, (place, kind) in PLACES.items():
                stacked = getattr(self, name)
                if stacked is not None:
                    own = nn.Parameter(stacked.detach()[e].clone(), requires_grad=stacked.requires_grad)
                    setattr(expert[place], kind, own)

    def _keys(self, prefix: str):
        """(parameter name, expert, key in the state dict) in the list's order: by expert, then by layer."""
        for e in range(self.count):
            for name, (place, kind) in PLACES.items():
                if getattr(self, name) is not None:
                    yield name, e, f"{prefix}{e}.{place}.{kind}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, e, key in self._keys(prefix):
            stacked = getattr(self, name)
            destination[key] = (stacked if keep_vars else stacked.detach())[e]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        slices: dict[str, dict[int, Tensor]] = {}
        known: set[str] = set()
        for name, e, key in self._keys(prefix):
            known.add(key)
            if key not in state_dict:
                missing_keys.append(key)
                continue
            value, wanted = state_dict[key], getattr(self, name).shape[1:]
            if value.shape != wanted:
                error_msgs.append(f"size mismatch for {key}: expected {tuple(wanted)}, got {tuple(value.shape)}")
                continue
            slices.setdefault(name, {})[e] = value
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, values in slices.items():
            stacked = getattr(self, name)
            if assign and len(values) == self.count:
                rows = torch.stack([values[e].detach() for e in range(self.count)])
                setattr(self, name, nn.Parameter(rows, requires_grad=stacked.requires_grad))
                continue
            with torch.no_grad():
                for e, value in values.items():
                    stacked[e].copy_(value)

    def extra_repr(self) -> str:
        (E, H, D), (_, O, _) = self.get_parameter("w1").shape, self.get_parameter("w2").shape
        return f"{D} -> {H} -> {O}, num_experts={E}, layer_norm={self.layernorm_weight is not None}"
