"""Reading and writing clips and recordings: by PyAV, sound files by soundfile.

Everything is read as uint8 RGB frames at 25 a second and float32 mono samples at 16 kHz, each at the time of its
timestamp (timeline.py), the picture upright and with square pixels. Files are written aside and renamed, so an
interrupted write leaves nothing that looks like a clip.
"""

import io
import os
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter

from llama_smop.data import timeline
from llama_smop.data.container import (
    MediaError,
    beginning,
    byte_count,
    naming,
    open_container,
    picture_of,
    raw_bytes,
    refuse_cut,
    sound_of,
    whole_packets,
)
from llama_smop.data.video_writer import write_frames
from llama_smop.models.units import AUDIO_RATE, VIDEO_RATE
from llama_smop.system import files

VIDEO_SIZE = 96
SOUND_RATES = (1_000, 768_000)  # Hz; a header that declares another is damaged
LONGEST_VIDEO_S, LONGEST_AUDIO_S = 2 * 3600, 12 * 3600  # the most that is read into memory at once


def streams(path: str | os.PathLike, content: bytes | None = None) -> tuple[str, ...]:
    """The streams of a file, of "audio" and "video", judged by its content. content: as in `stream_video`.

    Raises MediaError.
    """
    with naming(path):
        byte_count(path, content)
        with raw_bytes(path, content) as file:
            if _is_sound_file(file.read(4096)):
                return ("audio",)
        with open_container(path, content) as container:
            found = {"audio": sound_of(container), "video": picture_of(container)}
            return tuple(name for name, stream in found.items() if stream is not None)


# -- picture -----------------------------------------------------------------------------------------------------------


def read_video(
    path: str | os.PathLike,
    fps: int = VIDEO_RATE,
    size: int = VIDEO_SIZE,
    content: bytes | None = None,
    with_sound: bool = False,
) -> np.ndarray:
    """Frames of a clip, uint8 RGB (T, size, size, 3): `stream_video` read to its end. Raises MediaError."""
    with naming(path):
        frames = []
        for frame in stream_video(path, fps, size, content, with_sound):
            frames.append(frame)
            if len(frames) > LONGEST_VIDEO_S * fps:
                raise MediaError(path, f"is longer than {LONGEST_VIDEO_S // 3600} h, the most that is read at once")
        return np.stack(frames)


def stream_video(
    path: str | os.PathLike,
    fps: int = VIDEO_RATE,
    size: int | None = None,
    content: bytes | None = None,
    with_sound: bool = False,
) -> Iterator[np.ndarray]:
    """Frames of a video of any length, one after the other, uint8 RGB (H, W, 3), `fps` a second by their timestamps.

    size: None = as the first frame is shown; else each is scaled so that the shorter side fits and cropped around the
    centre to (size, size, 3). content: the file's bytes where they are in memory already; `path` then only names it.
    with_sound: begin where `stream_audio` of the same file begins, with the first frame for longer where sound comes
    earlier; without, at the first frame. The same array may be yielded several times: do not write to it.

    Raises:
        MediaError: the file is missing, empty, truncated, or has no video; timestamps that cannot be right.
    """
    with naming(path), open_container(path, content) as container:
        stream = picture_of(container)
        if stream is None:
            raise MediaError(path, "has no video stream")
        stream.thread_type = "NONE"  # clips are short, and data workers already run side by side
        rate = stream.average_rate
        shown = timeline.even_frames(
            _decoded_frames(path, container, stream, byte_count(path, content)),
            fps,
            beginning(container) if with_sound else None,
            float(1 / rate) if rate else None,
        )
        picture = _Picture(size, stream.sample_aspect_ratio)
        last = None
        image: np.ndarray | None = None
        for frame in shown:
            if image is None or frame is not last:
                last, image = frame, picture(frame)
            yield image
        if last is None:
            raise MediaError(path, "holds no frame")


def _decoded_frames(path, container, stream, size: int) -> Iterator[tuple[float | None, av.VideoFrame]]:
    count = 0
    try:
        for packet in whole_packets(path, container, stream, size):
            for frame in packet.decode():
                time = frame.time
                if time is None and frame.dts is not None:
                    time = float(frame.dts * frame.time_base)
                yield time, frame
                count += 1
    except (av.FFmpegError, OSError) as error:
        raise MediaError(path, f"cannot be decoded after {count} frames ({error.strerror})") from None


class _Picture:
    """Decoded frames as they are shown: square pixels, turned upright, of one size."""

    def __init__(self, size: int | None, pixel_aspect: Fraction | None):
        self.size = size
        self.shape: tuple[int, int] | None = None
        self.stretch = float(pixel_aspect) if pixel_aspect and 0.25 <= pixel_aspect <= 4 else 1.0
        self.scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        width, height = frame.width * self.stretch, frame.height
        if self.size is None:
            if self.shape is None:
                shown = (height, round(width))
                self.shape = shown[::-1] if turns % 2 else shown
            height, width = self.shape[::-1] if turns % 2 else self.shape
            image = self._rgb(frame, width, height)
        else:
            scale = self.size / min(width, height)
            width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
            top, left = (height - self.size) // 2, (width - self.size) // 2
            image = self._rgb(frame, width, height)[top : top + self.size, left : left + self.size]
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

    def _rgb(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        return self.scaler.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1).to_ndarray()


# -- sound -------------------------------------------------------------------------------------------------------------


def read_audio(path: str | os.PathLike, rate: int = AUDIO_RATE, content: bytes | None = None) -> np.ndarray:
    """Samples of a sound file, or of the sound of a video, float32 (samples,), mono at `rate` Hz: `stream_audio` read
    to its end. Raises MediaError."""
    with naming(path):
        blocks, samples = [], 0
        for block in stream_audio(path, rate, content):
            blocks.append(block)
            samples += len(block)
            if samples > LONGEST_AUDIO_S * rate:
                raise MediaError(path, f"is longer than {LONGEST_AUDIO_S // 3600} h, the most that is read at once")
        return np.ascontiguousarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks), dtype=np.float32)


def stream_audio(path: str | os.PathLike, rate: int = AUDIO_RATE, content: bytes | None = None) -> Iterator[np.ndarray]:
    """Sound of any length in blocks, float32 (n,), mono at `rate` Hz.

    Channels are averaged, another rate is resampled, and where nothing was recorded there is silence. Sound of a file
    with a picture begins where `stream_video(…, with_sound=True)` begins. content: as there.

    Raises:
        MediaError: the file is missing, empty, truncated or silent of samples, holds NaN or infinity, or declares a
            rate outside of SOUND_RATES.
    """
    with naming(path):
        size, empty = byte_count(path, content), True
        with raw_bytes(path, content) as file:
            head = file.read(4096)
            refuse_cut(path, head, size)
            sound = _open_sound_file(file) if _is_sound_file(head) else None
            blocks = _decoded_sound(path, content, size) if sound is None else _sound_file_blocks(path, sound)
            with closing(blocks):
                source = next(blocks)
                if not SOUND_RATES[0] <= source <= SOUND_RATES[1]:
                    raise MediaError(path, f"declares a rate of {source} Hz, which no recording has")
                for block in timeline.resampled(_finite(path, blocks), source, rate):
                    empty = False
                    yield block
        if empty:
            raise MediaError(path, "holds no sound")


def _finite(path: str | os.PathLike, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        if not np.isfinite(block).all():
            raise MediaError(path, "holds samples that are not finite numbers")
        if len(block):
            yield block


def _is_sound_file(head: bytes) -> bool:
    """Whether soundfile reads a file with this head. It cannot seek in a FLAC of unknown length."""
    if head[:4] == b"fLaC":
        return int.from_bytes(head[18:26], "big") % (1 << 36) > 0
    mpeg_audio = head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE0 == 0xE0 and bool(head[1] & 0x06)
    wave = head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE"
    return wave or mpeg_audio or head[:3] == b"ID3" or head[:4] in (b"FORM", b".snd")


def _open_sound_file(file) -> soundfile.SoundFile | None:
    """None where soundfile cannot read it, as with other codecs in a .wav."""
    file.seek(0)
    try:
        if isinstance(file, io.BytesIO):
            return soundfile.SoundFile(file)
        return soundfile.SoundFile(file.fileno(), closefd=False)
    except (soundfile.SoundFileError, RuntimeError):
        return None


def _sound_file_blocks(path: str | os.PathLike, sound: soundfile.SoundFile):
    """The rate, then mono samples in blocks."""
    with sound:
        yield sound.samplerate
        declared, read = sound.frames, 0
        if declared > sound.samplerate * LONGEST_AUDIO_S:
            raise MediaError(path, f"declares {declared} samples, more than {LONGEST_AUDIO_S // 3600} h")
        at_once = max(1, (1 << 20) // sound.channels)
        try:
            while read < declared and len(block := sound.read(at_once, dtype="float32", always_2d=True)):
                read += len(block)
                yield block.mean(axis=1) if sound.channels > 1 else block[:, 0]
        except (soundfile.SoundFileError, RuntimeError) as error:
            reason = str(error).rstrip(".").split(": ")[-1]
            raise MediaError(path, f"cannot be read as sound beyond sample {read} ({reason})") from None
        if read < declared and sound.format != "MP3":  # an MP3's declared length is an estimate
            raise MediaError(path, f"is truncated: {read} of {declared} samples")


def _decoded_sound(path: str | os.PathLike, content: bytes | None, size: int):
    """The rate, then mono samples in blocks, at their times."""
    with open_container(path, content) as container:
        stream = sound_of(container)
        if stream is None:
            raise MediaError(path, "has no audio stream, and no .wav lies beside it")
        frames = _decoded_samples(path, container, stream, size)
        first = next(frames, None)
        yield stream.rate if first is None else first[0]
        if first is not None:
            blocks = ((time, samples) for _, time, samples in chain([first], frames))
            yield from timeline.unbroken(blocks, first[0], beginning(container))


def _decoded_samples(path, container, stream, size: int) -> Iterator[tuple[int, float | None, np.ndarray]]:
    """Rate, time and samples."""
    rate, packed = None, av.AudioResampler(format="flt")
    try:
        for packet in whole_packets(path, container, stream, size):
            for frame in packet.decode():
                if frame.sample_rate != rate and rate is not None:
                    raise MediaError(path, f"its sample rate changes from {rate} to {frame.sample_rate} Hz")
                rate, time = frame.sample_rate, frame.time
                # PyAV reads out of bounds, and crashes, for planar sound of eight channels and more.
                wide = frame.format.is_planar and frame.layout.nb_channels >= 8
                for part in packed.resample(frame) if wide else (frame,):
                    yield rate, time, _mono(part)
                    time = None
    except (av.FFmpegError, OSError) as error:
        raise MediaError(path, f"its audio cannot be decoded ({error.strerror})") from None


def _mono(frame: av.AudioFrame) -> np.ndarray:
    values: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        values = (values.astype(np.float32) - 128) / 128
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / np.float32(2.0 ** (8 * values.dtype.itemsize - 1))
    if len(values) > 1:
        return values.mean(axis=0, dtype=np.float32)
    return values[0].astype(np.float32, copy=False)


def audio_path(video_path: str | os.PathLike) -> Path:
    """The file with a clip's sound: the .wav beside it, or the video itself where there is none."""
    wav = Path(video_path).with_suffix(".wav")
    with naming(wav):
        try:
            os.stat(wav)
        except (FileNotFoundError, NotADirectoryError):
            return Path(video_path)
    return wav


def files_of(recording: str | os.PathLike) -> tuple[Path, Path]:
    """The files that are read of a recording: itself, and the .wav beside it, which need not be there."""
    path = Path(recording)
    return path, path.parent / f"{path.stem}.wav"


# -- writing -----------------------------------------------------------------------------------------------------------


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file aside and renames it; where that fails (MediaError), an earlier file of that name is untouched."""
    try:
        files.write_bytes(Path(path), content)
    except OSError as error:
        raise MediaError(path, f"cannot be written ({error.strerror or error})") from None


def write_audio(path: str | os.PathLike, samples: np.ndarray, rate: int = AUDIO_RATE) -> None:
    """Writes float samples in [−1, 1], (samples,), as 16-bit PCM."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    write_bytes(path, buffer.getvalue())


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray,
    fps: int = VIDEO_RATE,
    audio: np.ndarray | None = None,
    rate: int = AUDIO_RATE,
) -> None:
    """Writes uint8 RGB frames (T, H, W, 3) as H.264 in mp4, with the sound as AAC where `audio` (samples,) is given.

    The same input gives the same bytes. `video_writer.write_frames` does the same for frames that come one by one.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"expected uint8 frames (T, H, W, 3), got {frames.dtype} {frames.shape}")
    write_frames(path, frames, fps, None if audio is None else [audio], rate)
