"""Clips that cannot be read and losses that are no number: named, passed over, and too many end the training."""

import json
import logging
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llama_smop.data.lrs3 import read_labels
from llama_smop.data.media import MediaError, write_audio, write_video
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.training import checkpoints
from llama_smop.training import run as module
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train

pytestmark = pytest.mark.xdist_group("setbacks")

STEPS = 6


@pytest.fixture(scope="module")
def sound_corpus(shared_corpus) -> Path:
    return shared_corpus


@pytest.fixture
def corpus(sound_corpus, tmp_path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(sound_corpus, tmp_path / "corpus")


def config(corpus: Path, data=(), **run) -> TrainConfig:
    return TrainConfig(
        model={
            "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
            "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
        },
        data={"root": corpus, "max_clips": 4, "buckets": 1, "noise": None, **dict(data)},
        optimizer={"learning_rate": 1e-3, "steps": STEPS, "precision": "fp32"},
        run={"log_every": 1, "save_every": 1, "keep": STEPS, **run},
    )


def log(out: Path) -> list[dict]:
    return [row for row in json.loads((out / "metrics.json").read_text()) if "loss" in row]


def damage(corpus: Path, count: int) -> list[str]:
    paths = [clip.video_path(corpus) for clip in read_labels(corpus, "train.csv")[:count]]
    for path in paths:
        path.write_bytes(path.read_bytes()[:2000])
    return [str(path) for path in paths]


def test_a_bad_clip_is_named_and_another_takes_its_place(corpus, tmp_path, caplog):
    bad = damage(corpus, 2)
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        train(config(corpus), out)
    assert len(log(out)) == STEPS
    assert set(json.loads((out / "bad_clips.json").read_text())) == set(bad)
    for path in bad:
        named = [r for r in caplog.records if path in r.getMessage()]
        assert len(named) == 1, "each bad clip is named once"


@pytest.mark.parametrize(("limit", "error"), ((2, ValueError), (0, MediaError)))
def test_too_many_bad_clips_end_the_training(corpus, tmp_path, limit, error):
    bad = damage(corpus, 6)
    with pytest.raises(error) as stopped:
        train(config(corpus, {"max_bad_clips": limit}), tmp_path / "run")
    assert any(path in str(stopped.value) for path in bad)
    assert not (tmp_path / "run/model").exists()


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss `value` in the forward passes of the given numbers, from 1."""

    def with_loss(value: float, passes) -> None:
        forward, count = LlamaSmopForConditionalGeneration.forward, 0

        def poisoned(self, *args, **kwargs):
            nonlocal count
            outputs = forward(self, *args, **kwargs)
            count += 1
            if count in passes:
                outputs.loss = outputs.loss * value
            return outputs

        monkeypatch.setattr(LlamaSmopForConditionalGeneration, "forward", poisoned)

    return with_loss


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_step_without_a_finite_loss_changes_nothing(sound_corpus, tmp_path, poison, value):
    poison(value, {3, 5})
    out = tmp_path / "run"
    train(config(sound_corpus), out)
    rows = log(out)
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 1, 1, 2, 2]
    assert all(math.isfinite(v) for row in rows for v in row.values())
    weights = [load_file(out / f"checkpoints/checkpoint-{n}/model.safetensors") for n in range(1, STEPS + 1)]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(weights)]
    assert same == [False, True, False, True, False]


def test_many_in_a_row_end_the_training_with_good_weights_kept(sound_corpus, tmp_path, poison):
    poison(math.nan, range(3, 100))
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"stopped at step 5: .* 3 steps in a row .*max_bad_steps.*checkpoints"):
        train(config(sound_corpus, max_bad_steps=3), out)
    newest = checkpoints.latest(out / "checkpoints")
    assert all(v.isfinite().all() for v in load_file(newest / "model.safetensors").values())


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    """An interruption, after the checkpoint of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


class StopAtOnce(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise Stopped


def test_setbacks_are_remembered_over_an_interruption(corpus, tmp_path, poison):
    bad = damage(corpus, 3)
    poison(math.nan, {2, 5})
    with pytest.raises(Stopped):
        train(config(corpus), tmp_path / "run", callbacks=[StopAfter(2)])
    before = json.loads((tmp_path / "run/bad_clips.json").read_text())
    assert before and set(before) < set(bad), "the test wants some to come after the interruption"
    train(config(corpus), tmp_path / "run")
    assert set(json.loads((tmp_path / "run/bad_clips.json").read_text())) == set(bad)
    assert [row.get("skipped_steps", 0) for row in log(tmp_path / "run")] == [0, 1, 1, 1, 2, 2]

    (tmp_path / "run/evaluation.json").write_text("[]")
    train(config(corpus, {"train": "test.csv"}), tmp_path / "run", resume=False)
    for name in ("bad_clips.json", "evaluation.json"):
        assert not (tmp_path / "run" / name).exists(), "of a training that was thrown away"


def test_bad_clips_before_an_interruption_count_for_the_limit(corpus, tmp_path):
    damage(corpus, 3)
    with pytest.raises(Stopped):
        train(config(corpus, {"max_bad_clips": 2}), tmp_path / "run", callbacks=[StopAfter(2)])
    before = json.loads((tmp_path / "run/bad_clips.json").read_text())
    assert 0 < len(before) < 3, "the test wants some to come after the interruption"
    for _ in range(2):  # to start it once more is no way round it
        with pytest.raises(ValueError, match=r"3 clips cannot be used, data\.max_bad_clips allows 2"):
            train(config(corpus, {"max_bad_clips": 2}), tmp_path / "run")


@pytest.mark.parametrize("modality", ("audio", "video", "audiovisual"))
def test_a_clip_the_model_cannot_take_is_named_and_another_takes_its_place(corpus, tmp_path, modality):
    """One of four seconds, where the model takes three; one shorter than a token."""
    long, short = (clip for clip in read_labels(corpus, "train.csv")[:2])
    for clip, frames in ((long, 100), (short, 1)):
        path = clip.video_path(corpus)
        write_video(path, np.zeros((frames, 96, 96, 3), np.uint8))
        write_audio(path.with_suffix(".wav"), np.full(frames * 640, 0.1, np.float32))
    stages = {"stages": [{"modalities": {modality: 1}}]}
    train(config(corpus, stages), tmp_path / "run")
    found = json.loads((tmp_path / "run/bad_clips.json").read_text())
    assert set(found) <= {long.id, short.id} and found
    if modality != "video":
        assert "longer than the audio window" in found[long.id]
    if modality != "audio":
        assert "shorter than one token" in found[short.id]


def test_what_the_configuration_says_now_holds_after_an_interruption(sound_corpus, tmp_path):
    """A lower learning rate is what a training is gone on with that has diverged."""
    with pytest.raises(Stopped):
        train(config(sound_corpus), tmp_path / "run", callbacks=[StopAfter(3)])
    asked = {"learning_rate": 1e-5, "weight_decay": 0.3, "betas": (0.5, 0.6), "steps": STEPS, "precision": "fp32"}
    changed = config(sound_corpus, save_every=2, log_every=3, keep=9).model_dump() | {"optimizer": asked}
    train(TrainConfig.model_validate(changed), tmp_path / "run")
    rates = {row["step"]: row["learning_rate"] for row in log(tmp_path / "run")}
    assert list(rates) == [1, 2, 3, 4, 6], "every third step and every checkpoint"
    assert rates[4] == pytest.approx(1e-5 * (1 + math.cos(math.pi * 3 / STEPS)) / 2)
    kept = tmp_path / "run/checkpoints"
    assert {folder.name for folder in kept.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3, 4, 6)}
    groups = torch.load(kept / "checkpoint-6/optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert all(group["betas"] == (0.5, 0.6) and group["initial_lr"] == 1e-5 for group in groups)


def test_a_row_of_the_log_does_not_reach_over_a_checkpoint(sound_corpus, tmp_path):
    """Else an interruption there would change it."""
    rhythm = {"log_every": 3, "save_every": 2}
    train(config(sound_corpus, **rhythm), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config(sound_corpus, **rhythm), tmp_path / "run", callbacks=[StopAfter(4)])
    train(config(sound_corpus, **rhythm), tmp_path / "run")
    assert [row["step"] for row in log(tmp_path / "whole")] == [2, 3, 4, 6]
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_epochs_that_are_other_steps_than_before_are_refused(sound_corpus, tmp_path):
    def epochs(number, **data):
        settings = config(sound_corpus, data).model_dump()
        settings["optimizer"] |= {"steps": None, "epochs": number}
        return TrainConfig.model_validate(settings)

    with pytest.raises(Stopped):
        train(epochs(3), tmp_path / "run", callbacks=[StopAfter(2)])
    with pytest.raises(ValueError, match=r"planned as (\d+) steps, and 3 epochs are \d+ now.* optimizer\.steps=\1"):
        train(epochs(3, max_clips=2), tmp_path / "run")
    for _ in range(2):  # other epochs are meant so; interrupted before they have a checkpoint, too
        with pytest.raises(Stopped):
            train(epochs(4), tmp_path / "run", callbacks=[StopAtOnce()])
    train(epochs(1), tmp_path / "run")


def test_one_of_several_gpus_is_used_and_said_so(sound_corpus, tmp_path, monkeypatch, caplog):
    """The Trainer would split each batch over them by threads."""
    made = module.training_arguments

    def two_gpus(*args):
        arguments = made(*args)
        assert arguments.n_gpu < 2
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr(module, "training_arguments", two_gpus)
    with caplog.at_level(logging.WARNING):
        train(config(sound_corpus), tmp_path / "run")
    assert "2 GPUs are visible and one is used: start with torchrun" in caplog.text
    assert len(log(tmp_path / "run")) == STEPS
