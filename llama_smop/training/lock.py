"""One process at a time in a folder."""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = "lock"


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder/lock`, which says who holds it.

    The lock is the system's, across the machines that share the file system: one whose process has ended, however it
    ended, holds no longer. It belongs to the process alone, not to those that it forks.

    Raises:
        ValueError: another process holds it; its number and machine are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = " ".join(file.read(200).split()) or "a process that has not said its name yet"
                raise ValueError(
                    f"{folder}: {what} is running in this folder, {holder}; wait for it, end it, or name another folder"
                ) from None
            logger.warning(
                "%s: this file system knows no locks (%s): see to it yourself that %s does not run here at the same "
                "time",
                *(folder, error.strerror, what),
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
