"""Cached and embedded inputs give what ids without a cache give; ways of decoding that lose the speech are refused."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, GenerationConfig

from llama_smop.models.modeling_llama_smop import SPEECH_INPUTS
from llama_smop.models.outputs import CACHE
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
    for name in ("cache", "past_key_values"):  # what transformers calls it depends on its version
        cache = getattr(model(**prompt, use_cache=True), CACHE)
        found = model(input_ids=new, attention_mask=mask, **{name: cache}).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", (1, 3))
def test_no_cache_and_a_static_one_give_the_same_tokens(model, prompt, beams):
    settings = {"num_beams": beams, "min_new_tokens": 8, "max_new_tokens": 8}
    expected = model.generate(**prompt, **settings)
    assert torch.equal(model.generate(**prompt, **settings, use_cache=False), expected)
    assert torch.equal(model.generate(**prompt, **settings, cache_implementation="static"), expected)


STATIC = {"cache_implementation": "static", "max_cache_len": 128, "min_new_tokens": 6, "max_new_tokens": 6}


def lengths(processor) -> list[dict]:
    """Prompts of one clip each, all of different lengths."""
    return [dict(processor(**chosen([one], "audiovisual"))) for one in CLIPS]


def test_a_compiled_step_is_one_graph_for_prompts_of_all_lengths(model, processor):
    """As `generate` compiles it on a GPU."""
    settings = CompileConfig(fullgraph=True, mode="default", backend="eager")
    settings._compile_all_devices = True
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for prompt in lengths(processor):
        expected = model.generate(**prompt, min_new_tokens=6, max_new_tokens=6)
        assert torch.equal(model.generate(**prompt, **STATIC, compile_config=settings), expected)
    assert counted["unique_graphs"] - before == 1


def test_a_compiled_language_model_does_not_follow_every_length(model, processor):
    """A graph for the first prompt, one for prompts of any length, one for the steps."""
    compiled, counter = copy.deepcopy(model), CompileCounter()
    torch._dynamo.reset()
    compiled.language_model.compile(backend=counter, fullgraph=True)
    for prompt in lengths(processor):
        expected = model.generate(**prompt, min_new_tokens=6, max_new_tokens=6)
        assert torch.equal(compiled.generate(**prompt, **STATIC), expected)
    assert counter.frame_count == 3


def test_several_sequences_of_each_clip_stand_together(model, prompt):
    """The best of three beams is what three beams give; samples are drawn for each clip's own speech."""
    length = prompt["input_ids"].shape[1]
    best = model.generate(**prompt, num_beams=3, max_new_tokens=6)
    beams = model.generate(**prompt, num_beams=3, num_return_sequences=3, max_new_tokens=6)
    assert torch.equal(beams[::3, : best.shape[1]], best)
    sure = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 6}
    for several, count in ((beams, 3), (model.generate(**prompt, **sure), 2)):
        assert torch.equal(several[:, :length], prompt["input_ids"].repeat_interleave(count, 0))
    greedy = model.generate(**prompt, max_new_tokens=6)
    assert torch.equal(model.generate(**prompt, **sure), greedy.repeat_interleave(2, 0))
    torch.manual_seed(1)
    one = model.generate(**prompt, do_sample=True, max_new_tokens=6)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**prompt, do_sample=True, max_new_tokens=6), one)


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
