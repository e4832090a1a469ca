"""Where the PTX interpreter is, so that kernels can be run on a machine without a GPU, as a GPU would be given them.

`LLAMA_SMOP_PTXRUN` names its folder; else `../shared/ptxrun`, the folder beside the checkout.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent


def folder() -> Path:
    return Path(os.environ.get("LLAMA_SMOP_PTXRUN") or REPOSITORY.parent / "shared" / "ptxrun")


def missing() -> str | None:
    """Why PTX cannot be run here, or None when it can."""
    if (folder() / "ptxrun" / "__init__.py").is_file():
        return None
    return f"no ptxrun in {folder()}; LLAMA_SMOP_PTXRUN names another place"


def load(name: str = "ptxrun") -> ModuleType:
    """The module `name` ("ptxrun", "ptxrun.triton_driver", "ptxrun.cuda") from that folder."""
    if str(folder()) not in sys.path:
        sys.path.insert(0, str(folder()))
    return importlib.import_module(name)
