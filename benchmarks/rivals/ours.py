"""The project's own backends through its public functions."""

import torch
from torch import Tensor

from benchmarks.rivals.base import BALANCE_COEF, Z_COEF, Rival
from benchmarks.rivals.grouped import Stacked
from benchmarks.workloads import Problem, Workload
from llama_smop import functional
from llama_smop.ops import dispatch


class Ours(Stacked):
    """`functional.smop`, gated experts too."""

    def __init__(self, p: Problem, backend: str):
        super().__init__(p)
        self.backend, self.modality = backend, p.modality

    def forward(self, x: Tensor, losses: bool) -> tuple[Tensor, Tensor | None]:
        w = self.workload
        gated = w.expert == "swiglu"
        out = functional.smop(
            x,
            self.gate_weight,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            self.ln_weight,
            self.ln_bias,
            top_k=w.top_k,
            sharing=w.sharing,
            modality=self.modality,
            activation="silu" if gated else "relu",
            gated=gated,
            backend=self.backend,
        )
        loss = BALANCE_COEF * out.load_balancing_loss + Z_COEF * out.router_z_loss if losses else None
        return out.hidden_states, loss


def _why_not(backend: str):
    def why_not(w: Workload, device: torch.device) -> str | None:
        gated = w.expert == "swiglu"
        return dispatch.unsupported(backend, w.torch_dtype, device, w.top_k, w.total_experts, gated)

    return why_not


def rival(backend: str) -> Rival:
    """Ours on `backend`; the PyTorch backend reads segment bounds on the host, which a CUDA graph cannot capture."""
    modes = ("eager",) if backend == "torch" else ("eager", "graph")
    return Rival(f"ours_{backend}", f"ours, {backend}", "ours", lambda p: Ours(p, backend), _why_not(backend), modes)


RIVALS = tuple(rival(b) for b in ("cuda", "triton", "torch"))
