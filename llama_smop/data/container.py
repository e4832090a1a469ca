"""Media files and what they are read from: opened whole, their streams chosen, every error with the file's name."""

import io
import os
import stat
from contextlib import contextmanager
from math import floor

import av

from llama_smop.data import timeline

VIDEO_RATE = 25


_QUALIFIED_NAME = f"{__name__}.MediaError: "


class MediaError(ValueError):
    """A media file cannot be used: which one, and why."""

    def __init__(self, path: str | os.PathLike, reason: str | None = None):
        if reason is None:  # a torch data worker hands over its whole traceback as one text: keep the last line
            path, _, reason = str(path).strip().splitlines()[-1].removeprefix(_QUALIFIED_NAME).partition(": ")
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self):  # so that it crosses from a data worker with both arguments
        return type(self), (self.path, self.reason)


@contextmanager
def naming(path: str | os.PathLike):
    """What a file, or a library that reads it, raises becomes a MediaError that names the file."""
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
    """Of a file that can be read from, which is not empty."""
    size = _regular(path).st_size if content is None else len(content)
    if size == 0:
        raise MediaError(path, "the file is empty")
    return size


def _regular(path: str | os.PathLike) -> os.stat_result:
    """Of no folder, and no pipe or device, which may have no end."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(path, "is a folder, not a media file")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(path, "is not a regular file")
    return status


def raw_bytes(path: str | os.PathLike, content: bytes | None):
    return open(path, "rb", buffering=0) if content is None else io.BytesIO(content)


def read_whole(path: str | os.PathLike) -> bytes:
    """What the readers take as `content`. Raises MediaError."""
    with naming(path):
        _regular(path)
        with open(path, "rb") as file:
            return file.read()


@contextmanager
def open_container(path: str | os.PathLike, content: bytes | None):
    """An open container of a whole file."""
    size = byte_count(path, content)
    with raw_bytes(path, content) as file:
        refuse_cut(path, file.read(4096), size)
    try:
        # Without "file:" a colon in a relative path would end the name of a protocol.
        source = f"file:{os.fspath(path)}" if content is None else io.BytesIO(content)
        container = av.open(source, metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise MediaError(path, f"cannot be opened, it is truncated or not a media file ({reason})") from None
    with container:
        yield container


def refuse_cut(path: str | os.PathLike, head: bytes, size: int) -> None:
    """MediaError where the file's own header says that it goes on beyond its end, which the libraries let pass."""
    declared = None
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        if 0 < length < 0xFFFFFF00:  # 0 or all ones comes from a pipe
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


def whole_packets(path: str | os.PathLike, container, stream, size: int):
    """A stream's packets, all whole, as many as the container's index has."""
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


def picture_of(container):
    """The stream of moving pictures, None where there is none: a cover is none."""
    cover = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & cover), None)


def sound_of(container):
    return next(iter(container.streams.audio), None)


def beginning(container) -> float | None:
    """Where the first frame and sample of a file with picture and sound belong; None where it has one stream only.

    That is where the picture begins, and whole frames before it where sound comes earlier.
    """
    streams = picture_of(container), sound_of(container)
    if None in streams or any(stream.start_time is None for stream in streams):
        return None
    picture, sound = (float(stream.start_time * stream.time_base) for stream in streams)
    if not picture - sound < timeline.LONGEST_GAP_S:
        raise timeline.TimelineError(f"its picture begins {picture - sound:.0f} s after its sound")
    return picture - max(0, floor((picture - sound) * VIDEO_RATE + 1e-6)) / VIDEO_RATE
