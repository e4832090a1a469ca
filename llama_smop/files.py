"""Files and folders that are never half-written: made aside, then put in place. What is not ours is never removed."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# What a rename answers where it cannot work: a mount point, another disk, a folder of somebody else's.
NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)

# --------------------------------------------------------------------------------------------------------------- files


def check_file(target: str | Path) -> Path:
    """The path that writing `target` will write, links followed; its folder is made.

    Raises:
        OSError: it is a folder, or cannot be written.
    """
    real = Path(os.path.realpath(target))
    if real.is_dir():
        raise IsADirectoryError(f"{target}: is a folder; name a file to write")
    real.parent.mkdir(parents=True, exist_ok=True)
    beside = not real.exists() or real.is_file()
    if not (beside and os.access(real.parent, os.W_OK | os.X_OK)) and not os.access(real, os.W_OK):
        raise PermissionError(f"{target}: cannot be written (no permission, or a read-only disk)")
    return real


def write_file(target: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file beside `target`, then put it in `target`'s place. A link stays, what it names is written;
    a device or a pipe is written as it is.

    Raises:
        OSError: `target` is a folder; the disk is full or not writable, and what was there before still is.
    """
    try:
        return _write_file(Path(target), check_file(target), write)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk does not say whose it is
            error.filename = str(target)
        raise


def _write_file(target: Path, real: Path, write: Callable[[Path], object]) -> Path:
    if real.exists() and (not real.is_file() or not os.access(real.parent, os.W_OK | os.X_OK)):
        write(real)
        return target
    aside = _beside(real, "writing")
    try:
        write(aside)
        try:
            os.replace(aside, real)
        except OSError as error:
            if error.errno not in NO_RENAME or not real.is_file():
                raise
            shutil.copyfile(aside, real)  # a file that is mounted by itself
    finally:
        remove(aside)
    return target


def write_text(target: str | Path, text: str) -> Path:
    return write_file(target, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_bytes(target: str | Path, content: bytes) -> Path:
    return write_file(target, lambda aside: aside.write_bytes(content))


def write_json(target: str | Path, content) -> Path:
    return write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path):
    """Raises ValueError: no JSON in the file, which is named."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, no JSON ({error})") from None


def read_record(path: Path, default, check: Callable[[Any], bool] = lambda content: True):
    """What a side record holds, `default` where there is none. One that is damaged, of another type than `default` or
    refused by `check` is set aside, which a warning says: it is not worth a training."""
    if not path.exists():
        return default
    try:
        content = read_json(path)
        if isinstance(content, type(default)) and check(content):
            return content
        reason = f"{path}: damaged, not what is written there"
    except ValueError as error:
        reason = str(error)
    aside = path.with_name(f"damaged-{path.name}")
    os.replace(path, aside)
    logger.warning("%s; set aside as %s", reason, aside.name)
    return default


# ------------------------------------------------------------------------------------------------------------- folders


def check_folder(target: str | Path, owned: Callable[[Path], set[str] | None]) -> Path:
    """The path that writing the folder `target` will write, links followed.

    owned: of a folder, the files in it (relative names) that may be replaced; None where it is none of ours.

    Raises:
        OSError: it is a file, is not empty and none of ours, or cannot be written.
    """
    real = Path(os.path.realpath(target))
    if real.exists() and not real.is_dir():
        raise NotADirectoryError(f"{target}: is a file; name a folder to write")
    if real.is_dir() and set(os.listdir(real)) - {"lost+found"} and owned(real) is None:
        raise FileExistsError(
            f"{target}: is not empty, and none of the folders that this command may replace; name a new or empty one"
        )
    there = next(folder for folder in (real, *real.parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there}: is a file; {target} cannot be made in it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: cannot be written (no permission, or a read-only disk)")
    return real


def write_folder(
    target: str | Path,
    write: Callable[[Path], object],
    owned: Callable[[Path], set[str] | None],
    first: str | None = None,
) -> Path:
    """Let `write` fill a new folder, then put it in `target`'s place. Files that were in `target` and not `owned` stay.

    Where a folder cannot be renamed (a mount point, a parent of somebody else's) its files are moved one by one, and
    `first` before all others: it tells a half-moved folder from a whole one.

    Raises:
        OSError: see `check_folder`; the disk is full, and what was there before still is.
    """
    real = check_folder(target, owned)
    with folder_aside(real) as aside:
        write(aside)
        before = owned(real) or set() if real.is_dir() else set()
        if aside.parent == real or not _swap(aside, real, before):
            new = move_into(aside, real, first)
            for name in before - set(new):
                remove(real / name)
    return Path(target)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A new folder on `target`'s disk, removed at the end: beside it, or in it where there is no room beside it."""
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(target, "writing")
    if target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK)):
        for left in target.glob(f".{target.name[:50]}.writing-*"):
            remove(left)
        aside = target / aside.name
    remove(aside)
    aside.mkdir()
    try:
        yield aside
    finally:
        remove(aside)


def move_into(source: Path, target: Path, first: str | None = None) -> list[str]:
    """Move every file of the folder `source` into the folder `target`, over those of the same name; the names."""
    names = sorted(_files(source), key=lambda name: (name != first, name))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(source / name, target / name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            write_file(target / name, lambda aside, file=source / name: shutil.copyfile(file, aside))
    return names


def _swap(aside: Path, target: Path, owned: Iterable[str]) -> bool:
    """Whether `aside` could take the place of `target`, with those files of `target` that are not `owned`."""
    if not target.exists():
        os.replace(aside, target)
        return True
    for name in _files(target) - set(owned) - _files(aside):
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        _link(target / name, aside / name)
    shutil.copymode(target, aside)
    old = _beside(target, "old")
    try:
        os.replace(target, old)  # a folder cannot be replaced in one step
    except OSError as error:
        if error.errno in NO_RENAME:
            return False
        raise
    try:
        os.replace(aside, target)
    except OSError:
        os.replace(old, target)
        raise
    remove(old)
    return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _files(folder: Path) -> set[str]:
    """Relative names of all files and links below a folder."""
    found = set()
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found |= {os.path.relpath(os.path.join(where, name), folder) for name in [*names, *links]}
    return found


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name[:50]}.{word}-{os.getpid()}")


def discard_unfinished(folder: Path) -> None:
    """Remove what interrupted writes of a process that has ended left in a folder, after putting back what they had
    moved out of the way."""
    for old in folder.glob(".*.old-*"):
        target = old.with_name(old.name[1:].rpartition(".old-")[0])
        if not target.exists():
            os.replace(old, target)
    for left in (*folder.glob(".*.writing-*"), *folder.glob(".*.old-*")):
        remove(left)


def remove(path: Path) -> None:
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
