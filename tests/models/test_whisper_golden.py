"""The audio tower, its clip lengths and its pooling against the authors' encode_audio."""

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor

from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.part_weights import load_part, part_weights
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.tokenizer import word_tokenizer
from tests.golden_files import GOLDEN, golden
from tests.published_run import PublishedProcessor
from tests.rounding import TINY_MODEL, assert_same_sums

HF_MODEL = GOLDEN / "whisper/hf_model"


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["word"])


@pytest.fixture(scope="module")
def feature_extractor():
    return WhisperFeatureExtractor.from_pretrained(HF_MODEL)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = LlamaSmopConfig(
        modalities=("audio",),
        audio_config=WhisperConfig.from_pretrained(HF_MODEL),
        projector_config={"hidden_features": 8},
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        **{f"{m}_token_id": 0 for m in ("audio", "audio_end", "video", "video_end")},
    )
    model = LlamaSmopForConditionalGeneration(config).eval()
    load_part(model.audio_tower, part_weights("audio_tower", HF_MODEL), HF_MODEL)
    return model


def pooled(model, batch, rate):
    with torch.no_grad():
        states = model.get_audio_states(batch["input_features"])
        tokens, mask = model.compress(states[:, : batch["audio_mask"].shape[1]], batch["audio_mask"], rate)
    return tokens, mask, states


@pytest.mark.parametrize("case", ["batch2_pool4", "len27200_pool3", "len33920_f32trunc_pool1", "len4800_pool4_min25"])
def test_features_match(case, model, tokenizer, feature_extractor):
    data, notes = golden(f"whisper/{case}")
    parity = PublishedProcessor(feature_extractor, tokenizer, rate_audio=notes["pool"])
    parity.count_dtype = torch.float32
    clips = [clip[:n, 0] for clip, n in zip(data["audio"], notes["lengths"], strict=True)]
    batch = parity(audio=clips, do_normalize=False)
    frames = data["log_mel_head"].shape[2]
    assert_same_sums(batch["input_features"][:, :, :frames], data["log_mel_head"], TINY_MODEL)
    tokens, mask, states = pooled(model, batch, notes["pool"])
    frames = data["last_hidden_head"].shape[1]
    assert_same_sums(states[:, :frames], data["last_hidden_head"], TINY_MODEL)
    assert mask.all()
    assert_same_sums(tokens, data["out"], TINY_MODEL)

    # By itself our count is of integers, and of the clip's own length.
    ours = LlamaSmopProcessor(feature_extractor, tokenizer, rate_audio=notes["pool"])
    tokens, mask, _ = pooled(model, ours(audio=clips), notes["pool"])
    for i, n in enumerate(notes["lengths"]):
        count = max(n * 50 // 16000, 25) // notes["pool"]
        assert mask[i].sum() == count
        common = min(count, data["out"].shape[1])
        assert_same_sums(tokens[i, :common], data["out"][i, :common], TINY_MODEL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_token_counts_for_every_video_length(dtype, tokenizer, feature_extractor):
    name = {"float32": "float32", "bfloat16": "bf16"}[dtype]
    table = golden("whisper/lightning_bf16_true")[0][f"token_counts_{name}_by_video_frames_1_to_750"]
    parity = PublishedProcessor(feature_extractor, tokenizer)
    parity.count_dtype = getattr(torch, dtype)
    exact = LlamaSmopProcessor(feature_extractor, tokenizer)
    ours = [parity.audio_frames(640 * frames) for frames in range(1, 751)]
    assert ours == table.clamp(max=1500).tolist()  # they slice 1500 frames past their end
    assert [exact.audio_frames(640 * frames) for frames in range(1, 751)] == [max(2 * n, 25) for n in range(1, 751)]
