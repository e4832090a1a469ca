"""The processor takes what every processor of transformers takes: files, rates, requests, chats, common keywords."""

import numpy as np
import pytest
import soundfile
import torch

from llama_smop.data.media import read_audio, read_video, write_video
from llama_smop.data.transforms import ClipTransform, layer_norm
from tests.models.conftest import chosen, clip

RANDOM = np.random.default_rng(0)
SAMPLES = (RANDOM.standard_normal(25600) * 0.1).astype(np.float32)
FRAMES = RANDOM.integers(0, 255, (40, 96, 96, 3), dtype=np.uint8)
HEARD, SEEN = {"type": "audio", "path": "talk.mp4"}, {"type": "video", "path": "talk.mp4"}


@pytest.fixture
def talk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("talk.mp4", FRAMES, audio=SAMPLES)
    soundfile.write("talk.wav.float", SAMPLES, 16000, format="WAV", subtype="FLOAT")
    return tmp_path


def user(*parts) -> list:
    return [{"role": "user", "content": list(parts)}]


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_raw_clip_is_prepared_as_in_training(processor):
    audio, video = ClipTransform.testing()(SAMPLES, FRAMES)
    expected = processor(audio=[audio], video=[video], do_normalize=False)
    assert_same(processor(audio=SAMPLES, videos=FRAMES), expected)
    channels_first = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)
    assert_same(processor(audio=torch.from_numpy(SAMPLES)[None], videos=[[channels_first]]), expected)


def test_sound_that_is_normalised_already_stays_as_it_is(processor):
    """The second layer norm undoes what the first one's epsilon took: 1e-8 of twice the variance, and rounding."""
    once = layer_norm(SAMPLES)
    bound = 1e-8 / (2 * SAMPLES.var()) + 4 * np.finfo(np.float32).eps
    assert np.abs(layer_norm(once) - once).max() <= bound * np.abs(once).max()


@pytest.mark.parametrize("rate", [8000, 44100])
def test_another_rate_is_resampled_as_a_file_of_it_is(processor, tmp_path, rate):
    samples = SAMPLES[: rate // 2]
    soundfile.write(tmp_path / "other.wav", samples, rate, subtype="FLOAT")
    given = processor(audio=samples, sampling_rate=rate)
    assert given["audio_mask"].sum() == len(samples) * 50 // rate
    assert_same(given, processor(audio=read_audio(tmp_path / "other.wav")))
    assert_same(given, processor(audio=[samples], audio_kwargs={"sampling_rate": rate}))


def test_a_request_reads_files(processor, talk):
    sound, picture = read_audio("talk.mp4"), read_video("talk.mp4", with_sound=True)
    both = processor(audio=sound, videos=picture)
    assert_same(processor.apply_transcription_request(audio="talk.mp4", video=["talk.mp4"]), both)
    assert_same(processor.apply_transcription_request(talk / "talk.mp4", (talk / "talk.mp4").as_uri()), both)
    assert_same(processor.apply_transcription_request(audio="talk.wav.float"), processor(audio=SAMPLES))
    alone = processor.apply_transcription_request(video="talk.mp4", prompt="set blue")
    assert processor.batch_decode(alone["input_ids"])[0].endswith("</video> set blue")


@pytest.mark.parametrize(
    ("parts", "settings", "request_"),
    [
        ([HEARD], {}, {"audio": "talk.mp4"}),
        ([SEEN, HEARD], {}, {"audio": "talk.mp4", "video": "talk.mp4"}),
        ([SEEN], {"load_audio_from_video": True}, {"audio": "talk.mp4", "video": "talk.mp4"}),
        ([{"type": "text", "text": "set red"}, SEEN], {}, {"video": "talk.mp4", "prompt": "set red"}),
        ([{"type": "audio", "audio": SAMPLES}], {}, {"audio": SAMPLES}),
        ([{"type": "audio", "audio": torch.from_numpy(SAMPLES)}], {}, {"audio": SAMPLES}),
        ([{"type": "video", "video": FRAMES}], {}, {"video": FRAMES}),
    ],
)
def test_a_chat_is_the_same_request(processor, talk, parts, settings, request_):
    expected = processor.apply_transcription_request(**request_)
    chat = {"tokenize": True, "return_dict": True, **settings}
    assert_same(processor.apply_chat_template(user(*parts), **chat), expected)
    together = processor.apply_chat_template([user(*parts)] * 2, **chat)
    assert all(torch.equal(together[name][1:], value) for name, value in expected.items())


def test_the_text_of_a_chat_is_a_prompt_for_the_processor(processor):
    clips = chosen([clip(20, 0), clip(30, 1)], "audiovisual")
    texts = processor.apply_chat_template([user({"type": "video"}, {"type": "audio"})] * 2)
    assert texts[0] == "<|begin_of_text|><audio></audio><video></video>Transcribe speech and video to text."
    assert_same(processor(texts, **clips), processor(**clips))
    assert_same(processor([t.removeprefix("<|begin_of_text|>") for t in texts], **clips), processor(**clips))


@pytest.mark.parametrize(
    "chat",
    [
        user({"type": "text", "text": "hello"}),
        user(HEARD, HEARD),
        user(HEARD) * 2,
        [{"role": "system", "content": "be quiet"}, *user(HEARD)],
    ],
)
def test_a_chat_that_the_model_was_not_trained_on_is_refused(processor, chat):
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="one message, of a user, with one clip"):
        processor.apply_chat_template(chat)


def test_sequences_are_padded_as_asked(processor):
    audio = [clip(20, 0)[0], clip(30, 1)[0]]
    assert processor(audio=audio, padding="max_length", max_length=99)["input_ids"].shape == (2, 99)
    assert processor(audio=audio, text_kwargs={"padding": "max_length", "max_length": 99})["input_ids"].shape[1] == 99
    longest = processor(audio=audio, padding=True, max_length=99, return_tensors="pt", truncation=True)
    assert_same(longest, processor(audio=audio))
    assert processor(audio=audio, pad_to_multiple_of=16)["input_ids"].shape[1] % 16 == 0


def test_decoding_is_the_tokenizers(processor):
    ids = [processor.encode("set blue"), processor.encode("bin")]
    assert processor.batch_decode(ids) == ["set blue", "bin"] and processor.decode(ids[0]) == "set blue"


def test_a_processor_that_is_saved_keeps_its_template(processor, tmp_path):
    own = type(processor)(processor.feature_extractor, processor.tokenizer, prompts={"audio": "set blue"})
    own.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert loaded.apply_chat_template(user({"type": "audio"})).endswith("</audio>set blue")
    assert_same(loaded(audio=SAMPLES), own(audio=SAMPLES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"audio": np.zeros((2, 16000))}, r"\(2, 16000\) may be 2 clips or 2 channels"),
        ({"audio": torch.tensor(1.0)}, "mono samples, got a single number"),
        ({"audio": 5}, "mono samples, got int"),
        ({"audio": [None]}, "mono samples, got NoneType"),
        ({"audio": {"array": SAMPLES}}, "got dict"),
        ({"audio": b"RIFF"}, "got bytes"),
        ({"audio": (SAMPLES * 32767).astype(np.int16)}, r"floats in \[-1, 1\], got integers"),
        ({"audio": SAMPLES * np.nan}, "not finite"),
        ({"audio": "absent.wav"}, "absent.wav: no such file"),
        ({"audio": SAMPLES, "sampling_rate": 0}, "sampling_rate must be whole Hz"),
        ({"audio": SAMPLES, "sampling_rate": "16k"}, "sampling_rate"),
        ({"audio": SAMPLES, "return_tensors": "np"}, 'must be "pt"'),
        ({"audio": SAMPLES, "truncation": True, "max_length": 5}, "does not fit max_length = 5"),
        ({"audio": [SAMPLES, SAMPLES[:9000]], "padding": False}, "make no batch without padding"),
        ({"audio": SAMPLES, "return_mm_token_type_ids": True}, "return_mm_token_type_ids"),
        ({"audio": SAMPLES, "images": FRAMES}, "expected audio and video, got images"),
        ({"video": FRAMES, "videos": FRAMES}, "both video and videos"),
        ({"videos": FRAMES[:, :90]}, r"mouth crops \(T, 96, 96, 3\), got \(40, 90, 96, 3\)"),
        ({"videos": FRAMES.astype(np.float32)}, "transformed already, or"),
        ({"videos": FRAMES, "do_normalize": False}, "leave out do_normalize=False"),
        ({"videos": FRAMES, "fps": 10}, "25 frames a second"),
        ({"audio": SAMPLES, "prompt": ["a", "b"]}, "one prompt for each of 1 clips, got 2"),
        ({"audio": SAMPLES, "text": "<audio></audio>" * 2}, "expected 1 <audio></audio> in the prompt, got 2"),
        ({"audio": SAMPLES, "text": "<video></video>set"}, "expected 1 <audio></audio> in the prompt, got 0"),
        ({"audio": [SAMPLES, SAMPLES], "text": ["<audio></audio>set", "bin"]}, "got both"),
    ],
)  # fmt: skip
def test_odd_input_is_one_clear_line(processor, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        processor(**arguments)
    assert "\n" not in str(error.value)


def test_a_misspelt_keyword_is_not_ignored(processor):
    with pytest.raises(TypeError, match="unexpected keyword argument 'paddding'"):
        processor(audio=SAMPLES, paddding=True)


def test_a_picture_that_shows_more_than_a_mouth_is_refused(processor, tmp_path):
    write_video(tmp_path / "face.mp4", np.full((10, 128, 160, 3), 90, np.uint8))
    with pytest.raises(ValueError, match=r"face\.mp4: shows 160×128 pixels, no mouth crop of 96×96; cut it"):
        processor.apply_transcription_request(video=tmp_path / "face.mp4")
