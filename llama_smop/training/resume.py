"""Where a training goes on from, and whether it can: found by the first process, told to all of them."""

import os
import platform
import time
import uuid
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from llama_smop import files
from llama_smop.training import checkpoints
from llama_smop.training.config import TrainConfig
from llama_smop.training.record import last_start

PATIENCE_S = 60  # with file systems that tell late what another machine wrote


def starting_point(out: Path, config: TrainConfig, resume: bool, args: TrainingArguments, steps: int) -> str | None:
    """The newest whole checkpoint under `out`, None to start at the beginning; without `resume` all are removed.

    steps: of the whole training, as it is configured now.

    Raises:
        ValueError: they are not those of the last start, though the epochs are.
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
        "batches or the data have changed; say how many steps it shall have in all, with --set optimizer.epochs=null "
        f"--set optimizer.steps={before}, or train anew with --no-resume"
    )


def check_shared(out: Path, args: TrainingArguments) -> None:
    """Raises ValueError: a machine that takes part does not see the folder that the first process writes."""
    if args.world_size <= int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
        return
    (name,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    mark = out / name
    if args.process_index == 0:
        files.write_text(mark, "")
    args.distributed_state.wait_for_everyone()
    end = time.monotonic() + PATIENCE_S
    while not mark.exists() and time.monotonic() < end:
        time.sleep(1)
    blind = {host for host in gather_object([None if mark.exists() else platform.node()]) if host is not None}
    if args.process_index == 0:
        files.remove(mark)
    if blind:
        raise ValueError(f"{out} is not the same folder on all machines, which it must be: not on {', '.join(blind)}")
