"""`transcribe`: what a file holds decides what is read, and one bad file does not end the others."""

import shutil

import av
import numpy as np
import pytest
import torch

from llama_smop.cli import main
from llama_smop.data.media import MediaError, write_audio
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.transcription.recording import usable
from llama_smop.transcription.run import transcribe
from tests.data.recordings import numbered, record, tone

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return model_folder.save(*build_tiny(["bin", "blue", "now"], **SIZES), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Of a second each; what they hold and how they end have nothing to do with each other."""
    folder, frames, sound = tmp_path_factory.mktemp("in"), numbered(25), tone(440, 1.0)
    record(folder / "both.mp4", frames, sound=sound)
    record(folder / "mute.mp4", frames)
    for name, audio, rate in (
        ("voice.m4a", "aac", 16000),
        ("voice.mp4", "aac", 16000),
        ("voice.opus", "libopus", 48000),
        ("voice.webm", "libopus", 48000),
        ("voice.oga", "flac", 16000),
        ("voice.mp3", "libmp3lame", 16000),
    ):
        record(folder / name, sound=tone(440, 1.0, rate), rate=rate, audio=audio)
    write_audio(folder / "voice.wav", sound)
    write_audio(folder / "sound_as.mp4.wav", sound)
    (folder / "sound_as.mp4.wav").rename(folder / "sound_as.mp4")
    with_cover(folder / "cover.m4a", sound)
    record(folder / "beside.mkv", frames)
    write_audio(folder / "beside.wav", sound)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no film")
    record(folder / "short.mp4", frames[:1])
    return folder


def with_cover(path, sound):
    with av.open(str(path), "w", format="mp4") as out:
        voice, cover = out.add_stream("aac", rate=16000, layout="mono"), out.add_stream("png", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(sound[None], "fltp", "mono")
        frame.rate, frame.pts = 16000, 0
        image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, np.uint8))
        out.mux(cover.encode(image) + cover.encode(None))
        out.mux(voice.encode(frame) + voice.encode(None))


@pytest.mark.parametrize(
    ("name", "modality"),
    (
        ("both.mp4", "audiovisual"),
        ("beside.mkv", "audiovisual"),
        ("mute.mp4", "video"),
        ("cover.m4a", "audio"),
        ("sound_as.mp4", "audio"),
        *((f"voice.{suffix}", "audio") for suffix in ("m4a", "mp4", "opus", "webm", "oga", "mp3", "wav")),
    ),
)
def test_what_is_used_is_what_is_in_the_file(recordings, tmp_path, name, modality):
    path = recordings / name
    if name.startswith("voice"):  # away from the .wav beside it
        path = shutil.copy(path, tmp_path / name)
    sound = None if modality == "video" else path.with_suffix(".wav") if name == "beside.mkv" else path
    assert usable(path, ("audio", "video", "audiovisual")) == (sound, modality != "audio")
    assert usable(path, (modality,)) == (sound, modality != "audio")


def test_what_a_model_cannot_take_is_said(recordings):
    with pytest.raises(MediaError, match=r"mute\.mp4: has no sound, and the model takes audio only"):
        usable(recordings / "mute.mp4", ("audio",))
    with pytest.raises(MediaError, match=r"cover\.m4a: has no picture, and the model takes video only"):
        usable(recordings / "cover.m4a", ("video",))
    with pytest.raises(MediaError, match=r"mute\.mp4: has no sound, and audiovisual was asked for"):
        usable(recordings / "mute.mp4", ("audio", "video", "audiovisual"), "audiovisual")


def test_every_file_gets_its_text_or_its_line_and_the_end_counts(recordings, model, capsys, caplog):
    names = ("both.mp4", "empty.mp4", "mute.mp4", "text.mp4", "nowhere.mp4", "short.mp4", "voice.opus")
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", *(str(recordings / name) for name in names), "--model", str(model)])
    assert "4 of 7 files could not be transcribed" in str(ended.value.code)
    out = capsys.readouterr().out
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        str(recordings / name) for name in ("both.mp4", "mute.mp4", "voice.opus")
    ]
    told = [record.getMessage() for record in caplog.records]
    for name, reason in zip(
        ("empty.mp4", "text.mp4", "nowhere.mp4", "short.mp4"),
        ("is empty", "not a media file", "no such file", "shorter than one token"),
        strict=True,
    ):
        assert [line for line in told if line.startswith(f"{recordings / name}: ") and reason in line], name
    assert all("\n" not in line for line in told)


def test_a_single_bad_file_is_the_error_itself(recordings, model):
    with pytest.raises(MediaError, match=r"empty\.mp4: the file is empty"):
        list(transcribe([recordings / "empty.mp4"], model))
