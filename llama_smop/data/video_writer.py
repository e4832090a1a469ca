"""Video files written frame by frame: H.264 with AAC or FLAC in mp4, in memory that does not grow with their length.

The file is written aside and renamed. The codec libraries do not report a full disk: the errors of writing are kept
and raised here.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from llama_smop.data.container import MediaError
from llama_smop.models.units import AUDIO_RATE, VIDEO_RATE
from llama_smop.system import files


def write_frames(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    fps: int = VIDEO_RATE,
    sound: Iterable[np.ndarray] | None = None,
    rate: int = AUDIO_RATE,
    fine: bool = False,
) -> int:
    """Write a video of any length and return how many frames it has. The same input gives the same bytes.

    Args:
        frames: uint8 RGB (H, W, 3), all of one even height and width.
        sound: float samples (n,) in [−1, 1] in blocks of any length, mono at `rate` Hz, from the first frame on; it is
            read along with the frames, and may be shorter or longer than they are.
        fine: sound as FLAC of 16 bits, without a loss; else as AAC of 48 kbit/s, whose error of about −24 dB makes a
            small recogniser hear other letters: for players alone, where a .wav lies beside the video.

    Raises:
        ValueError: no frame, or one of another shape or dtype. MediaError: the file cannot be written.
        What `frames` and `sound` raise. An earlier file of that name is then untouched.
    """
    counted = 0

    def write(aside: Path) -> None:
        nonlocal counted
        with open(aside, "wb") as file:
            if file.seekable():
                counted = _encode(file, frames, fps, sound, rate, fine)
                return
            with tempfile.TemporaryFile() as whole:  # a pipe: mp4 is not written from front to back
                counted = _encode(whole, frames, fps, sound, rate, fine)
                whole.seek(0)
                shutil.copyfileobj(whole, file)

    try:
        files.write_file(Path(path), write)
    except (OSError, av.FFmpegError) as error:
        raise MediaError(path, f"cannot be written ({error.strerror or error})") from None
    return counted


def check_name(path: str | os.PathLike) -> None:
    """ValueError: the name says another format than `write_frames` writes."""
    files.check_suffix(path, "mp4", ".mp4", ".m4v")


def _encode(
    file: BinaryIO | Any,
    frames: Iterable[np.ndarray],
    fps: int,
    sound: Iterable[np.ndarray] | None,
    rate: int,
    fine: bool,
) -> int:
    target = _Target(file)
    try:
        with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            picture = container.add_stream("libx264", rate=fps)
            picture.pix_fmt = "yuv420p"
            picture.thread_count = 1
            # Without x264's lookahead, whose macroblock tree is not deterministic.
            picture.options = {"preset": "superfast", "crf": "20", "x264-params": "mbtree=0:rc-lookahead=0"}
            track = None if sound is None else _SoundTrack(container, sound, rate, fine)
            scaler, shape, count = VideoReformatter(), None, 0
            for image in frames:
                if shape is None:
                    shape = _checked(image)
                    picture.height, picture.width = shape[:2]
                elif image.shape != shape or image.dtype != np.uint8:
                    raise ValueError(f"expected frames of one shape, got {shape} and then {image.dtype} {image.shape}")
                count += 1
                if track is not None:
                    track.write_until(count * rate // fps)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(picture.encode(scaler.reformat(frame, format="yuv420p", threads=1)))
            if not count:
                raise ValueError("expected at least one frame")
            if track is not None:
                track.finish()
            container.mux(picture.encode(None))
        file.flush()
    except (OSError, av.FFmpegError) as error:
        raise target.error or error from None
    if target.error is not None:
        raise target.error
    return count


def _checked(image: np.ndarray) -> tuple[int, ...]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 frames (H, W, 3), got {image.dtype} {image.shape}")
    if image.shape[0] % 2 or image.shape[1] % 2 or not image.size:
        raise ValueError(f"expected an even height and width for H.264, got {image.shape[0]}×{image.shape[1]}")
    return image.shape


class _SoundTrack:
    """The sound of a video that is being written."""

    def __init__(self, container: av.container.OutputContainer, blocks: Iterable[np.ndarray], rate: int, fine: bool):
        self._container, self._blocks, self._rate = container, iter(blocks), rate
        if fine:
            self._stream = container.add_stream("flac", rate=rate, layout="mono", format="s16")
        else:
            self._stream = container.add_stream("aac", rate=rate, layout="mono", format="fltp")
            self._stream.bit_rate = 48_000
            self._stream.options = {"aac_coder": "fast"}
        self._fine = fine
        self._stream.codec_context.flags |= av.codec.context.Flags.bitexact
        self._written = 0

    def write_until(self, sample: int) -> None:
        """Encode blocks up to at least `sample`, or to the sound's end."""
        while self._written < sample and (block := next(self._blocks, None)) is not None:
            self._encode(block)

    def finish(self) -> None:
        for block in self._blocks:
            self._encode(block)
        self._container.mux(self._stream.encode(None))

    def _encode(self, block: np.ndarray) -> None:
        if not len(block):
            return
        if self._fine:
            whole = np.clip(np.rint(block * 32768.0), -32768, 32767).astype(np.int16)
            samples = av.AudioFrame.from_ndarray(whole[None], "s16", "mono")
        else:
            whole = np.ascontiguousarray(block, dtype=np.float32)
            samples = av.AudioFrame.from_ndarray(whole[None], "fltp", "mono")
        samples.rate, samples.pts, samples.time_base = self._rate, self._written, Fraction(1, self._rate)
        self._container.mux(self._stream.encode(samples))
        self._written += len(block)


class _Target:
    """What PyAV writes to: a file that keeps its first error."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None
        self.seek, self.tell = file.seek, file.tell

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise
