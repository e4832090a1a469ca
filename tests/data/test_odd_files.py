"""Files that no reader expects: each is a MediaError that names it, none takes memory, hangs or ends the process."""

import os
import struct

import numpy as np
import pytest
import soundfile

from llama_smop.data.lrs3 import load_clip
from llama_smop.data.media import MediaError, read_audio, read_video, streams, write_audio, write_video
from llama_smop.data.noise import Babble
from tests.data.recordings import numbered, record, tone

RATE = 16000


@pytest.mark.parametrize("rate", (2**31 - 1, 999_999, 1))
def test_a_wild_sample_rate_is_refused(tmp_path, rate):
    path = tmp_path / "a.wav"
    write_audio(path, tone(440, 0.5))
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    with pytest.raises(MediaError, match=rf"a\.wav: declares a rate of {rate} Hz"):
        read_audio(path)


@pytest.mark.parametrize("jump", (10_000.0, 1e8))
def test_one_wild_timestamp_is_refused(tmp_path, jump):
    times = np.arange(30) / 25
    times[20:] += jump
    path = record(tmp_path / "a.mkv", numbered(30), times)
    with pytest.raises(MediaError, match=r"a\.mkv: .*a timestamp jumps by"):
        read_video(path)


def with_declared_samples(path, count):
    content = bytearray(path.read_bytes())
    value = int.from_bytes(content[18:26], "big")
    content[18:26] = (value >> 36 << 36 | count).to_bytes(8, "big")
    path.write_bytes(content)


def test_a_flac_that_was_streamed_is_read_and_one_that_lies_is_refused(tmp_path):
    """Of unknown length, which is legal; and declaring a month of sound."""
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(440, 1.0), RATE)
    whole = read_audio(path)
    with_declared_samples(path, 0)
    np.testing.assert_array_equal(read_audio(path), whole)
    with_declared_samples(path, 2**36 - 1)
    with pytest.raises(MediaError, match=r"a\.flac: declares 68719476735 samples"):
        read_audio(path)


ODD_NAMES = ("a\0b.mp4", "n" * 300 + ".mp4", "folder", "pipe", "device", "behind_a_file/a.mp4")


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("read", (read_video, read_audio, streams, load_clip, lambda p: load_clip(p, "audio")))
def test_odd_paths_are_named(tmp_path, name, read):
    (tmp_path / "folder").mkdir()
    (tmp_path / "behind_a_file").touch()
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for ever
    (tmp_path / "device").symlink_to("/dev/zero")  # which has no end
    with pytest.raises(MediaError) as caught:
        read(str(tmp_path / name))
    assert os.path.splitext(str(tmp_path / name))[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", (MemoryError(), ValueError("odd"), OSError(116, "Stale file handle"), OverflowError())
)
def test_whatever_a_library_raises_names_the_file(tmp_path, monkeypatch, error):
    write_video(tmp_path / "a.mp4", numbered(5), audio=tone(440, 0.2))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("llama_smop.data.media.whole_packets", fail)
    for read in (read_video, read_audio):
        with pytest.raises(MediaError, match=rf"^{tmp_path}/a\.mp4: "):
            read(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ("talk:1.mp4", "http:x.mp4", "-a.mp4", "per%20cent.mp4", "a b?c#d.mp4"))
def test_a_relative_path_is_a_file_whatever_is_in_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video("a.mp4", numbered(5), audio=tone(440, 0.2))
    os.rename("a.mp4", name)
    assert len(read_video(name)) == 5 and len(read_audio(name)) >= 3200


def test_babble_does_without_odd_clips(tmp_path):
    write_audio(tmp_path / "good.wav", tone(440, 1.0))
    babble = Babble([tmp_path / name for name in (*ODD_NAMES, "good.wav")])
    assert all(babble.sample(RATE, np.random.default_rng(seed)).std() > 0 for seed in range(3))
