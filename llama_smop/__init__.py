"""Llama-SMoP: speech recognition that listens and reads lips, with a fast sparse mixture of projectors.

The projector and the operators need torch alone; the model, which needs transformers, is imported when asked for.
"""

from importlib import import_module

from llama_smop import functional
from llama_smop.functional import SMoPOutput
from llama_smop.projector import DenseProjector, SMoPProjector

__version__ = "0.1.0"

_MODELS = {
    "LlamaSmopConfig": "configuration_llama_smop",
    "LlamaSmopForConditionalGeneration": "modeling_llama_smop",
    "LlamaSmopProcessor": "processing_llama_smop",
}

__all__ = ["DenseProjector", "SMoPOutput", "SMoPProjector", "functional", *_MODELS]


def __getattr__(name: str):
    if name in _MODELS:
        return getattr(import_module(f"llama_smop.models.{_MODELS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
