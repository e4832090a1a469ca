"""Resizing the vocabulary: the model goes on as before, learns, and comes back from a folder."""

import pytest
import torch

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.assemble import assemble
from llama_smop.models.tiny import build_tiny
from tests.golden_files import GOLDEN
from tests.models.conftest import WORDS, chosen, clip

CLIPS = [clip(20, 1), clip(25, 2)]
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "max_seconds": 1.0}
PARTS = {"language_model": GOLDEN / "full_model/llm_hf", "audio_tower": GOLDEN / "whisper/hf_model"}


def made(kind: str):
    torch.manual_seed(0)
    if kind == "fetched parts":
        return assemble(**PARTS, projector={"hidden_features": 16}, lora={"language_model": {"r": 4, "alpha": 1}})
    model, processor = build_tiny(WORDS, **SIZES, ctc_weight=0.0 if kind == "without CTC" else 1.5)
    if kind == "untied":
        text = model.config.text_config.to_dict() | {"tie_word_embeddings": False}
        model = LlamaSmopForConditionalGeneration(type(model.config)(**model.config.to_dict() | {"text_config": text}))
    return model, processor


@pytest.mark.parametrize("kind", ["tied", "untied", "without CTC", "fetched parts"])
@pytest.mark.parametrize("steps", [[7], [10, 3], [4, 0], ["to a multiple of 64"]], ids=str)
def test_resized_saved_and_loaded(kind, steps, tmp_path):
    model, processor = made(kind)
    modality = "audio" if kind == "fetched parts" else "audiovisual"
    texts = ["hello", "world"] if kind == "fetched parts" else ["bin", "set"]
    batch = processor(text=texts, **chosen(CLIPS, modality))
    vocabulary = model.config.text_config.vocab_size
    with torch.no_grad():
        before = model.eval()(**batch).logits
    for more in steps:
        if isinstance(more, int):
            model.resize_token_embeddings(vocabulary + more)
        else:
            model.resize_token_embeddings(pad_to_multiple_of=64)
    now = -(-vocabulary // 64) * 64 if isinstance(more, str) else vocabulary + more
    assert model.config.text_config.vocab_size == now
    output = model(**batch)
    torch.testing.assert_close(output.logits[..., :vocabulary], before)
    assert output.logits.shape[-1] == now == model.language_model.lm_head.out_features
    assert output.loss.isfinite()
    model.train()(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["tied", "fetched parts"])
def test_the_tokens_that_the_model_needs_stay(kind):
    model, _ = made(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="special tokens need a vocabulary of at least"):
        model.resize_token_embeddings(max(model.config.special_token_ids))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_one_dtype_whatever_the_language_models_config_says():
    model, _ = made("tied")
    text = model.config.text_config.to_dict() | {"dtype": "bfloat16"}
    model = LlamaSmopForConditionalGeneration(type(model.config)(**model.config.to_dict() | {"text_config": text}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
