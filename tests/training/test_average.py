"""The mean of the last checkpoints: the right numbers, of whole checkpoints alone, in a model that works."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_smop.cli import main
from llama_smop.evaluation.run import evaluate
from llama_smop.models import model_folder
from llama_smop.training import checkpoints
from llama_smop.training.averaging import average, newest
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train
from tests.damage import flip_last_byte

pytestmark = pytest.mark.xdist_group("average")

STEPS, LAST = 4, 3


def config(corpus: Path, **run) -> dict:
    return {
        "model": {
            "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
            "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
            "modalities": ["audio"],
        },
        "data": {"root": corpus, "max_clips": 4, "buckets": 1, "stages": [{"modalities": {"audio": 1}}]},
        "optimizer": {"learning_rate": 1e-2, "steps": STEPS, "precision": "fp32"},
        "run": {"log_every": 1, "save_every": 1, "keep": STEPS, **run},
    }


@pytest.fixture(scope="module")
def corpus(shared_corpus) -> Path:
    return shared_corpus


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(TrainConfig.model_validate(config(corpus, average_last=LAST)), out)
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def mean_by_hand(run: Path, steps) -> dict[str, torch.Tensor]:
    all_weights = [weights(run / f"checkpoints/checkpoint-{n}") for n in steps]
    return {name: torch.stack([w[name] for w in all_weights]).double().mean(0).float() for name in all_weights[0]}


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_training_ends_with_the_mean_of_its_last_checkpoints(trained, corpus):
    assert_equal(weights(trained / "model"), mean_by_hand(trained, (2, 3, 4)))
    assert not torch.equal(
        weights(trained / "model")["multi_modal_projector.w1"],
        weights(trained / "checkpoints/checkpoint-4")["multi_modal_projector.w1"],
    )
    left = {p.name for p in (trained / "model").iterdir()}
    assert not left & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    model, processor = model_folder.load(trained / "model")
    rows, _ = evaluate(model, processor, corpus, "test.csv", modalities=["audio"], snrs=[None])
    assert rows[0].words > 0


def test_the_command_passes_over_a_damaged_checkpoint(run, tmp_path, capsys, caplog):
    damaged = run / "checkpoints/checkpoint-3/model.safetensors"
    flip_last_byte(damaged)
    main(["average", str(run), "--last", "2", "--to", str(tmp_path / "mean")])
    assert "mean of checkpoint-4, checkpoint-2" in capsys.readouterr().out
    assert_equal(weights(tmp_path / "mean"), mean_by_hand(run, (2, 4)))
    assert json.loads((tmp_path / "mean/averaged_from.json").read_text()) == ["checkpoint-4", "checkpoint-2"]
    assert checkpoints.is_whole(tmp_path / "mean")
    with pytest.raises(SystemExit, match="has 3 whole checkpoints, --last asks for 4"):
        main(["average", str(run), "--last", "4", "--to", str(tmp_path / "more")])
    assert not (tmp_path / "more").exists()
    with caplog.at_level(logging.WARNING):
        assert len(newest(run, 4)) == 3
    assert "checkpoint-3 is damaged" in caplog.text


def test_whole_numbers_are_the_newest_and_strangers_are_refused(run, tmp_path):
    folders = newest(run, 2)
    for number, folder in enumerate(folders):
        tensors = {"count": torch.tensor(10 - number), "half": torch.tensor([1.0, 2.0 + number]).bfloat16()}
        save_file(tensors, folder / "model.safetensors")
    average(folders, tmp_path / "mean", run)
    mean = weights(tmp_path / "mean")
    assert mean["count"] == 10 and mean["half"].tolist() == [1.0, 2.5] and mean["half"].dtype == torch.bfloat16
    count = torch.tensor(1)
    for tensors, message in (
        ({"count": count}, r"its weights are not those of .* \(half\)"),
        ({"count": count, "half": torch.ones(3)}, r"half is \(3,\) torch.float32, in .* \(2,\) torch.bfloat16"),
    ):
        save_file(tensors, folders[1] / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            average(folders, tmp_path / "mean", run)
    assert weights(tmp_path / "mean").keys() == mean.keys(), "what was there before is still there"


def test_as_many_checkpoints_must_be_kept(corpus):
    with pytest.raises(ValueError, match="average_last 3 needs as many checkpoints: raise keep, now 2"):
        TrainConfig.model_validate(config(corpus, average_last=3, keep=2))


def test_a_model_that_was_changed_is_not_loaded(run):
    file = run / "model/model.safetensors"
    flip_last_byte(file)
    with pytest.raises(ValueError, match="the weights are not those that were saved"):
        model_folder.load(run / "model")
