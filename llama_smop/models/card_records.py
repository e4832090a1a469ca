"""What a model folder notes for its card: how it was trained, and the word error rates that it reached.

Each note names the weights that it is of. A note of other weights counts for nothing.
"""

import math
from pathlib import Path
from typing import Any

from llama_smop.models import seal
from llama_smop.models.rates import rate_parsed, rate_text
from llama_smop.models.units import MODALITIES
from llama_smop.system import files

TRAINING, EVALUATION, CONVERSION = "training.json", "evaluation.json", "conversion.json"
ROWS = "rows of `llama-smop evaluate --json`"
FIELDS = {
    **dict.fromkeys(("corpus", "labels", "modality", "model_sha256"), str),
    **dict.fromkeys(("clips", "words", "beams", "substitutions", "deletions", "insertions"), int),
    "snr": int | float | None,
    "noise": str | None,
    "rate": str | None,
}
NEWER = {"rate": None}  # fields that earlier versions' rows lack


def write_training(folder: Path, facts: dict) -> None:
    """Note how the weights in a model folder were trained: facts by name, "name" being the model's."""
    files.write_json(folder / TRAINING, facts | {"model_sha256": seal.fingerprint(folder)})


def read_training(folder: Path) -> dict:
    """What `write_training` noted, if it is of the weights that are there now; else nothing."""
    facts = read_note(folder / TRAINING)
    return facts if facts and facts.get("model_sha256") == seal.fingerprint(folder) else {}


def add_results(folder: Path, records: Any, origin: str | Path) -> None:
    """Note the rows of `llama-smop evaluate --json` in a model folder, in place of earlier rows of these conditions.

    Those of pictures made worse on purpose are left aside.

    Raises:
        ValueError: rows of another model, or none; one line that starts with `origin`.
    """
    whole = [record for record in records if not _degraded(record)] if isinstance(records, list) else []
    rows = [_row(record, origin) for record in whole]
    if not rows:
        raise ValueError(f"{origin}: holds no {ROWS}")
    own = seal.fingerprint(folder)
    if any(row["model_sha256"] != own for row in rows):
        raise ValueError(
            f"{origin}: was measured with other weights or settings than those in {folder}; evaluate this model"
        )
    earlier = {_condition(row): row for row in read_results(folder)}
    files.write_json(folder / EVALUATION, list((earlier | {_condition(row): row for row in rows}).values()))


def read_results(folder: Path) -> list[dict]:
    """The rows that `add_results` noted and that are of the weights that are there now."""
    file = folder / EVALUATION
    if not file.is_file():
        return []
    try:
        records = files.read_json(file)
        rows = [_row(record, file) for record in records] if isinstance(records, list) else []
    except ValueError:  # a strange file must not end a save
        return []
    own = seal.fingerprint(folder)
    return [row for row in rows if row["model_sha256"] == own]


def read_note(file: Path) -> dict:
    """The content of a JSON file that is an object; else nothing."""
    try:
        content = files.read_json(file) if file.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _row(record: Any, origin: str | Path) -> dict:
    """The fields of a row that a card needs, checked; `wer` as the counts give it."""
    if not isinstance(record, dict):
        raise ValueError(f"{origin}: holds no {ROWS}")
    record = NEWER | record
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise ValueError(
            f"{origin}: does not say {', '.join(missing)}; measure again with this version's evaluate --json"
        )
    row = {name: record[name] for name in FIELDS}
    wrong = [name for name, value in row.items() if not isinstance(value, FIELDS[name]) or isinstance(value, bool)]
    wrong += [name for name, value in row.items() if isinstance(value, int | float) and not math.isfinite(value)]
    wrong += [name for name, value in row.items() if isinstance(value, int) and value < 0 and name != "snr"]
    wrong += ["modality"] if row["modality"] not in MODALITIES else []
    wrong += ["words"] if row["words"] == 0 else []
    wrong += ["rate"] if row["rate"] is not None and not _is_rate(row["rate"]) else []
    if wrong:
        raise ValueError(f"{origin}: holds a row whose {wrong[0]} is {row[wrong[0]]!r:.60}")
    return row | {"wer": (row["substitutions"] + row["deletions"] + row["insertions"]) / row["words"]}


def _is_rate(text: Any) -> bool:
    try:
        return rate_text(rate_parsed(text)) == text
    except (AttributeError, ValueError):
        return False


def _degraded(record: Any) -> bool:
    return isinstance(record, dict) and record.get("degradation") is not None


def _condition(row: dict) -> tuple:
    return tuple(row[name] for name in ("corpus", "labels", "modality", "rate", "snr", "noise", "beams"))
