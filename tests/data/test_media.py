import errno
import io
import os

import av
import numpy as np
import pytest
import soundfile

from llama_smop.data import video_writer
from llama_smop.data.media import MediaError, audio_path, read_audio, read_video, write_audio, write_video

RATE = 16000


def tone(hertz, seconds, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def numbered_frames(count, height=96, width=96):
    """Frame k is a flat grey of 20 + 4·k, which survives H.264 and says which frame it is."""
    return np.broadcast_to(
        (20 + 4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3)
    ).copy()


def frame_numbers(video):
    return np.round((video.mean(axis=(1, 2, 3)) - 20) / 4).astype(int)


def test_video_comes_back_frame_by_frame(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(30))
    video = read_video(tmp_path / "a.mp4")
    assert video.shape == (30, 96, 96, 3) and video.dtype == np.uint8
    assert frame_numbers(video).tolist() == list(range(30))


@pytest.mark.parametrize("fps", [5, 12, 24, 30, 50, 60])
def test_another_frame_rate_is_resampled_to_25(tmp_path, fps):
    count = 40
    write_video(tmp_path / "a.mp4", numbered_frames(count), fps=fps)
    video = read_video(tmp_path / "a.mp4")
    assert abs(len(video) - count / fps * 25) <= 1, "the clip's duration changed"
    shown_at = np.minimum(np.arange(len(video)) / 25, (count - 1) / fps)  # the last frame stays to the end
    assert np.abs(frame_numbers(video) / fps - shown_at).max() <= max(0.5 / fps, 0.02) + 1e-6


def test_a_single_frame_at_another_rate(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(1), fps=5)
    assert len(read_video(tmp_path / "a.mp4")) == 5


def test_another_size_is_scaled_and_cropped_around_the_centre(tmp_path):
    frames = np.zeros((3, 120, 240, 3), dtype=np.uint8)
    frames[:, :, 60:180] = (200, 40, 40)  # the central square is red, the sides black
    write_video(tmp_path / "wide.mp4", frames)
    video = read_video(tmp_path / "wide.mp4")
    assert video.shape == (3, 96, 96, 3)
    assert np.abs(video[:, 8:-8, 8:-8].astype(int) - (200, 40, 40)).max() < 12
    write_video(tmp_path / "small.mp4", numbered_frames(3, 48, 64))
    assert frame_numbers(read_video(tmp_path / "small.mp4")).tolist() == [0, 1, 2]


def test_the_same_frames_give_the_same_mp4(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (5, 96, 96, 3), dtype=np.uint8)
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", frames, audio=tone(440, 0.2))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_audio_at_any_rate_comes_out_at_16_khz(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(440, 1.0, rate), rate, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav")
    assert audio.shape == (RATE,) and audio.dtype == np.float32
    middle = slice(2000, -2000)  # the filter's ends
    np.testing.assert_allclose(audio[middle], tone(440, 1.0)[middle], atol=2e-3)


def test_stereo_is_mixed_down(tmp_path):
    left, right = tone(440, 0.5), tone(880, 0.5)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-6)


def test_written_audio_comes_back(tmp_path):
    write_audio(tmp_path / "a.wav", tone(300, 0.3))
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), tone(300, 0.3), atol=1e-4)


def test_an_mp4_lends_its_own_sound_where_no_wav_lies_beside_it(tmp_path):
    clip = tmp_path / "a.mp4"
    write_video(clip, numbered_frames(50), audio=tone(440, 2.0))
    assert audio_path(clip) == clip
    audio = read_audio(clip)
    assert abs(len(audio) - 2 * RATE) < 2048  # AAC works in blocks of 1024
    spectrum = np.abs(np.fft.rfft(audio[4000:20000]))
    assert abs(np.argmax(spectrum) - 440) <= 2
    write_audio(tmp_path / "a.wav", tone(200, 2.0))
    assert audio_path(clip) == tmp_path / "a.wav"


def truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("read", [read_video, read_audio])
@pytest.mark.parametrize("suffix", [".mp4", ".wav"])
def test_missing_empty_and_foreign_files_are_named(tmp_path, read, suffix):
    path = tmp_path / f"clip{suffix}"
    with pytest.raises(MediaError, match=r"clip\.\w+: no such file"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(MediaError, match="the file is empty"):
        read(path)
    path.write_bytes(b"this is no media file at all" * 40)
    with pytest.raises(MediaError, match=r"clip\.\w+: cannot be"):
        read(path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_truncated_mp4_is_an_error(tmp_path, share):
    path = tmp_path / "a.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (20, 96, 96, 3), dtype=np.uint8))
    truncated(path, share)
    with pytest.raises(MediaError, match="truncated"):
        read_video(path)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_truncated_mp4_with_its_index_in_front_is_an_error(tmp_path, share):
    path = tmp_path / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (20, 96, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    assert len(read_video(path)) == 20
    truncated(path, share)
    with pytest.raises(MediaError, match=r"truncated|decoded"):
        read_video(path)


@pytest.mark.parametrize("share", [0.0005, 0.5, 0.999])
def test_a_truncated_wav_is_an_error(tmp_path, share):
    path = tmp_path / "a.wav"
    write_audio(path, tone(440, 2.0))
    truncated(path, share)
    with pytest.raises(MediaError):
        read_audio(path)


def test_a_wav_from_a_pipe_with_unknown_length_is_read(tmp_path):
    path = tmp_path / "a.wav"
    write_audio(path, tone(440, 1.0))
    content = bytearray(path.read_bytes())
    content[4:8] = b"\xff\xff\xff\xff"
    content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(read_audio(path)) == RATE


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_audio(path, np.zeros(1600, np.float32))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(MediaError, match=rf"^{path}: cannot be read \(Input/output error\)"):
        read_audio(path)


def test_sound_that_is_not_finite_or_not_there(tmp_path):
    broken = tone(440, 0.1)
    broken[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, RATE, subtype="FLOAT")
    with pytest.raises(MediaError, match="not finite"):
        read_audio(tmp_path / "nan.wav")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(MediaError, match="holds no sound"):
        read_audio(tmp_path / "none.wav")
    write_video(tmp_path / "mute.mp4", numbered_frames(3))
    with pytest.raises(MediaError, match="no audio stream"):
        read_audio(tmp_path / "mute.mp4")


def test_a_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, numbered_frames(3))
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(video_writer, "open", Full, raising=False)
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be written \(No space left"):
        write_video(path, numbered_frames(5))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_that_h264_cannot_take():
    with pytest.raises(ValueError, match="even height and width"):
        write_video("never.mp4", np.zeros((2, 95, 96, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"uint8 frames \(T, H, W, 3\)"):
        write_video("never.mp4", np.zeros((2, 96, 96), dtype=np.uint8))
