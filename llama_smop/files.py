"""Files and folders that are never half-written: made aside, then renamed into place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_aside(target: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` make a file or a folder beside `target`, then put it in `target`'s place.

    Raises:
        OSError: the disk is full or not writable; what was at `target` before is still there.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("writing", "old"))
    remove(aside)
    try:
        write(aside)
        if target.is_dir():  # a folder cannot be replaced in one step
            os.replace(target, old)
        os.replace(aside, target)
        remove(old)
    finally:
        remove(aside)
    return target


def write_text(target: str | Path, text: str) -> Path:
    return write_aside(target, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(target: str | Path, content) -> Path:
    return write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
