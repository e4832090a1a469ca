"""Weights saved with the names of earlier versions load everywhere, and are never dropped in silence."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_smop.models import model_folder
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.tiny import build_tiny
from llama_smop.projector import DenseProjector, SMoPProjector
from llama_smop.training import fsdp
from llama_smop.training.averaging import average
from tests.models.conftest import WORDS

FORMER = {"bias1": "b1", "bias2": "b2", "layernorm_weight": "ln_weight", "layernorm_bias": "ln_bias"}
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16}


def formerly(state: dict) -> dict:
    names = {key: key.rpartition(".") for key in state}
    return {
        head + dot + FORMER.get(leaf, leaf) if "projector" in head or not dot else key: state[key]
        for key, (head, dot, leaf) in names.items()
    }


@pytest.fixture
def saved(tmp_path):
    """(a model, the folder that an earlier version would have written of it)."""
    torch.manual_seed(0)
    model, processor = build_tiny(WORDS, **SIZES)
    with torch.no_grad():
        for name in FORMER:
            getattr(model.multi_modal_projector, name).normal_()
    folder = model_folder.save(model.eval(), processor, tmp_path / "model")
    (folder / "sha256.json").unlink()
    state = formerly(load_file(folder / "model.safetensors"))
    assert "multi_modal_projector.ln_weight" in state
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model, folder


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_folder_loads_and_is_saved_and_loads_again(saved, tmp_path):
    model, folder = saved
    loaded, processor = model_folder.load(folder, "cpu")
    assert_same(model, loaded)
    again = model_folder.save(loaded, processor, tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() <= model.state_dict().keys(), "saved under former names"
    assert_same(model, model_folder.load(again, "cpu")[0])
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert_same(model, LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "sharded"))


@pytest.mark.parametrize("kind", (SMoPProjector, DenseProjector))
def test_a_projectors_state_dict_loads(kind):
    one, other = kind(8, 12, 8, layer_norm=True), kind(8, 12, 8, layer_norm=True)
    state = formerly(one.state_dict())
    assert {"b1", "b2", "ln_weight", "ln_bias"} <= state.keys()
    other.load_state_dict(state)
    assert_same(one, other)
    assert other.b1 is other.bias1 and other.ln_weight is other.layernorm_weight
    with pytest.raises(RuntimeError, match=r"Unexpected key.*b1"):
        other.load_state_dict(one.state_dict() | {"b1": one.bias1})


def test_a_sharded_training_loads_them(saved):
    model, folder = saved
    other, _ = build_tiny(WORDS, **SIZES)
    fsdp.load_weights(other, folder / "model.safetensors")
    assert_same(model, other)


def test_checkpoints_of_both_names_are_averaged(saved, tmp_path):
    """Of a training that an earlier version began and this one resumed."""
    model, folder = saved
    with torch.no_grad():
        model.multi_modal_projector.bias1.add_(2.0)
    (tmp_path / "now").mkdir()
    model.save_pretrained(tmp_path / "now")
    mean = load_file(average([tmp_path / "now", folder], tmp_path / "mean", tmp_path) / "model.safetensors")
    assert mean.keys() == load_file(tmp_path / "now/model.safetensors").keys()
    torch.testing.assert_close(mean["multi_modal_projector.bias1"], model.multi_modal_projector.bias1 - 1)
