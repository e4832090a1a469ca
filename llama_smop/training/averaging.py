"""The mean of a training's last checkpoints: often a better model than the last of them."""

import logging
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from llama_smop import files
from llama_smop.models import seal
from llama_smop.training import checkpoints

logger = logging.getLogger(__name__)

# Of a checkpoint, what only a training that goes on can use.
TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin")
SOURCES = "averaged_from.json"


def newest(run: str | Path, last: int) -> list[Path]:
    """The newest `last` whole checkpoints of a run, newest first; fewer where there are fewer, which a warning says."""
    found = list(islice(checkpoints.whole(Path(run) / "checkpoints"), last))
    if len(found) < last:
        logger.warning("%s has %d whole checkpoints, not the %d asked for", run, len(found), last)
    return found


def average(checkpoints: Sequence[Path], to: str | Path) -> Path:
    """Write the mean of checkpoints of one training, newest first, as a model folder `to`, aside and sealed.

    Floating-point tensors are averaged in float64 and keep their dtype; whole numbers and everything that is no weight
    come from the newest. The checkpoints' names are in `to/averaged_from.json`.

    Raises:
        ValueError: no checkpoint, or weights of different names, shapes or dtypes; one line.
        OSError: no place for a model (see `seal.check_target`).
    """
    seal.check_target(to)
    if not checkpoints:
        raise ValueError("there is no whole checkpoint to average")

    def write(aside: Path) -> None:
        ignored = shutil.ignore_patterns(SAFE_WEIGHTS_NAME, seal.SEAL, *TRAINING_STATE)
        shutil.copytree(checkpoints[0], aside, ignore=ignored, dirs_exist_ok=True)
        weights = _mean([folder / SAFE_WEIGHTS_NAME for folder in checkpoints])
        save_file(weights, aside / SAFE_WEIGHTS_NAME, {"format": "pt"})
        files.write_json(aside / SOURCES, [folder.name for folder in checkpoints])

    return seal.write_sealed(to, write)


def _mean(paths: list[Path]) -> dict[str, torch.Tensor]:
    """One tensor after the other: no more than one model and one tensor in memory."""
    sources = [safe_open(path, "pt") for path in paths]
    names = [set(source.keys()) for source in sources]
    for path, own in zip(paths, names, strict=True):
        if own != names[0]:
            differing = ", ".join(sorted(own ^ names[0])[:3])
            raise ValueError(f"{path}: its weights are not those of {paths[0]} ({differing}); average one training's")
    mean = {}
    for name in sorted(names[0]):
        newest = mean[name] = sources[0].get_tensor(name)
        total = newest.double() if newest.is_floating_point() else None
        for path, source in zip(paths[1:], sources[1:], strict=True):
            value = source.get_tensor(name)
            if (value.shape, value.dtype) != (newest.shape, newest.dtype):
                raise ValueError(
                    f"{path}: {name} is {tuple(value.shape)} {value.dtype}, in {paths[0]} {tuple(newest.shape)} "
                    f"{newest.dtype}; average one training's"
                )
            if total is not None:
                total += value
        if total is not None:
            mean[name] = (total / len(paths)).to(newest.dtype)
    return mean
