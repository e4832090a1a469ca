"""Training on several processes: the loss curve of one process with their batches joined, whatever falls to which."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_smop.models.tiny import build_tiny
from llama_smop.training.config import TrainConfig
from llama_smop.training.fsdp import units
from llama_smop.training.run import train
from tests.rounding import TINY_MODEL, assert_same_sums, two_orders
from tests.training import children

pytestmark = pytest.mark.xdist_group("ranks")

STEPS, SAVED = 5, 3
LOSSES = ("loss", "lm_loss", "ctc_loss", "load_balancing_loss", "router_z_loss", "grad_norm")
LEARNING_RATE = 1e-3
ADDITIONS = TINY_MODEL * STEPS
# AdamW makes of a gradient that is nothing but rounding a whole step in either direction: one weight is then off by
# twice the learning rate, beside 108 000 weights whose norm is 53.
CURVES = two_orders(ADDITIONS) + 2 * LEARNING_RATE / 53


@pytest.fixture(scope="module")
def corpus(shared_corpus, tmp_path_factory) -> Path:
    """Texts of one to six words: the batches of a step differ in their number of tokens."""
    root = shutil.copytree(shared_corpus, tmp_path_factory.mktemp("corpus") / "corpus")
    labels = root / "labels/train.csv"
    lines = []
    for i, line in enumerate(labels.read_text().splitlines()):
        *fields, text = line.split(",")
        lines.append(",".join([*fields, " ".join(text.split()[: 1 + i % 6])]))
    labels.write_text("\n".join(lines) + "\n")
    return root


def config(corpus: Path, strategy: str = "ddp", **optimizer) -> dict:
    """Four experts a modality for a handful of tokens, and one modality a batch: some experts are idle on a rank."""
    return {
        "model": {
            "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "ctc_weight": 0.5},
            "projector": {"hidden_features": 16, "num_experts": 8, "top_k": 1, "sharing": "DEDR"},
        },
        "data": {
            "root": str(corpus),
            "max_clips": 2,
            "buckets": 2,
            "stages": [{"modalities": {"audio": 1, "video": 1, "audiovisual": 1}}],
        },
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "steps": STEPS,
            "precision": "fp32",
            "global_aux_losses": True,
            **optimizer,
        },
        "run": {"log_every": 1, "save_every": SAVED, "strategy": strategy},
    }


def train_joint_batches(world: int, config: dict, out: Path) -> None:
    """One process that is given what `world` ranks are given, together."""
    _replan(world, lambda shares: [list(chain(*batches)) for batches in zip(*shares, strict=True)])
    children.train(config, out)


def train_in_turn(world: int, config: dict, out: Path) -> None:
    """One process that accumulates over what the ranks are given."""
    _replan(world, lambda shares: [batch for batches in zip(*shares, strict=True) for batch in batches])
    config["optimizer"]["accumulate"] = world
    children.train(config, out)


def _replan(world: int, join) -> None:
    from llama_smop.training import build as module

    share = module.training_plan
    module.training_plan = lambda config, clips, *_: join([share(config, clips, r, world) for r in range(world)])


def curve(out: Path, name: str) -> torch.Tensor:
    rows = json.loads((out / "metrics.json").read_text())
    return torch.tensor([row[name] for row in rows if name in row], dtype=torch.float64)


def assert_same_curves(ours: Path, theirs: Path, names=LOSSES, exactly: bool = False) -> None:
    """Equal but for the order of sums, and for the log's seventh decimal."""
    rtol, atol = (0, 0) if exactly else (CURVES, 1e-7)
    for name in names:
        assert len(curve(ours, name)) == STEPS
        torch.testing.assert_close(
            curve(ours, name), curve(theirs, name), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Of two strategies with two ranks: the sum of two gradients has no order, only their norm's sum has one.

    A key's bias adds as much to all scores of a query, which the softmax takes out again: its gradient is rounding
    alone, and AdamW scales it up to as much as a whole step.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("k_proj.bias"):
            assert (ours[name] - value).abs().max() <= 2 * LEARNING_RATE * STEPS, name
            continue
        assert_same_sums(ours[name], value, ADDITIONS, name, scale=LEARNING_RATE)  # which bounds a weight's step


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model/model.safetensors")


@pytest.fixture(scope="module")
def joint(corpus, tmp_path_factory):
    """One process's run with the joint batches of `world` ranks, each accumulated over `accumulate` of them."""
    runs = {}

    def run(world: int, accumulate: int) -> Path:
        out = runs.get((world, accumulate))
        if out is None:
            out = runs[world, accumulate] = tmp_path_factory.mktemp("joint")
            settings = config(corpus, accumulate=accumulate)
            assert children.run(train_joint_batches, world, settings, out) == 0
        return out

    return run


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    """Two ranks' run of a strategy, accumulating over two batches, which may be of different modalities."""
    runs = {}

    def run(strategy: str) -> Path:
        if strategy not in runs:
            runs[strategy] = tmp_path_factory.mktemp(strategy)
            children.ranks(children.train, 2, config(corpus, strategy, accumulate=2), runs[strategy])
        return runs[strategy]

    return run


def test_layers_and_the_projector_are_the_units_of_sharding():
    torch.manual_seed(0)
    model, _ = build_tiny(["word"], width=16, hidden_features=16)
    layers = ["HubertEncoderLayerStableLayerNorm", "LlamaDecoderLayer", "WhisperEncoderLayer"]
    assert units(model) == sorted([*layers, "SMoPProjector"])


def test_one_process_cannot_shard(corpus, tmp_path):
    with pytest.raises(ValueError, match="fsdp2 shards over processes: start it with torchrun"):
        train(TrainConfig.model_validate(config(corpus, "fsdp2")), tmp_path)


@pytest.mark.parametrize("strategy", ("ddp", "fsdp2"))
def test_two_processes_give_the_curve_of_the_joint_batch(joint, two, strategy):
    assert_same_curves(two(strategy), joint(2, accumulate=2))


@pytest.mark.slow  # test_ranks_setbacks.py has checkpointing in two processes
@pytest.mark.parametrize("strategy", ("ddp", "fsdp2"))
def test_so_do_four_with_gradient_checkpointing(corpus, joint, tmp_path, strategy):
    children.ranks(children.train, 4, config(corpus, strategy, gradient_checkpointing=True), tmp_path)
    assert_same_curves(tmp_path, joint(4, accumulate=1))
    idle = sum(curve(tmp_path, f"expert_load/{e}").eq(0).sum() for e in range(16))
    assert idle >= 8, "batches of one modality leave the other's experts idle"


def test_a_sharded_training_writes_what_a_whole_one_does(two):
    sharded, whole = two("fsdp2"), two("ddp")
    for folder in ("model", f"checkpoints/checkpoint-{SAVED}"):
        assert {p.name for p in (sharded / folder).iterdir()} == {p.name for p in (whole / folder).iterdir()}
    assert_same_weights(weights(sharded), weights(whole))


@pytest.mark.parametrize(
    ("first", "then"),
    (
        pytest.param("ddp", "ddp", marks=pytest.mark.slow),
        pytest.param("fsdp2", "fsdp2", marks=pytest.mark.slow),
        ("fsdp2", "ddp"),
        ("ddp", "fsdp2"),
    ),
)
def test_they_go_on_after_an_interruption_with_either_strategy(corpus, two, tmp_path, first, then):
    checkpoint = Path("checkpoints") / f"checkpoint-{SAVED}"
    shutil.copytree(two(first) / checkpoint, tmp_path / checkpoint)
    children.ranks(children.train, 2, config(corpus, then, accumulate=2), tmp_path)
    assert_same_curves(tmp_path, two(first), exactly=first == then)


def train_and_count_logits(tied: bool, config: dict, out: Path) -> None:
    """Writes how many steps took all logits, and how many did without."""
    from transformers import LlamaConfig

    from llama_smop.models import modeling_llama_smop, tiny

    tiny.LlamaConfig = lambda **settings: LlamaConfig(**settings | {"tie_word_embeddings": tied})
    decide, kinds = modeling_llama_smop.without_logits, []

    def counted(*args, **kwargs):
        kinds.append(decide(*args, **kwargs))
        return kinds[-1]

    modeling_llama_smop.without_logits = counted
    children.train(config, out)
    if os.environ["RANK"] == "0":
        (out / "kinds.json").write_text(json.dumps(kinds))


@pytest.mark.parametrize("tied", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_a_sharded_head_needs_not_make_all_logits(corpus, tmp_path, tied):
    for strategy in ("ddp", "fsdp2"):
        children.ranks(train_and_count_logits, 2, tied, config(corpus, strategy), tmp_path / strategy)
        assert json.loads((tmp_path / strategy / "kinds.json").read_text()) == ["chunked"] * STEPS
    assert_same_curves(tmp_path / "fsdp2", tmp_path / "ddp")


@pytest.mark.slow  # test_rates.py compares what the ranks draw
@pytest.mark.parametrize("strategy", ("ddp", "fsdp2"))
def test_ranks_take_the_same_rate_through_its_own_projector(corpus, tmp_path, strategy):
    settings = config(corpus, strategy)
    settings["model"] |= {"rates": [[4, 2], [16, 5]], "rate_projectors": "separate"}
    children.ranks(children.train, 2, settings, tmp_path / "two")
    settings["run"]["strategy"] = "ddp"
    assert children.run(train_joint_batches, 2, settings, tmp_path / "one") == 0
    assert_same_curves(tmp_path / "two", tmp_path / "one")
    rates = {len(curve(tmp_path / "two", f"lm_loss/{rate}")) for rate in ("4,2", "16,5")}
    assert rates == {2, 3}, "both rates are drawn"


def score(arguments: list[str]) -> None:
    from llama_smop.cli import main

    main(["evaluate", *arguments])


def test_clips_are_shared_out_when_a_model_is_scored(corpus, two, tmp_path):
    scores = {world: tmp_path / f"{world}.json" for world in (1, 2)}
    common = ["--model", str(two("ddp") / "model"), "--root", str(corpus), "--snr", "0", "--snr", "clean"]
    assert children.run(score, [*common, "--json", str(scores[1])]) == 0
    children.ranks(score, 2, [*common, "--json", str(scores[2])])
    assert scores[1].read_text() == scores[2].read_text()
    assert [row["modality"] for row in json.loads(scores[1].read_text())] == [
        *(["audio"] * 2),
        "video",
        *(["audiovisual"] * 2),
    ]


def test_without_global_aux_losses_it_is_the_curve_of_the_ranks_in_turn(corpus, tmp_path):
    """Of one process that accumulates over the ranks' batches, which differ in their text tokens."""
    settings = config(corpus, global_aux_losses=False)
    settings["data"]["noise"] = None
    children.ranks(children.train, 2, settings, tmp_path / "two")
    assert children.run(train_in_turn, 2, settings, tmp_path / "one") == 0
    assert_same_curves(tmp_path / "two", tmp_path / "one", (*LOSSES, "expert_load/0", "expert_load/9"))
