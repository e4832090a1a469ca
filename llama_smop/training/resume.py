"""Finds the checkpoint to resume at, on rank 0, and broadcasts it to all ranks."""

import os
import platform
import time
import uuid
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from llama_smop.system import files
from llama_smop.training import checkpoints
from llama_smop.training.config import TrainConfig
from llama_smop.training.record import last_start

SHARED_FOLDER_TIMEOUT_S = 60  # network file systems may show late what another machine wrote


def starting_point(out: Path, config: TrainConfig, resume: bool, args: TrainingArguments, steps: int) -> str | None:
    """The newest whole checkpoint under `out`, or None. Without `resume` all checkpoints are removed.

    steps: the steps of the whole training as it is configured now.

    Raises:
        ValueError: the epochs are those of the last start, but give another number of steps now.
    """
    run, latest = out / "checkpoints", None
    if args.process_index == 0:
        if not resume:
            checkpoints.remove_all(run)
        latest = checkpoints.latest(run)
        if latest is not None:
            _check_length(out, config, steps)
        checkpoints.set_aside_after(run, latest)
    (latest,) = broadcast_object_list([None if latest is None else str(latest)])
    return latest


def _check_length(out: Path, config: TrainConfig, steps: int) -> None:
    start, epochs = last_start(out), config.optimizer.epochs
    before = None if start is None else start.get("steps")
    if before in (None, steps) or epochs is None or epochs != start.get("epochs"):
        return
    raise ValueError(
        f"{out} was planned as {before} steps, and {epochs:g} epochs are {steps} now: the number of processes, the "
        "batches or the data have changed; give the number of steps with --set optimizer.epochs=null "
        f"--set optimizer.steps={before}, or start again with --no-resume"
    )


def check_shared(out: Path, args: TrainingArguments) -> None:
    """Raises ValueError: a machine of the training does not see the folder that rank 0 writes."""
    if args.world_size <= int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
        return
    (name,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    mark = out / name
    if args.process_index == 0:
        files.write_text(mark, "")
    args.distributed_state.wait_for_everyone()
    end = time.monotonic() + SHARED_FOLDER_TIMEOUT_S
    while not mark.exists() and time.monotonic() < end:
        time.sleep(1)
    without = {host for host in gather_object([None if mark.exists() else platform.node()]) if host is not None}
    if args.process_index == 0:
        files.remove(mark)
    if without:
        raise ValueError(f"{out} must be the same folder on all machines, but is not on {', '.join(without)}")
