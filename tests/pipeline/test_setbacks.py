"""Clips that cannot be read and losses that are no number: named, passed over, and too many end the training."""

import json
import logging
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_smop import checkpoint
from llama_smop.config import TrainConfig
from llama_smop.data.corpus import make_corpus
from llama_smop.data.lrs3 import read_labels
from llama_smop.data.media import MediaError
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.train import train

pytestmark = pytest.mark.xdist_group("setbacks")

STEPS = 6


@pytest.fixture(scope="module")
def sound_corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", clips=16, seed=3, progress=False, workers=1)


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
    newest = checkpoint.latest(out / "checkpoints")
    assert all(v.isfinite().all() for v in load_file(newest / "model.safetensors").values())
