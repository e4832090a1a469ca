"""The JSON file of a run, one per device.

schema, kind ("cpu", "gpu", "peers", "data"), note?, environment, ceilings, workloads {key: sizes}, stages {name: …},
correctness [], predictions []?, techniques []?, timings [], memory [], kernels [], model [], skipped [],
data []? (kind "data" alone)
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

from benchmarks.workloads import Workload
from llama_smop.system import files

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent / "results"
LISTS = ("correctness", "predictions", "techniques", "timings", "memory", "kernels", "model", "skipped")


def new(kind: str) -> dict:
    return {"schema": SCHEMA, "kind": kind, "environment": {}, "ceilings": {}, "workloads": {}, "stages": {}} | {
        name: [] for name in LISTS
    }


def add(results: dict, found: dict, workload: Workload | None = None) -> None:
    """Append the records of a case to the results' lists."""
    for name in LISTS:
        results.setdefault(name, []).extend(found.get(name, ()))
    if workload is not None:
        results["workloads"][workload.key] = asdict(workload)


def load(path: Path) -> dict:
    """Raises ValueError: the file has another schema."""
    results = json.loads(Path(path).read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{Path(path).name} has schema {results.get('schema')}, expected {SCHEMA}; measure again")
    return results


def save(results: dict, path: Path) -> None:
    """Write atomically: a reader never sees half a file."""
    files.write_text(path, _dump(results) + "\n")


def _dump(results: dict) -> str:
    """Indented JSON with one line for each record of a list, so that a diff shows records."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(v) for v in value)
            text = f"[\n  {rows}\n ]"
        elif key == "workloads" and value:
            rows = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            text = f"{{\n  {rows}\n }}"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def slug(kind: str, environment: dict) -> str:
    """A file name for a device: gpu-nvidia-h200, cpu-amd-epyc-2-cores."""
    name = environment["device"] + (f" {environment['cores']} cores" if kind in ("cpu", "data") else "")
    return f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
