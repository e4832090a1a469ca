"""Reading tests/golden: tensors and the JSON beside them."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and notes of tests/golden/{name}.safetensors and .json."""
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())
