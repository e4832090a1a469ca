"""A training that is stopped: by Ctrl-C, by a batch system, twice, through one of several processes."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from llama_smop.training import checkpoints
from tests.training import children

pytestmark = pytest.mark.xdist_group("signals")

STEPS = 30


@pytest.fixture(scope="module")
def config(shared_corpus) -> dict:
    """No checkpoint before the last step, unless a signal stops it."""
    return {
        "model": {
            "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
            "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
            "modalities": ["audio"],
        },
        "data": {"root": str(shared_corpus), "max_clips": 2, "buckets": 1, "stages": [{"modalities": {"audio": 1}}]},
        "optimizer": {"learning_rate": 1e-3, "steps": STEPS, "precision": "fp32"},
        "run": {"log_every": 1, "save_every": 1000},
    }


def slow_train(config: dict, out: Path, pause: float = 0.2) -> None:
    from transformers import TrainerCallback

    from llama_smop.training.config import TrainConfig
    from llama_smop.training.run import train

    class Pause(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(pause)

    train(TrainConfig.model_validate(config), out, callbacks=[Pause()])


def logged(out: Path) -> list[dict]:
    rows = json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").exists() else []
    return [row for row in rows if "loss" in row]


def wait_for_steps(child, out: Path, steps: int = 2) -> None:
    while len(logged(out)) < steps:
        assert child.is_alive(), "the training ended before the signal"
        time.sleep(0.02)


def saved_at_its_last_step(out: Path) -> int:
    newest = checkpoints.latest(out / "checkpoints")
    step = logged(out)[-1]["step"]
    assert newest is not None and newest.name == f"checkpoint-{step}" and step < STEPS
    assert not (out / "model").exists()
    return step


@pytest.mark.parametrize(("number", "status"), ((signal.SIGTERM, 143), (signal.SIGHUP, 129)))
def test_a_training_that_is_told_to_end_saves_first_and_goes_on_later(config, tmp_path, number, status):
    """Its data worker is sent the signal too, as SLURM does."""
    if number == signal.SIGTERM:
        config = config | {"data": config["data"] | {"workers": 1}}
    out = tmp_path / "run"
    child = children.start(slow_train, config, out)
    wait_for_steps(child, out)
    for pid in [*offspring(child.pid), child.pid]:
        os.kill(pid, number)
    child.join()
    assert child.exitcode == status
    step = saved_at_its_last_step(out)
    assert children.run(children.train, config, out) == 0
    assert [row["step"] for row in logged(out)] == list(range(1, STEPS + 1))
    assert json.loads((out / "starts.json").read_text())[1]["from_step"] == step


def offspring(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == pid:
            found.append(int(name.split()[0]))
    return found


def test_one_process_that_is_told_ends_all_at_the_same_step(config, tmp_path):
    out = tmp_path / "run"
    ranks = children._start_ranks(slow_train, 2, (config, out))
    wait_for_steps(ranks[0], out)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [143, 143]
    saved_at_its_last_step(out)


def test_a_second_signal_ends_it_at_once(config, tmp_path):
    out = tmp_path / "run"
    child = children.start(slow_train, config, out, 60)
    while not (out / "starts.json").exists() or (child.is_alive() and not in_step(out)):
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    child.join(1.5)
    assert child.is_alive(), "the first is answered at the end of the step"
    os.kill(child.pid, signal.SIGTERM)
    child.join(30)  # the step has a minute left
    assert child.exitcode == -signal.SIGTERM


def in_step(out: Path) -> bool:
    """TensorBoard's file is opened when the training begins."""
    return any(out.rglob("events.out.tfevents*"))


def test_a_signal_that_was_ignored_at_the_start_still_is(config, tmp_path):
    """As under nohup."""
    out = tmp_path / "run"
    child = children.start(deaf_train, config, out)
    wait_for_steps(child, out)
    os.kill(child.pid, signal.SIGHUP)
    child.join()
    assert child.exitcode == 0 and (out / "model").exists()


def deaf_train(config: dict, out: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    slow_train(config, out, 0.05)


def test_what_an_ablation_has_started_is_ended_first(tmp_path):
    child = children.start(tidy, tmp_path)
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 143 and (tmp_path / "ended").exists()


def tidy(folder: Path) -> None:
    from llama_smop.training.signals import stopped_by_signals

    with stopped_by_signals():
        try:
            (folder / "begun").touch()
            time.sleep(60)
        finally:
            (folder / "ended").touch()


def test_ctrl_c_is_a_failure_with_a_word(config, tmp_path):
    """Else `train … && next` goes on."""
    out = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(config | {"optimizer": {"steps": 100_000, "precision": "fp32"}})
    )
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), "--out", str(out)]
    child = children.start(command_line, arguments, tmp_path)
    while not logged(out):
        assert child.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    stderr = (tmp_path / "stderr").read_text()
    assert child.exitcode == 130 and "llama-smop: interrupted" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "stdout").read_text()


def command_line(arguments: list[str], folder: Path) -> None:
    from llama_smop.cli import main

    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "w") as file:
            os.dup2(file.fileno(), number)
    main(arguments)
