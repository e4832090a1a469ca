"""Runs a grid: one child process for each unfinished cell, several at a time."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from llama_smop.ablation.grid import Cell, GridConfig, ScoreSection, cells, read_grid
from llama_smop.data.lrs3 import read_labels
from llama_smop.data.media import read_audio
from llama_smop.data.synthetic.corpus import GRID, make_corpus
from llama_smop.evaluation.wer import guess_per_slot
from llama_smop.reports.ablation.page import check_page, write_page
from llama_smop.system import files
from llama_smop.system.lock import folder_lock
from llama_smop.training.config import TrainConfig
from llama_smop.training.signals import stopped_by_signals


def ablate(config: str | Path, out: str | Path, jobs: int | None = None) -> Path:
    """Train and score every cell of a grid file without a result in `out`, and return the path of the page.

    `out/results.json` has all measurements; `out/README.md` and the pictures beside it show them.

    An interrupted cell resumes at its newest checkpoint. A grid may grow: a file with more seeds or axes may be run in
    the same folder, and only new cells are computed.

    Raises:
        ValueError: an invalid grid file, base or setting; another ablation runs in `out`, or `out` holds a cell of
            other settings.
        RuntimeError: cells failed; the message has the last log line of each. The others are in the results.
        FileExistsError: `out` has a README.md that is not an ablation's page.
        Stopped: SIGTERM or SIGHUP arrived; the running cells have saved and ended.
    """
    grid, beside = read_grid(config)
    out = Path(out).absolute()
    corpus = None if grid.corpus is None else out / "corpus"
    planned = list(cells(grid, beside, corpus))
    jobs = jobs or grid.jobs
    threads = grid.threads or max(1, (os.cpu_count() or 1) // jobs)
    with folder_lock(out, "another ablation"), stopped_by_signals():
        check_page(out)
        for cell in planned:
            _check_cell(out / "cells" / cell.name, cell)
        if grid.corpus is not None:
            make_corpus(corpus, clips=grid.corpus.clips, seed=grid.corpus.seed)
        _check_scoring(grid.score, planned)
        for cell in planned:
            _write_request(out / "cells" / cell.name, cell, grid)
        failures = run_children([out / "cells" / cell.name for cell in planned], jobs, threads)
        machine = {
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
            "jobs": jobs,
            "threads": threads,
            "versions": {package: version(package) for package in ("llama-smop", "torch", "transformers")},
        }
        collect(out, grid, planned, failures, machine)
        page = write_page(out)
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(planned)} cells failed; the same command retries them: "
            + "; ".join(f"{name}: {line}" for name, line in failures.items())
        )
    return page


def collect(out: Path, grid: GridConfig, planned: Sequence[Cell], failures: dict[str, str], machine: dict) -> None:
    """Write `out/results.json`: the grid, and every cell with its result or its last log line."""
    records, data = [], planned[0].config.data
    for cell in planned:
        facts = {key: value for key, value in asdict(cell).items() if key != "config"}
        done = out / "cells" / cell.name / "result.json"
        records.append(facts | (files.read_json(done) if done.exists() else {"failed": failures[cell.name]}))
    content = {
        "synthetic": grid.corpus is not None,
        "corpus": _made_corpus(out / "corpus", grid) if grid.corpus else str(data.root or data.shards),
        "guess": guess_per_slot(GRID) if grid.corpus else None,
        "grid": grid.model_dump(mode="json"),
        "config": planned[0].config.model_dump(mode="json", exclude={"data": {"root", "shards"}}),
        "machine": machine,
        "cells": records,
    }
    files.write_json(out / "results.json", content)


def _made_corpus(corpus: Path, grid: GridConfig) -> dict:
    return grid.corpus.model_dump() | {"counts": files.read_json(corpus / "manifest.json")["counts"]}


def run_children(folders: Sequence[Path], jobs: int, threads: int) -> dict[str, str]:
    """Run the cells without a result, `jobs` at a time. Returns {name: last log line} of those that failed."""
    waiting = [folder for folder in folders if not (folder / "result.json").exists()]
    running: dict[Path, tuple[subprocess.Popen, int]] = {}  # process and slot; the slot selects the GPU
    failures: dict[str, str] = {}
    devices = _devices()
    with tqdm(desc="cells", unit="step", smoothing=0.05, mininterval=float("inf")) as bar:  # refreshed below
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    slot = min(set(range(jobs)) - {slot for _, slot in running.values()})
                    folder = waiting.pop(0)
                    running[folder] = (_start(folder, threads, devices[slot % len(devices)] if devices else None), slot)
                time.sleep(0.2)
                for folder, (child, _) in list(running.items()):
                    if child.poll() is None:
                        continue
                    del running[folder]
                    if child.returncode or not (folder / "result.json").exists():
                        failures[folder.name] = _last_line(folder / "log.txt", child.returncode)
                        bar.write(f"{folder.name} failed: {failures[folder.name]}")
                _show_progress(bar, folders, failures)
        finally:
            for child, _ in running.values():
                child.terminate()
            for child, _ in running.values():
                child.wait()
    return failures


def _start(folder: Path, threads: int, device: str | None) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    if device is not None:  # one GPU each: a training that sees several would use them all
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "llama_smop.ablation.cell", str(folder), str(os.getpid())]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(  # in a new session: only the parent receives Ctrl-C, and it ends its children
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _devices() -> list[str]:
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible and count else [str(i) for i in range(count)]


def _show_progress(bar: tqdm, folders: Sequence[Path], failures: dict[str, str]) -> None:
    """Show the steps of all cells; a cell that has not started counts with the steps of the longest started one."""
    states = []
    for folder in folders:
        states.append(files.read_record(folder / "progress.json", {}, lambda state: {"step", "of"} <= state.keys()))
    known = [state["of"] for state in states if state]
    if known:
        bar.total = sum(known) + (len(folders) - len(known)) * max(known)
    done = sum((folder / "result.json").exists() for folder in folders)
    shown = f"{done}/{len(folders)} cells" + (f", {len(failures)} failed" if failures else "")
    steps = sum(state["step"] for state in states if state)
    if (steps, shown) != (bar.n, bar.postfix):
        bar.set_postfix_str(shown, refresh=False)
        bar.update(steps - bar.n)
        bar.refresh()


def _last_line(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:  # its last line is not the reason
        return f"ended by signal {-code}"
    return lines[-1] if lines else f"ended with {code}"


def _check_cell(folder: Path, cell: Cell) -> None:
    """Raises ValueError: the folder holds a cell with another training configuration."""
    note = folder / "cell.json"
    # Validated again, so that fields that are newer than the request get their defaults.
    if note.exists() and TrainConfig.model_validate(files.read_json(note)["config"]) != cell.config:
        raise ValueError(f"{folder} holds a cell of other settings; choose another --out or delete it")


def _write_request(folder: Path, cell: Cell, grid: GridConfig) -> None:
    """Write a cell's request. A cell with another scoring keeps its training and is scored again."""
    note = folder / "cell.json"
    if note.exists():
        if ScoreSection.model_validate(files.read_json(note)["score"]) == grid.score:
            return
        (folder / "result.json").unlink(missing_ok=True)
    request = {
        part: s.model_dump(mode="json", exclude_unset=True)
        for part, s in (("config", cell.config), ("score", grid.score))
    }
    files.write_json(note, request)


def _check_scoring(score: ScoreSection, planned: Sequence[Cell]) -> None:
    """Check before training. Raises ValueError: labels or noise that the scoring needs do not exist."""
    data = planned[0].config.data
    root = score.root or data.root
    read_labels(root, score.labels)
    if any(snr is not None for snr in score.snrs):
        for noise in score.noises:
            if noise == "babble":
                read_labels(root, data.train)
            else:
                read_audio(noise)
