"""What a backend computes, stated once, and the tuples that travel between operators and backends.

`backends.torch`, `backends.cuda` and `llama_smop.triton_kernels.projection` are backends. They trust what they are
given: operators check it, make tensors contiguous and make their device the current one.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Experts(NamedTuple):
    """Stacked parameters of X experts D → H → O. Biases may be None; so may LayerNorm's two, which may be float32.

    Of gated experts w1 and b1 hold 2·H rows: the gate's, then those that it opens for.
    """

    w1: Tensor  # (X, H, D)
    b1: Tensor | None  # (X, H)
    w2: Tensor  # (X, O, H)
    b2: Tensor | None  # (X, O)
    ln_weight: Tensor | None  # (X, O)
    ln_bias: Tensor | None  # (X, O)


class Schedule(NamedTuple):
    """The T·K choices in expert order."""

    order: Tensor  # (T·K,) int32; row r is choice order[r] = t·K + k; undefined past the last offset
    inverse: Tensor  # (T, K) int32, the row of each choice; −1 for a skipped one
    offs: Tensor  # (X,) int32, cumulative ends of the experts' rows


class Saved(NamedTuple):
    """What backward needs of the forward pass, rows in expert order. What was dropped or has no use is empty."""

    h: Tensor  # (T·K, H) after the activation
    pre: Tensor  # (T·K, H) before it, for gelu and silu; (T·K, 2·H) for gated experts
    z: Tensor  # (T·K, O) before LayerNorm
    mean: Tensor  # (T·K,) LayerNorm's statistics
    rstd: Tensor  # (T·K,)


class Backend(Protocol):
    """Plain contiguous tensors in and out. T tokens, K choices each, R routers, E experts a router, X experts in all.

    Router logits, gate weights, losses and statistics have `acc_dtype`; expert ids, counts and schedules are int32.
    """

    def unsupported(
        self, dtype: torch.dtype, device: torch.device, top_k: int, num_experts: int, gated: bool = False
    ) -> str | None:
        """One line on why these arguments cannot be served, or None. `gated`: experts with a gate."""
        ...

    def route_fwd(
        self,
        x: Tensor,  # (T, D)
        gate_weight: Tensor,  # (R, E, D)
        modality: Tensor | None,  # (T,) int32 in [0, R), None with one router
        mask: Tensor | None,  # (T,) bool
        top_k: int,
        num_experts: int,
        shared_experts: int = 0,
        ahead: Tensor | None = None,  # (X, …), read by the launch after these: may be brought into a cache meanwhile
    ) -> tuple[Tensor, ...]:
        """→ the nine tensors of `route.Routing`; with shared experts also the two more of `route.Routed`."""
        ...

    def route_bwd(
        self,
        x: Tensor,
        gate_weight: Tensor,
        modality: Tensor | None,
        mask: Tensor | None,
        logits: Tensor,
        weights: Tensor,
        experts: Tensor,
        counts: Tensor,
        dlogits: Tensor | None,
        dweights: Tensor | None,  # (T, K), or more columns, of which the first K are read
        dbalance: Tensor | None,
        dz: Tensor | None,
        need_dx: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """→ dx, dgate_weight."""
        ...

    def schedule(self, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """→ the tensors of `Schedule` for experts (T, K) int32; ids outside [0, X) skip the choice."""
        ...

    def expert_projection_fwd(
        self,
        x: Tensor,  # (T, D)
        weights: Tensor,  # (T, K)
        experts: Tensor,  # (T, K) int32
        schedule: Schedule,
        parameters: Experts,
        activation: str,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """→ y (T, O), then the tensors of `Saved`, None for those that have no use."""
        ...

    def expert_projection_bwd(
        self,
        dy: Tensor,  # (T, O)
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        schedule: Schedule,
        parameters: Experts,
        saved: Saved,  # an empty h or z is computed again
        activation: str,
        eps: float,
        need_dx: bool,
        need_dweights: bool,
        need_dparams: bool,
    ) -> tuple[Tensor | None, ...]:
        """→ dx, dweights, then the gradients of `Experts`, None for those that were not asked for."""
        ...

    def replayed(self, sequence: Callable[..., tuple]) -> Callable[..., tuple]:
        """The quickest form of a function that calls these and does nothing else: its first argument is a tensor."""
        ...

    def grouped_mm(
        self,
        a: Tensor,  # (M, K)
        b: Tensor,  # (G, K, N) or (K, N), a unit stride along one of the last two
        offs: Tensor,  # (G,) int32
        bias: Tensor | None,  # (G, N)
        activation: str | None,
    ) -> tuple[Tensor, Tensor]:
        """→ the product, and the pre-activation for gelu and silu (else empty)."""
        ...


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, router logits and gate weights: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_shared_experts(weights: Tensor, experts: Tensor, num_experts: int, shared: int) -> tuple[Tensor, Tensor]:
    """(weights, experts) with `shared` choices more for every real token, of weight 1: experts X, X + 1, …."""
    total, real = num_experts + shared, experts[:, :1] < num_experts
    ids = torch.arange(num_experts, total, dtype=torch.int32, device=experts.device)
    experts = torch.cat((experts, ids.expand(experts.shape[0], shared)), 1)
    return torch.cat((weights, real.to(weights.dtype).expand(-1, shared)), 1), torch.where(real, experts, total)
