"""Checkpoints are read without running what they carry."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from llama_smop.convert import convert
from llama_smop.models.formats.fairseq import avhubert_config, load_avhubert
from llama_smop.models.formats.safe_load import load_checkpoint, state_dict_of
from llama_smop.models.part_weights import part_weights
from tests.golden_files import GOLDEN

FAIRSEQ = GOLDEN / "full_model/large_tiny_iter5.pt"


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("where", ["beside", "legacy"])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, suffix, where):
    trap, file = tmp_path / "ran", tmp_path / f"evil{suffix}"
    content = {"model": {"w": torch.zeros(2)}, "extra": Malice(trap)}
    if where == "beside":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content["extra"], protocol=2))
    with pytest.raises(ValueError, match=r"evil.*refused, as loading it could run code") as error:
        load_checkpoint(file)
    assert not trap.exists()
    assert "\n" not in str(error.value)


def test_fairseqs_dictionary_and_numpy_scalars_pass_as_inert(tmp_path):
    checkpoint = load_checkpoint(FAIRSEQ)
    assert len(state_dict_of(checkpoint, FAIRSEQ)) == 186
    file = tmp_path / "scalar.pt"
    torch.save({"model": {"w": torch.ones(2)}, "best": np.float64(3.0)}, file)
    assert torch.equal(state_dict_of(load_checkpoint(file), file)["w"], torch.ones(2))


def test_the_tower_of_a_fairseq_file_has_its_settings():
    tower, report = load_avhubert(FAIRSEQ)
    config = tower.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert (config.trunk_channels, config.trunk_blocks) == ([4, 8, 16, 32], [2, 2, 2, 2])
    assert not tower.training
    assert report.missing == report.unexpected == []


def test_a_fine_tuned_file_gives_its_encoder(tmp_path):
    checkpoint = load_checkpoint(FAIRSEQ)
    model = {f"encoder.w2v_model.{k}": v for k, v in checkpoint["model"].items()}
    model |= {"decoder.embed_tokens.weight": torch.zeros(3, 2)}
    settings = {"model": {"_name": "av_hubert_seq2seq", "w2v_args": {"model": checkpoint["cfg"]["model"]}}}
    torch.save({"model": model, "cfg": settings}, tmp_path / "vsr.pt")
    tower, _ = load_avhubert(tmp_path / "vsr.pt")
    original, _ = load_avhubert(FAIRSEQ)
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in tower.state_dict().items())


def test_a_fairseq_file_becomes_a_folder_that_serves_as_video_tower(tmp_path):
    report = convert(FAIRSEQ, tmp_path / "tower")
    assert report.missing == report.unexpected == []
    assert (tmp_path / "tower/conversion.json").is_file()
    ours, theirs = part_weights("video_tower", tmp_path / "tower"), part_weights("video_tower", FAIRSEQ)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


@torch.no_grad()
def test_base_is_post_norm(tmp_path):
    checkpoint = load_checkpoint(FAIRSEQ)
    checkpoint["cfg"]["model"]["layer_norm_first"] = False
    torch.save({"model": checkpoint["model"], "cfg": checkpoint["cfg"]}, tmp_path / "base.pt")
    tower, report = load_avhubert(tmp_path / "base.pt")
    assert type(tower.encoder).__name__ == "HubertEncoder"
    assert report.missing == report.unexpected == []
    assert tower(torch.randn(1, 4, 1, 88, 88)).last_hidden_state.isfinite().all()


def test_lightning_files_and_flat_ones_are_one(tmp_path):
    weights = OrderedDict(a=torch.zeros(1), b=torch.ones(2))
    lightning = {"state_dict": {f"model.{k}": v for k, v in weights.items()}, "epoch": 3}
    for content in (weights, lightning):
        torch.save(content, tmp_path / "x.ckpt")
        assert state_dict_of(load_checkpoint(tmp_path / "x.ckpt"), "x").keys() == weights.keys()


def _file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def test_wrong_damaged_and_absent_files_are_named(tmp_path):
    whole = FAIRSEQ.read_bytes()
    cases = [
        (_file(tmp_path, "cut.pt", whole[: len(whole) // 2]), "cut.pt: truncated or damaged"),
        (_file(tmp_path, "empty.pt", b""), "empty.pt: truncated or damaged"),
        (_file(tmp_path, "cut.safetensors", b"\x10\x00\x00\x00"), "cut.safetensors: truncated or damaged"),
        (_file(tmp_path, "video.mp4", b"x"), "expected a .pt, .pth, .ckpt, .bin, .safetensors file, got .mp4"),
    ]
    for file, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            load_checkpoint(file)
        assert "\n" not in str(error.value), file
    with pytest.raises(FileNotFoundError, match=r"none.pt: no such checkpoint file"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        state_dict_of({"epoch": 3}, "x.pt")


def test_another_model_and_another_variant_are_refused():
    with pytest.raises(ValueError, match="no AV-HuBERT video encoder"):
        avhubert_config({"w": torch.zeros(1)}, source="x.pt")
    state = state_dict_of(load_checkpoint(FAIRSEQ), FAIRSEQ)
    with pytest.raises(ValueError, match="modality_fuse = 'add' is not supported"):
        avhubert_config(state, {"modality_fuse": "add"}, source="x.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"cfg": 5}, "cfg holds a int"),
        ({"cfg": {"model": [1]}}, r"cfg\.model holds a list"),
        ({"cfg": None, "args": "text"}, "args holds a str"),
        ({"cfg": {"model": {"w2v_args": 3}}}, "w2v_args holds a int"),
        ({"cfg": {"model": {"w2v_args": {"model": 3}}}}, r"w2v_args\.model holds a int"),
        ({"cfg": {"model": {"encoder_attention_heads": "four"}}}, "encoder_attention_heads = 'four'"),
        ({"cfg": {"model": {"encoder_attention_heads": 5}}}, "encoder_attention_heads = 5"),
        ({"cfg": {"model": {"layer_norm_first": "yes"}}}, "layer_norm_first = 'yes'"),
        ({"model": {5: torch.zeros(1)}}, "a tensor is named 5"),
        ({"model": {("a", "b"): torch.zeros(1), "w": torch.zeros(1)}}, "a tensor is named"),
    ),
)
def test_a_file_of_another_make_is_refused_by_name(tmp_path, changes, message):
    checkpoint = {"model": state_dict_of(load_checkpoint(FAIRSEQ), FAIRSEQ), "cfg": {"model": {}}} | changes
    torch.save(checkpoint, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=rf"odd\.pt: .*{message}") as error:
        convert(tmp_path / "odd.pt", tmp_path / "to", language_model="x")
    assert "\n" not in str(error.value) and not (tmp_path / "to").exists()


@pytest.mark.parametrize("scale", (float("nan"), float("inf"), 0, -1))
def test_a_scale_that_is_none_is_refused(tmp_path, scale):
    torch.save({"llm.w": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="--lora-scale"):
        convert(tmp_path / "a.pt", tmp_path / "to", language_model="x", lora_scale=scale)
