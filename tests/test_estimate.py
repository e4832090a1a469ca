"""The memory estimate against a run measured by torch's profiler, on scaled-down models."""

import dataclasses
import functools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, WhisperConfig

from llama_smop import LlamaSmopForConditionalGeneration, estimate
from llama_smop.models import published
from llama_smop.models.configuration_llama_smop import AvHubertVideoConfig, LlamaSmopConfig
from llama_smop.training.config import TrainConfig

pytestmark = pytest.mark.xdist_group("estimate")  # which share some estimates

# Without it a CPU convolves video in a workspace many times the step, which no estimate is about.
BFLOAT16_CONVOLUTION = torch.ops.mkldnn._is_mkldnn_bf16_supported()
WORKLOAD = estimate.Workload(clips=3, seconds=1.2, text_tokens=12)


TEXT = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# The language model's layers and its logits then take most of the memory.
MOSTLY_TEXT = {"modalities": ["audio"], "text_config": LlamaConfig(**TEXT | {"vocab_size": 20000})}


def scaled_down(**changes) -> LlamaSmopConfig:
    """The published structure: frozen towers, DEDR, LoRA on a Llama with shared key-value heads."""
    settings = {
        "text_config": LlamaConfig(**TEXT),
        "audio_config": WhisperConfig(
            d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=256, max_source_positions=100
        ),
        "video_config": AvHubertVideoConfig(
            frontend_channels=8,
            trunk_channels=(8, 16, 32, 64),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
        ),
        "projector_config": {"hidden_features": 128},
        "lora": {"language_model": {"r": 8, "alpha": 8}},
        "audio_token_id": 1,
        "audio_end_token_id": 2,
        "video_token_id": 3,
        "video_end_token_id": 4,
        "pad_token_id": 5,
        "bos_token_id": 6,
        "eos_token_id": 7,
    }
    return LlamaSmopConfig(**settings | changes)


CHANGES = {
    "none": {},
    "mostly text": MOSTLY_TEXT,
    "recompute": {"projector_config": {"hidden_features": 128, "recompute": "hz"}},
    "audio": {"modalities": ["audio"]},
    "all trained": {"freeze_towers": False, "lora": {}},
}


@functools.cache
def estimated(changes: str, dtype: torch.dtype, **options) -> estimate.Estimate:
    """Of a training, each once: it takes a second."""
    return estimate.training(scaled_down(**CHANGES[changes]), WORKLOAD, dtype=dtype, **options)


def measured_peak(step) -> int:
    """Most bytes that the CPU allocator had given out at once during `step`, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("dtype", "changes", "options"),
    [
        (torch.float32, "none", {}),
        (torch.float32, "mostly text", {}),
        (torch.float32, "mostly text", {"fused_loss": "plain"}),
        (torch.float32, "mostly text", {"gradient_checkpointing": True}),
        (torch.float32, "recompute", {}),
        (torch.bfloat16, "none" if BFLOAT16_CONVOLUTION else "audio", {}),
        (torch.float32, "all trained", {}),
    ],
    ids=["float32", "labels", "all logits", "checkpointing", "recompute", "bfloat16", "all trained"],
)
def test_training(dtype, changes, options):
    config, found = scaled_down(**CHANGES[changes]), estimated(changes, dtype, **options)
    model = LlamaSmopForConditionalGeneration(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if "gradient_checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    model.fused_loss = options.get("fused_loss", "auto")
    skip_logits = model.fused_loss != "plain"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(**estimate.batch(config, WORKLOAD, dtype), skip_logits=skip_logits).loss.backward()

    step()  # what the first step alone allocates
    model.zero_grad(set_to_none=True)
    peak = measured_peak(step)
    optimizer.step()
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert 0.9 * peak < found.step < (1.3 if "gradient_checkpointing" in options else 1.1) * peak
    assert found.optimizer == pytest.approx(states, rel=0.1)
    assert found.weights == pytest.approx(weights, rel=0.01)
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("beams", [1, 4])
def test_inference(beams):
    config = scaled_down()
    found = estimate.inference(config, WORKLOAD, dtype=torch.float32, num_beams=beams)
    model = LlamaSmopForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    batch = {k: v for k, v in estimate.batch(config, WORKLOAD, torch.float32).items() if k != "labels"}
    text = WORKLOAD.text_tokens + 1
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:, :-text]
    batch["input_ids"][:, -7:] = 10

    def step():
        inputs = {k: v.clone() for k, v in batch.items()}
        model.generate(**inputs, num_beams=beams, max_new_tokens=text)

    step()
    assert found.step == pytest.approx(measured_peak(step), rel=0.1)
    assert found.optimizer == 0


def test_what_saves_memory_is_seen_to():
    config = scaled_down(**MOSTLY_TEXT)
    plain = estimated("mostly text", torch.float32, fused_loss="plain")
    labelled = estimated("mostly text", torch.float32)
    less = estimated("mostly text", torch.float32, gradient_checkpointing=True)
    positions = estimate.batch(config, WORKLOAD, torch.float32)["input_ids"].numel()
    assert plain.step - labelled.step > positions * config.text_config.vocab_size * 4
    assert labelled.flops < plain.flops
    assert less.step < labelled.step and less.flops > labelled.flops


def test_flops_follow_the_parameters():
    """2 for each weight and token in a language model's product; the backward of LoRA needs those of the inputs."""
    config = scaled_down()
    found = estimate.inference(config, WORKLOAD, dtype=torch.float32)
    longer = estimate.inference(config, estimate.Workload(clips=6, seconds=1.2, text_tokens=12), dtype=torch.float32)
    assert longer.flops == pytest.approx(2 * found.flops, rel=1e-6)
    text = config.text_config
    per_layer = 2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 512
    length = estimate.batch(config, WORKLOAD, torch.float32)["input_ids"].numel()
    assert found.flops > 2 * text.num_hidden_layers * per_layer * length
    # The towers are frozen, the language model's own weights too: its backward is that of the inputs alone.
    backward = estimated("none", torch.float32).flops - found.flops
    assert backward == pytest.approx(2 * length * (text.num_hidden_layers * per_layer + 2 * 128 * 2000), rel=0.2)


def test_published_sizes_have_their_names():
    sizes = {"llama-3.2-1b": 1.24e9, "llama-3.2-3b": 3.21e9, "llama-3.1-8b": 8.03e9}
    for name, parameters in sizes.items():
        config = published.published(name)
        with torch.device("meta"):
            model = LlamaSmopForConditionalGeneration(config)
        own = sum(p.numel() for n, p in model.language_model.named_parameters() if "lora_" not in n)
        assert own == pytest.approx(parameters, rel=0.005), name
    with pytest.raises(ValueError, match="unknown language model"):
        published.published("llama-4")


def test_table_has_a_line_for_each_estimate():
    sizes = {"weights": estimate.GIB, "optimizer": 0, "step": estimate.GIB // 2, "flops": 3 * 10**14}
    row = estimate.Estimate("small", "training", {"projector": 1_500_000}, 1_500_000, **sizes)
    lines = estimate.table([row, row], tflops=100).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| small | training | 1.5 M | 1.5 M | 1.00 | 0.00 | 0.50 | 1.50 | 300.0 | 3.00 |"


def test_an_empty_workload_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        estimate.Workload(clips=0)


TRAIN = {"data": {"root": "corpus"}, "optimizer": {"steps": 1, "precision": "bf16"}}


@pytest.mark.parametrize(
    "size", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama-3.2-1b")) for name in published.PUBLISHED]
)
def test_what_lies_beside_the_code_is_what_it_computes(size):
    """After a change that moves them: `python -m llama_smop.estimate`. Another torch may make other copies."""
    kept = [row for row in estimate.published_estimates() if row.name == size]
    for row, found in zip(kept, estimate.estimated_published(size), strict=True):
        assert dataclasses.replace(found, step=row.step) == row
        assert found.step == pytest.approx(row.step, rel=0.02), (row.name, row.mode)


def test_info_of_a_training_file(monkeypatch):
    """The published sizes are not computed anew, which takes a quarter of a minute."""
    monkeypatch.setattr(estimate, "published", None)
    config = TrainConfig.model_validate(TRAIN | {"model": {"tiny": {"width": 32}}})
    text = estimate.info(config)
    assert "multi_modal_projector" in text
    assert text.count("| this file |") == 2
    for size in published.PUBLISHED:
        assert [line.split(" | ")[1] for line in text.splitlines() if size in line] == [
            "training",
            "inference, 1 beam",
            "inference, 15 beams",
        ]


def test_the_recipes_sizes_stand_in_for_files_that_are_not_here(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section = {
        "language_model": "meta-llama/Llama-3.2-3B",
        "audio_tower": "openai/whisper-medium.en",
        "video_tower": "large_vox_iter5.pt",
        "lora": "llama-3.2-3b",
    }
    config, remark = estimate.model_config(TrainConfig.model_validate(TRAIN | {"model": section}))
    assert config.text_config.hidden_size == 3072
    assert config.lora["language_model"]["r"] == 96
    assert "assumed" in remark
    section["language_model"] = "somebody/model"
    with pytest.raises(ValueError, match="no such folder"):
        estimate.model_config(TrainConfig.model_validate(TRAIN | {"model": section}))
