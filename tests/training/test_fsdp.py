"""Training from shards: everything that holds for a training from files."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from llama_smop.data.lrs3 import read_labels
from llama_smop.training.build import training_clips, training_plan
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train
from tests.training import children
from tests.training.test_kills import SIGKILL, same_run
from tests.training.test_ranks import CURVES, curve, train_joint_batches

pytest.importorskip("webdataset")

from llama_smop.data.shards.write import write_shards

pytestmark = pytest.mark.xdist_group("sharded_training")


@pytest.fixture(scope="module")
def corpus(shared_corpus, tmp_path_factory) -> Path:
    """A copy, to be written to."""
    return shutil.copytree(shared_corpus, tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    """Twelve clips in six shards."""
    out = tmp_path_factory.mktemp("shards") / "train"
    write_shards(corpus, "train.csv", out, clips_per_shard=2, progress=False)
    return out


def config(shards, data=(), ctc_weight=1.5, **optimizer) -> dict:
    return {
        "model": {
            "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "ctc_weight": ctc_weight},
            "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
        },
        "data": {
            "shards": str(shards),
            "max_clips": 2,
            "window": 3,
            "stages": [
                {"until": 0.5, "modalities": {"audio": 1, "video": 1}, "noise": False},
                {"until": 1.0, "modalities": {"audio": 1, "video": 1}},
            ],
            "noise": {"snrs": [0]},
            **dict(data),
        },
        "optimizer": {"learning_rate": 1e-3, "precision": "fp32", **(optimizer or {"steps": 4})},
        "run": {"log_every": 1, "save_every": 1},
    }


@pytest.mark.parametrize(("workers", "unfinished"), ((0, 3), pytest.param(2, 5, marks=pytest.mark.slow)))
def test_killed_in_mid_epoch_it_ends_as_if_it_had_not_been(shards, tmp_path, workers, unfinished):
    """An epoch and a half, two batches a step, six an epoch; killed in the first epoch and in the second."""
    settings = config(shards, {"workers": workers}, epochs=1.5, accumulate=2)
    assert children.run(children.train, settings, tmp_path / "whole") == 0
    assert children.run(children.train, settings, tmp_path / "killed", 1, f"checkpoint-{unfinished}") == SIGKILL
    assert (tmp_path / f"killed/checkpoints/checkpoint-{unfinished - 1}").is_dir()
    assert children.run(children.train, settings, tmp_path / "killed") == 0
    same_run(tmp_path / "killed", tmp_path / "whole")


def test_two_processes_have_the_curve_of_the_joint_batch(shards, tmp_path):
    settings = config(shards, {"noise": None}, ctc_weight=0.0, steps=3, global_aux_losses=True)
    children.ranks(children.train, 2, settings, tmp_path / "two")
    assert children.run(train_joint_batches, 2, settings, tmp_path / "one") == 0
    two, one = (curve(tmp_path / run, "lm_loss") for run in ("two", "one"))
    assert len(two) == 3
    torch.testing.assert_close(two, one, rtol=CURVES, atol=1e-7)


@pytest.mark.parametrize("world", (1, 2))
def test_so_many_epochs_draw_every_clip_so_often(shards, world):
    settings = TrainConfig.model_validate(config(shards, {"workers": 2}, epochs=3))
    source = training_clips(settings, world).source
    plans = [training_plan(settings, source, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    assert Counter(draw.index for plan in plans for batch in plan for draw in batch) == Counter(
        dict.fromkeys(range(12), 3)
    )


def test_a_bad_clip_is_named_and_too_many_end_the_training(corpus, tmp_path):
    clip = read_labels(corpus, "train.csv")[2]
    path = clip.video_path(corpus)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:2000])
        write_shards(corpus, "train.csv", tmp_path / "shards", clips_per_shard=4, progress=False)
    finally:
        path.write_bytes(whole)
    video = {"stages": [{"modalities": {"video": 1}}]}
    train(TrainConfig.model_validate(config(tmp_path / "shards", video, epochs=1)), tmp_path / "run")
    (named,) = json.loads((tmp_path / "run/bad_clips.json").read_text())
    assert named.endswith(f".tar/{clip.id}.mp4")
    with pytest.raises(ValueError, match=named):
        train(
            TrainConfig.model_validate(config(tmp_path / "shards", video | {"max_bad_clips": 0}, epochs=1)),
            tmp_path / "0",
        )


@pytest.mark.parametrize(
    ("data", "message"),
    (
        ({"root": "corpus"}, "either root .* or shards"),
        ({"shards": None}, "either root .* or shards"),
        ({"shards": None, "root": "corpus"}, "window goes with shards"),
        ({"keep_decoded": True}, "not for shards"),
        ({"shards": "pipe:cat shards"}, r"must hold \{name\}"),
    ),
)
def test_a_configuration_that_makes_no_sense_says_why(data, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(config("shards", data))
