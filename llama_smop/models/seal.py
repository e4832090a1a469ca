"""The seal of a folder that this package wrote: the SHA-256 of every file, which shows damage."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from llama_smop import files

logger = logging.getLogger(__name__)

SEAL = "sha256.json"
TRAINER_STATE = "trainer_state.json"  # transformers' name; marks a checkpoint that training resumes from


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file; to be called when all files are written."""
    hashes = {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.write_json(folder / SEAL, hashes)


def renew(folder: Path, written: Iterable[str]) -> None:
    """Update the seal of a folder, if it has one, after the files `written` were added and others removed."""
    hashes = read(folder)
    if hashes is None:
        return
    hashes |= {name: _sha256(folder / name) for name in written if name != SEAL}
    files.write_json(folder / SEAL, {name: digest for name, digest in hashes.items() if (folder / name).is_file()})


def is_whole(folder: Path, suffix: str = "") -> bool:
    """Whether every file, or every one of that suffix, is there with the hash it was sealed with."""
    hashes = read(folder)
    if hashes is None:
        return False
    hashes = {folder / name: digest for name, digest in hashes.items() if name.endswith(suffix)}
    return all(file.is_file() and _sha256(file) == digest for file, digest in hashes.items())


def owned(folder: Path) -> set[str] | None:
    """The files of a sealed folder that its seal names, and the seal; None where there is no seal that can be read."""
    hashes = read(folder)
    if hashes is None:
        return None
    inside = {name for name in hashes if not os.path.isabs(name) and ".." not in Path(name).parts}
    return {name for name in inside if (folder / name).is_file()} | {SEAL}


def read(folder: Path) -> dict[str, str] | None:
    """The hashes by name; None where there is no seal, or one that cannot be read, which a warning says."""
    if not (folder / SEAL).is_file():
        return None
    try:
        hashes = files.read_json(folder / SEAL)
    except (OSError, ValueError) as error:
        logger.warning("%s", error)
        return None
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        logger.warning("%s: damaged, no hashes by file name", folder / SEAL)
        return None
    return hashes


def write_sealed(folder: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a new folder, seal it, and put it in the place of `folder`. Files that others put into a sealed
    folder that was there before stay.

    Raises:
        OSError: see `check_target`; a disk that is full, and what was there before still is.
    """

    def sealed(aside: Path) -> None:
        write(aside)
        seal(aside)

    check_target(folder)
    try:
        return files.write_folder(folder, sealed, owned, first=SEAL)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{folder}: could not be saved ({reason}); what was there before still is") from error


def check_target(folder: str | Path) -> None:
    """Check that a sealed folder may be written there.

    Raises:
        OSError: it is a file, not writable, a training's checkpoint, or neither empty nor sealed.
    """
    if (files.check_folder(folder, owned) / TRAINER_STATE).exists():
        raise FileExistsError(f"{folder}: is a checkpoint of a training; name a new or empty folder")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
