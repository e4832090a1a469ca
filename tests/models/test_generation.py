"""Cached and embedded inputs give what ids without a cache give; ways of decoding that lose the speech are refused."""

import pytest
import torch
from transformers import GenerationConfig

from llama_smop.models.modeling_llama_smop import SPEECH_INPUTS
from tests.models.conftest import chosen, clip

CLIPS = [clip(45, 1), clip(20, 2), clip(31, 3)]


@pytest.fixture
def prompt(processor):
    """Left-padded, of clips of different lengths."""
    return dict(processor(**chosen(CLIPS, "audiovisual")))


@torch.no_grad()
@pytest.mark.parametrize("speech", [True, False], ids=["speech", "text"])
def test_the_next_tokens_from_a_cache_are_those_without_one(model, prompt, speech):
    if not speech:
        prompt = {k: v for k, v in prompt.items() if k not in SPEECH_INPUTS}
    new = torch.tensor([[5, 6], [7, 8], [9, 10]])
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(new)], 1)
    ids = torch.cat([prompt["input_ids"], new], 1)
    expected = model(**prompt | {"input_ids": ids, "attention_mask": mask}).logits[:, -2:]
    cache = model(**prompt, use_cache=True).past_key_values
    found = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_tuple_on_request(model, prompt):
    output = model(**prompt)
    as_tuple = model(**prompt, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)


@torch.no_grad()
@pytest.mark.parametrize("modality", ["audio", "video", "audiovisual"])
def test_embeddings_in_place_of_ids(model, processor, modality):
    prompt = dict(processor(**chosen(CLIPS, modality)))
    ids = prompt.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    expected = model(**prompt, input_ids=ids).logits
    assert torch.equal(model(**prompt, inputs_embeds=embeds).logits, expected)
    assert torch.equal(model(**prompt, inputs_embeds=embeds, input_ids=ids).logits, expected)
    tokens = model.generate(**prompt, input_ids=ids, max_new_tokens=6)[:, ids.shape[1] :]
    assert torch.equal(model.generate(**prompt, inputs_embeds=embeds, max_new_tokens=6), tokens)


def test_speech_without_a_place_for_it_is_refused(model, prompt):
    del prompt["input_ids"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="speech needs input_ids or inputs_embeds"):
            call(**prompt)


@pytest.mark.parametrize(
    "setting",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "paged"},
        {"generation_config": GenerationConfig(prefill_chunk_size=4)},
        {"assistant_model": "itself"},
    ],
    ids=str,
)
def test_ways_of_decoding_that_lose_the_speech_are_refused(model, processor, setting):
    prompt = processor(**chosen(CLIPS[:1], "audiovisual"))
    if "assistant_model" in setting:
        setting = {"assistant_model": model.language_model}
    name = "prefill_chunk_size" if "generation_config" in setting else next(iter(setting))
    with pytest.raises(ValueError, match=f"does not go with {name}.*the speech would not be heard"):
        model.generate(**prompt, **setting, max_new_tokens=2)


def test_text_alone_is_decoded_in_any_way(model):
    ids = torch.tensor([[0, 5, 6, 5, 6, 5]])
    expected = model.generate(ids, max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6, prompt_lookup_num_tokens=2), expected)
