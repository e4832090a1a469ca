"""Layers for `kernels.kernelize`: stateless modules whose `forward` takes the place of another module's.

`kernelize` checks that such a class has no constructor and no members of its own, and the replaced signature.
"""

from typing import Any

from torch import Tensor, nn

from llama_smop import projector
from llama_smop.functional import SMoPOutput
from llama_smop.integrations.transformers_experts import experts_forward


class SMoPProjector(nn.Module):
    """For a module with the attributes and the `forward` of `llama_smop.SMoPProjector`."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor, modality: Tensor | None = None, mask: Tensor | None = None) -> SMoPOutput:
        return projector.SMoPProjector.forward(self, x, modality, mask)


class Experts(nn.Module):
    """For a mixture of transformers with stacked expert weights: Mixtral, Qwen3-MoE, gpt-oss, …"""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
