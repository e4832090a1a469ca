"""What a long training meets and goes on from, up to a limit: clips that cannot be read, losses that are no number."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch.utils.data import Dataset

from llama_smop import files
from llama_smop.data.media import MediaError
from llama_smop.data.plan import Draw, DrawnClips

logger = logging.getLogger(__name__)


class ReplacedClips(Dataset):
    """`DrawnClips` in which a clip that cannot be read gives way to the one nearest in length, of the same shard where
    there are shards.

    Batches so keep their size and no step is left without data. The item says what was passed over under "bad_clips",
    {path: reason}.

    Raises:
        MediaError: more than `limit` clips in a row that cannot be read; with 0 the first.
    """

    def __init__(self, clips: DrawnClips, limit: int):
        self.clips, self.limit = clips, limit

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> dict:
        bad = {}
        for index in chain([draw.index], self.clips.source.nearest(draw.index)):
            try:
                return self.clips[replace(draw, index=index)] | {"bad_clips": bad}
            except MediaError as error:
                bad[error.path] = error.reason
                if len(bad) > self.limit:
                    raise
        raise ValueError(f"no clip can be read that could take the place of {next(iter(bad))}")


class Setbacks:
    """Counts setbacks, names them in warnings, and ends the training when there are too many.

    record: JSON file for the clips that could not be used, {path: reason}; None = not written.
    """

    def __init__(self, record: Path | None, max_bad_clips: int, max_bad_steps: int):
        self.record, self.max_bad_clips, self.max_bad_steps = record, max_bad_clips, max_bad_steps
        self.bad_clips: dict[str, str] = {}
        self.skipped_steps = 0
        self._in_a_row = 0

    def clips(self, bad: Mapping[str, str]) -> None:
        """Take note of clips that were passed over.

        Raises:
            ValueError: now more than `max_bad_clips` different ones.
        """
        new = {path: reason for path, reason in bad.items() if path not in self.bad_clips}
        if not new:
            return
        for path, reason in new.items():
            logger.warning("%s: %s; another clip takes its place", path, reason)
        self.bad_clips |= new
        if self.record is not None:
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
                "(run.max_bad_steps); the checkpoints hold the last good weights; try a lower optimizer.learning_rate"
            )
