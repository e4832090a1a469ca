"""Rows sorted by expert and grouped matrix products: torch's own, and the grouped_gemm package's (MegaBlocks' product).

Everything round the two products is plain PyTorch: sort, gather, per-row bias and LayerNorm, weighted sum over K.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.base import Layer, Rival, activate, leaf, route_blocks
from benchmarks.workloads import Problem, Workload


class Stacked(Layer):
    """A layer that keeps its parameters stacked, as `Problem` does."""

    def __init__(self, p: Problem):
        super().__init__()
        self.workload = p.workload
        for name in Problem.PARAMETERS:
            self.register_parameter(name, leaf(getattr(p, name)))


def expert_order(experts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """order (T·K,), inverse (T·K,) and each expert's row count, without a host synchronisation."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = (flat[:, None] == torch.arange(total, device=flat.device)).sum(0)
    return order, order.argsort(), counts


def layer_norm_rows(z: Tensor, weight: Tensor | None, bias: Tensor | None, expert_of_row: Tensor) -> Tensor:
    """LayerNorm whose scale and shift are those of each row's expert."""
    if weight is None:
        return z
    return F.layer_norm(z, z.shape[-1:]) * weight[expert_of_row] + bias[expert_of_row]


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[t, k] · rows[t·K + k], summed in the weights' float32."""
    T, K = weights.shape
    return (rows.view(T, K, -1) * weights[..., None]).sum(1).to(rows.dtype)


class Grouped(Stacked):
    """`product(a (M, Kd), b (X, N, Kd), counts (X,))` is a @ b[e].t() for the rows of each expert."""

    @staticmethod
    def product(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        w = self.workload
        weights, experts, loss = route_blocks(x, self.gate_weight, w, losses)
        order, inverse, counts = expert_order(experts, w.total_experts)
        counts = self.prepare(counts)
        expert_of_row = experts.flatten()[order]
        h = self.product(x[order // w.top_k], self.w1, counts)
        h = activate(h if self.b1 is None else h + self.b1[expert_of_row], w)
        z = self.product(h, self.w2, counts)
        z = z if self.b2 is None else z + self.b2[expert_of_row]
        z = layer_norm_rows(z, self.ln_weight, self.ln_bias, expert_of_row)
        return combine(z[inverse], weights), loss

    def prepare(self, counts: Tensor) -> Tensor:
        return counts


class TorchGroupedMM(Grouped):
    @staticmethod
    def product(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(a, b.transpose(1, 2), offs=counts)

    def prepare(self, counts: Tensor) -> Tensor:
        return counts.cumsum(0, dtype=torch.int32)


class GroupedGemmPackage(Grouped):
    @staticmethod
    def product(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        from grouped_gemm.ops import gmm

        return gmm(a, b, counts, trans_b=True)

    def prepare(self, counts: Tensor) -> Tensor:
        return counts.cpu()  # the package takes the counts on the host


def _no_torch_grouped_mm(w: Workload, device: torch.device) -> str | None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if device.type == "cuda" and w.dtype != "bfloat16":
        return f"torch's grouped_mm on a GPU takes bfloat16, not {w.dtype}"
    return None


def _no_grouped_gemm(w: Workload, device: torch.device) -> str | None:
    if importlib.util.find_spec("grouped_gemm") is None:
        return "the package grouped_gemm (MegaBlocks' grouped product) is not installed"
    if device.type != "cuda" or w.dtype != "bfloat16":
        return "grouped_gemm needs a CUDA device and bfloat16"
    return None


TORCH = Rival(
    "grouped_mm",
    "torch grouped_mm",
    "peer",
    TorchGroupedMM,
    _no_torch_grouped_mm,
    modes=("eager", "graph", "compiled"),
)
PACKAGE = Rival("grouped_gemm", "grouped_gemm (MegaBlocks)", "peer", GroupedGemmPackage, _no_grouped_gemm)
