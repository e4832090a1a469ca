"""transformers' experts interface: `smop` (the best backend) and `smop_torch`.

After `register()`, `model.set_experts_implementation("smop")` runs every Hugging Face mixture with stacked expert
weights on our grouped GEMM, forward and backward: gated or plain, with and without bias, transposed or not. How gate
and up are laid out is the model's own affair (`_apply_gate`). Expert ids ≥ the number of experts skip their choice.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_smop import functional
from llama_smop.ops import dispatch
from llama_smop.ops.expert_projection import schedule
from llama_smop.ops.operator import autocast_dtype

IMPLEMENTATIONS = {"smop": "auto", "smop_torch": "torch"}


def register() -> None:
    """Make `smop` and `smop_torch` known to transformers (5.17 or newer). Calling it again changes nothing."""
    from transformers.integrations.moe import ExpertsInterface

    for name, backend in IMPLEMENTATIONS.items():
        ExpertsInterface.register(name, partial(experts_forward, backend=backend))


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Σ_k top_k_weights[t, k] · expert[top_k_index[t, k]](hidden_states[t]).

    Args:
        self: an experts module of transformers, see its `use_experts_implementation`.
        hidden_states: (T, D).  top_k_index: (T, K) integer, ids ≥ num_experts are skipped.  top_k_weights: (T, K).

    Returns:
        (T, D) in hidden_states' dtype.
    """
    (T, K), D = top_k_index.shape, hidden_states.shape[-1]
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up_weight, down_weight = _as_in_out(self, up_name), _as_in_out(self, "down_proj")
    backend = dispatch.resolve(backend, autocast_dtype(up_weight), hidden_states.device, K, self.num_experts)
    order, inverse, offs = schedule(top_k_index.clamp(max=self.num_experts), self.num_experts, backend)

    # Rows past offs[-1] belong to skipped choices: any row may stand there, grouped_mm neither reads nor returns it.
    choice = order.long().clamp(0, max(T * K - 1, 0))
    rows = _Rows.apply(hidden_states.to(up_weight.dtype), choice // K, inverse)
    h = functional.grouped_mm(rows, up_weight, offs, bias=_bias(self, up_name), backend=backend)
    h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    out = functional.grouped_mm(h, down_weight, offs, bias=_bias(self, "down_proj"), backend=backend)

    weights = torch.where(inverse >= 0, top_k_weights, 0)
    chosen = _Rows.apply(out, inverse.clamp(min=0).long().view(-1), choice[:, None]).view(T, K, D)
    return (chosen * weights[..., None]).sum(1).to(hidden_states.dtype)


class _Rows(torch.autograd.Function):
    """`source[index]`, where `uses` (rows of source, n) says which results came of each row, −1 for none.

    So the backward is a gather and a sum of n, not a scatter: quick on a CPU, free of atomics on a GPU.
    """

    @staticmethod
    def forward(source: Tensor, index: Tensor, uses: Tensor) -> Tensor:
        return source.index_select(0, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (uses,) = ctx.saved_tensors
        parts = grad.index_select(0, uses.clamp(min=0).long().view(-1)).view(*uses.shape, -1)
        return parts.masked_fill((uses < 0)[..., None], 0.0).sum(1), None, None


def _as_in_out(experts: nn.Module, name: str) -> Tensor:
    """The stacked weight as (num_experts, in, out)."""
    weight = getattr(experts, name)
    return weight if experts.is_transposed else weight.transpose(1, 2)


def _bias(experts: nn.Module, name: str) -> Tensor | None:
    return getattr(experts, f"{name}_bias") if experts.has_bias else None
