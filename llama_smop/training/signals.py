"""SIGTERM and SIGHUP, by which a job is told to end: a training saves at its next step first."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from transformers import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0  # SLURM and torchrun both hand on one signal: a second within this time is the first


class Stopped(SystemExit):
    """A training was told to end, has saved, and ends the process with a shell's status of that signal: 143, 129."""

    def __init__(self, number: signal.Signals):
        super().__init__(128 + number)


class StopRequest(TrainerCallback):
    """While open (`with`), the first signal is noted; at the end of the step the training saves and stops. A second
    one ends the process at once. A signal that was ignored at the start (nohup) still is.

    asked: the signal that came, to this process. agreed: one came to some process of the training, which all of them
    learn at the same step (`SmopTrainer`).
    """

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.agreed = False
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self):
        for number in _ours():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def check(self, state: TrainerState) -> None:
        """Raises Stopped: the training stopped before its last step because it was told to."""
        if not self.agreed or state.global_step >= state.max_steps:
            return
        number = self.asked or signal.SIGTERM
        if state.is_world_process_zero:
            logger.warning(
                "%s: stopped and saved at step %d of %d; the same command goes on",
                *(number.name, state.global_step, state.max_steps),
            )
        raise Stopped(number)


@contextmanager
def raised() -> Iterator[None]:
    """While open, these signals raise Stopped where the program is, so that it can end what it has started."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number))

    before = {number: signal.signal(number, end) for number in _ours()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ours() -> list[signal.Signals]:
    """Those that nobody has taken or ignored; none outside the main thread, which alone gets them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]


def spare_worker(number: int) -> None:
    """For a data worker, to which the batch system sends the signal as well: the first is its trainer's to answer."""

    def let_pass(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, let_pass)
