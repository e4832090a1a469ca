"""One cell in a process of its own: `python -m llama_smop.ablation.cell FOLDER`. Interrupted, it goes on.

FOLDER/cell.json       what is asked: the training's configuration, what to score
FOLDER/run             the training's folder
FOLDER/progress.json   the step it is at
FOLDER/used.json       wall and CPU seconds up to the newest checkpoint
FOLDER/result.json     written last
"""

import fcntl
import os
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from transformers import TrainerCallback

from llama_smop import files
from llama_smop.ablation.grid import ScoreSection
from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.evaluation.expert_use import expert_activation
from llama_smop.evaluation.run import evaluate, supported
from llama_smop.models import model_folder
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train


def _is_used(record: dict) -> bool:
    return all(isinstance(record.get(name), int | float) for name in ("wall", "cpu", "starts"))


class Used(TrainerCallback):
    """Adds up wall and CPU seconds over interruptions; what was lost with one is not counted. Tells the step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "used.json"
        self.before = files.read_record(self.path, {"wall": 0.0, "cpu": 0.0, "starts": 0}, _is_used)
        self.since = time.perf_counter()

    def now(self) -> dict:
        """CPU seconds are this process's, its start included."""
        wall = self.before["wall"] + time.perf_counter() - self.since
        cpu = self.before["cpu"] + time.process_time()
        return {"wall": round(wall, 1), "cpu": round(cpu, 1), "starts": self.before["starts"] + 1}

    def on_save(self, args, state, control, **kwargs):
        files.write_json(self.path, self.now())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0 or state.global_step == state.max_steps:
            files.write_json(self.folder / "progress.json", {"step": state.global_step, "of": state.max_steps})


def run_cell(folder: Path) -> None:
    asked = files.read_json(folder / "cell.json")
    config, score = TrainConfig.model_validate(asked["config"]), ScoreSection.model_validate(asked["score"])
    used, run = Used(folder), folder / "run"
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
    """Each condition once: clean sound and lips with the first kind of noise, and each noisy SNR with every kind."""
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


def _end_with(parent: int) -> None:
    """A cell ends itself when whoever started it has been killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    _end_with(int(sys.argv[2]))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits until one that was orphaned in this folder has ended
        run_cell(folder)
