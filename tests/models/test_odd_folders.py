"""A model folder with one odd file: one line that names the folder, before anything of size is built."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models import model_folder
from llama_smop.models.assemble import assemble
from llama_smop.models.tiny import build_tiny
from llama_smop.training import checkpoints
from tests.golden_files import GOLDEN
from tests.models.conftest import WORDS

NAN = float("nan")
FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
ODD = {
    "a layer count of nonsense": {
        "text_config.num_hidden_layers": [10**9, -1, 0, "x", None, 1.5, True, [1, 2], 10**30]
    },
    "of the audio tower": {"audio_config.encoder_layers": [10**9, -1, "x"], "audio_config.d_model": [0, 10**12, 17]},
    "of the video tower": {
        "video_config.num_hidden_layers": [10**9, -1, "x", None, 2.0, True],
        "video_config.hidden_size": [10**12, 0, "x", None],
        "video_config.num_attention_heads": [0, 3, {}],
        "video_config.trunk_channels": [3, [], [1, "x"], None, [10**9] * 3],
        "video_config.trunk_blocks": [[10**9] * 3, [1, 1, -1]],
        "video_config.norm_groups": [0, None],
        "video_config.hidden_act": ["nonsense", 3, None],
        "video_config.hidden_dropout": [-1, 2, NAN, "x"],
        "video_config.layer_norm_eps": [NAN, -1.0, "x"],
    },
    "of the projector": {
        "projector_config.hidden_features": [10**12, 0, None, "x"],
        "projector_config.num_experts": [10**9, 0, 1.5],
        "projector_config.activation": ["tanh", None, []],
        "projector_config.layer_norm": ["yes", None, 3],
        "projector_config.backend": ["opencl", 1],
    },
    "of the language model": {
        "text_config.model_type": ["nonsense", 3, "whisper", None],
        "text_config.vocab_size": [10**12, 0, "x"],
        "text_config.hidden_act": ["nonsense", 3],
        "text_config.rms_norm_eps": [NAN, "x"],
        "text_config.attention_dropout": [-1, 2, None],
        "text_config.rope_parameters.rope_theta": [0, -1, NAN, "x"],
        "text_config.pad_token_id": [10**9, "x"],
        "text_config.dtype": ["nonsense", "int8"],
    },
    "of the whole": {
        "text_config": [3, "x", [1]],
        "audio_config": [3, "x", [1]],
        "projector_config": [3, [1], {"kind": 3}],
        "modalities": [3, None, ["smell"], [1], ["audio", "audio"], {}],
        "rate_audio": [0, "x", 10**9, None, 2.5, [1, 2]],
        "rates": [3, "x", [], [[4]], [[4, 2], [4, 2]], [[0, 1]], [[4, 2.0]], {"a": 1}, [[4, 2], None]],
        "rate_projectors": [3, "x", None],
        "compression": [3, None, []],
        "audio_token_id": [-1, 10**9, "x", None, 1.5],
        "eos_token_id": ["x", ["x"], -1],
        "ctc_weight": [NAN, -1, "x", None, 10**30],
        "freeze_towers": ["no", None],
        "lora": [
            3,
            "x",
            {"language_model": 3},
            {"language_model": {"r": "x", "alpha": 1}},
            {"language_model": {"r": 4}},
        ],
        "sources": [3, {"language_model": 3}, {"nonsense": "x"}],
        "dtype": ["nonsense", "int8", 3],
        "model_type": ["llama", 3, None],
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16}
    model, processor = build_tiny(WORDS, max_seconds=1.0, **sizes)
    return model_folder.save(model, processor, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / checkpoints.SEAL).unlink()
    return tmp_path / "model"


def expect_one_line(load, folder, case=""):
    try:
        load(folder)
    except ValueError as error:
        assert str(error).startswith(f"{folder}: "), f"{case}: the folder is not named first: {error}"
        assert "\n" not in str(error) and len(str(error)) < 600, f"{case}: not one line: {error}"
        return str(error)
    raise AssertionError(f"{case} was accepted")


@pytest.mark.parametrize("kind", ODD)
def test_a_malformed_config(folder, kind):
    whole = json.loads((folder / "config.json").read_text())
    for place, values in ODD[kind].items():
        *parents, name = place.split(".")
        for value in values:
            config = json.loads(json.dumps(whole))
            part = config
            for parent in parents:
                part = part[parent]
            part[name] = value
            (folder / "config.json").write_text(json.dumps(config))
            expect_one_line(LlamaSmopForConditionalGeneration.from_pretrained, folder, f"{place} = {value!r}")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"model_type": "llama_smop"}', "\0" * 100, "\xff"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(folder, name, content):
    if content.startswith('{"') and name not in ("config.json", "tokenizer.json"):
        pytest.skip("which says nothing, so that the defaults hold")
    (folder / name).write_text(content, encoding="latin-1")
    expect_one_line(model_folder.load, folder, f"{name} of {content!r:.20}")


@pytest.mark.parametrize(
    "changes",
    [
        {"rate_audio": "x"},
        {"rate_video": 0},
        {"rates": [[4]]},
        {"rates": 3},
        {"audio_window": None},
        {"prompts": 3},
        {"prompts": {"audio": 3}},
    ],
    ids=str,
)
def test_a_malformed_processor(folder, changes):
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | changes))
    expect_one_line(model_folder.load, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2**17, "intermediate_size": 2**20, "vocab_size": 2**23}, "in another shape than"),
        ({"num_hidden_layers": 1000}, "lacks language_model.model.layers.1."),
    ],
)
def test_sizes_that_would_fill_the_memory_are_refused_by_the_shapes_of_the_weights(
    folder, changes, message, monkeypatch
):
    """Each within its bounds, together terabytes."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # which takes the memory
    assert message in expect_one_line(LlamaSmopForConditionalGeneration.from_pretrained, folder)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["language_model.model.norm.weight", "multi_modal_projector.w1"])
def test_a_weight_that_is_not_finite(folder, name, value):
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[3] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for load in (model_folder.load, LlamaSmopForConditionalGeneration.from_pretrained):
        assert f"{name} holds NaN or infinity" in expect_one_line(load, folder)


def test_a_part_whose_weights_are_not_finite(tmp_path):
    shutil.copytree(GOLDEN / "whisper/hf_model", tmp_path / "whisper")
    state = load_file(tmp_path / "whisper/model.safetensors")
    (bias,) = (value for name, value in state.items() if name.endswith("encoder.conv1.bias"))
    bias[0] = NAN
    save_file(state, tmp_path / "whisper/model.safetensors", {"format": "pt"})
    parts = {"language_model": GOLDEN / "full_model/llm_hf", "audio_tower": tmp_path / "whisper"}
    message = expect_one_line(lambda _: assemble(**parts, projector={"hidden_features": 16}), tmp_path / "whisper")
    assert "conv1.bias holds NaN or infinity" in message


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_sealed_folder_that_is_saved_into_again_loads_the_new_weights(saved, tmp_path, shard):
    """As after fine-tuning a model that a training wrote: the seal follows what is written and what is gone."""
    shutil.copytree(saved, tmp_path / "model")
    model, _ = model_folder.load(tmp_path / "model")
    with torch.no_grad():
        model.multi_modal_projector.w1.add_(1.0)
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    loaded, _ = model_folder.load(tmp_path / "model")
    assert torch.equal(loaded.multi_modal_projector.w1, model.multi_modal_projector.w1)
