"""Read other projects' checkpoints without running code in them."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class Inert:
    """Stub of a class that fairseq pickles beside its tensors: accepts any arguments and state, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


# The classes that fairseq checkpoints name; all others are refused.
STUBS = [
    (Inert, "fairseq.data.dictionary.Dictionary"),
    (Inert, "numpy.core.multiarray.scalar"),
    (Inert, "numpy._core.multiarray.scalar"),
    (Inert, "numpy.dtype"),
    argparse.Namespace,
]
PICKLES = (".pt", ".pth", ".ckpt", ".bin")


def load_checkpoint(path: str | Path) -> Any:
    """The content of a .safetensors, .pt, .pth, .ckpt or .bin file, tensors on the CPU; no code in it is run.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, a truncated one, or a pickle that asks for
            anything but tensors, plain containers and the stubs above.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in PICKLES:
            with torch.serialization.safe_globals(STUBS):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for a damaged pickle
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: truncated or damaged ({reason}); fetch the file again") from None
    raise ValueError(
        f"{path}: expected a {', '.join((*PICKLES, '.safetensors'))} file, got {path.suffix or 'no suffix'}"
    )


def state_dict_of(checkpoint: Any, path: str | Path) -> dict[str, Tensor]:
    """The flat state dict inside: itself, or under "model" (fairseq) or "state_dict" (Lightning, whose keys may begin
    with "model.").

    Raises:
        ValueError: no tensors found.
    """
    for key in ("state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict) or not any(isinstance(v, Tensor) for v in checkpoint.values()):
        raise ValueError(f"{path}: holds no state dict (names with tensors)")
    nameless = [key for key, value in checkpoint.items() if isinstance(value, Tensor) and not isinstance(key, str)]
    if nameless:
        raise ValueError(f"{path}: holds no state dict: a tensor is named {nameless[0]!r}, which is not text")
    state = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if all(k.startswith("model.") for k in state):
        state = {k.removeprefix("model."): v for k, v in state.items()}
    return state


def _refusal(path: Path, error: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", error) or re.search(r"`([\w.]+)`", error)
    what = f"names {found.group(1)}, which is not a tensor" if found else "is damaged or holds more than tensors"
    return f"{path}: {what}; refused, as loading it could run code. Ask for the weights as .safetensors"
