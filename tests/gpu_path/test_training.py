"""Whole training steps on a GPU: nothing makes the host wait, and pinned batches are read when they have arrived."""

import json
from contextlib import contextmanager

import pytest
import torch
import yaml

from llama_smop.cli import main
from tests.gpu_path.problems import Expected, batch, loss_of, projector, step
from tests.training import children

pytestmark = pytest.mark.gpu

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1}


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", (64, 200), ids=("dense", "sorted"))
def test_a_projectors_step_never_waits(backend, tokens):
    """Forward, backward, clipping and AdamW. (A whole recogniser's step waits: in transformers, for its masks.)"""
    module, inputs = projector(backend), batch(tokens=tokens)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def train_step():
        optimizer.zero_grad()
        loss_of(module(*inputs)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    train_step()  # kernels are compiled and loaded, states made
    with waiting_is_an_error():
        train_step()
    Expected(module, *inputs).check(step(module, *inputs))


def test_batches_from_pinned_memory(backend):
    """A loader's batches, copied without waiting; the pinned memory is handed out again for later batches."""
    module = projector(backend)
    drawn = [batch("cpu", seed=seed) for seed in range(4)]
    expected = [Expected(module, *inputs) for inputs in drawn]
    loader = torch.utils.data.DataLoader(drawn, batch_size=None, pin_memory=True)
    got = []
    for pinned in loader:
        assert all(t.is_pinned() for t in pinned)
        got.append(step(module, *(t.to("cuda", non_blocking=True) for t in pinned)))
    for one, want in zip(got, expected, strict=True):
        want.check(one)


def trained(config: dict, folder) -> None:
    """`llama-smop train`; the losses of its steps go to metrics.json."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["train", "--config", str(folder / "config.yaml"), "--out", str(folder / "run")])


def test_a_training_follows_the_curve_of_the_cpu(tmp_path):
    """`llama-smop train` with loader processes and pinned batches, in float32, beside a process that sees no GPU."""
    corpus = tmp_path / "corpus"
    main(["corpus", "make", str(corpus), "--clips", "12", "--seed", "3", "--workers", "1"])
    config = {
        "model": {"tiny": SIZES, "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1}},
        "data": {"root": str(corpus), "max_clips": 2, "buckets": 2, "workers": 1, "noise": {"snrs": [None]}},
        "optimizer": {"learning_rate": 1e-3, "steps": 4, "precision": "fp32"},
        "run": {"log_every": 1, "save_every": 4},
    }
    trained(config, tmp_path / "gpu")
    assert children.run(trained, config, tmp_path / "cpu") == 0
    curves = [
        torch.tensor(
            [r["loss"] for r in json.loads((tmp_path / d / "run" / "metrics.json").read_text()) if "loss" in r]
        )
        for d in ("gpu", "cpu")
    ]
    assert len(curves[0]) == 4
    torch.testing.assert_close(*curves, rtol=2e-3, atol=0)
