"""Child processes that end when their parent does, and work shared out over them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL_S = 0.2


def exit_with_parent(parent: int) -> None:
    """Start a thread that ends this process with status 1 when it is no longer a child of process `parent`.

    So no child survives a parent that was killed. `parent` must be the parent's own `os.getpid()`: the parent may have
    ended before this call, and `os.getppid()` would then name another process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class WorkerLost(RuntimeError):
    """A worker process ended while it worked."""


def unordered(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    prepare: Callable[[], object] | None = None,
) -> Generator[Result, None, None]:
    """`function(task)` of every task, as they are done, by `workers` processes; by this one where `workers` is 0.

    prepare: called once in each worker. All three are pickled. An interrupt is for this process alone; the workers end
    with it, also where it is killed, and where the generator is closed.

    Raises:
        WorkerLost: a worker ended, as by a crash or for want of memory. What `function` raises.
    """
    if workers < 1:
        for task in tasks:
            yield function(task)
        return
    # Not forked: the caller may hold threads and locks of torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(os.getpid(), prepare))
    try:
        with _ignoring_interrupts():  # the workers inherit it
            jobs = [pool.submit(function, task) for task in tasks]
        for job in as_completed(jobs):
            yield job.result()
    except BrokenProcessPool:
        raise WorkerLost("a worker process ended") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(parent: int, prepare: Callable[[], object] | None) -> None:
    exit_with_parent(parent)
    if prepare is not None:
        prepare()


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python refuses signal handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
