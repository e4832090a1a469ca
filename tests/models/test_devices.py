"""Dtypes, devices and kinds of attention; where accelerate may cut the model in pieces."""

import copy

import pytest
import torch
from accelerate import infer_auto_device_map

from llama_smop import LlamaSmopForConditionalGeneration
from tests.models.conftest import chosen, clip

WHOLE = ("ResidualBlock", "HubertPositionalConvEmbedding", "SMoPProjector", "WhisperEncoderLayer", "LlamaDecoderLayer")


@pytest.mark.parametrize("name", WHOLE)
def test_what_adds_its_input_or_holds_its_parameters_itself_stays_whole(model, name):
    module_names = [n for n, m in model.named_modules() if type(m).__name__ == name]
    assert module_names
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for share in range(1, 100):
        limits = {"cpu": total * share // 100, "disk": 10 * total}
        places = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
        cut = [n for n in module_names if any(key.startswith(f"{n}.") for key in places)]
        assert cut == [], f"with {share}% of the memory on the first device {cut[0]} is cut in two"


DTYPES = {"auto": torch.bfloat16, torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, None: torch.bfloat16}


@pytest.fixture(scope="module")
def in_bfloat16(pair, tmp_path_factory):
    """A saved model in bfloat16, and one batch."""
    folder = tmp_path_factory.mktemp("saved")
    copy.deepcopy(pair[0]).to(torch.bfloat16).save_pretrained(folder)
    return folder, pair[1](**chosen([clip(20, 1)], "audiovisual"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_is_that_of_every_part(in_bfloat16, dtype):
    folder, batch = in_bfloat16
    named = {} if dtype is None else {"dtype": dtype}
    model = LlamaSmopForConditionalGeneration.from_pretrained(folder, **named)
    assert {p.dtype for p in model.parameters()} == {DTYPES[dtype]}
    assert model(**batch).logits.dtype == DTYPES[dtype]


@torch.no_grad()
@pytest.mark.parametrize("device_map", ("auto", "cpu", {"": "cpu"}), ids=str)
def test_a_device_map(in_bfloat16, device_map):
    folder, batch = in_bfloat16
    plain = LlamaSmopForConditionalGeneration.from_pretrained(folder)
    placed = LlamaSmopForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    placed_logits = placed(**batch.to(placed.device)).logits.cpu()
    torch.testing.assert_close(placed_logits, plain(**batch.to("cpu")).logits)


@torch.no_grad()
def test_implementations_of_attention_agree(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    batch = pair[1](**chosen([clip(20, 1), clip(30, 2)], "audiovisual"))
    logits = {}
    for name in ("eager", "sdpa"):
        model = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name)
        parts = (model, model.language_model, model.audio_tower)
        assert {part.config._attn_implementation for part in parts} == {name}
        logits[name] = model(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-4)
