"""Graceful stop on SIGTERM and SIGHUP: a training saves a checkpoint at its next step, then exits."""

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
DUPLICATE_S = 1.0  # SLURM and torchrun both forward a signal: one that arrives again this soon is a duplicate


class Stopped(SystemExit):
    """A training was stopped by a signal and has saved. The exit status is the shell's for that signal: 143 or 129."""

    def __init__(self, number: signal.Signals):
        super().__init__(128 + number)


class StopRequest(TrainerCallback):
    """A context manager that handles the signals. After the first one the training saves and stops at the end of its
    step. A second one ends the process at once. A signal that was ignored before (nohup) stays ignored.

    received: the signal that this process received. agreed: some process of the training has received one; all
    processes learn it at the same step (`SmopTrainer`).
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.agreed = False
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self):
        for number in _unhandled_signals():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > DUPLICATE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def check(self, state: TrainerState) -> None:
        """Raises Stopped: a signal stopped the training before its last step."""
        if not self.agreed or state.global_step >= state.max_steps:
            return
        number = self.received or signal.SIGTERM
        if state.is_world_process_zero:
            logger.warning(
                "%s: stopped and saved at step %d of %d; the same command resumes",
                *(number.name, state.global_step, state.max_steps),
            )
        raise Stopped(number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While open, a signal raises Stopped in the main thread, so that the program can end its child processes."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number))

    before = {number: signal.signal(number, end) for number in _unhandled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unhandled_signals() -> list[signal.Signals]:
    """The signals with the default handler; none outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]


def ignore_first_signal(worker: int) -> None:
    """A `worker_init_fn`. Batch systems signal data workers too; a worker ignores the first signal."""

    def ignore(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, ignore)
