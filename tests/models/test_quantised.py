"""Towers and language model in 8 or 4 bits: with bitsandbytes where it is installed, else with a stand-in for it."""

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.quantise import language_model_in
from llama_smop.models.tiny import build_tiny
from tests.models.conftest import WORDS, chosen, clip

CLIPS = [clip(20, 1), clip(25, 2)]
LORA = {part: {"r": 4, "alpha": 8, "init": "normal"} for part in ("language_model", "video_tower")}
SIZES = {"width": 64, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "max_seconds": 1.0, "ctc_weight": 0.0}


class Product(torch.autograd.Function):
    """x·weightᵀ + bias, which like bitsandbytes' gives a view."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return nn.functional.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None, None


class Linear8bit(nn.Module):
    """A linear layer whose weight is whole numbers and a scale, as bitsandbytes keeps it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return Product.apply(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(model: nn.Module) -> int:
    """Replace the linear layers that transformers would replace; their number."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(n, kept)]
    for name in names:
        model.set_submodule(name, Linear8bit(model.get_submodule(name)))
    return len(names)


def made(lora: bool):
    """With LoRA and frozen towers, or all trainable."""
    torch.manual_seed(0)
    model, processor = build_tiny(WORDS, **SIZES)
    config = type(model.config)(**model.config.to_dict() | {"lora": LORA if lora else {}, "freeze_towers": lora})
    return LlamaSmopForConditionalGeneration(config), processor


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all trainable"])
@pytest.mark.parametrize("modality", ["audio", "video", "audiovisual"])
def test_it_runs_and_only_what_learnt_before_learns(modality, lora):
    model, processor = made(lora)
    batch = processor(text=["bin blue", "set red at"], **chosen(CLIPS, modality))
    before, expected = trainable(model), model.eval()(**batch).loss
    assert quantise(model) > 10
    model.freeze()
    names = set(dict(model.named_parameters()))
    assert trainable(model) == {n for n in before & names if model.get_parameter(n).is_floating_point()}
    assert all(name in names for name in before if "lora_" in name)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0)
    loss.backward()


@pytest.mark.parametrize(("bits", "tolerance"), ((8, 0.05), (4, 0.3)))
@pytest.mark.parametrize("library", ("torchao", "bitsandbytes"))
def test_the_language_model_alone(tmp_path, library, bits, tolerance):
    pytest.importorskip(library)
    model, processor = made(lora=True)
    model.save_pretrained(tmp_path)
    settings = language_model_in(bits, library)
    loaded = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path, quantization_config=settings).eval()
    own, plain = loaded.state_dict(), model.state_dict()
    same = {n for n in plain if type(own.get(n)) is torch.Tensor and torch.equal(own[n], plain[n])}
    rounded = {n for n in plain if n not in same}
    layers = {f"{n}.weight" for n, m in model.language_model.named_modules() if type(m) is nn.Linear}
    layers = {f"language_model.{n}" for n in layers if "lora_" not in n and "lm_head" not in n}
    assert rounded == layers, "towers, projector, LoRA or embeddings were rounded too, or the language model was not"
    batch = processor(text=["bin blue", "set red at"], **chosen(CLIPS, "audiovisual"))
    expected = model.eval()(**batch).loss
    torch.testing.assert_close(loaded(**batch).loss.float(), expected, rtol=tolerance, atol=0)
    prompt = processor(**chosen(CLIPS, "audiovisual"))
    assert loaded.generate(**prompt, max_new_tokens=2).shape == model.generate(**prompt, max_new_tokens=2).shape


@pytest.mark.parametrize(("arguments", "message"), (((3,), "8 or 4 bits, got 3"), ((8, "gguf"), "got 'gguf'")))
def test_another_quantisation_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        language_model_in(*arguments)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("llama_smop.models.quantise.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="torchao is not installed"):
        language_model_in(8)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all trainable"])
@pytest.mark.parametrize("bits", [8, 4])
def test_with_bitsandbytes(tmp_path, bits, lora):
    pytest.importorskip("bitsandbytes")
    model, processor = made(lora)
    model.save_pretrained(tmp_path)
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    settings = BitsAndBytesConfig(**four if bits == 4 else {"load_in_8bit": True})
    loaded = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path, quantization_config=settings)
    assert {n for n in trainable(loaded) if "lora_" in n} == {n for n in trainable(model) if "lora_" in n}
    loaded.save_pretrained(tmp_path / "again")  # before it is used: bitsandbytes may pack weights anew where they are
    batch = processor(text=["bin blue", "set red at"], **chosen(CLIPS, "audiovisual"))
    loss = loaded(**batch).loss
    torch.testing.assert_close(loss.float(), model.eval()(**batch).loss, rtol=0.2, atol=0)
    loss.backward()
    again = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(**batch).loss, loss)
