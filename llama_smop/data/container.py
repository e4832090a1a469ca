"""Open media files, choose their streams, refuse truncated ones; every error names the file."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from typing import Any

import av

from llama_smop.data import timeline
from llama_smop.models.units import VIDEO_RATE

_QUALIFIED_NAME = f"{__name__}.MediaError: "


class MediaError(ValueError):
    """A media file cannot be used: which one, and why."""

    def __init__(self, path: str | os.PathLike, reason: str | None = None):
        if reason is None:  # a torch data worker hands over its whole traceback as one text: keep the last line
            path, _, reason = str(path).strip().splitlines()[-1].removeprefix(_QUALIFIED_NAME).partition(": ")
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self):  # so that a data worker can send it with both arguments
        return type(self), (self.path, self.reason)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turn the exceptions of a file, or of a library that reads it, into a MediaError that names the file."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(path, "no such file") from None
    except MemoryError:
        raise MediaError(path, "does not fit into memory") from None
    except (OSError, ValueError, RuntimeError, ArithmeticError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MediaError(path, f"cannot be read ({reason})") from None


def byte_count(path: str | os.PathLike, content: bytes | None) -> int:
    """Size of a file, or of its `content`. Raises MediaError: it is empty, or not a regular file."""
    size = _regular(path).st_size if content is None else len(content)
    if size == 0:
        raise MediaError(path, "the file is empty")
    return size


def _regular(path: str | os.PathLike) -> os.stat_result:
    """Status of a regular file. Raises MediaError: a folder; a pipe or device, which may have no end."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(path, "is a folder, not a media file")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(path, "is not a regular file")
    return status


def raw_bytes(path: str | os.PathLike, content: bytes | None) -> io.RawIOBase | io.BytesIO:
    return open(path, "rb", buffering=0) if content is None else io.BytesIO(content)


def read_whole(path: str | os.PathLike) -> bytes:
    """The bytes of a file, for the readers' argument `content`. Raises MediaError."""
    with naming(path):
        _regular(path)
        with open(path, "rb") as file:
            return file.read()


@contextmanager
def open_container(path: str | os.PathLike, content: bytes | None) -> Iterator[av.container.InputContainer]:
    """An open container of a whole file."""
    size = byte_count(path, content)
    with raw_bytes(path, content) as file:
        refuse_cut(path, file.read(4096), size)
    try:
        # Without "file:" a colon in a relative path would end the name of a protocol.
        source = f"file:{os.fspath(path)}" if content is None else io.BytesIO(content)
        container = av.open(source, "r", metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise MediaError(path, f"cannot be opened, it is truncated or not a media file ({reason})") from None
    with container:
        yield container


def refuse_cut(path: str | os.PathLike, head: bytes, size: int) -> None:
    """MediaError where the file's header declares more bytes than there are, which the libraries accept."""
    declared = None
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        if 0 < length < 0xFFFFFF00:  # 0 or all ones: written to a pipe
            declared = length + 8
    elif head[:4] == b"FORM":
        declared = int.from_bytes(head[4:8], "big") + 8
    elif head[:4] == b"\x1a\x45\xdf\xa3" and (at := head.find(b"\x18\x53\x80\x67")) > 0 and at + 12 <= len(head):
        width = 9 - head[at + 4].bit_length()  # Matroska: the size of the segment, all ones where it was not known
        length = int.from_bytes(head[at + 4 : at + 4 + width], "big") & (1 << 7 * width) - 1
        if length != (1 << 7 * width) - 1:
            declared = at + 4 + width + length
    if declared is not None and declared > size + 1:
        raise MediaError(path, f"is truncated: {size} of {declared} bytes")


def whole_packets(
    path: str | os.PathLike, container: av.container.InputContainer, stream: av.VideoStream | av.AudioStream, size: int
) -> Iterator[Any]:
    """A stream's packets. Raises MediaError: an incomplete one, or the index names packets beyond the file's end."""
    read = 0
    for packet in container.demux(stream):
        if packet.size and packet.is_corrupt:
            raise MediaError(path, f"is truncated: packet {read} is incomplete")
        read += bool(packet.size)
        yield packet
    if "mp4" in container.format.name:  # an edit list may hide packets, so their count says nothing
        beyond = sum(entry.pos + entry.size > size for entry in stream.index_entries)
        if beyond:
            raise MediaError(path, f"is truncated: {beyond} of {len(stream.index_entries)} packets lie beyond its end")


def picture_of(container: av.container.InputContainer) -> av.VideoStream | None:
    """The video stream, None where there is none; a cover picture does not count."""
    cover = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & cover), None)


def sound_of(container: av.container.InputContainer) -> av.AudioStream | None:
    """The first audio stream, None where there is none."""
    return next(iter(container.streams.audio), None)


def beginning(container: av.container.InputContainer) -> float | None:
    """Time of the first frame and sample of a file with picture and sound; None where it has one stream only.

    It is the start of the picture, moved back by whole frames where the sound starts earlier.
    """
    picture, sound = _start(picture_of(container)), _start(sound_of(container))
    if picture is None or sound is None:
        return None
    if not picture - sound < timeline.LONGEST_GAP_S:
        raise timeline.TimelineError(f"its picture begins {picture - sound:.0f} s after its sound")
    return picture - max(0, floor((picture - sound) * VIDEO_RATE + 1e-6)) / VIDEO_RATE


def _start(stream: av.VideoStream | av.AudioStream | None) -> float | None:
    """Seconds at which a stream starts; None without a stream, or where the file does not say."""
    if stream is None or stream.start_time is None or stream.time_base is None:
        return None
    return float(stream.start_time * stream.time_base)
