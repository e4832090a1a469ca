"""An advisory lock on a folder."""

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
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock `folder/lock` as `what`; the file names the process that holds it.

    It is a POSIX record lock (`lockf`): it works across machines that share the file system, the system releases it
    when the process ends in any way, and forked children do not inherit it.

    Raises:
        ValueError: another process holds the lock; the message names its number and machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = " ".join(file.read(200).split()) or "a process that has not written its number yet"
                raise ValueError(
                    f"{folder}: {what} is running in this folder, {holder}; wait for it, end it, or name another folder"
                ) from None
            logger.warning(
                "%s: this file system does not support locks (%s): make sure that %s does not run here at the same "
                "time",
                *(folder, error.strerror, what),
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
