"""Recordings of every kind: frames and sound lie where their timestamps put them, whatever container they are in."""

import struct
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile

from llama_smop.data import timeline
from llama_smop.data.lrs3 import load_clip
from llama_smop.data.media import (
    MediaError,
    read_audio,
    read_video,
    stream_audio,
    stream_video,
    streams,
    write_audio,
    write_video,
)
from tests.data.recordings import numbered, numbers, record, tone

RATE = 16000


def flashes_and_bursts(seconds=3.0, at=(0.52, 2.0)):
    """100 ms of white and of a tone, both at the same moments: frames (T, 96, 96, 3), samples (n,)."""
    frames = np.zeros((round(seconds * 25), 96, 96, 3), np.uint8)
    samples = np.zeros(round(seconds * RATE), np.float32)
    for begin in at:
        frames[round(begin * 25) :][:3] = 255
        samples[round(begin * RATE) :][:1600] = tone(440, 0.1)
    return frames, samples


def moments(video, audio):
    """Where the flashes and the bursts begin, in seconds."""
    bright = np.flatnonzero(video.reshape(len(video), -1).mean(axis=1) > 150) / 25
    loud = np.flatnonzero(np.abs(audio) > 0.2) / RATE
    return [x[np.insert(np.diff(x) > 0.5, 0, True)] for x in (bright, loud)]


# -- picture


@pytest.mark.parametrize("suffix", ("mp4", "mkv", "webm"))
def test_uneven_timestamps_are_followed_though_25_frames_a_second_are_declared(tmp_path, suffix):
    times = np.cumsum(np.random.default_rng(0).choice([0.02, 0.033, 0.09, 0.2], 55)).round(3)
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = record(tmp_path / f"a.{suffix}", numbered(55), times, video=codec)
    found = numbers(read_video(path))
    shown = times - times[0]
    assert abs(len(found) / 25 - shown[-1]) < 0.3
    wanted = np.arange(round(shown[-1] * 25)) / 25
    expected = [int(np.abs(shown - t).argmin()) for t in wanted]
    for k, (is_, should) in enumerate(zip(found, expected, strict=False)):
        off = abs(abs(shown[is_] - k / 25) - abs(shown[should] - k / 25))
        assert off < 0.002, f"at {k / 25} s frame {is_} stands, of {shown[is_]} s"


@pytest.mark.parametrize("fps", (25, 12.5, 29.97, 60))
def test_a_gap_in_the_picture_holds_the_last_frame_and_moves_nothing(tmp_path, fps):
    times = np.arange(40) / fps
    times[20:] += 1.0
    found = numbers(read_video(record(tmp_path / "a.mkv", numbered(40), times)))
    back = found.index(20)
    assert abs(back / 25 - (times[20] - 0.5 * (times[20] - times[19]))) < 0.05, "nearest in time: half way through"
    assert set(found[round(times[19] * 25) + 1 : back - 1]) == {19}


@pytest.mark.parametrize("rotation", (90, 180, -90))
def test_a_rotated_video_stands_upright(tmp_path, rotation):
    frames = np.zeros((5, 96, 128, 3), np.uint8)
    frames[:, :40, :60] = (200, 30, 30)  # red in one corner
    plain, turned = (record(tmp_path / f"{angle}.mp4", frames, rotation=angle) for angle in (0, rotation))
    expected = np.rot90(read_video(plain), rotation // 90, axes=(1, 2)).astype(int)
    assert np.abs(read_video(turned) - expected).mean() < 2
    shape = (128, 96, 3) if rotation % 180 else (96, 128, 3)
    assert {frame.shape for frame in stream_video(turned)} == {shape}


@pytest.mark.parametrize(
    ("name", "settings"),
    (
        ("ten_bit.mkv", {"pixels": "yuv420p10le"}),
        ("odd.mkv", {"video": "ffv1", "pixels": "bgr0", "shape": (97, 131)}),
        ("vp9.webm", {"video": "libvpx-vp9"}),
        ("a.mov", {}),
        ("a.avi", {"video": "mpeg4"}),
        ("sixty.mp4", {"fps": 60}),
        ("slow.mkv", {"fps": 12}),
        ("full_chroma.mp4", {"pixels": "yuv444p"}),
        ("a.ts", {}),
    ),
)
def test_pictures_of_every_kind(tmp_path, name, settings):
    shape = settings.pop("shape", (96, 96))
    fps = settings.get("fps", 25)
    path = record(tmp_path / name, numbered(50, *shape), **settings)
    found = numbers(read_video(path))
    assert abs(len(found) - 50 / fps * 25) <= 2
    assert np.abs(np.array(found) / fps - np.minimum(np.arange(len(found)) / 25, 49 / fps)).max() <= 0.05
    assert {frame.shape for frame in stream_video(path)} == {(*shape, 3)}


def test_a_browsers_recording(tmp_path):
    """Without a duration, an index and an average rate, its frames uneven, with a gap of half a second in both."""
    times = np.sort(np.concatenate([np.arange(0, 1.2, 1 / 30), np.arange(1.7, 3.0, 1 / 30)])).round(3)
    frames = np.zeros((len(times), 96, 96, 3), np.uint8)
    bright = ((times >= 0.52) & (times < 0.65)) | ((times >= 2.0) & (times < 2.13))
    frames[bright] = 255
    _, samples = flashes_and_bursts()
    path = record(
        tmp_path / "a.webm",
        frames,
        times,
        np.repeat(samples, 3)[None],
        rate=48000,
        video="libvpx",
        audio="libopus",
        gap=(1.2, 1.7),
        live=True,
    )
    with av.open(str(path)) as container:
        assert container.duration is None, "the recording is to have no duration"
    audio, video = load_clip(path)
    flashes, bursts = moments(video, audio)
    np.testing.assert_allclose(flashes, [0.52, 2.0], atol=0.041)
    np.testing.assert_allclose(bursts, [0.52, 2.0], atol=0.021)
    assert abs(len(video) / 25 - 3.0) < 0.1 and abs(len(audio) / RATE - 3.0) < 0.1


# -- synchrony


@pytest.mark.parametrize("suffix", ("mp4", "mkv"))
@pytest.mark.parametrize("later", (0.6, 0.013, 0.0))
def test_sound_that_begins_later_stays_with_its_picture(tmp_path, suffix, later):
    frames, samples = flashes_and_bursts(at=(0.8, 2.0))
    path = record(tmp_path / f"a.{suffix}", frames, sound=samples[round(later * RATE) :], later=later)
    flashes, bursts = moments(*load_clip(path)[::-1])
    np.testing.assert_allclose(flashes, bursts, atol=0.021)
    np.testing.assert_allclose(flashes, [0.8, 2.0], atol=1e-6)


@pytest.mark.parametrize("suffix", ("mp4", "mkv"))
def test_a_picture_that_begins_later_stays_with_its_sound_of_which_nothing_is_lost(tmp_path, suffix):
    frames, samples = flashes_and_bursts(at=(0.2, 2.0))
    path = record(tmp_path / f"a.{suffix}", frames[13:], np.arange(13, 75) / 25, samples)
    audio, video = load_clip(path)
    flashes, bursts = moments(video, audio)
    np.testing.assert_allclose(bursts, [0.2, 2.0], atol=0.021)
    np.testing.assert_allclose(flashes, [2.0], atol=0.041)
    assert abs(len(read_video(path, with_sound=False)) - 62) <= 1, "without its sound it begins at its first frame"


def test_a_gap_in_the_sound_is_silence(tmp_path):
    frames, samples = flashes_and_bursts()
    samples[RATE:][: round(0.6 * RATE)] += 0.2 * tone(100, 0.6)
    path = record(tmp_path / "a.mkv", frames, sound=samples, gap=(1.0, 1.7))
    audio, video = load_clip(path)
    flashes, bursts = moments(video, audio)
    np.testing.assert_allclose(flashes, bursts, atol=0.021)
    assert np.abs(audio[round(1.1 * RATE) : round(1.7 * RATE)]).max() < 0.01


def test_a_wav_beside_the_clip_begins_with_its_first_frame(tmp_path):
    frames, samples = flashes_and_bursts()
    path = record(tmp_path / "a.mkv", frames, np.arange(75) / 25 + 0.4, samples, video="libx264")
    write_audio(tmp_path / "a.wav", samples)
    audio, video = load_clip(path)
    assert len(video) == 75 and len(audio) == len(samples)
    np.testing.assert_allclose(*moments(video, audio), atol=0.021)


# -- sound


@pytest.mark.parametrize("layout", ("mono", "stereo", "5.1", "7.1"))
@pytest.mark.parametrize(("name", "audio", "rate"), (("a.mkv", "flac", 48000), ("a.m4a", "aac", 44100)))
def test_channels_are_averaged(tmp_path, layout, name, audio, rate):
    channels = av.AudioLayout(layout).nb_channels
    sound = np.stack([tone(440, 1.0, rate) * (1 if c == 0 else 0) for c in range(channels)])
    found = read_audio(record(tmp_path / name, sound=sound, rate=rate, audio=audio, layout=layout))
    assert abs(len(found) - RATE) < 1500
    assert np.std(found[4000:12000]) == pytest.approx(0.5 / np.sqrt(2) / channels, rel=0.1)


@pytest.mark.parametrize(
    ("name", "audio", "rate"),
    (
        ("a.opus", "libopus", 48000),
        ("a.webm", "libopus", 48000),
        ("a.oga", "flac", 16000),
        ("a.mp3", "libmp3lame", 44100),
        ("a.m4a", "aac", 8000),
        ("a.mp4", "aac", 96000),
        ("a.mov", "pcm_s24le", 48000),
        ("a.mkv", "pcm_f32le", 22050),
        ("a.avi", "pcm_u8", 11025),
        ("a.mka", "ac3", 32000),
    ),
)
def test_sound_of_every_kind_is_found_by_what_is_in_the_file(tmp_path, name, audio, rate):
    path = record(tmp_path / name, sound=tone(440, 2.0, rate), rate=rate, audio=audio)
    path = path.rename(tmp_path / "no_ending")
    assert streams(path) == ("audio",)
    found = read_audio(path)
    assert abs(len(found) - 2 * RATE) < 0.1 * RATE
    spectrum = np.abs(np.fft.rfft(found[8000:24000]))
    assert abs(np.argmax(spectrum) - 440) <= 2 and np.std(found[8000:24000]) == pytest.approx(0.354, rel=0.1)


@pytest.mark.parametrize("rate", (8000, 44100, 96000))
@pytest.mark.parametrize("kind", ("WAV/PCM_24", "WAV/FLOAT", "WAV/DOUBLE", "AIFF/PCM_16", "FLAC/PCM_24", "RF64/PCM_16"))
def test_sound_files(tmp_path, rate, kind):
    form, subtype = kind.split("/")
    soundfile.write(tmp_path / "a", tone(440, 1.0, rate), rate, format=form, subtype=subtype)
    found = read_audio(tmp_path / "a")
    assert found.shape == (RATE,) and found.dtype == np.float32
    np.testing.assert_allclose(found[2000:-2000], tone(440, 1.0)[2000:-2000], atol=2e-3)


@pytest.mark.parametrize("source", (8000, 11025, 44100, 48000, 96000))
def test_sound_resampled_in_pieces_is_that_resampled_at_once(source):
    from math import gcd

    from scipy.signal import resample_poly

    samples = np.random.default_rng(0).standard_normal(23 * source + 77).astype(np.float32)
    blocks = np.array_split(samples, 41)
    found = np.concatenate(list(timeline.resampled(blocks, source, RATE)))
    common = gcd(source, RATE)
    np.testing.assert_array_equal(found, resample_poly(samples, RATE // common, source // common))


def test_a_file_says_what_it_holds(tmp_path):
    frames, samples = flashes_and_bursts(1.0, (0.52,))
    assert streams(record(tmp_path / "both.mp4", frames, sound=samples)) == ("audio", "video")
    assert streams(record(tmp_path / "mute.mp4", frames)) == ("video",)
    assert streams(record(tmp_path / "blind.mp4", sound=samples)) == ("audio",)
    write_audio(tmp_path / "a.wav", samples)
    assert streams(tmp_path / "a.wav") == ("audio",)


# -- whole files and others


def hide_by_edit_list(path, begin: float, length: float) -> None:
    """Show `length` seconds from `begin` on, as a trim without re-encoding does."""
    content = bytearray(path.read_bytes())
    header = content.find(b"mvhd")
    movie = struct.unpack(">I", content[header + 16 : header + 20])[0]
    edits = content.find(b"elst")
    media_header = content.find(b"mdhd", edits)
    media = struct.unpack(">I", content[media_header + 16 : media_header + 20])[0]
    content[edits + 12 : edits + 20] = struct.pack(">Ii", int(length * movie), int(begin * media))
    path.write_bytes(content)


def test_frames_that_an_edit_list_hides_are_not_missed(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"g": "10", "bf": "0"})
        stream.width = stream.height = 96
        for frame in numbered(55):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        out.mux(stream.encode(None))
    hide_by_edit_list(path, 1.4, 0.6)
    found = numbers(read_video(path))
    assert abs(len(found) - 15) <= 1 and abs(found[0] - 35) <= 1, "what is from 1.4 to 2.0 s is shown"


@pytest.mark.parametrize("name", ("a.mkv", "a.avi", "a.aiff", "a.flac", "a.mov"))
def test_a_file_that_ends_early_is_refused_whatever_it_is(tmp_path, name):
    path = tmp_path / name
    noise = 0.3 * np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32)
    if name in ("a.aiff", "a.flac"):
        soundfile.write(path, noise, RATE)
        read = read_audio
    else:
        frames = np.random.default_rng(0).integers(0, 255, (40, 96, 96, 3), dtype=np.uint8)
        record(path, frames, sound=noise, video="mpeg4" if name == "a.avi" else "libx264", audio="pcm_s16le")
        read = read_video
    assert len(read(path))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 7 // 10])
    with pytest.raises(MediaError, match=rf"{name}: (is truncated|cannot be)"):
        read(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_length_of_a_recording(tmp_path):
    """Peaks of a process that reads 20 s and then 2 minutes; whole, the latter would take 31 MB more of frames."""
    script = (
        "import sys; from llama_smop.data.media import stream_audio, stream_video\n"
        "for film, wav in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    frames = sum(1 for _ in stream_video(film, with_sound=True))\n"
        "    samples = sum(map(len, stream_audio(film))) + sum(map(len, stream_audio(wav)))\n"
        "    status = dict(line.split(':') for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "    print(frames, samples, status['VmHWM'].split()[0])"
    )
    lengths, paths = (20, 120), []
    for seconds in lengths:
        images = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), dtype=np.uint8)
        sound = np.tile(tone(440, 1.0, 48000), seconds)
        film, wav = tmp_path / f"{seconds}.mkv", tmp_path / f"{seconds}.wav"
        pictures = images[np.arange(seconds * 10) % 10]
        record(film, pictures, sound=sound, rate=48000, audio="pcm_s16le", fps=10, video="mpeg4")
        soundfile.write(wav, np.stack([sound, sound], axis=1), 48000)
        paths += [film, wav]
    out = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    peaks = []
    for seconds, line in zip(lengths, out.stdout.splitlines(), strict=True):
        frames, samples, peak = map(int, line.split())
        assert abs(frames - seconds * 25) < 5 and abs(samples - 2 * seconds * RATE) < 100
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 16 * 1024, f"{peaks} kB"


def test_a_generated_clip_has_the_same_frames_with_and_without_its_sound(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(50), audio=tone(440, 2.0))
    alone, together = read_video(tmp_path / "a.mp4"), read_video(tmp_path / "a.mp4", with_sound=True)
    np.testing.assert_array_equal(alone, together)
    assert numbers(alone) == list(range(50))
    assert sum(map(len, stream_audio(tmp_path / "a.mp4"))) >= 50 * 640
