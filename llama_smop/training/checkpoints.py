"""Checkpoints of a training: written atomically, sealed with hashes, and read only when whole."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from llama_smop.models.model_folder import quietly
from llama_smop.models.seal import SEAL, is_whole, seal
from llama_smop.system import files

logger = logging.getLogger(__name__)

STAGING = ".writing"
DAMAGED = "damaged-"


@contextmanager
def atomic_save(trainer: Trainer) -> Iterator[Path]:
    """While open, the Trainer writes its checkpoint into a staging folder, which this yields. On exit the checkpoint is
    sealed and renamed into place, and the oldest ones are removed."""
    run = Path(trainer.args.output_dir)
    staging = run / STAGING
    trainer._get_output_dir = lambda trial: str(staging)
    try:
        with quietly():
            yield staging
    except (OSError, RuntimeError, SafetensorError) as error:  # how Python, torch and safetensors report a full disk
        reason = " ".join(str(error).split())
        raise OSError(f"{run}: a checkpoint could not be written ({reason}); those before it are whole") from error
    finally:
        del trainer._get_output_dir
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for folder in staging.glob("checkpoint-*"):
            seal(folder)
            target = run / folder.name
            files.remove(target)
            os.replace(folder, target)
        staging.rmdir()
        rotate_checkpoints(output_dir=str(run), save_total_limit=trainer.args.save_total_limit, use_mtime=False)
    trainer.accelerator.wait_for_everyone()


def whole(run: Path) -> Iterator[Path]:
    """The whole checkpoints under `run`, newest first; each damaged one is skipped with a warning."""
    for folder in sorted((p for p in run.glob("checkpoint-*") if _step(p)), key=_step, reverse=True):
        if is_whole(folder):
            yield folder
        else:
            logger.warning("%s is damaged (its files disagree with %s); trying the checkpoint before it", folder, SEAL)


def latest(run: Path) -> Path | None:
    return next(whole(run), None)


def set_aside_after(run: Path, start: Path | None) -> None:
    """Rename the checkpoints after `start`, which are damaged: the training that resumes at `start` writes these steps
    again, and damaged checkpoints must not count among those that are kept."""
    step = 0 if start is None else _step(start)
    for folder in list(run.glob("checkpoint-*")):
        if _step(folder) > step:
            aside = folder.with_name(DAMAGED + folder.name)
            files.remove(aside)
            folder.rename(aside)
            logger.warning("%s is renamed to %s", folder, aside.name)


def remove_all(run: Path) -> None:
    """Remove the checkpoints under `run`, also damaged ones, and nothing else."""
    for folder in (*run.glob("checkpoint-*"), *run.glob(f"{DAMAGED}checkpoint-*"), run / STAGING):
        if folder.name == STAGING or _step(folder.with_name(folder.name.removeprefix(DAMAGED))):
            files.remove(folder)


def _step(folder: Path) -> int:
    number = folder.name.split("-")[1]
    return int(number) if number.isdecimal() else 0


def discard_unfinished(out: Path) -> None:
    """Remove the unfinished files of interrupted writes from a run's folder."""
    files.remove(out / "checkpoints" / STAGING)
    files.discard_unfinished(out)
