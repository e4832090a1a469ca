"""transformers' pipeline for speech recognition gives what `llama-smop transcribe` prints, whatever it is handed."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig, pipeline

from llama_smop.data.media import MediaError, write_video
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.transcription import attempts
from llama_smop.transcription.pipeline import LlamaSmopPipeline
from llama_smop.transcription.recording import Options
from llama_smop.transcription.run import transcripts
from llama_smop.transcription.word_times import Word

TASK = "automatic-speech-recognition"
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 4.0}


@pytest.fixture(autouse=True)
def _by_energy(monkeypatch):
    """Planted sound is loud or quiet, and no speech."""
    from llama_smop.transcription.voice_activity import SileroVoiceActivity

    monkeypatch.setattr(SileroVoiceActivity, "installed", classmethod(lambda cls: None))


def loud(*parts: tuple[float, float], rate: int = 16000) -> np.ndarray:
    """Noise of (seconds, level) parts."""
    random = np.random.RandomState(0)
    return np.concatenate([random.randn(round(s * rate)) * level for s, level in parts]).astype(np.float32)


TALK = loud((1.0, 0.001), (2.0, 0.2), (1.0, 0.001), (3.0, 0.2), (1.0, 0.001), (2.5, 0.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    return model_folder.save(*build_tiny([f"w{i}" for i in range(40)], **SIZES), folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sound file of 10.5 s in three parts, one at another rate, and a mouth crop with sound."""
    folder = tmp_path_factory.mktemp("recordings")
    soundfile.write(folder / "long talk.wav", TALK, 16000, subtype="FLOAT")
    soundfile.write(folder / "other.wav", loud((2.0, 0.2), rate=22050), 22050, subtype="FLOAT")
    frames = np.random.RandomState(1).randint(0, 255, (40, 96, 96, 3), dtype=np.uint8)
    write_video(folder / "mouth.mp4", frames, audio=TALK[16000:41600])
    return folder


@pytest.fixture(scope="module")
def recognise(folder):
    return pipeline(TASK, model=str(folder))


def texts(folder, *paths, **options) -> list[str]:
    """What the command line prints."""
    return [transcript.text for transcript in transcripts(paths, folder, Options(**options))]


def test_every_form_of_a_recording_gives_what_transcribe_prints(recognise, folder, files):
    path = files / "long talk.wav"
    (expected,) = texts(folder, path)
    assert len(expected.split()) > 3
    forms = {
        "path": str(path),
        "Path": path,
        "file://": path.as_uri(),
        "bytes": path.read_bytes(),
        "array": TALK,
        "float64": TALK.astype(np.float64),
        "tensor": torch.from_numpy(TALK),
        "raw": {"raw": TALK, "sampling_rate": 16000},
        "stereo": {"array": np.stack([TALK, TALK]), "sampling_rate": 16000, "path": "not read"},
        "file in a dict": {"path": str(path), "bytes": None},
    }
    wrong = {name: found for name, form in forms.items() if (found := recognise(form)) != {"text": expected}}
    assert not wrong
    assert recognise({"array": TALK, "sampling_rate": 16000, "id": 7})["id"] == [7]


def test_a_video_goes_in_as_it_is(recognise, folder, files):
    video = files / "mouth.mp4"
    assert recognise(str(video)) == {"text": texts(folder, video)[0]}
    for modality in ("audio", "video"):
        assert recognise(video.read_bytes(), modality=modality) == {"text": texts(folder, video, modality=modality)[0]}


def test_another_rate_is_that_of_the_file(recognise, folder, files):
    samples, rate = soundfile.read(files / "other.wav", dtype="float32")
    assert recognise({"raw": samples, "sampling_rate": rate})["text"] == texts(folder, files / "other.wav")[0]


def test_lists_and_generators_give_one_result_each(recognise, folder, files):
    paths = [files / "long talk.wav", files / "mouth.mp4", files / "other.wav"]
    expected = [{"text": text} for text in texts(folder, *paths)]
    assert recognise(paths) == expected
    assert recognise([str(p) for p in paths], batch_size=2) == expected
    assert list(recognise(path for path in paths)) == expected


def test_no_recording_gives_no_text(recognise):
    assert recognise([]) == [] and recognise([], batch_size=4, return_timestamps=True) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 2}, "each recording gets one text: leave out num_return_sequences"),
        ({"generation_config": GenerationConfig(num_beams=2, num_return_sequences=2)}, "each recording gets one text"),
        ({"return_dict_in_generate": True}, "recordings get texts: leave out return_dict_in_generate"),
    ],
)
def test_settings_by_which_generate_gives_no_text_a_clip_are_refused(recognise, settings, message):
    with pytest.raises(ValueError, match=message):
        recognise(TALK, generate_kwargs=settings)


def test_timestamps_are_those_of_the_pieces(recognise, folder, files):
    path = files / "long talk.wav"
    (transcript,) = transcripts([path], folder)
    spoken = [piece for piece in transcript.pieces if piece.text]
    assert len(spoken) == 3
    expected = {
        "text": transcript.text,
        "chunks": [{"text": piece.text, "timestamp": (piece.start, piece.end)} for piece in spoken],
    }
    assert recognise(path, return_timestamps=True) == expected
    assert recognise(path, return_timestamps=True, batch_size=1) == recognise(
        path, return_timestamps=True, batch_size=3
    )
    assert "chunks" not in recognise(path, return_timestamps=False)


def test_words_have_the_times_that_the_aligner_finds(recognise, files, monkeypatch):
    def aligned(text, audio, frames):
        return [Word(word, 0.1 * place, 0.1 * place + 0.05) for place, word in enumerate(text.split())]

    monkeypatch.setattr(attempts, "find_aligner", lambda model, name: aligned)
    path = files / "long talk.wav"
    pieces = recognise(path, return_timestamps=True)["chunks"]
    found = recognise(path, return_timestamps="word")
    assert [chunk["text"] for chunk in found["chunks"]] == found["text"].split()
    first = found["chunks"][0]["timestamp"]
    assert first == pytest.approx((pieces[0]["timestamp"][0], pieces[0]["timestamp"][0] + 0.05))


def test_without_an_aligner_a_piece_has_its_own_times_and_that_is_said(recognise, files, caplog):
    path = files / "long talk.wav"
    assert recognise(path, return_timestamps="word") == recognise(path, return_timestamps=True)
    assert "words have no times" in caplog.text


def test_one_bad_file_among_several_is_named(recognise, files, tmp_path):
    absent = tmp_path / "absent.wav"
    found = list(attempts.attempts([absent, files / "mouth.mp4"], recognise.model, recognise.processor))
    assert str(found[0]) == f"{absent}: no such file" and found[1].text
    with pytest.raises(MediaError, match=r"absent\.wav: no such file"):
        recognise([files / "mouth.mp4", absent], batch_size=2)


def test_settings_of_generate_reach_it(recognise, folder, files):
    path = files / "long talk.wav"
    beams = texts(folder, path, num_beams=3)[0]
    assert recognise(path, generate_kwargs={"num_beams": 3})["text"] == beams
    assert recognise(path, num_beams=3)["text"] == beams
    short = recognise(path, generate_kwargs={"max_new_tokens": 1}, return_timestamps=True)
    assert all(len(chunk["text"].split()) == 1 for chunk in short["chunks"])
    with pytest.raises(ValueError, match="tempreture"):
        recognise(path, tempreture=2)


def test_an_address_is_fetched(recognise, folder, files):
    handler = partial(SimpleHTTPRequestHandler, directory=str(files))
    handler.log_message = lambda *arguments: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert recognise(f"{address}/mouth.mp4")["text"] == texts(folder, files / "mouth.mp4")[0]
        with pytest.raises(ValueError, match=r"/absent\.wav: cannot be fetched .*404"):
            recognise(f"{address}/absent.wav")
        server.shutdown()


def test_a_model_in_memory_needs_its_parts_alone(recognise, folder, files, tmp_path):
    model, processor = model_folder.load(folder)
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    expected = recognise(TALK)
    assert pipeline(TASK, model=model, **parts)(TALK) == expected
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    assert pipeline(TASK, model=fresh, **parts)(TALK) == expected
    recognise.save_pretrained(tmp_path)
    assert pipeline(TASK, model=str(tmp_path))(TALK) == expected


def test_other_models_get_transformers_own_pipeline(recognise):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (2,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    other = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions, **positions))
    made = pipeline(TASK, model=other, feature_extractor=Wav2Vec2FeatureExtractor(), tokenizer=recognise.tokenizer)
    assert type(made) is AutomaticSpeechRecognitionPipeline and made.type == "ctc"
    assert type(recognise) is LlamaSmopPipeline and recognise.type == "seq2seq"


@pytest.mark.parametrize(
    ("recording", "settings", "message"),
    [
        ("absent.wav", {}, "absent.wav: no such file"),
        (b"no film", {}, "the recording: cannot be opened"),
        (b"", {}, "the recording: the file is empty"),
        (np.zeros(0, np.float32), {}, "the recording: holds no sound"),
        (TALK * np.nan, {}, "not finite"),
        (TALK.astype(np.int16), {}, "float samples .* got an array of int16"),
        (np.zeros((3, 100), np.float32), {}, r"two channels, got \(3, 100\)"),
        ([0.1, 0.2], {}, "float samples .* got float"),
        ({"array": TALK}, {}, '"sampling_rate" in Hz'),
        ({"array": TALK, "sampling_rate": 0}, {}, "sampling_rate must be whole Hz"),
        ({"text": "hello"}, {}, r"got \['text'\]"),
        (TALK, {"return_timestamps": "char"}, "return_timestamps must be"),
        (TALK, {"return_language": True}, "leave out return_language"),
        (TALK, {"modality": "smell"}, "takes audio, video, audiovisual, not smell"),
        (TALK, {"modality": "video"}, "the recording: has no picture, and video was asked for"),
    ],
)
def test_odd_recordings_are_refused_in_one_line(recognise, tmp_path, monkeypatch, recording, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        recognise(recording, **settings)
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, MediaError) or Path(error.value.path).parent == Path()


def test_lengths_of_chunks_are_the_packages_and_that_is_said(recognise, caplog):
    assert recognise(TALK, chunk_length_s=30, stride_length_s=5) == recognise(TALK)
    assert "cut where nobody speaks" in caplog.text
