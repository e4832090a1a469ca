"""`clips.jsonl` of a generated corpus: a line, which is a JSON record, for each clip that is finished."""

import json
from pathlib import Path

JOURNAL = "clips.jsonl"
_FIELDS = {"index": int, "split": str, "path": str, "n_frames": int, "text": str, "words": list, "sha256": dict}


def read_journal(root: Path) -> list[dict]:
    """The records of the corpus in `root`; none without a journal. Lines that are not whole records are left out: a
    run that was killed cuts its last one.

    Raises:
        OSError: the journal cannot be read.
    """
    path = root / JOURNAL
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [record for record in map(_record, lines) if record is not None]


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in _FIELDS.items()):
        return None
    return record if all(_is_word(word) for word in record["words"]) else None


def _is_word(word) -> bool:
    """[the word, its start and its end in seconds]"""
    whole = isinstance(word, list) and len(word) == 3 and isinstance(word[0], str)
    return whole and all(isinstance(time, int | float) for time in word[1:])
