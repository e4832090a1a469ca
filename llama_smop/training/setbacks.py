"""What a long training meets and goes on from, up to a limit: clips that cannot be used, losses that are no number."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch.utils.data import Dataset

from llama_smop import files
from llama_smop.data.media import MediaError
from llama_smop.data.training_plan import Draw, DrawnClips

logger = logging.getLogger(__name__)

STEPS = "skipped_steps.json"


class ReplacedClips(Dataset):
    """`DrawnClips` in which a clip that cannot be used gives way to the one nearest in length, of the same shard where
    there are shards.

    Batches so keep their size and no step is left without data. The item says what was passed over under "bad_clips",
    {path or id: reason}.

    unfit: says why the model cannot take a clip, or None: called with its audio samples, video frames and text.

    Raises:
        MediaError: more than `limit` clips in a row that cannot be used; with 0 the first.
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
                reason = self.unfit(samples, frames, item["text"])
                if reason is not None:
                    raise MediaError(item["id"], reason)
                return item | {"bad_clips": bad}
            except MediaError as error:
                bad[error.path] = error.reason
                if len(bad) > self.limit:
                    raise
        raise ValueError(f"no clip can be used that could take the place of {next(iter(bad))}")


def _is_text(value) -> bool:
    return isinstance(value, str)


class Setbacks:
    """Counts setbacks, names them in warnings, and ends the training when there are too many.

    record: JSON file of the clips that could not be used, {path: reason}; None = neither read nor written.
    """

    def __init__(self, record: Path | None, max_bad_clips: int, max_bad_steps: int):
        self.record, self.max_bad_clips, self.max_bad_steps = record, max_bad_clips, max_bad_steps
        self.bad_clips: dict[str, str] = {}
        self.skipped_steps = 0
        self._in_a_row = 0

    def begin(self, checkpoint: str | Path | None, fresh: bool) -> None:
        """Remember what was met before this start, which goes on from `checkpoint` if there is one; `fresh`: forget."""
        if self.record is not None and self.record.exists():
            if fresh:
                self.record.unlink()
            else:
                self.bad_clips = files.read_record(self.record, {}, lambda clips: all(map(_is_text, clips.values())))
        steps = None if checkpoint is None else Path(checkpoint, STEPS)
        if steps is not None and steps.exists():
            kept = files.read_json(steps)
            self.skipped_steps, self._in_a_row = kept["skipped"], kept["in_a_row"]

    def keep(self, checkpoint: Path) -> None:
        """Put the steps that were skipped so far into a checkpoint's folder; the clips have their record."""
        files.write_json(checkpoint / STEPS, {"skipped": self.skipped_steps, "in_a_row": self._in_a_row})

    def clips(self, bad: Mapping[str, str]) -> None:
        """Take note of clips that were passed over.

        Raises:
            ValueError: by now more than `max_bad_clips` different ones.
        """
        if not bad:
            return
        new = {path: reason for path, reason in bad.items() if path not in self.bad_clips}
        for path, reason in new.items():
            logger.warning("%s: %s; another clip takes its place", path, reason)
        self.bad_clips |= new
        if new and self.record is not None:
            files.write_json(self.record, self.bad_clips)
        if len(self.bad_clips) > self.max_bad_clips:
            path, reason = list(self.bad_clips.items())[-1]
            raise ValueError(
                f"{len(self.bad_clips)} clips cannot be used, data.max_bad_clips allows {self.max_bad_clips}; the "
                f"newest is {path}: {reason}"
            )

    def step(self, number: int, finite: bool) -> None:
        """Take note of whether the loss and the gradient of step `number` were finite.

        Raises:
            RuntimeError: `max_bad_steps` in a row were not.
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
                "(run.max_bad_steps); the checkpoints before it are good: the same command goes on from the newest and "
                "takes a lower optimizer.learning_rate"
            )
