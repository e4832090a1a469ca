"""Averages the weights of a training's last checkpoints, which often gives a better model than the last one."""

import logging
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from llama_smop.models import model_folder, seal
from llama_smop.models.former_names import present_name
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.system import files
from llama_smop.training import checkpoints
from llama_smop.training.summary import training_facts

logger = logging.getLogger(__name__)

# Files of a checkpoint that only a resumed training needs.
TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin")
SOURCES = "averaged_from.json"


def newest(run: str | Path, last: int) -> list[Path]:
    """The newest `last` whole checkpoints of a run, newest first; a warning says if there are fewer."""
    found = list(islice(checkpoints.whole(Path(run) / "checkpoints"), last))
    if len(found) < last:
        logger.warning("%s has %d whole checkpoints, not the %d asked for", run, len(found), last)
    return found


def average(checkpoints: Sequence[Path], to: str | Path, run: Path) -> Path:
    """Write the mean of checkpoints of the training in `run`, newest first, as a sealed model folder `to`, atomically.

    Floating-point tensors are averaged in float64 and keep their dtype. Integer tensors and the other files come from
    the newest checkpoint. `to/averaged_from.json` lists the checkpoints' names.

    Raises:
        ValueError: no checkpoint, or weights of different names, shapes or dtypes; one line.
        OSError: `to` cannot be written (see `seal.check_target`).
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
        facts = training_facts(run, len(checkpoints))
        model_folder.describe(LlamaSmopForConditionalGeneration, aside, Path(to).name, facts)

    return seal.write_sealed(to, write)


def _mean(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Tensor by tensor, so that memory holds one model and one tensor at most."""
    sources = [safe_open(path, "pt") for path in paths]
    # A training that an earlier version began has checkpoints with names of both.
    saved = [{present_name(name): name for name in source.keys()} for source in sources]  # noqa: SIM118
    names = [set(own) for own in saved]
    for path, own in zip(paths, names, strict=True):
        if own != names[0]:
            differing = ", ".join(sorted(own ^ names[0])[:3])
            raise ValueError(
                f"{path}: its weights are not those of {paths[0]} ({differing}); average checkpoints of one training"
            )
    mean = {}
    for name in sorted(names[0]):
        newest = mean[name] = sources[0].get_tensor(saved[0][name])
        total = newest.double() if newest.is_floating_point() else None
        for path, source, own in zip(paths[1:], sources[1:], saved[1:], strict=True):
            value = source.get_tensor(own[name])
            if (value.shape, value.dtype) != (newest.shape, newest.dtype):
                raise ValueError(
                    f"{path}: {name} is {tuple(value.shape)} {value.dtype}, in {paths[0]} {tuple(newest.shape)} "
                    f"{newest.dtype}; average checkpoints of one training"
                )
            if total is not None:
                total += value
        if total is not None:
            mean[name] = (total / len(paths)).to(newest.dtype)
    return mean
