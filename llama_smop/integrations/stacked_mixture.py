"""`StackedMixture`: the module that takes a mixture's place, with its children, settings and state-dict keys."""

from inspect import isfunction
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama_smop import functional
from llama_smop.integrations.mixture_parts import Expert, Parts
from llama_smop.ops.router_losses import aux_losses

# transformers' Trainer spares from weight decay by these names what it spared as a bias or a LayerNorm before.
NAMES = ("w1", "bias1", "w2", "bias2", "layernorm_weight", "layernorm_bias")  # in the order of smop's arguments
# accelerate looks for a weight that is not there by the name of its parameter, and has it by that of each expert's.
OFFLOADED = (
    "the weights of experts that replace_experts replaced cannot be offloaded by accelerate; give the mixture a device "
    "in device_map, or undo() the replacement first"
)


class Settings(NamedTuple):
    """How the parts are put together; what structure does not say is found by trying."""

    top_k: int
    activation: str
    gate_last: bool = False  # the second half of the first product is the gate
    normalize_weights: bool = True
    weight_scale: float = 1.0
    jitter: float = 0.0
    pads: bool = False  # frames that fill no token are padded, not dropped
    logits: bool = True  # returned beside the output
    aux: tuple[str, float, float] | None = None  # `get_aux_loss`: form and weights of the balance and the z-loss


class StackedMixture(nn.Module):
    """A mixture on stacked parameters, with the original's names: its router, and `StackedExperts` where its list was.

    forward(hidden_states (..., D)) -> (output (..., O), router_logits (tokens, E)), both in hidden_states' dtype, or
    the output alone, as the original has it. Frames (B, F, D / k) are first stacked by k, where the original does so.
    """

    def __init__(self, original: nn.Module, parts: Parts, settings: Settings, backend: str, recompute: str | int):
        super().__init__()
        for name, value in vars(original).items():  # plain settings that other code may read: top_k, num_experts, …
            if not name.startswith("_") and isinstance(value, int | float | str | None):
                setattr(self, name, value)
        self.parts, self.settings, self.backend, self.recompute = parts, settings, backend, recompute
        self.top_k, self.original_class = settings.top_k, type(original)
        self._losses: tuple[Tensor, Tensor] | None = None
        modules = {f"{parts.experts}.{e}": m for e, m in enumerate(getattr(original, parts.experts))}
        if parts.shared:
            modules[parts.shared] = getattr(original, parts.shared)
        stack = StackedExperts(modules, parts)
        instead: dict[str | None, nn.Module] = {parts.experts: stack}
        if parts.shared:
            instead[parts.shared] = InTheStack(stack, len(modules) - 1)
        for name, child in original.named_children():
            setattr(self, name, instead.get(name, child))
        self.train(original.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            known = self.__dict__
            if name == "get_aux_loss" and "settings" in known and known["settings"].aux:
                return self._aux_loss
            method = getattr(known.get("original_class"), name, None)  # one that reads its settings alone
            if name.startswith("_") or not isfunction(method):
                raise
            return MethodType(method, self)

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        p, s = self.parts, self.settings
        x = hidden_states
        if p.front:
            front: Any = getattr(self, p.front)
            x = front(x.transpose(1, 2)).transpose(1, 2)
        experts: StackedExperts = getattr(self, p.experts)
        if experts.w1.is_meta and not x.is_meta:
            raise ValueError(OFFLOADED)
        x = _stacked_frames(x, experts.in_features, s.pads)
        if p.norm:
            norm: Any = getattr(self, p.norm)
            x = norm(x)
        router: Any = getattr(self, p.router)
        gate, logits = None, None
        jitter = s.jitter if self.training else 0.0
        if isinstance(router, nn.Linear) and router.bias is None and not jitter:
            gate = router.weight[None]
        else:
            logits = router(x)
            if jitter:
                flat = logits.flatten(0, -2)
                logits = (flat * torch.empty_like(flat).uniform_(1 - jitter, 1 + jitter)).view(logits.shape)
        out = functional.smop(
            x, gate, *experts.arguments(s.gate_last), top_k=self.top_k, sharing="JEJR", activation=s.activation,
            gated=p.expert.gated, shared_experts=int(p.shared is not None), normalize_weights=s.normalize_weights,
            weight_scale=s.weight_scale, router_logits=logits, eps=p.expert.eps or 1e-5, recompute=self.recompute,
            backend=self.backend,
        )  # fmt: skip
        assert out.router_logits is not None and out.expert_indices is not None
        if s.aux:
            routed = out.router_logits.flatten(0, -2), out.expert_indices.flatten(0, -2)
            self._losses = aux_losses(*routed, None, None, 1, balance=s.aux[0]) if self.training else None
        y = out.hidden_states
        return (y, out.router_logits.flatten(0, -2).to(y.dtype)) if s.logits else y

    def _aux_loss(self) -> Tensor:
        """The auxiliary loss of the last forward in training, as the original weights it; 0 where there was none."""
        if self._losses is None or self.settings.aux is None:
            return torch.zeros((), device=getattr(self, self.parts.experts).w1.device)
        (_, balance, z), losses = self.settings.aux, self._losses
        return balance * losses[0] + z * losses[1]

    def __getstate__(self) -> dict:  # copies and pickles take no losses along: these hold a graph
        return self.__dict__ | {"_losses": None}

    def copy_into(self, original: nn.Module) -> None:
        """Write the present weights, with their device, dtype and what is frozen, into the module replaced."""
        for name, child in self.named_children():
            if isinstance(child, StackedExperts):
                child.copy_into(original)
            elif name != self.parts.shared:
                setattr(original, name, child)
        original.train(self.training)

    def extra_repr(self) -> str:
        shown = {n: v for n, v in self.settings._asdict().items() if n in ("top_k", "activation")}
        return ", ".join([*(f"{n}={v}" for n, v in shown.items()), f"backend={self.backend}"])


def _stacked_frames(x: Tensor, width: int, pads: bool) -> Tensor:
    """(B, F, width / k) → (B, tokens, width), k neighbouring frames a token."""
    if x.shape[-1] == width or width % x.shape[-1] or x.dim() != 3:
        return x
    k, (B, F, _) = width // x.shape[-1], x.shape
    if pads and F % k:
        x = torch.nn.functional.pad(x, (0, 0, 0, k - F % k))
    tokens = x.shape[1] // k
    return x[:, : tokens * k].reshape(B, tokens, width)


class StackedExperts(nn.Module):
    """Parameters of all experts (`NAMES`), a shared one last, saved and loaded under each expert's own keys."""

    stacked_parameters = True  # for `weight_decay`: the first dimension counts experts

    def __init__(self, modules: dict[str, nn.Module], parts: Parts):
        super().__init__()
        self.name, self.owners, self.expert = parts.experts, tuple(modules), parts.expert
        for name in NAMES:
            self.register_parameter(name, None)
        for name, places in _places(self.expert).items():
            slices: list[Any] = []
            for module in modules.values():
                layers = [getattr(module.get_submodule(layer), kind) for layer, kind in places]
                slices.append(None if layers[0] is None else torch.cat([p.detach() for p in layers]))
            if slices[0] is not None:
                first = getattr(next(iter(modules.values())).get_submodule(places[0][0]), places[0][1])
                setattr(self, name, nn.Parameter(torch.stack(slices), requires_grad=first.requires_grad))

    @property
    def in_features(self) -> int:
        return self.get_parameter("w1").shape[2]

    def arguments(self, gate_last: bool) -> list[Any]:
        """In smop's order, gate rows first."""
        parameters = [getattr(self, name) for name in NAMES]
        if gate_last:
            half = parameters[0].shape[1] // 2
            parameters[:2] = (None if p is None else p.roll(half, 1) for p in parameters[:2])
        return parameters

    def copy_into(self, original: nn.Module) -> None:
        for e, owner in enumerate(self.owners):
            for name, layer, kind, rows in self._slices():
                stacked = self.get_parameter(name)
                own = nn.Parameter(stacked.detach()[e, rows].clone(), requires_grad=stacked.requires_grad)
                setattr(original.get_submodule(f"{owner}.{layer}"), kind, own)

    def _slices(self) -> list[tuple[str, str, str, slice]]:
        """(parameter, layer, the layer's parameter, rows of an expert) in the order of an expert's own state dict."""
        found = []
        for name, places in _places(self.expert).items():
            stacked = getattr(self, name)
            if stacked is not None:
                rows = stacked.shape[1] // len(places)
                found += [(name, *place, slice(i * rows, (i + 1) * rows)) for i, place in enumerate(places)]
        order = (*self.expert.first, self.expert.second, self.expert.norm)
        return sorted(found, key=lambda s: (order.index(s[1]), s[2] == "bias"))

    def _in_the_list(self) -> dict[int, str]:
        """{expert: what its keys begin with}, without a shared one, which saves and loads itself."""
        own = f"{self.name}."
        return {e: owner.removeprefix(own) + "." for e, owner in enumerate(self.owners) if owner.startswith(own)}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._save(destination, prefix, keep_vars, self._in_the_list())

    def _save(self, destination, prefix, keep_vars, owners: dict[int, str]) -> None:
        for e, owner in owners.items():
            for name, layer, kind, rows in self._slices():
                stacked = getattr(self, name)
                destination[f"{prefix}{owner}{layer}.{kind}"] = (stacked if keep_vars else stacked.detach())[e, rows]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._load(state_dict, prefix, *args, owners=self._in_the_list())

    def _load(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs, *,
        owners: dict[int, str],
    ) -> None:  # fmt: skip
        values: dict[str, dict[tuple[int, int], Tensor]] = {}
        known: set[str] = set()
        for e, owner in owners.items():
            for name, layer, kind, rows in self._slices():
                key = f"{prefix}{owner}{layer}.{kind}"
                known.add(key)
                if key not in state_dict:
                    missing_keys.append(key)
                    continue
                value, wanted = state_dict[key], getattr(self, name)[e, rows].shape
                if value.shape != wanted:
                    error_msgs.append(f"size mismatch for {key}: expected {tuple(wanted)}, got {tuple(value.shape)}")
                    continue
                values.setdefault(name, {})[e, rows.start] = value
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, found in values.items():
            stacked, parts = getattr(self, name), len(_places(self.expert)[name])
            if assign and len(found) == len(self.owners) * parts:
                rows = stacked.shape[1] // parts
                made = torch.stack([
                    torch.cat([found[e, i * rows].detach() for i in range(parts)]) for e in range(len(self.owners))
                ])  # fmt: skip
                setattr(self, name, nn.Parameter(made, requires_grad=stacked.requires_grad))
                continue
            with torch.no_grad():
                for (e, start), value in found.items():
                    stacked[e, start : start + len(value)].copy_(value)

    def extra_repr(self) -> str:
        (X, _, D), (_, O, H) = self.get_parameter("w1").shape, self.get_parameter("w2").shape
        return f"{D} -> {H} -> {O}, num_experts={X}, layer_norm={self.layernorm_weight is not None}"


def _places(expert: Expert) -> dict[str, list[tuple[str, str]]]:
    """Stacked parameter -> the (layer, parameter) of an expert that its rows come from."""
    places = {
        "w1": [(layer, "weight") for layer in expert.first],
        "bias1": [(layer, "bias") for layer in expert.first],
        "w2": [(expert.second, "weight")],
        "bias2": [(expert.second, "bias")],
    }
    norm = expert.norm
    return places | (
        {} if norm is None else {"layernorm_weight": [(norm, "weight")], "layernorm_bias": [(norm, "bias")]}
    )


class InTheStack(nn.Module):
    """Where the shared expert was: saves and loads its rows of `StackedExperts` under the keys that they had."""

    def __init__(self, stack: "StackedExperts", row: int):
        super().__init__()
        self._stack, self.row = (stack,), row  # in a tuple: not a child of this module too

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._stack[0]._save(destination, prefix, keep_vars, {self.row: ""})

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._stack[0]._load(state_dict, prefix, *args, owners={self.row: ""})
