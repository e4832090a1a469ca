"""Child processes that end when their parent does."""

import os
import threading
import time

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
