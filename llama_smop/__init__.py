"""Llama-SMoP: speech recognition that listens and reads lips, with a fast sparse mixture of projectors.

The projector and the operators need only torch and numpy. The model, which needs transformers, is imported lazily;
transformers' Auto classes and pipelines know it as soon as both are imported (models/auto_classes.py).
"""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def _find_kernels() -> None:
    """Import the kernels from the folder beside this package: that is where a checkout has them."""
    package = Path(__file__).resolve().parent
    source = package.parent / "triton_kernels" / "__init__.py"
    if (package / "triton_kernels").is_dir() or not source.is_file():
        return
    name = f"{__name__}.triton_kernels"
    spec = spec_from_file_location(name, source, submodule_search_locations=[str(source.parent)])
    assert spec is not None and spec.loader is not None, source
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_find_kernels()

from llama_smop import functional  # noqa: E402
from llama_smop.functional import SMoPOutput  # noqa: E402
from llama_smop.models import auto_classes  # noqa: E402
from llama_smop.projector import DenseProjector, SMoPProjector  # noqa: E402

__version__ = "0.1.0"

_MODELS = {
    "LlamaSmopConfig": "configuration_llama_smop",
    "LlamaSmopForConditionalGeneration": "modeling_llama_smop",
    "LlamaSmopProcessor": "processing_llama_smop",
}

__all__ = ["DenseProjector", "SMoPOutput", "SMoPProjector", "functional", *_MODELS]


def __getattr__(name: str):
    if name in _MODELS:
        try:
            return getattr(import_module(f"llama_smop.models.{_MODELS[name]}"), name)
        except ModuleNotFoundError as error:
            from llama_smop.system.extras import remedy

            raise ImportError(f"{name}: {remedy(error.name or '')}", name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


auto_classes.watch()
