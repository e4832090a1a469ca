"""Saving and loading: the same model comes back, nothing is half-written, and disagreement is an error."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_smop import LlamaSmopConfig, LlamaSmopForConditionalGeneration
from llama_smop.models import pretrained
from llama_smop.models.assemble import assemble
from tests.golden_files import GOLDEN
from tests.models.conftest import chosen, clip

CLIPS = [clip(20, 1), clip(25, 2)]


@torch.no_grad()
def test_round_trip(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "model")
    batch = processor(**chosen(CLIPS, "audiovisual"))
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), loaded.generate(**batch, max_new_tokens=4))
    assert not loaded.training
    assert loaded.generation_config.do_sample is False


def test_a_full_disk_leaves_the_earlier_checkpoint(model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def _expect_one_line(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        LlamaSmopForConditionalGeneration.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_truncated_file_is_named(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    _expect_one_line(saved, "truncated or damaged")


def test_missing_and_unexpected_weights_are_named(saved):
    state = load_file(saved / "model.safetensors")
    gate = state.pop("multi_modal_projector.gate_weight")
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    _expect_one_line(saved, "lacks multi_modal_projector.gate_weight")
    save_file(state | {"multi_modal_projector.gate_weight": gate, "extra": gate.clone()}, saved / "model.safetensors")
    _expect_one_line(saved, "extra")


def test_a_config_of_other_sizes_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["projector_config"]["hidden_features"] = 100
    (saved / "config.json").write_text(json.dumps(config))
    _expect_one_line(saved, "another shape.*multi_modal_projector.bias1")


@pytest.fixture
def assembled():
    torch.manual_seed(0)
    return assemble(
        language_model=GOLDEN / "full_model/llm_hf",
        audio_tower=GOLDEN / "whisper/hf_model",
        video_tower=GOLDEN / "full_model/large_tiny_iter5.pt",
        projector={"hidden_features": 16},
        lora={"language_model": {"r": 4, "alpha": 1}},
    )


def test_what_can_be_fetched_again_is_not_saved(assembled, tmp_path):
    model, processor = assembled
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path / "small")
    kept = load_file(tmp_path / "small/model.safetensors")
    assert all("lora_" in k or k.startswith("multi_modal_projector.") for k in kept)
    loaded = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "small")
    state, own = model.state_dict(), loaded.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[k], own[k]) for k in state), "the parts fetched again differ"
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    batch = processor(text=["hello", "world"], **chosen(CLIPS, "audiovisual"))
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, loaded(**batch).loss)

    model.save_pretrained(tmp_path / "whole", complete=True)
    assert len(load_file(tmp_path / "whole/model.safetensors")) > len(kept)
    (tmp_path / "small" / pretrained.SPECIAL_TOKENS_FILE).unlink()
    _expect_one_line(tmp_path / "small", "lacks special_tokens.safetensors")


def test_a_source_that_is_gone_is_named(assembled, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, _ = assembled
    model.config.sources["audio_tower"] = str(tmp_path / "nowhere")
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="nowhere: no such folder, not in the cache"):
        LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "small")


def test_only_the_base_models_weights_are_taken(assembled):
    model, processor = assembled
    base = load_file(GOLDEN / "full_model/llm_hf/model.safetensors")["model.embed_tokens.weight"]
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings[: len(base)], base)
    assert len(embeddings) == len(base) + 5 == len(processor.tokenizer)
    assert isinstance(model.config, LlamaSmopConfig)
    assert model.config.eos_token_id == processor.tokenizer.eos_token_id
