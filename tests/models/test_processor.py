"""What the processor makes of clips and text, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from llama_smop import LlamaSmopProcessor
from llama_smop.models.tokenizer import word_tokenizer
from llama_smop.models.units import streams_of
from tests.models.conftest import chosen, clip
from tests.rounding import assert_same_sums

PROMPT = {
    "audio": "transcribe speech to text.",
    "video": "transcribe video to text.",
    "audiovisual": "transcribe speech and video to text.",
}


@pytest.mark.parametrize("modality", list(PROMPT))
def test_the_sequence_is_the_recipes(processor, modality):
    batch = processor(text=["set blue now"], **chosen([clip(27, 0)], modality))
    A = 54 // 4 if "audio" in streams_of(modality) else 0
    V = 27 // 2 if "video" in streams_of(modality) else 0
    speech = ["<audio>"] * (A + 1) * bool(A) + ["</audio>"] * bool(A)
    speech += ["<video>"] * (V + 1) * bool(V) + ["</video>"] * bool(V)
    expected = ["<|begin_of_text|>", *speech, *PROMPT[modality].split(), "set", "blue", "now", "<|end_of_text|>"]
    assert processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()) == expected
    labels = batch["labels"][0]
    assert (labels[:-4] == -100).all()
    assert torch.equal(labels[-4:], batch["input_ids"][0, -4:])
    if V:
        assert batch["video_values"].shape == (1, 26, 1, 88, 88)
    if A:
        assert batch["audio_mask"].sum() == 54


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_unlabelled(processor, side):
    batch = processor(text=["set", "bin blue at f"], padding_side=side, **chosen([clip(20, 0), clip(30, 1)], "audio"))
    pads = batch["input_ids"] == processor.tokenizer.pad_token_id
    assert torch.equal(batch["attention_mask"] == 0, pads)
    assert (batch["labels"][pads] == -100).all()
    assert pads[0, 0 if side == "left" else -1]
    assert not pads[1].any()


def test_without_text_prompts_end_at_the_right_for_generation(processor):
    batch = processor(**chosen([clip(20, 0), clip(30, 1)], "audio"))
    assert "labels" not in batch
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert batch["attention_mask"][0, 0] == 0


@pytest.mark.parametrize("lengths", ([1], [399, 5000], [16000, 24000, 31234], [-1], [0, 300], [-200], [-401]))
def test_the_features_are_those_of_the_whole_window(processor, lengths):
    """Silence beyond the longest clip is filled in, not computed; lengths up to 0 count back from the window's end."""
    window, random = processor.audio_window * 320, np.random.default_rng(0)
    audio = [random.standard_normal(n if n > 0 else window + n).astype(np.float32) for n in lengths]
    whole = processor.feature_extractor(audio, sampling_rate=16000, max_length=window, return_tensors="pt")
    features = processor._log_mel(audio, [25] * len(audio))["input_features"]
    assert features.shape == whole["input_features"].shape
    # Powers of 400 samples in some 20 bins, then their logarithm, of which 1 here is 4 decades.
    assert_same_sums(features, whole["input_features"], 420, "the log-mel spectrum", scale=1.0)


def test_audio_is_cut_or_padded_to_the_video(processor):
    audio, video = clip(30, 0)
    even = processor(audio=[audio], video=[video])
    longer = processor(audio=[torch.cat([audio, torch.ones(5000)])], video=[video])
    shorter = processor(audio=[audio[:-3000]], video=[video])
    silent_end = processor(audio=[torch.cat([audio[:-3000], torch.zeros(3000)])], video=[video])
    assert torch.equal(even["input_features"], longer["input_features"])
    assert torch.equal(shorter["input_features"], silent_end["input_features"])
    assert torch.equal(even["audio_mask"], shorter["audio_mask"])


def test_arrays_tensors_and_columns_are_one(processor):
    audio = clip(20, 0)[0]
    batches = [processor(audio=[a]) for a in (audio, audio.numpy(), audio[:, None], audio.tolist())]
    for batch in batches[1:]:
        assert torch.equal(batches[0]["input_features"], batch["input_features"])


def test_a_single_clip_need_not_be_in_a_list(processor):
    audio, video = clip(20, 0)
    expected = processor(text=["bin"], audio=[audio], video=[video])
    for sound in (audio, audio.numpy(), audio[:, None], audio.tolist(), audio[None], tuple(audio.tolist())):
        for picture in (video, video.numpy(), video[None]):
            found = processor(text="bin", audio=sound, video=picture)
            assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = LlamaSmopProcessor.from_pretrained(tmp_path)
    clips = [clip(20, 0), clip(25, 1)]
    ours = processor(text=["set red", "bin"], **chosen(clips, "audiovisual"))
    theirs = loaded(text=["set red", "bin"], **chosen(clips, "audiovisual"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_folder_of_an_earlier_version_keeps_its_prompt(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["prompts"] = {"audio": "hear", "video": "see", "audio_video": "set red now"}
    settings |= {"published_padding": False, "published_audio_count": None}
    file.write_text(json.dumps(settings))
    batch = LlamaSmopProcessor.from_pretrained(tmp_path)(**chosen([clip(20, 0)], "audiovisual"))
    assert processor.tokenizer.decode(batch["input_ids"][0, -3:]) == "set red now"


def test_text_round_trip(processor):
    ids = processor.encode("Bin BLUE at f")
    assert processor.tokenizer.decode(ids) == "bin blue at f"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "audio, video or both, got neither"),
        ({"text": "bin"}, "audio, video or both, got neither"),
        ({"text": np.zeros(16000), "sampling_rate": 16000}, r"the first argument is the text; .* processor\(audio="),
        ({"text": [np.zeros(16000)]}, "the first argument is the text"),
        ({"audio": []}, "at least one clip"),
        ({"audio": [np.zeros(16000)], "text": ["a", "b"]}, "one text for each of 1 clips, got 2"),
        (
            {"audio": [np.zeros(16000)], "text": ["set purple now"]},
            "cannot carry 'purple' of the text 'set purple now'",
        ),
        ({"audio": [np.zeros(16000)], "text": ["set <audio> now"]}, "cannot carry '<audio>'"),
        ({"audio": [np.zeros(0)]}, "no audio samples"),
        ({"audio": [np.zeros(40000)]}, "2.50 s is longer than the audio window of 2.00 s"),
        ({"audio": [np.zeros((2, 16000))]}, "mono"),
        ({"audio": np.zeros(0)}, "no audio samples"),
        ({"video": torch.zeros(20, 88, 88)}, r"\(T, 1, H, W\)"),
        ({"video": [torch.zeros(1, 1, 88, 88)]}, "1 video frames is shorter than one token of 2 frames"),
        ({"video": [torch.zeros(20, 88, 88)]}, r"\(T, 1, H, W\)"),
        ({"audio": [np.zeros(16000)], "padding_side": "top"}, '"left" or "right"'),
    ],
)
def test_bad_input_is_one_clear_line(processor, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(**arguments)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_the_special_tokens_is_refused(processor):
    bare = type(processor.tokenizer)(
        tokenizer_object=word_tokenizer(["a"])._tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    vocabulary = bare.get_vocab()
    bare.get_vocab = lambda: {k: v for k, v in vocabulary.items() if k != "<video>"}
    with pytest.raises(ValueError, match="lacks the special tokens <video>;"):
        LlamaSmopProcessor(processor.feature_extractor, bare)


@pytest.mark.parametrize("words", [["two words"], [""]])
def test_a_word_has_no_white_space(words):
    with pytest.raises(ValueError, match="white space"):
        word_tokenizer(words)
