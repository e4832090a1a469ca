"""The seal of a folder that this package wrote: the SHA-256 of every file, which shows damage."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from llama_smop.system import files

logger = logging.getLogger(__name__)

SEAL = "sha256.json"
TRAINER_STATE = "trainer_state.json"  # transformers' name; marks a checkpoint that training resumes from
CARD = "README.md"  # the hub's name of a model card
# The card holds its own hash: whether somebody edited it shows in any folder, and on the hub.
_MARK = "<!-- Written by llama-smop. Edit it freely: an edited card is not overwritten. sha256 {} -->\n"


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file; to be called when all files are written."""
    hashes = {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.write_json(folder / SEAL, hashes)


def renew(folder: Path, written: Iterable[str]) -> None:
    """Update the seal of a folder, if it has one, after the files `written` were added and others removed."""
    hashes = read(folder)
    if hashes is None:
        return
    hashes |= {name: _sha256(folder / name) for name in written if name != SEAL and (folder / name).is_file()}
    files.write_json(folder / SEAL, {name: digest for name, digest in hashes.items() if (folder / name).is_file()})


def mark_card(text: str) -> str:
    """The text of a model card with its mark, by which `is_edited` knows it."""
    text = text.rstrip("\n") + "\n\n"
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def is_edited(card: Path) -> bool:
    """Whether a model card is there that this package did not write as it stands."""
    if not card.exists():
        return False
    try:
        text = card.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return True
    mark = re.search(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{64})") + r"\Z", text)
    return mark is None or hashlib.sha256(text[: mark.start()].encode()).hexdigest() != mark[1]


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model's configuration and weights, by which a result names the model that it was measured on."""
    config = files.read_json(folder / "config.json")
    known = {name: value for name, value in config.items() if name != "transformers_version"}
    parts = [json.dumps(known, sort_keys=True), *(_sha256(file) for file in sorted(folder.glob("*.safetensors")))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_whole(folder: Path, suffix: str = "") -> bool:
    """Whether every file, or every one of that suffix, is there with the hash it was sealed with; a model card may be
    edited."""
    hashes = read(folder)
    if hashes is None:
        return False
    hashes = {folder / name: digest for name, digest in hashes.items() if name.endswith(suffix) and name != CARD}
    return all(file.is_file() and _sha256(file) == digest for file, digest in hashes.items())


def owned(folder: Path) -> set[str] | None:
    """The files of a sealed folder that its seal names, but for an edited model card, and the seal; None where there is
    no seal that can be read."""
    hashes = read(folder)
    if hashes is None:
        return None
    inside = {name for name in hashes if not os.path.isabs(name) and ".." not in Path(name).parts}
    edited = {CARD} if is_edited(folder / CARD) else set()
    return {name for name in inside - edited if (folder / name).is_file()} | {SEAL}


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
    folder that was there before stay, and so does a model card that somebody edited.

    Raises:
        OSError: see `check_target`; a disk that is full, and what was there before still is.
    """

    def sealed(aside: Path) -> None:
        write(aside)
        if is_edited(Path(folder) / CARD):
            files.remove(aside / CARD)
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
