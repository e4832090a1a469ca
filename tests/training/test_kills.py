"""Nothing is lost: a training killed again and again, at any moment, ends as if it had never been touched."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import children

pytestmark = pytest.mark.xdist_group("kills")

STEPS = 6
# A kind of kill: the part of a path it waits for, and at how many changes of such paths at most it strikes.
AT_CHANGES = {"checkpoint": ("checkpoints/.writing", 60), "write": ("", 70)}  # both reach the second checkpoint
SIGKILL = -9


@pytest.fixture(scope="module")
def config(shared_corpus) -> dict:
    """A checkpoint after every step, so that much of the time is spent in writing one."""
    return {
        "model": {
            "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
            "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
        },
        "data": {
            "root": str(shared_corpus),
            "max_clips": 2,
            "buckets": 2,
            "stages": [{"modalities": {"audio": 1, "video": 1}}],
        },
        "optimizer": {"learning_rate": 1e-3, "steps": STEPS, "precision": "fp32"},
        "run": {"log_every": 1, "save_every": 1},
    }


def curve(run: Path) -> list[dict]:
    """The log, without what a clock says."""
    timings = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    rows = json.loads((run / "metrics.json").read_text())
    return [{k: v for k, v in row.items() if k not in timings} for row in rows]


def same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    left = [str(p.relative_to(one)) for p in one.rglob(".*")]
    assert not left, f"killed writes left {left}"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """The uninterrupted training."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert children.run(children.train, config, out) == 0
    return out


@pytest.mark.parametrize(
    ("in_checkpoints", "at_writes", "at_any_time"),
    (pytest.param(3, 1, 1, id="five"), pytest.param(9, 5, 6, id="twenty", marks=pytest.mark.slow)),
)
def test_killed_so_many_times(config, whole, tmp_path, in_checkpoints, at_writes, at_any_time):
    moments = random.Random(0)
    schedule = ["checkpoint"] * in_checkpoints + ["write"] * at_writes + ["time"] * at_any_time
    moments.shuffle(schedule)
    runs, kills, interrupted = 0, 0, 0
    while kills < len(schedule):
        out = tmp_path / f"run{runs}"
        runs += 1
        ended = None
        while ended != 0:
            how = schedule[kills] if kills < len(schedule) else "never"
            part, most = AT_CHANGES.get(how, ("", None))
            child = children.start(children.train, config, out, most and moments.randint(1, most), part)
            if how == "time":
                while not out.exists() and child.is_alive():
                    time.sleep(0.01)
                time.sleep(moments.uniform(0, 1.5))
                child.kill()
            child.join()
            ended = child.exitcode
            assert ended in (0, SIGKILL), f"after {kills} kills a restart failed"
            kills += ended == SIGKILL
            interrupted += ended == SIGKILL and (out / "checkpoints/.writing").exists()
        same_run(out, whole)
        steps = [start["from_step"] for start in json.loads((out / "starts.json").read_text())]
        assert steps == sorted(steps) and steps[0] == 0 and (out / "report.html").exists()
    assert interrupted >= in_checkpoints // 2, f"{interrupted} kills alone fell into the writing of a checkpoint"


@pytest.mark.parametrize("write", (3, 10, 16))
def test_killed_while_the_model_is_written(config, whole, tmp_path, write):
    out = tmp_path / "run"
    assert children.run(children.train, config, out, write, ".model.writing") == SIGKILL
    assert list(out.glob(".*model.writing-*")) and not (out / "model").exists()
    assert len(curve(out)) >= STEPS, "a killed training has its log"
    assert children.run(children.train, config, out) == 0
    same_run(out, whole)
