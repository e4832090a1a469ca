"""Training on two processes: the loss curve of one process, whatever falls to which."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_smop.data.corpus import make_corpus
from tests.pipeline import children

pytestmark = pytest.mark.xdist_group("ranks")

STEPS, WORLD = 5, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Texts of one to six words: the batches of a step differ in their number of tokens."""
    root = make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", clips=16, seed=3, progress=False, workers=1)
    labels = root / "labels/train.csv"
    lines = []
    for i, line in enumerate(labels.read_text().splitlines()):
        *fields, text = line.split(",")
        lines.append(",".join([*fields, " ".join(text.split()[: 1 + i % 6])]))
    labels.write_text("\n".join(lines) + "\n")
    return root


def config(corpus: Path, ctc_weight: float, **optimizer) -> dict:
    """Four experts a modality for a handful of tokens, and one modality a batch: some experts are idle on a rank."""
    return {
        "model": {
            "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "ctc_weight": ctc_weight},
            "projector": {"hidden_features": 16, "num_experts": 8, "top_k": 1, "sharing": "DEDR"},
        },
        "data": {
            "root": str(corpus),
            "max_clips": 2,
            "buckets": 2,
            "stages": [{"modalities": {"audio": 1, "video": 1, "audiovisual": 1}}],
        },
        "optimizer": {"learning_rate": 1e-3, "steps": STEPS, "precision": "fp32", **optimizer},
        "run": {"log_every": 1, "save_every": 3},
    }


def train_without_router_losses(config: dict, out: Path) -> None:
    """The routers' losses are means over the processes, not those of the joint batch: left out of the comparison."""
    from llama_smop.models.configuration_llama_smop import LlamaSmopConfig

    made = LlamaSmopConfig.__post_init__

    def without(self, **kwargs):
        made(self, **kwargs)
        self.load_balancing_coef = self.router_z_coef = 0.0

    LlamaSmopConfig.__post_init__ = without
    children.train(config, out)


def train_joint_batches(config: dict, out: Path) -> None:
    """One process that is given what the ranks are given, together."""
    _replan(lambda shares: [first + second for first, second in zip(*shares, strict=True)])
    train_without_router_losses(config, out)


def train_in_turn(config: dict, out: Path) -> None:
    """One process that accumulates over what the ranks are given."""
    _replan(lambda shares: [batch for batches in zip(*shares, strict=True) for batch in batches])
    children.train(config, out)


def _replan(join) -> None:
    from llama_smop import train as module

    share = module.training_plan

    def plan(config, clips, rank, world):
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"accumulate": 1})})
        return join([share(config, clips, r, WORLD) for r in range(WORLD)])

    module.training_plan = plan


def curve(out: Path, name: str) -> torch.Tensor:
    rows = json.loads((out / "metrics.json").read_text())
    return torch.tensor([row[name] for row in rows if name in row], dtype=torch.float64)


def test_the_curve_is_that_of_the_joint_batch(corpus, tmp_path):
    settings = config(corpus, ctc_weight=0.0)
    children.ranks(train_without_router_losses, WORLD, settings, tmp_path / "two")
    assert children.run(train_joint_batches, settings, tmp_path / "one") == 0
    for name in ("loss", "lm_loss"):
        two, one = (curve(tmp_path / run, name) for run in ("two", "one"))
        assert len(two) == STEPS
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_with_the_auxiliary_losses_it_is_that_of_the_ranks_in_turn(corpus, tmp_path):
    """Equal texts, so that the mean over processes is the mean over their batches."""
    labels = corpus / "labels/same.csv"
    lines = (corpus / "labels/train.csv").read_text().splitlines()
    labels.write_text("".join(f"{line.rsplit(',', 1)[0]},now\n" for line in lines))
    settings = config(corpus, ctc_weight=0.5)
    settings["data"] |= {"train": "same.csv", "noise": None}
    children.ranks(children.train, WORLD, settings, tmp_path / "two")
    settings["optimizer"]["accumulate"] = WORLD
    assert children.run(train_in_turn, settings, tmp_path / "one") == 0
    names = ("loss", "lm_loss", "ctc_loss", "load_balancing_loss", "router_z_loss", "expert_load/0", "expert_load/9")
    for name in names:
        two, one = (curve(tmp_path / run, name) for run in ("two", "one"))
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    idle = [sum(curve(tmp_path / "two", f"expert_load/{e}") == 0) for e in range(16)]
    assert sum(idle) >= 8, "batches of one modality leave the other's experts idle"
    ours, theirs = (load_file(tmp_path / run / "model/model.safetensors") for run in ("two", "one"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_go_on_after_an_interruption(corpus, tmp_path):
    settings = config(corpus, ctc_weight=0.5)
    children.ranks(children.train, WORLD, settings, tmp_path / "whole")
    (tmp_path / "again").mkdir()
    source = tmp_path / "whole/checkpoints/checkpoint-3"
    (tmp_path / "again/checkpoints").mkdir()
    source.rename(tmp_path / "again/checkpoints/checkpoint-3")
    children.ranks(children.train, WORLD, settings, tmp_path / "again")
    assert curve(tmp_path / "again", "loss").equal(curve(tmp_path / "whole", "loss"))
