"""The commands a user runs, on a corpus of seconds and a model of thousands of parameters."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from llama_smop.cli import main
from llama_smop.models import model_folder
from llama_smop.training import checkpoints
from llama_smop.training.config import read_config
from llama_smop.training.run import train
from tests.damage import flip_last_byte

pytestmark = pytest.mark.xdist_group("pipeline")

CONFIG = {
    "model": {
        "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
        "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
    },
    "data": {
        "stages": [
            {"until": 0.5, "modalities": {"audio": 1, "video": 1}, "noise": False},
            {"until": 1.0, "modalities": {"audio": 1, "video": 1, "audiovisual": 1}},
        ],
        "max_clips": 2,
        "buckets": 2,
        "noise": {"snrs": [0, None]},
    },
    "optimizer": {"learning_rate": 1e-3, "steps": 8, "precision": "fp32"},
    "run": {"log_every": 1, "save_every": 2},
}


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(capfd):
    """A command in this process: how it ended and what it printed."""

    def call(*args) -> Ended:
        capfd.readouterr()
        code = 0
        try:
            main([str(a) for a in args])
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
            if isinstance(code, str):  # what the interpreter does with a message
                print(code, file=sys.stderr)
                code = 1
        return Ended(code, *capfd.readouterr())

    return call


def _environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def corpus(shared_corpus, tmp_path_factory) -> Path:
    """A copy, to be written to."""
    return shutil.copytree(shared_corpus, tmp_path_factory.mktemp("corpus") / "corpus")


def config_file(folder: Path, corpus: Path, **changes) -> Path:
    content = {**CONFIG, "data": {**CONFIG["data"], "root": str(corpus)}, **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> Path:
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("run")
    train(read_config(config_file(folder, corpus)), folder / "run")
    return folder / "run"


def curve(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in json.loads((run / "metrics.json").read_text()) if "loss" in row]


def test_training_logs_every_part_of_the_loss_and_the_expert_load(run):
    first = json.loads((run / "metrics.json").read_text())[0]
    assert {"loss", "lm_loss", "load_balancing_loss", "router_z_loss", "ctc_loss", "learning_rate"} <= set(first)
    load = [value for key, value in first.items() if key.startswith("expert_load/")]
    assert len(load) == 4, "DEDR with two experts has four"
    assert sum(load) == pytest.approx(1, abs=1e-3)


def test_the_same_seed_gives_the_same_model(run, tmp_path, corpus):
    again = train(read_config(config_file(tmp_path, corpus)), tmp_path / "again")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run / "model", again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_losses(run, tmp_path, corpus):
    config = config_file(tmp_path, corpus)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llama_smop.cli", "train", "--config", str(config), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
    while not list((out / "checkpoints").glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model").exists(), "the training ended before it could be killed"
    result = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert result.returncode == 0, result.stderr
    assert curve(out) == curve(run)
    assert not list(out.rglob(".*writing*")), "an unfinished checkpoint was left behind"


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, corpus, caplog):
    out = shutil.copytree(run, tmp_path / "out", ignore=shutil.ignore_patterns("model"))
    newest = checkpoints.latest(out / "checkpoints")
    flip_last_byte(newest / "model.safetensors")
    train(read_config(config_file(tmp_path, corpus)), out)
    assert f"{newest.name} is damaged" in caplog.text
    assert [start["from_step"] for start in json.loads((out / "starts.json").read_text())] == [0, 6]
    assert curve(out) == curve(run)
    weights, undisturbed = (load_file(folder / "model/model.safetensors") for folder in (out, run))
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())


def test_the_only_checkpoint_that_is_kept_is_a_whole_one(run, tmp_path, corpus):
    """A damaged one with a higher number does not count, nor last."""
    out = shutil.copytree(run, tmp_path / "out", ignore=shutil.ignore_patterns("model"))
    config = read_config(config_file(tmp_path, corpus), settings=["run.keep=1"])
    for folder in (out / "checkpoints").glob("checkpoint-*"):
        flip_last_byte(folder / "model.safetensors")

    class Stop(Exception):
        pass

    class AfterTheFirst(TrainerCallback):
        def on_save(self, *args, **kwargs):
            raise Stop

    with pytest.raises(Stop):
        train(config, out, callbacks=[AfterTheFirst()])
    assert [folder.name for folder in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert checkpoints.latest(out / "checkpoints") is not None


def test_evaluate_prints_a_table_and_writes_json(cli, run, corpus, tmp_path):
    scores = tmp_path / "scores.json"
    result = cli(
        *("evaluate", "--model", run / "model", "--root", corpus, "--snr", "clean", "--snr", "0", "--json", scores)
    )
    assert result.code == 0, result.stderr
    assert "| labels | modality | clean | 0 dB |" in result.stdout
    rows = json.loads(scores.read_text())
    assert [(r["modality"], r["snr"]) for r in rows] == [
        ("audio", None),
        ("audio", 0),
        ("video", None),
        ("audiovisual", None),
        ("audiovisual", 0),
    ]
    for row in rows:
        assert row["wer"] == pytest.approx(
            (row["substitutions"] + row["deletions"] + row["insertions"]) / row["words"], abs=1e-4
        )
        assert len(row["transcripts"]) == row["clips"]


def test_evaluate_gives_the_same_with_workers_and_takes_the_babble_of_other_labels(cli, run, corpus, tmp_path):
    shutil.copyfile(corpus / "labels/train.csv", tmp_path / "talkers.csv")
    scores = [tmp_path / "one.json", tmp_path / "two.json"]
    common = ("evaluate", "--model", run / "model", "--root", corpus, "--modality", "audio", "--snr", "0", "--json")
    for file, more in zip(scores, ((), ("--workers", "2", "--babble-labels", tmp_path / "talkers.csv")), strict=True):
        result = cli(*common, file, *more)
        assert result.code == 0, result.stderr
    assert scores[0].read_text() == scores[1].read_text()


def test_a_clip_longer_than_the_model_takes_is_named_before_any_is_transcribed(cli, run, corpus):
    labels = corpus / "labels/long.csv"
    first, second, *_ = (corpus / "labels/test.csv").read_text().splitlines()
    fields = second.split(",")
    labels.write_text(f"{first}\n{','.join([*fields[:2], '76', *fields[3:]])}\n")
    result = cli("evaluate", "--model", run / "model", "--root", corpus, "--labels", "long.csv")
    assert_fails_in_one_line(result, fields[1].removesuffix(".mp4"), "3.04 s is longer than the audio window of 3.00 s")


def test_transcribe_takes_mp4_and_wav_and_names_each(cli, run, corpus):
    clip = next((corpus / "generated").rglob("*.mp4"))
    result = cli("transcribe", clip, clip.with_suffix(".wav"), "--model", run / "model")
    assert result.code == 0, result.stderr
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [str(clip), str(clip.with_suffix(".wav"))]


def test_transcribe_is_deterministic_and_takes_any_rate_and_stereo(cli, run, corpus, tmp_path):
    clip = next((corpus / "generated").rglob("*.wav"))
    audio, rate = soundfile.read(clip, dtype="float32")
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.stack([audio, audio], 1), rate)
    first = cli("transcribe", clip, "--model", run / "model")
    assert first.stdout and first.stdout == cli("transcribe", stereo, "--model", run / "model").stdout


def assert_fails_in_one_line(result: Ended, *parts: str) -> None:
    """The command failed, and said so in one line that holds every part."""
    assert result.code != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("llama-smop: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in lines[0]


def test_clips_that_cannot_be_used_are_named(cli, run, corpus, tmp_path):
    clip = next((corpus / "generated").rglob("*.mp4"))
    empty, cut = tmp_path / "empty.mp4", tmp_path / "cut.mp4"
    empty.touch()
    cut.write_bytes(clip.read_bytes()[:3000])
    for path, reason in ((tmp_path / "none.mp4", "no such file"), (empty, "empty"), (cut, "cut.mp4")):
        assert_fails_in_one_line(cli("transcribe", path, "--model", run / "model"), str(path), reason)


def test_a_clip_shorter_than_a_token_is_refused(cli, run, corpus, tmp_path):
    from llama_smop.data.media import write_video

    short = tmp_path / "short.mp4"
    write_video(short, np.zeros((1, 96, 96, 3), np.uint8))
    assert_fails_in_one_line(
        cli("transcribe", short, "--model", run / "model", "--modality", "video"), "shorter than one token"
    )


def test_weights_that_disagree_with_their_config_are_refused(cli, run, tmp_path):
    folder = shutil.copytree(run / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["projector_config"]["hidden_features"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    assert_fails_in_one_line(cli("transcribe", "x.mp4", "--model", folder), str(folder), "disagree")


def test_a_folder_without_a_model_is_refused(cli, tmp_path):
    assert_fails_in_one_line(cli("transcribe", "x.mp4", "--model", tmp_path), str(tmp_path), "no model here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, "unknown key optimiser"),
        ({"optimizer": {"steps": 1, "learning_rat": 1}}, "unknown key optimizer.learning_rat"),
        ({"optimizer": {"steps": 1, "epochs": 1}}, "either steps or epochs"),
        ({"optimizer": {"steps": 0}}, "optimizer.steps"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, corpus, changes, message):
    path = config_file(tmp_path, corpus, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_labels_with_a_wrong_line_stop_the_training(cli, tmp_path, corpus):
    root = tmp_path / "corpus"
    shutil.copytree(corpus / "labels", root / "labels")
    with open(root / "labels" / "train.csv", "a") as labels:
        labels.write("generated,a.mp4,12\n")
    lines = len((root / "labels" / "train.csv").read_text().splitlines())
    result = cli("train", "--config", config_file(tmp_path, root), "--out", tmp_path / "out")
    assert_fails_in_one_line(result, f"train.csv:{lines}", "expected 5 fields")


def test_a_full_disk_leaves_the_model_that_was_there(run, tmp_path, monkeypatch):
    model, processor = model_folder.load(run / "model")
    target = model_folder.save(model, processor, tmp_path / "model")
    before = (target / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        model_folder.save(model, processor, target)
    assert (target / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
