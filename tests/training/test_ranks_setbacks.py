"""Several processes and what goes wrong in one of them: nothing is lost, and all agree on what happened."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_smop.data.lrs3 import read_labels
from llama_smop.models import model_folder
from tests.training import children
from tests.training.test_kills import SIGKILL, same_run
from tests.training.test_ranks import STEPS, assert_same_curves, assert_same_weights, config, corpus

pytestmark = pytest.mark.xdist_group("ranks_setbacks")

GOLDEN = Path(__file__).parents[1] / "golden"
__all__ = ["corpus"]  # a fixture


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The uninterrupted, sharded training."""
    out = tmp_path_factory.mktemp("whole")
    children.ranks(children.train, 2, config(corpus, "fsdp2"), out)
    return out


def test_killed_while_a_sharded_checkpoint_is_written(corpus, whole, tmp_path):
    """First the process that writes the weights is killed, then the other, which writes its random state only."""
    settings = config(corpus, "fsdp2")
    for victim, write in ((0, 12), (1, 1)):
        killed = children.killed_rank(children.train, 2, victim, settings, tmp_path, write, "checkpoints/.writing")
        assert killed == SIGKILL
        assert (tmp_path / "checkpoints/.writing").exists() and not list(tmp_path.glob("checkpoints/checkpoint-*"))
    children.ranks(children.train, 2, settings, tmp_path)
    same_run(tmp_path, whole)


def train_with_a_bad_number(config: dict, out: Path) -> None:
    """In the third step the loss of the second process is not a number."""
    from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration

    forward, count = LlamaSmopForConditionalGeneration.forward, 0

    def poisoned(self, *args, **kwargs):
        nonlocal count
        outputs = forward(self, *args, **kwargs)
        count += 1
        if count == 3 and os.environ["RANK"] == "1":
            outputs.loss = outputs.loss * float("nan")
        return outputs

    LlamaSmopForConditionalGeneration.forward = poisoned
    children.train(config, out)


@pytest.mark.parametrize("strategy", ("ddp", "fsdp2"))
def test_all_skip_a_step_that_is_bad_in_one(corpus, tmp_path, strategy):
    settings = config(corpus, strategy)
    settings["run"] |= {"save_every": 1, "keep": 5}
    children.ranks(train_with_a_bad_number, 2, settings, tmp_path)
    rows = [row for row in json.loads((tmp_path / "metrics.json").read_text()) if "loss" in row]
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 1, 1, 1]
    weights = [load_file(tmp_path / f"checkpoints/checkpoint-{n}/model.safetensors") for n in range(1, 6)]
    changed = [any(not a[k].equal(b[k]) for k in a) for a, b in pairwise(weights)]
    assert changed == [True, False, True, True]
    assert all(value.isfinite().all() for value in weights[-1].values())


def test_bad_clips_of_all_processes_are_reported(corpus, tmp_path):
    root = shutil.copytree(corpus, tmp_path / "corpus")
    bad = [clip.video_path(root) for clip in read_labels(root, "train.csv")[:6]]
    for path in bad:
        path.write_bytes(path.read_bytes()[:2000])
    settings = config(root)
    settings["data"]["stages"] = [{"modalities": {"audiovisual": 1}}]
    children.ranks(children.train, 2, settings, tmp_path / "run")
    assert set(json.loads((tmp_path / "run/bad_clips.json").read_text())) == {str(path) for path in bad}


def train_on_a_disk_of_its_own(config: dict, out: Path) -> None:
    """As on a machine that does not share the folder of the run with the others."""
    from llama_smop.training import resume

    resume.SHARED_FOLDER_TIMEOUT_S = 0.5
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    rank = os.environ["RANK"]
    try:
        children.train(config, out / rank)
    except ValueError as error:
        (out / f"error{rank}").write_text(str(error))


def test_a_folder_that_is_not_shared_is_refused_at_the_start(corpus, tmp_path):
    children.ranks(train_on_a_disk_of_its_own, 2, config(corpus), tmp_path)
    for rank in range(2):
        assert "must be the same folder on all machines" in (tmp_path / f"error{rank}").read_text()
    assert not list(tmp_path.rglob("checkpoint*"))


def of_parts(settings: dict) -> dict:
    """The published structure in small: frozen parts, LoRA."""
    settings["model"] = {
        "language_model": str(GOLDEN / "full_model/llm_hf"),
        "audio_tower": str(GOLDEN / "whisper/hf_model"),
        "video_tower": str(GOLDEN / "full_model/large_tiny_iter5.pt"),
        "lora": {"r": 4, "alpha": 8},
        "projector": settings["model"]["projector"],
    }
    return settings


def test_the_markers_embeddings_are_the_checkpoints_after_an_interruption(corpus, tmp_path):
    """They are random and frozen, so not among the weights that are trained; here another seed would draw others."""
    settings = of_parts(config(corpus))
    assert children.run(children.train, settings, tmp_path) == 0
    shutil.rmtree(tmp_path / "model")
    settings["run"]["seed"] = 1
    settings["optimizer"]["steps"] += 1
    assert children.run(children.train, settings, tmp_path) == 0
    rows = load_file(tmp_path / "model/special_tokens.safetensors")
    for name, value in load_file(tmp_path / f"checkpoints/checkpoint-{STEPS}/special_tokens.safetensors").items():
        assert torch.equal(rows[name], value), name


@pytest.mark.parametrize("loss", (pytest.param("plain", marks=pytest.mark.slow), "chunked"))
def test_frozen_parts_with_lora_are_sharded_too(corpus, tmp_path, loss):
    """The published recipe in small: a layer's weights are frozen in bfloat16, those of its LoRA learn in float32."""
    settings = of_parts(config(corpus, precision="bf16", gradient_checkpointing=True, fused_loss=loss))
    for strategy in ("ddp", "fsdp2"):
        settings["run"]["strategy"] = strategy
        children.ranks(children.train, 2, settings, tmp_path / strategy)
    losses = ("loss", "lm_loss", "load_balancing_loss", "router_z_loss", "grad_norm")
    assert_same_curves(tmp_path / "fsdp2", tmp_path / "ddp", losses)
    saved = load_file(tmp_path / "fsdp2/model/model.safetensors")
    assert saved and all("lora_" in name or name.startswith("multi_modal_projector.") for name in saved)
    assert all(value.dtype == torch.float32 for value in saved.values())
    loaded, whole = (model_folder.load(tmp_path / strategy / "model")[0].state_dict() for strategy in ("fsdp2", "ddp"))
    assert_same_weights(loaded, whole)
