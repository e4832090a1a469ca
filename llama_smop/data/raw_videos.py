"""A folder of raw videos in any layout, and what is said in them: text files beside them, or a table."""

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_smop.data.auto_avsr import label_text
from llama_smop.data.lrs3 import LabelError, read_text

ENDINGS = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".mxf"),
}
NOT_IN_A_LABEL = re.compile(r"[,\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what a line of labels cannot hold


@dataclass(frozen=True)
class RawVideo:
    """One of the videos.

    source: its path below the folder. path: that of its crop below the data set. text: what is said, as in a label, or
    None where nothing says so.
    """

    source: str
    path: str
    text: str | None


def find_videos(
    root: str | os.PathLike,
    table: str | os.PathLike | None = None,
    *,
    lower: bool = True,
    without: Sequence[Path] = (),
) -> tuple[list[RawVideo], dict[str, str]]:
    """The videos below `root` by their endings, in order, hidden ones left aside, with their texts.

    Args:
        table: a CSV file with the texts, two fields a line, path and text (a first line `path,text` is skipped), or the
            five of a label file; paths are below `root`, with or without their endings. By default the text is read
            from NAME.txt beside NAME.mp4: its line that begins with "Text:", as in LRS3, or else all of it.
        without: folders not to look into.

    Returns:
        The videos, and for each one that cannot be told apart from another its path with the reason.

    Raises:
        LabelError: `root` is no folder; the table, or a text, cannot be read; the table names a video twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise LabelError(f"{root}: is no folder of videos")
    said = None if table is None else _read_table(Path(table))
    found: list[RawVideo] = []
    clashes: dict[str, str] = {}
    taken: dict[str, str] = {}
    for source in _walk(root, {path.resolve() for path in without}):
        stem = Path(source).with_suffix("").as_posix()
        path = NOT_IN_A_LABEL.sub("_", stem).lstrip() + ".mp4"
        if path in taken:
            clashes[source] = f"its crop would be that of {taken[path]}"
            continue
        taken[path] = source
        if said is None:
            beside = root / f"{stem}.txt"
            text = _said_in(read_text(beside, "text")) if beside.exists() else None
        else:
            text = said.get(source, said.get(stem))
        found.append(RawVideo(source, path, label_text(text, lower) or None if text is not None else None))
    return found, clashes


def _walk(root: Path, without: set[Path]) -> list[str]:
    """Relative paths; folders that links lead to are looked into once."""
    found, seen = [], set(without)
    for where, folders, names in os.walk(root, followlinks=True):
        real = Path(where).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(where).relative_to(root)
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in ENDINGS:
                found.append((below / name).as_posix())
    return found


def _said_in(content: str) -> str:
    for line in content.splitlines():
        if line.lstrip()[:5].lower() == "text:":
            return line.lstrip()[5:]
    return content


def _read_table(path: Path) -> dict[str, str]:
    """Texts by path."""
    texts: dict[str, str] = {}
    content = read_text(path, "table of texts")
    try:
        rows = list(csv.reader(io.StringIO(content), strict=True))
    except csv.Error as error:
        raise LabelError(f"{path}: is no CSV file ({error})") from None
    for number, row in enumerate(rows, start=1):
        if not any(field.strip() for field in row) or (number == 1 and row[0].strip().lower() == "path"):
            continue
        if len(row) not in (2, 5):
            raise LabelError(
                f"{path}: row {number}: expected path,text (a text with a comma in quotes) or the five fields of a "
                f"label, got {len(row)} fields"
            )
        name = row[0].strip() if len(row) == 2 else f"{row[0].strip()}/{row[1].strip()}"
        name = Path(name).as_posix()
        if name in texts:
            raise LabelError(f"{path}: row {number}: {name} has a text already")
        texts[name] = row[-1]
    return texts
