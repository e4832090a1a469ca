"""Is a backend right? The chain route → projection → loss → gradients through it, through `naive`, and compared.

The first use of a backend on a GPU, `llama-smop doctor` and the tests of the kernels share it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llama_smop.ops import checks, naive
from llama_smop.ops.backend import Backend, Experts, Saved, Schedule
from llama_smop.ops.checks import layout


@dataclass(frozen=True)
class Model:
    """What is compiled for: sizes, sharing, options. T and the routing are the input's."""

    D: int
    H: int
    O: int
    E: int
    K: int
    sharing: str = "DEDR"
    activation: str = "relu"
    layer_norm: bool = True
    biases: bool = True
    dtype: torch.dtype = torch.bfloat16
    layer_norm_dtype: torch.dtype | None = None
    shared: int = 0  # experts that every token goes through, the last of the stacked ones

    @property
    def routers(self) -> int:
        return layout(self.sharing, self.E)[0]

    @property
    def X(self) -> int:
        """Experts that tokens are routed to."""
        return layout(self.sharing, self.E)[1]


@dataclass
class Inputs:
    """A model's tensors, a batch of tokens, and the gradients that come back to each result. Unit scale."""

    x: Tensor
    modality: Tensor | None
    mask: Tensor | None
    gate_weight: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    dy: Tensor
    dlogits: Tensor
    dbalance: Tensor
    dz: Tensor

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.w1, self.b1, self.w2, self.b2, self.ln_weight, self.ln_bias

    def to(self, target: torch.device | str | torch.dtype) -> "Inputs":
        """On another device; or, for a dtype, every floating-point tensor in it."""
        moved = {}
        for field in fields(self):
            t = getattr(self, field.name)
            integer = isinstance(target, torch.dtype) and t is not None and not t.is_floating_point()
            moved[field.name] = t if t is None or integer else t.to(target)
        return Inputs(**moved)


def make(
    model: Model, tokens: int, seed: int = 0, skew: float = 0.0, masked: float = 0.0, video: float = 0.5
) -> Inputs:
    """Synthetic unit-scale tensors, exact in the model's dtype. `skew` draws every token to expert 0 of its router."""
    g = torch.Generator().manual_seed(seed)
    D, H, O, E, X, R = model.D, model.H, model.O, model.E, model.X + model.shared, model.routers
    F = 2 * H if model.activation in checks.GATED else H

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    def param(tensor: Tensor, wanted: bool = True, dtype: torch.dtype = model.dtype) -> Tensor | None:
        return tensor.to(dtype) if wanted else None

    x, gate = randn(tokens, D), randn(R, E, D, scale=D**-0.5)
    if skew:
        x[:, 0] = 1.0
        gate[:, 0, 0] = skew
    ln_dtype = model.layer_norm_dtype or model.dtype
    return Inputs(
        x=param(x),
        modality=(torch.rand(tokens, generator=g) < video).to(torch.int32) if R == 2 else None,
        mask=torch.rand(tokens, generator=g) >= masked,
        gate_weight=param(gate),
        w1=param(randn(X, F, D, scale=D**-0.5)),
        b1=param(randn(X, F, scale=0.5), model.biases),
        w2=param(randn(X, O, H, scale=H**-0.5)),
        b2=param(randn(X, O, scale=0.5), model.biases),
        ln_weight=param(1 + randn(X, O, scale=0.2), model.layer_norm, ln_dtype),
        ln_bias=param(randn(X, O, scale=0.5), model.layer_norm, ln_dtype),
        dy=param(randn(tokens, O)),
        dlogits=randn(tokens, E, scale=0.1),
        dbalance=torch.tensor(0.7),
        dz=torch.tensor(0.3),
    )


def through_backend(
    backend: Backend, model: Model, inputs: Inputs, *, need_dx: bool = True, recompute: str = ""
) -> dict[str, Tensor]:
    """Every result and gradient of the chain, by the interface functions, as the operators call them."""
    i, eps = inputs, 1e-5
    routing = backend.route_fwd(i.x, i.gate_weight, i.modality, i.mask, model.K, model.X, model.shared, i.w1)
    logits, weights, experts, counts, balance, z_loss, order, inverse, offs, *of_all = routing
    all_weights, all_experts = of_all or (weights, experts)
    schedule, parameters = Schedule(order, inverse, offs), Experts(*i.parameters())
    y, *kept = backend.expert_projection_fwd(i.x, all_weights, all_experts, schedule, parameters, model.activation, eps)
    saved = Saved(*(y.new_empty(0) if t is None else t for t in kept))
    if "h" in recompute:
        saved = saved._replace(h=y.new_empty(0), pre=y.new_empty(0))
    if "z" in recompute:
        saved = saved._replace(z=y.new_empty(0))
    dx, dweights, *dparams = backend.expert_projection_bwd(
        i.dy, i.x, all_weights, all_experts, schedule, parameters, saved, model.activation, eps, need_dx, True, True
    )
    dx_route, dgate = backend.route_bwd(
        i.x, i.gate_weight, i.modality, i.mask, logits, weights, experts, counts, i.dlogits, dweights, i.dbalance,
        i.dz, need_dx,
    )  # fmt: skip
    results = {
        "logits": logits, "weights": weights, "experts": experts, "counts": counts, "load_balancing_loss": balance,
        "router_z_loss": z_loss, "inverse": inverse, "offs": offs, "y": y, "dweights": dweights, "dgate": dgate,
    }  # fmt: skip
    results |= dict(zip(("all_weights", "all_experts"), of_all, strict=False))
    results |= dict(zip(("dw1", "db1", "dw2", "db2", "dln_weight", "dln_bias"), dparams, strict=True))
    if need_dx:
        results |= {"dx_projection": dx, "dx_route": dx_route}
    return {name: t.clone() for name, t in results.items() if t is not None}


def through_naive(model: Model, inputs: Inputs, experts: Tensor) -> dict[str, Tensor]:
    """The same names from the float64 loop and autograd, for the routing `experts`."""
    i = inputs.to(torch.float64)
    leaves = {f.name: getattr(i, f.name) for f in fields(i) if f.name.startswith(("gate", "w", "b", "ln"))}
    leaves = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    i = replace(i, **leaves)
    x_route, x_projection = (i.x.clone().requires_grad_() for _ in range(2))
    r = naive.route(x_route, i.gate_weight, i.modality, i.mask, model.K, model.X, experts)
    weights, chosen = r.weights, r.experts
    if model.shared:
        weights, chosen = naive.with_shared_experts(weights, chosen, model.X, model.shared)
    weights = weights.detach().requires_grad_()
    w1, b1, w2, b2, ln_weight, ln_bias = i.parameters()
    y = naive.expert_projection(x_projection, weights, chosen, w1, b1, w2, b2, ln_weight, ln_bias, model.activation)
    results = {
        "logits": r.logits, "weights": r.weights, "counts": r.counts, "load_balancing_loss": r.load_balancing_loss,
        "router_z_loss": r.router_z_loss, "y": y,
    }  # fmt: skip
    if model.shared:
        results["all_weights"] = weights.clone()
    wanted = {"dx_projection": x_projection, "dweights": weights}
    wanted |= {f"d{name}": t for name, t in leaves.items() if name != "gate_weight"}
    results |= _grads((y * i.dy).sum(), wanted)
    loss = (r.logits * i.dlogits).sum() + (r.weights * results["dweights"][:, : model.K]).sum()
    loss = loss + r.load_balancing_loss * i.dbalance + r.router_z_loss * i.dz
    results |= _grads(loss, {"dx_route": x_route, "dgate": i.gate_weight})
    return {name: t.detach() for name, t in results.items()}


def _grads(loss: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad:
        return {name: torch.zeros_like(t) for name, t in wanted.items()}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), grads, strict=True)}


def on_device(device: torch.device) -> AbstractContextManager:
    """Backends launch on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def faults(got: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor] | None) -> list[str]:
    """One line for each result that is wrong.

    exact: the same in float64. plain: by PyTorch in the dtype that is checked; twice its error is allowed, and a
    rounding of that dtype, since on few elements PyTorch may be lucky. Of PyTorch itself (None) four roundings are.
    """
    eps = max(torch.finfo(t.dtype).eps for t in got.values() if t.is_floating_point() and t.dim())
    found = []
    for name in ("experts", "counts", "inverse", "offs"):
        if name in exact and not torch.equal(got[name].cpu().long(), exact[name].cpu().long()):
            found.append(f"{name} differs from the definition's")
    for name, truth in exact.items():
        if not truth.is_floating_point():
            continue
        if got[name].shape != truth.shape:
            found.append(f"{name} has shape {tuple(got[name].shape)}, not {tuple(truth.shape)}")
            continue
        off, size = error(got[name], truth), error(truth, torch.zeros_like(truth))
        if plain is None:
            allowed = 4 * eps * size + 1e-5
        else:
            allowed = 2 * error(plain[name], truth) + torch.finfo(got[name].dtype).eps * size + 1e-5
        if off > allowed:
            found.append(f"{name} is off by {off:.1e}, allowed {allowed:.1e}")
    return found


def error(result: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference (the largest one is too much a matter of luck on few elements); a NaN counts
    as infinite, so an element that was never written is an infinite error."""
    if result.numel() == 0:
        return 0.0
    return (result.cpu().double() - exact.cpu().double()).square().mean().nan_to_num(nan=float("inf")).sqrt().item()
