"""Model folders and training checkpoints: written aside, sealed with hashes, read back only when whole."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging as transformers_logging

from llama_smop import files
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.seal import SEAL, is_whole, seal, write_sealed

logger = logging.getLogger(__name__)

STAGING = ".writing"
DAMAGED = "damaged-"


def save(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write a model folder; `weights` in place of the model's own, which may be sharded.

    Raises:
        OSError: see `seal.check_target`; a disk that is full, and the model that was there before still is.
    """

    def write(aside: Path) -> None:
        model.save_pretrained(aside, state_dict=weights)
        processor.save_pretrained(aside)

    with _quietly():
        return write_sealed(folder, write)


def load(
    folder: str | Path, device: str | torch.device | None = None
) -> tuple[LlamaSmopForConditionalGeneration, LlamaSmopProcessor]:
    """Model (in eval mode) and processor of a folder that `save` or a training run wrote.

    device: by default a GPU where there is one.

    Raises:
        ValueError: no such folder, no model in it, or weights that disagree with the configuration; one line.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no model here (config.json is missing); give the folder a training run wrote")
    if (folder / SEAL).is_file() and not is_whole(folder, ".safetensors"):
        raise ValueError(f"{folder}: the weights are not those that were saved ({SEAL} says so); copy it again")
    try:
        with _quietly():
            model = LlamaSmopForConditionalGeneration.from_pretrained(folder, local_files_only=True)
            processor = LlamaSmopProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers makes of a malformed file
        if str(error).startswith(f"{folder}: "):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder}: cannot be read: {reason[:300]}") from error
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars over the weights of even the smallest model, and its notes on sharding."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------- checkpoints of a training


@contextmanager
def publishing(trainer: Trainer) -> Iterator[Path]:
    """While open, the Trainer writes its checkpoint aside, into the folder that it gives; on leaving it is sealed and
    appears under its name."""
    run = Path(trainer.args.output_dir)
    staging = run / STAGING
    trainer._get_output_dir = lambda trial: str(staging)
    try:
        with _quietly():
            yield staging
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as Python, torch and safetensors say it
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
    """The whole checkpoints under `run`, newest first; a damaged one is named in a warning and passed over."""
    for folder in sorted((p for p in run.glob("checkpoint-*") if _step(p)), key=_step, reverse=True):
        if is_whole(folder):
            yield folder
        else:
            logger.warning("%s is damaged (its files disagree with %s); trying the checkpoint before it", folder, SEAL)


def latest(run: Path) -> Path | None:
    return next(whole(run), None)


def set_aside_after(run: Path, start: Path | None) -> None:
    """Rename the damaged checkpoints after the one that a training goes on from: it comes by there again, and they
    would count among those that are kept."""
    step = 0 if start is None else _step(start)
    for folder in list(run.glob("checkpoint-*")):
        if _step(folder) > step:
            aside = folder.with_name(DAMAGED + folder.name)
            files.remove(aside)
            folder.rename(aside)
            logger.warning("%s is kept as %s", folder, aside.name)


def remove_all(run: Path) -> None:
    """Remove the checkpoints under `run`, damaged ones too, and nothing else."""
    for folder in (*run.glob("checkpoint-*"), *run.glob(f"{DAMAGED}checkpoint-*"), run / STAGING):
        if folder.name == STAGING or _step(folder.with_name(folder.name.removeprefix(DAMAGED))):
            files.remove(folder)


def _step(folder: Path) -> int:
    number = folder.name.split("-")[1]
    return int(number) if number.isdecimal() else 0


def discard_unfinished(out: Path) -> None:
    """Remove what interrupted writes left in a run's folder."""
    files.remove(out / "checkpoints" / STAGING)
    files.discard_unfinished(out)
