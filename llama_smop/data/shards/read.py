"""Clips out of shards."""

import json
import logging
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import cached_property

import numpy as np

from llama_smop.data.batching import nearest_in_length
from llama_smop.data.media import MediaError, read_audio, read_video
from llama_smop.data.noise import Babble, Sound
from llama_smop.data.shards.index import Shard, ShardError, ShardIndex, first_line, is_remote, open_file, place
from llama_smop.data.shards.plan import Deal, ShardBatches
from llama_smop.data.sources import LoadedClip

logger = logging.getLogger(__name__)

DUPLICATE = ""  # key under which a clip's files note the suffix that occurs twice
WAITS_S = (2, 10, 30, 120)  # before each retry of a shard that could not be fetched


def read_shard(source: str, shard: Shard) -> dict[int, dict[str, bytes]]:
    """A shard's clips by number, each as its files by suffix, still encoded.

    Raises:
        ShardError: it cannot be read or lacks clips; from a remote source, after all retries.
    """
    for wait in WAITS_S if is_remote(source) else ():
        try:
            return _read_shard(source, shard)
        except ShardError as error:
            logger.warning("%s; trying again in %d s", error, wait)
            time.sleep(wait)
    return _read_shard(source, shard)


def _read_shard(source: str, shard: Shard) -> dict[int, dict[str, bytes]]:
    where = place(source, shard.name)
    clips: dict[int, dict[str, bytes]] = {}
    try:
        with open_file(source, shard.name) as stream:
            with tarfile.open(fileobj=stream, mode="r|*") as tar:
                for member in tar:
                    number, _, suffix = member.name.rpartition("/")[2].lower().partition(".")
                    content = tar.extractfile(member) if member.isreg() else None
                    if content is not None and number.isdecimal() and suffix:
                        files = clips.setdefault(int(number), {})
                        if suffix in files:
                            files[DUPLICATE] = suffix.encode()
                        files[suffix] = content.read()
            while stream.read(1 << 20):  # read past the archive's end: a command whose output is closed early fails
                pass
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise ShardError(f"{where}: cannot be read ({first_line(error)})") from None
    missing = len(set(shard.numbers) - clips.keys())
    if missing:
        raise ShardError(f"{where}: is truncated, {missing} of {len(shard.numbers)} clips are missing")
    return clips


class ShardClips:
    """The clips of shards, by number; quick when loaded in the order of `batches`.

    A process holds, still encoded, the window of shards of the clip it loads; a thread prefetches the next window. The
    clips do not depend on that: a run that resumes in the middle of an epoch reads only the shards it needs from there.

    world, workers: processes, and data workers of each; the shards are dealt out to all of them. window, seed: as in
    `Deal`.
    """

    def __init__(self, index: ShardIndex, world: int = 1, workers: int = 1, window: int = 512, seed: int = 0):
        self.index, self.workers, self.window, self.seed = index, workers, window, seed
        self.deal = self._deal(world)
        self._shard_of = np.zeros(len(index), dtype=np.int64)
        for position, shard in enumerate(index.shards):
            self._shard_of[list(shard.numbers)] = position
        self._route: tuple[int, dict[int, tuple[int, int]], list[list[tuple[int, ...]]]] = (-1, {}, [])
        self._window: tuple[int, tuple[int, ...]] = (-1, ())
        self._held: dict[int, Future] = {}
        self._held_by = os.getpid()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def texts(self) -> tuple[str, ...]:
        """Single words: the index holds no sentences."""
        return self.index.words

    def batches(self, rank: int = 0, world: int = 1, **settings) -> ShardBatches:
        deal = self.deal if world * self.workers == self.deal.consumers else self._deal(world)
        return ShardBatches(deal, rank=rank, world=world, **settings)

    def _deal(self, world: int) -> Deal:
        return Deal(self.index.shards, world * self.workers, self.window, self.seed)

    def nearest(self, number: int) -> Iterator[int]:
        """Other clips of the same shard, which are at hand; the nearest in length first."""
        shard = self.index.shards[self._shard_of[number]]
        for at in nearest_in_length(shard.frames, shard.numbers.index(number)):
            yield shard.numbers[at]

    @cached_property
    def babble(self) -> Babble:
        """Babble of the clips of the first shard, which are a random choice; read once."""
        first = self.index.shards[0]
        clips = read_shard(self.index.source, first)
        return Babble([_sound(first, number, clips[number]) for number in first.numbers if _has_media(clips[number])])

    def load(self, number: int, modality: str, epoch: int) -> LoadedClip:
        shard = self.index.shards[self._shard_of[number]]
        clip = self._hold(int(self._shard_of[number]), epoch)[number]
        about, name = _about(clip), _name(shard, number, clip)
        if about is None:
            raise MediaError(name, "its .json does not say its id and text")
        if DUPLICATE in clip:
            raise MediaError(name, f"has its .{clip[DUPLICATE].decode()} twice, of which one may be another clip's")
        sound, picture = _sound(shard, number, clip), _picture(shard, number, clip)
        audio = video = None
        if modality != "audio":
            video = read_video(picture.path, content=picture.content, with_sound=sound == picture)
        if modality != "video":
            audio = read_audio(sound.path, content=sound.content)
        return LoadedClip(about["id"], about["text"], audio, video)

    def _hold(self, position: int, epoch: int) -> dict[int, dict[str, bytes]]:
        """The clips of the shard at `position`; starts the thread that reads its window in this epoch, and the next."""
        if self._held_by != os.getpid():  # forked: the parent's thread does not run here
            self._held, self._window, self._held_by = {}, (-1, ()), os.getpid()
        if self._window[0] != epoch or position not in self._window[1]:
            now, after = self._windows_from(position, epoch)
            for gone in self._held.keys() - {*now, *after}:
                self._held.pop(gone).cancel()
            wanted: dict[int, Future] = {p: Future() for p in (*now, *after) if p not in self._held}
            self._held |= wanted
            self._window = (epoch, now)
            # A daemon, so that the process can end without waiting for it.
            threading.Thread(target=self._read, args=(wanted,), daemon=True).start()
        return self._held[position].result()

    def _windows_from(self, position: int, epoch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The window of an epoch that holds the shard at `position`, and the same consumer's next one."""
        if self._route[0] != epoch:
            windows = self.deal.windows(epoch)
            where = {p: (c, n) for c, own in enumerate(windows) for n, window in enumerate(own) for p in window}
            self._route = (epoch, where, windows)
        _, where, windows = self._route
        consumer, turn = where[position]
        own = windows[consumer]
        after = own[turn + 1] if turn + 1 < len(own) else self.deal.windows(epoch + 1)[consumer][0]
        return own[turn], after

    def _read(self, wanted: dict[int, Future]) -> None:
        for position, future in wanted.items():
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(read_shard(self.index.source, self.index.shards[position]))
            except BaseException as error:
                future.set_exception(error)


def _about(clip: dict[str, bytes]) -> dict[str, str] | None:
    try:
        about = json.loads(clip.get("json", b""))
    except (ValueError, RecursionError):
        return None
    whole = isinstance(about, dict) and all(isinstance(about.get(key), str) for key in ("id", "text"))
    return about if whole else None


def _name(shard: Shard, number: int, clip: dict[str, bytes]) -> str:
    """A clip's shard and id, or its number in the shard where it has no id."""
    about = _about(clip)
    return f"{shard.name}/{f'{number:08d}' if about is None else about['id']}"


def _has_media(clip: dict[str, bytes]) -> bool:
    return bool(clip.keys() - {"json", DUPLICATE})


def _member(shard: Shard, number: int, clip: dict[str, bytes], first: str) -> Sound:
    """A clip's file with the suffix `first`, else another of its media files."""
    suffixes = sorted(clip.keys() - {"json", DUPLICATE}, key=lambda suffix: (suffix == "wav") != (first == "wav"))
    if not suffixes:
        raise MediaError(_name(shard, number, clip), "has no media file in its shard")
    suffix = suffixes[0]
    return Sound(f"{_name(shard, number, clip)}.{suffix}", clip.get(suffix, b""))


def _sound(shard: Shard, number: int, clip: dict[str, bytes]) -> Sound:
    return _member(shard, number, clip, "wav")


def _picture(shard: Shard, number: int, clip: dict[str, bytes]) -> Sound:
    return _member(shard, number, clip, "mp4")
