"""Fault tolerance: unusable clips are replaced and steps without a finite loss are skipped, each up to a limit."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch.utils.data import Dataset

from llama_smop.data.media import MediaError
from llama_smop.data.training_plan import Draw, DrawnClips
from llama_smop.system import files

logger = logging.getLogger(__name__)

STEPS = "skipped_steps.json"


class ReplacedClips(Dataset):
    """`DrawnClips` that replaces an unusable clip by the one nearest in length, in the same shard if there are shards.

    So batches keep their size. The item names the replaced clips under "bad_clips", {path or id: reason}.

    unfit: called with a clip's audio samples, video frames, text and compression rate (None = the model's only one);
        returns why the model cannot take it, or None.

    Raises:
        MediaError: more than `limit` unusable clips in a row.
    """

    def __init__(self, clips: DrawnClips, limit: int, unfit: Callable[..., str | None] = lambda *_: None):
        self.clips, self.limit, self.unfit = clips, limit, unfit

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> dict:
        bad = {}
        for index in chain([draw.index], self.clips.source.nearest(draw.index)):
            try:
                item = self.clips[replace(draw, index=index)]
                samples, frames = (None if item[s] is None else len(item[s]) for s in ("audio", "video"))
                reason = self.unfit(samples, frames, item["text"], draw.rate)
                if reason is not None:
                    raise MediaError(item["id"], reason)
                return item | {"bad_clips": bad}
            except MediaError as error:
                bad[error.path] = error.reason
                if len(bad) > self.limit:
                    raise
        raise ValueError(f"{next(iter(bad))} is unusable, and so is every clip that could replace it")


def _is_text(value) -> bool:
    return isinstance(value, str)


class Setbacks:
    """Counts unusable clips and skipped steps, warns of each, and ends the training when there are too many.

    record: JSON file of the unusable clips, {path: reason}. None: neither read nor written.
    """

    def __init__(self, record: Path | None, max_bad_clips: int, max_bad_steps: int):
        self.record, self.max_bad_clips, self.max_bad_steps = record, max_bad_clips, max_bad_steps
        self.bad_clips: dict[str, str] = {}
        self.skipped_steps = 0
        self._in_a_row = 0

    def restore(self, checkpoint: str | Path | None, fresh: bool) -> None:
        """Restore the counts of a run that resumes at `checkpoint`, if any. `fresh`: delete the record instead."""
        if self.record is not None and self.record.exists():
            if fresh:
                self.record.unlink()
            else:
                self.bad_clips = files.read_record(self.record, {}, lambda clips: all(map(_is_text, clips.values())))
        steps = None if checkpoint is None else Path(checkpoint, STEPS)
        if steps is not None and steps.exists():
            saved = files.read_json(steps)
            self.skipped_steps, self._in_a_row = saved["skipped"], saved["in_a_row"]

    def save(self, checkpoint: Path) -> None:
        """Write the counts of skipped steps into a checkpoint's folder. The clips are in `record` already."""
        files.write_json(checkpoint / STEPS, {"skipped": self.skipped_steps, "in_a_row": self._in_a_row})

    def record_clips(self, bad: Mapping[str, str]) -> None:
        """Count clips that were replaced.

        Raises:
            ValueError: more than `max_bad_clips` different clips so far.
        """
        if not bad:
            return
        new = {path: reason for path, reason in bad.items() if path not in self.bad_clips}
        for path, reason in new.items():
            logger.warning("%s: %s; another clip replaces it", path, reason)
        self.bad_clips |= new
        if new and self.record is not None:
            files.write_json(self.record, self.bad_clips)
        if len(self.bad_clips) > self.max_bad_clips:
            path, reason = list(self.bad_clips.items())[-1]
            raise ValueError(
                f"{len(self.bad_clips)} clips cannot be used, data.max_bad_clips allows {self.max_bad_clips}; the "
                f"newest is {path}: {reason}"
            )

    def record_step(self, number: int, finite: bool) -> None:
        """Count step `number`, whose loss and gradient were `finite` or not.

        Raises:
            RuntimeError: `max_bad_steps` steps in a row were not finite.
        """
        if finite:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.skipped_steps += 1
        logger.warning("step %d skipped: its loss or gradient is not a finite number", number)
        if self._in_a_row >= self.max_bad_steps:
            raise RuntimeError(
                f"stopped at step {number}: loss or gradient was not a finite number {self._in_a_row} steps in a row "
                "(run.max_bad_steps); the checkpoints before it are good: the same command resumes at the newest; "
                "it may set a lower optimizer.learning_rate"
            )
