"""The index of a folder of shards: reading it, and opening files of the folder."""

import json
import os
import re
import reprlib
import shlex
from dataclasses import dataclass
from types import ModuleType
from typing import IO

from llama_smop.system.extras import remedy

INDEX = "index.json"
FORMAT = 2
SILENCE_S = 60  # without data, after which a download is abandoned


class ShardError(ValueError):
    """Shards cannot be written or read: which, and why."""

    def __init__(self, message: str):
        # A torch data worker hands over its whole traceback as one text: keep the last line.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def webdataset() -> ModuleType:
    """The library. Raises ShardError where the extra is not installed."""
    try:
        import webdataset
    except ImportError:
        raise ShardError(f"tar shards: {remedy('webdataset')}") from None
    return webdataset


@dataclass(frozen=True)
class Shard:
    """One tar file. numbers: each clip's line in the label file, from 0, in the order of the tar; frames: its
    length."""

    name: str
    numbers: tuple[int, ...]
    frames: tuple[int, ...]


@dataclass(frozen=True)
class ShardIndex:
    """Every clip of a corpus. source: a folder, or what webdataset opens; words: those of all texts, in lower case."""

    source: str
    shards: tuple[Shard, ...]
    words: tuple[str, ...]

    def __len__(self) -> int:
        """Clips."""
        return sum(len(shard.numbers) for shard in self.shards)


def read_index(source: str | os.PathLike) -> ShardIndex:
    """The index of `source`: a folder, or what webdataset opens.

    That is `https://bucket/folder`, or a command such as `pipe:aws s3 cp s3://bucket/folder/{name} -`.
    """
    where = place(source, INDEX)
    try:
        with open_file(source, INDEX) as stream:
            index = json.loads(stream.read())
    except (OSError, ValueError, RecursionError) as error:
        raise ShardError(f"{where}: not the index of written shards ({first_line(error)})") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ShardError(
            f"{where}: expected an index of format {FORMAT}; `llama-smop corpus shard` with the same arguments writes "
            "it again and keeps the shards"
        )
    try:
        shards = tuple(_shard(entry) for entry in index["shards"])
        words = tuple(index["words"])
        if not isinstance(index["words"], list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"expected a list of words, got {reprlib.repr(index['words'])}")
    except KeyError as error:
        raise ShardError(f"{where}: not the index of written shards (without {error})") from None
    except (TypeError, ValueError) as error:
        raise ShardError(f"{where}: not the index of written shards ({first_line(error)})") from None
    for shard in shards:
        if not re.fullmatch(r"\w[\w.-]*", shard.name, re.ASCII):  # a name may become part of a shell command
            raise ShardError(f"{where}: expected plain names of shards, got {shard.name!r}")
    numbers = sorted(number for shard in shards for number in shard.numbers)
    if not numbers or numbers != list(range(len(numbers))):
        raise ShardError(f"{where}: expected every clip once, numbered from 0")
    return ShardIndex(os.fspath(source), shards, words)


def _shard(entry: dict) -> Shard:
    shard = Shard(entry["name"], tuple(entry["numbers"]), tuple(entry["frames"]))
    whole = all(type(value) is int for value in (*shard.numbers, *shard.frames))
    if not isinstance(shard.name, str) or not whole or min(shard.frames, default=1) < 1:
        raise ValueError(f"expected names, numbers and positive frames, got {reprlib.repr(entry)}")
    if len(shard.frames) != len(shard.numbers):
        raise ValueError(f"{shard.name} has {len(shard.numbers)} clips and the frames of {len(shard.frames)}")
    return shard


def place(source: str | os.PathLike, name: str) -> str:
    """Address or command of a file in `source`."""
    source = os.fspath(source)
    return source.replace("{name}", name) if "{name}" in source else f"{source.rstrip('/')}/{name}"


def is_remote(source: str | os.PathLike) -> bool:
    """Whether `source` is read over a network, where a failed read may succeed when tried again."""
    return os.fspath(source).startswith("pipe:") or "://" in os.fspath(source)


def open_file(source: str | os.PathLike, name: str) -> IO[bytes]:
    """A file of `source`, to be read from its beginning to its end."""
    where = place(source, name)
    if where.startswith(("http://", "https://")):  # webdataset's own curl has no timeout
        where = f"pipe:curl -fsSL --connect-timeout 30 --speed-limit 1 --speed-time {SILENCE_S} {shlex.quote(where)}"
    return webdataset().gopen(where)


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a message of one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    status = re.search(r"\bexit (\d+) \(read\)", text)  # webdataset prints all its arguments
    return f"the command ended with {status[1]}" if status else text
