"""Videos written frame by frame: what comes back, what memory it takes, what ends it."""

import errno
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from llama_smop.data import video_writer
from llama_smop.data.media import MediaError, read_audio, read_video, write_video
from llama_smop.data.video_writer import write_frames
from tests.data.test_media import frame_numbers, numbered_frames, tone


def test_frames_and_blocks_of_sound_give_the_file_of_the_whole(tmp_path):
    frames, sound = numbered_frames(50), tone(440, 2.0)
    write_video(tmp_path / "whole.mp4", frames, audio=sound)
    blocks = (sound[at : at + 777] for at in range(0, len(sound), 777))
    assert write_frames(tmp_path / "parts.mp4", iter(frames), sound=blocks) == 50
    assert frame_numbers(read_video(tmp_path / "parts.mp4")).tolist() == list(range(50))
    assert (read_video(tmp_path / "parts.mp4") == read_video(tmp_path / "whole.mp4")).all()
    assert read_audio(tmp_path / "parts.mp4") == pytest.approx(read_audio(tmp_path / "whole.mp4"), abs=1e-6)


def test_fine_sound_is_that_which_was_written(tmp_path):
    """With AAC's errors a small recogniser hears other letters."""
    sound = (0.3 * np.random.RandomState(0).randn(32000)).clip(-1, 1).astype(np.float32)
    blocks = (sound[at : at + 777] for at in range(0, len(sound), 777))
    write_frames(tmp_path / "a.mp4", iter(numbered_frames(50)), sound=blocks, fine=True)
    assert read_audio(tmp_path / "a.mp4") == pytest.approx(sound, abs=1 / 32768)
    assert frame_numbers(read_video(tmp_path / "a.mp4", with_sound=True)).tolist() == list(range(50))


def test_sound_and_picture_lie_side_by_side_in_a_long_file(tmp_path):
    path = tmp_path / "long.mp4"
    write_frames(path, iter(numbered_frames(50).repeat(20, axis=0)), sound=(tone(300, 1.0) for _ in range(40)))
    with av.open(str(path)) as container:
        times = [(p.stream.type, float(p.dts * p.time_base)) for p in container.demux() if p.size]
    last = {"audio": 0.0, "video": 0.0}
    for kind, time in times:
        last[kind] = time
        assert abs(last["audio"] - last["video"]) < 2, "a player would have to seek"


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_sound_may_be_shorter_or_longer_than_the_picture(tmp_path, seconds):
    write_frames(tmp_path / "a.mp4", iter(numbered_frames(40)), sound=[tone(440, seconds)])
    assert len(read_video(tmp_path / "a.mp4")) == 40
    assert len(read_audio(tmp_path / "a.mp4")) == pytest.approx(16000 * seconds, abs=2100)


def test_memory_does_not_grow_with_the_length(tmp_path):
    def frames(count):
        for number in range(count):
            yield np.full((96, 96, 3), number % 200, np.uint8)

    peaks = []
    for seconds in (2, 4, 24):  # the first warms up
        tracemalloc.start()
        write_frames(
            tmp_path / "a.mp4", frames(25 * seconds), sound=(np.zeros(16000, np.float32) for _ in range(seconds))
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 2e5, f"{peaks[1:]} bytes for 4 s and 24 s, of which the frames are 3 and 17 MB"


def test_an_error_among_the_frames_is_theirs_and_leaves_no_file(tmp_path):
    def frames():
        yield from numbered_frames(3)
        raise MediaError("talk.mp4", "is truncated")

    with pytest.raises(MediaError, match=r"talk\.mp4: is truncated"):
        write_frames(tmp_path / "a.mp4", frames())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "at least one frame"),
        ([np.zeros((96, 96), np.uint8)], r"uint8 frames \(H, W, 3\)"),
        ([np.zeros((96, 96, 3))], r"uint8 frames \(H, W, 3\)"),
        ([np.zeros((96, 95, 3), np.uint8)], "even height and width"),
        ([np.zeros((96, 96, 3), np.uint8), np.zeros((48, 48, 3), np.uint8)], "frames of one shape"),
    ],
)
def test_frames_that_make_no_video(tmp_path, frames, reason):
    with pytest.raises(ValueError, match=reason):
        write_frames(tmp_path / "a.mp4", frames)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fits", [0, 2000, 60_000, 120_000])
def test_a_disk_that_is_full_at_any_moment_is_named(tmp_path, monkeypatch, fits):
    class Small:
        """A file on a disk that takes `fits` bytes."""

        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115
            self.seek, self.tell, self.flush, self.seekable = (
                getattr(self.file, name) for name in ("seek", "tell", "flush", "seekable")
            )

        def write(self, content):
            if self.tell() + len(content) > fits:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    noisy = np.random.RandomState(0).randint(0, 255, (40, 96, 96, 3)).astype(np.uint8)
    write_frames(tmp_path / "a.mp4", noisy)
    assert (tmp_path / "a.mp4").stat().st_size > fits
    monkeypatch.setattr(video_writer, "open", Small, raising=False)
    with pytest.raises(MediaError, match=r"b\.mp4: cannot be written \(No space left"):
        write_frames(tmp_path / "b.mp4", noisy)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_pipe_gets_the_whole_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        content = pool.submit((tmp_path / "pipe").read_bytes)
        write_frames(tmp_path / "pipe", numbered_frames(2))
        assert len(read_video("piped", content=content.result(timeout=20))) == 2
