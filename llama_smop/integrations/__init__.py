"""The operators inside other people's code: `replace_experts` for mixture modules, `register` for transformers."""

from llama_smop.integrations.replace_experts import Replacement, replace_experts
from llama_smop.integrations.transformers_experts import register

__all__ = ["Replacement", "register", "replace_experts"]
