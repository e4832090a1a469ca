"""Trains and scores one cell in a child process: `python -m llama_smop.ablation.cell FOLDER PARENT`.

PARENT is the process number of the parent; the cell ends when the parent does. An interrupted cell resumes.

FOLDER/cell.json       the request: the training's configuration, the conditions to score
FOLDER/run             the training's folder
FOLDER/progress.json   the step that the training has reached
FOLDER/used.json       wall and CPU seconds up to the newest checkpoint
FOLDER/result.json     written last
"""

import fcntl
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from transformers import TrainerCallback

from llama_smop.ablation.grid import ScoreSection
from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.evaluation.expert_use import expert_activation
from llama_smop.evaluation.run import evaluate, supported
from llama_smop.models import model_folder
from llama_smop.system import files
from llama_smop.system.processes import exit_with_parent
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train


def _is_used(record: dict) -> bool:
    return all(isinstance(record.get(name), int | float) for name in ("wall", "cpu", "starts"))


class ResourceUse(TrainerCallback):
    """Sums wall and CPU seconds over all starts of a cell, each up to its newest checkpoint, and writes progress."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "used.json"
        self.before = files.read_record(self.path, {"wall": 0.0, "cpu": 0.0, "starts": 0}, _is_used)
        self.since = time.perf_counter()

    def now(self) -> dict:
        """The sums so far; CPU seconds include the start of this process."""
        wall = self.before["wall"] + time.perf_counter() - self.since
        cpu = self.before["cpu"] + time.process_time()
        return {"wall": round(wall, 1), "cpu": round(cpu, 1), "starts": self.before["starts"] + 1}

    def on_save(self, args, state, control, **kwargs):
        files.write_json(self.path, self.now())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0 or state.global_step == state.max_steps:
            files.write_json(self.folder / "progress.json", {"step": state.global_step, "of": state.max_steps})


def run_cell(folder: Path) -> None:
    request = files.read_json(folder / "cell.json")
    config, score = TrainConfig.model_validate(request["config"]), ScoreSection.model_validate(request["score"])
    used, run = ResourceUse(folder), folder / "run"
    started = folder / "started.json"
    if not started.exists():
        files.write_json(started, _now())
    trained = folder / "trained.json"
    if not trained.exists():
        train(config, run, callbacks=[used])
        files.write_json(trained, used.now())
        files.write_json(used.path, used.now())
    training = files.read_json(trained)
    model, processor = model_folder.load(run / "model")
    data = Lrs3Dataset(score.root or config.data.root, score.labels, supported(model)[-1])
    result = {
        "steps": files.read_json(folder / "progress.json")["of"],
        "projector_parameters": sum(p.numel() for p in model.multi_modal_projector.parameters()),
        "rows": score_rows(model, processor, config, score),
        "expert_activation": expert_activation(model, processor, data),
        "router_entropy": _router_entropy(files.read_json(run / "metrics.json")),
        "seconds": {"training": training, "all": used.now()},
        "started": files.read_json(started),
        "ended": _now(),
    }
    files.write_json(folder / "result.json", result)


def score_rows(model, processor, config: TrainConfig, score: ScoreSection) -> list[dict]:
    """Score each condition once: clean sound and video with the first kind of noise, each noisy SNR with every kind."""
    rows = []
    wanted = [m for m in score.modalities or supported(model) if m in supported(model)]
    for number, noise in enumerate(score.noises):
        snrs = [snr for snr in score.snrs if number == 0 or snr is not None]
        modalities = [m for m in wanted if number == 0 or m != "video"]
        if not (snrs and modalities):
            continue
        found, _ = evaluate(
            model,
            processor,
            score.root or config.data.root,
            score.labels,
            modalities=modalities,
            snrs=snrs,
            noise=noise,
            babble_labels=config.data.train,
            num_beams=score.beams,
        )
        rows += [asdict(row) | {"noise": None if row.snr is None else noise} for row in found]
    return rows


def _router_entropy(log: list[dict]) -> list[dict]:
    prefix = "router_entropy/"
    points = [(row, [key for key in row if key.startswith(prefix)]) for row in log]
    return [{"step": row["step"]} | {k.removeprefix(prefix): row[k] for k in keys} for row, keys in points if keys]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main(folder: Path, parent: int) -> None:
    exit_with_parent(parent)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for an orphaned cell in this folder to end
        run_cell(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
