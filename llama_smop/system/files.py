"""Atomic writes of files and folders: written beside the target, then renamed. Files of others are never removed."""

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

# Errors of a rename that cannot work: a mount point, another disk, a folder of another user.
NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)

# --------------------------------------------------------------------------------------------------------------- files


def check_file(target: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """The path that a write to `target` changes, links followed. Makes its folder.

    inputs: files that the same command reads.

    Raises:
        OSError: `target` is a folder or one of `inputs`, or cannot be written.
    """
    real = Path(os.path.realpath(target))
    if not real.exists() and os.path.exists(target):  # a pipe behind /dev/stdout or /dev/fd/63: its link names no file
        real = Path(target)
    if real.is_dir():
        raise IsADirectoryError(f"{target}: is a folder; name a file to write")
    if real.is_file() and any(os.path.isfile(path) and os.path.samefile(real, path) for path in inputs):
        raise FileExistsError(f"{target}: is read by this command and would be lost; name another file to write")
    _nearest(target, real.parent)
    real.parent.mkdir(parents=True, exist_ok=True)
    beside = not real.exists() or real.is_file()
    if not (beside and os.access(real.parent, os.W_OK | os.X_OK)) and not os.access(real, os.W_OK):
        raise PermissionError(f"{target}: cannot be written (no permission, or a read-only disk)")
    return real


def _nearest(target: str | Path, real: Path) -> Path:
    """The folder that exists, `real` or the nearest above it. Raises NotADirectoryError: a file is in the way."""
    there = next(folder for folder in (real, *real.parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there}: is a file; {target} cannot be made in it")
    return there


def check_suffix(target: str | os.PathLike, kind: str, *suffixes: str) -> None:
    """ValueError where a name says another format than is written, by which players and readers go.

    suffixes: those of the format; a name without one, as of a pipe, says nothing.
    """
    suffix = Path(target).suffix
    if suffix and suffix.lower() not in suffixes:
        remedy = Path(target).with_suffix(suffixes[0])
        raise ValueError(f"{target}: what is written is {kind}, whatever its name; name it {remedy}")


def write_file(target: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file beside `target`, then rename it to `target`. Links are followed; devices and pipes are
    written directly.

    Raises:
        OSError: `target` is a folder; or the disk is full or read-only, and the old content is still there.
    """
    try:
        return _write_file(Path(target), check_file(target), write)
    except OSError as error:
        if error.errno and error.filename is None:  # the error of a full disk has no file name
            error.filename = str(target)
        raise


def _write_file(target: Path, real: Path, write: Callable[[Path], object]) -> Path:
    if real.exists() and (not real.is_file() or real.is_symlink() or not os.access(real.parent, os.W_OK | os.X_OK)):
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
            shutil.copyfile(aside, real)  # a single file that is a mount point
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
    """Raises ValueError: the file, which the message names, is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, no JSON ({error})") from None


def read_record(path: Path, default, check: Callable[[Any], bool] = lambda content: True):
    """The content of an auxiliary JSON file, or `default` if it does not exist.

    A file that is damaged, has another type than `default` or fails `check` is renamed with a warning and counts as
    missing: it must not end a training.
    """
    if not path.exists():
        return default
    try:
        content = read_json(path)
        if isinstance(content, type(default)) and check(content):
            return content
        reason = f"{path}: damaged, other content than expected"
    except ValueError as error:
        reason = str(error)
    aside = path.with_name(f"damaged-{path.name}")
    os.replace(path, aside)
    logger.warning("%s; renamed to %s", reason, aside.name)
    return default


def claim(
    note: Path,
    settings: dict,
    what: str,
    ignored: Iterable[str] = (),
    upgrade: Callable[[dict], dict] = lambda noted: noted,
) -> None:
    """Reserve the folder of `note` for the result with these settings, which are noted as JSON; a resumed run passes.

    what: the kind of result, for messages. ignored: names that an empty folder may hold. upgrade: brings the note of an
    earlier version into the present form.

    Raises:
        ValueError: the folder holds a result of other settings, or other files.
    """
    folder = note.parent
    if note.exists():
        noted = upgrade(read_json(note))
        differing = [key for key in settings if noted.get(key) != settings[key]]
        if differing:
            raise ValueError(
                f"{folder}: holds a {what} with other settings ({', '.join(differing)}); choose another folder or "
                "delete it"
            )
    elif folder.is_dir() and set(os.listdir(folder)) - set(ignored):
        raise ValueError(f"{folder}: is not empty and holds no {what}; choose another folder")
    else:
        write_json(note, settings)


# ------------------------------------------------------------------------------------------------------------- folders


def check_folder(target: str | Path, owned: Callable[[Path], set[str] | None]) -> Path:
    """The path that a write to the folder `target` changes, links followed.

    owned: returns the files of a folder (relative names) that may be replaced; None if the folder is not ours.

    Raises:
        OSError: `target` is a file, is not empty and not ours, or cannot be written.
    """
    real = Path(os.path.realpath(target))
    if real.exists() and not real.is_dir():
        raise NotADirectoryError(f"{target}: is a file; name a folder to write")
    if real.is_dir() and set(os.listdir(real)) - {"lost+found"} and owned(real) is None:
        raise FileExistsError(
            f"{target}: is not empty, and not a folder that this command may replace; name a new or empty one"
        )
    there = _nearest(target, real)
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: cannot be written (no permission, or a read-only disk)")
    return real


def write_folder(
    target: str | Path,
    write: Callable[[Path], object],
    owned: Callable[[Path], set[str] | None],
    first: str | None = None,
) -> Path:
    """Let `write` fill a new folder, then rename it to `target`. Files in `target` that are not `owned` stay.

    If the folder cannot be renamed (a mount point, a parent of another user), its files are moved one by one. The file
    `first` is moved first; it distinguishes a partly moved folder from a whole one.

    Raises:
        OSError: see `check_folder`; or the disk is full, and the old content is still there.
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
    """A temporary folder on `target`'s disk: beside `target`, or in it if its parent cannot be written."""
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
    """Move every file of the folder `source` into `target`, over files of the same name. Returns their names."""
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
    """Replace `target` by `aside` plus the files of `target` that are not `owned`. False: it cannot be renamed."""
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
    """Remove the temporary files that writes of an ended process left in a folder. A target that was renamed away and
    not replaced is restored first."""
    for old in folder.glob(".*.old-*"):
        target = old.with_name(old.name[1:].rpartition(".old-")[0])
        if not target.exists():
            os.replace(old, target)
    for left in (*folder.glob(".*.writing-*"), *folder.glob(".*.old-*")):
        remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
