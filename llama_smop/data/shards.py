"""Clips in webdataset tar shards, for data that outgrows a disk: writing them, and streaming them back in batches.

A folder of shards holds `clips-000000.tar`, … and `index.json`, which knows every clip's length. So the batches of an
epoch are planned before anything is read, as a function of (seed, epoch, number of consumers): a consumer is one data
worker of one process, and reads its own shards from front to back. All consumers get equally many batches and together
every clip exactly once, and a run that resumes at batch n skips to it without decoding.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from llama_smop import files

from .batching import FrameBatchSampler, split_fullest
from .lrs3 import MODALITIES, read_labels
from .media import MediaError, read_audio, read_video, write_bytes
from .noise import Noise
from .transforms import ClipTransform, clip_rng

INDEX = "index.json"
_FORMAT = 1


class ShardError(ValueError):
    """Shards cannot be written or read: which, and why."""


def _webdataset():
    try:
        import webdataset
    except ImportError:
        raise ShardError("tar shards need webdataset, which is not installed: pip install webdataset") from None
    return webdataset


@dataclass(frozen=True)
class Shard:
    """One tar file. numbers: each clip's line in the label file, from 0, in the order of the tar; frames: its
    length."""

    name: str
    numbers: tuple[int, ...]
    frames: tuple[int, ...]


# ---- writing


def write_shards(
    root: str | os.PathLike,
    label_file: str,
    out: str | os.PathLike,
    clips_per_shard: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> list[Shard]:
    """Writes the clips of a label file (LRS3 layout) as tar shards into the folder `out`, in an order drawn by `seed`.

    A clip is three files: `{number}.mp4`, `.wav` where there is one, and `.json` with its id and text. Shards are
    written aside and renamed; run again after an interruption, finished ones are kept. Raises MediaError naming a clip
    that is missing, ShardError where `out` holds other shards.
    """
    webdataset = _webdataset()
    if clips_per_shard < 1:
        raise ValueError(f"expected at least one clip a shard, got {clips_per_shard}")
    root, out = Path(root), Path(out)
    clips = read_labels(root, label_file)
    digest = sha256("\n".join(f"{c.id},{c.n_frames},{c.text}" for c in clips).encode()).hexdigest()
    settings = {"labels": digest, "clips_per_shard": clips_per_shard, "seed": seed}
    _claim(out, settings)

    order = np.random.default_rng([seed, 0x5D]).permutation(len(clips))
    shards = []
    with tqdm(total=len(clips), desc="shards", unit="clip", disable=not progress) as bar:
        for first in range(0, len(clips), clips_per_shard):
            numbers = order[first : first + clips_per_shard].tolist()
            shard = Shard(f"clips-{len(shards):06d}.tar", tuple(numbers), tuple(clips[n].n_frames for n in numbers))
            if not (out / shard.name).exists():
                buffer = io.BytesIO()
                with webdataset.TarWriter(buffer, encoder=False, mtime=0) as tar:
                    for number in numbers:
                        tar.write({"__key__": f"{number:08d}", **_members(root, clips[number])})
                write_bytes(out / shard.name, buffer.getvalue())
            shards.append(shard)
            bar.update(len(numbers))
    index = {"format": _FORMAT, "settings": settings, "shards": [asdict(shard) for shard in shards]}
    files.write_text(out / INDEX, json.dumps(index) + "\n")
    return shards


def _members(root: Path, clip) -> dict[str, bytes]:
    video = clip.video_path(root)
    members = {}
    for path in (video, video.with_suffix(".wav")):
        try:
            members[path.suffix[1:]] = path.read_bytes()
        except FileNotFoundError:
            if path == video:
                raise MediaError(path, "no such file") from None
        except OSError as error:
            raise MediaError(path, f"cannot be read ({error.strerror})") from None
    members["json"] = json.dumps({"id": clip.id, "text": clip.text}).encode()
    return members


def _claim(out: Path, settings: dict) -> None:
    note = out / "settings.json"
    if note.exists():
        found = files.read_json(note)
        if found != settings:
            differing = [key for key in settings if found.get(key) != settings[key]]
            raise ShardError(f"{out} holds shards made of other {', '.join(differing)}: choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise ShardError(f"{out} is not empty and holds no shards: choose another folder")
    else:
        files.write_json(note, settings)


# ---- planning


def read_index(source: str | os.PathLike) -> list[Shard]:
    """The shards in `source`: a folder, or what webdataset opens.

    That is `https://bucket/folder`, or a command such as `pipe:aws s3 cp s3://bucket/folder/{name} -`.
    """
    try:
        with _open(source, INDEX) as stream:
            index = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise ShardError(f"{_place(source, INDEX)}: not the index of written shards ({error})") from None
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ShardError(f"{_place(source, INDEX)}: expected an index of format {_FORMAT}")
    shards = [Shard(s["name"], tuple(s["numbers"]), tuple(s["frames"])) for s in index["shards"]]
    for shard in shards:
        if Path(shard.name).name != shard.name or ":" in shard.name:
            raise ShardError(f"{_place(source, INDEX)}: expected plain names of shards, got {shard.name!r}")
    return shards


def _place(source: str | os.PathLike, name: str) -> str:
    source = os.fspath(source)
    return source.replace("{name}", name) if "{name}" in source else f"{source.rstrip('/')}/{name}"


def _open(source: str | os.PathLike, name: str):
    return _webdataset().gopen(_place(source, name))


@dataclass(frozen=True)
class _Window:
    """Shards that are held in memory together, and the batches made of their clips, by label number."""

    shards: tuple[Shard, ...]
    batches: tuple[tuple[int, ...], ...]


def plan_epoch(
    shards: list[Shard],
    consumers: int,
    seed: int = 0,
    epoch: int = 0,
    max_frames: int | None = None,
    max_clips: int | None = None,
    num_buckets: int = 50,
    window: int = 512,
    shuffle: bool = True,
) -> list[list[_Window]]:
    """For each consumer its windows of an epoch, equally many batches for all.

    Shards are dealt out in a drawn order, always to the consumer with the fewest frames; a window is as many of them as
    it takes to hold `window` clips, and its clips are bucketed and shuffled as by `FrameBatchSampler`.
    """
    if len(shards) < consumers:
        raise ShardError(
            f"{len(shards)} shards cannot keep {consumers} data workers busy: write smaller shards or use fewer workers"
        )
    order = np.random.default_rng([seed, epoch]).permutation(len(shards)) if shuffle else range(len(shards))
    hands: list[list[Shard]] = [[] for _ in range(consumers)]
    loads = [0] * consumers
    for i in order:
        least = loads.index(min(loads))
        hands[least].append(shards[i])
        loads[least] += sum(shards[i].frames)

    plans: list[list[_Window]] = []
    for hand in hands:
        plan, held = [], []
        for shard in hand:
            held.append(shard)
            if sum(len(s.numbers) for s in held) >= window or shard is hand[-1]:
                numbers = [n for s in held for n in s.numbers]
                sampler = FrameBatchSampler(
                    [f for s in held for f in s.frames],
                    max_frames,
                    num_buckets,
                    seed=int(np.random.SeedSequence([seed, *numbers[:2]]).generate_state(1)[0]),
                    shuffle=shuffle,
                    max_clips=max_clips,
                )
                sampler.set_epoch(epoch)
                plan.append(_Window(tuple(held), tuple(tuple(numbers[i] for i in batch) for batch in sampler)))
                held = []
        plans.append(plan)
    most = max(sum(len(w.batches) for w in plan) for plan in plans)
    return [_with_batches(plan, most) for plan in plans]


def _with_batches(plan: list[_Window], count: int) -> list[_Window]:
    """The plan with its fullest batches halved until there are `count`."""
    batches = [batch for window in plan for batch in window.batches]
    if sum(map(len, batches)) < count:
        raise ShardError("a data worker's shards hold fewer clips than another has batches: write shards of like size")
    sizes = split_fullest([len(batch) for batch in batches], count)
    clips = iter([number for batch in batches for number in batch])
    split = iter([tuple(next(clips) for _ in range(size)) for size in sizes])
    windows = []
    for window in plan:
        left, own = sum(map(len, window.batches)), []
        while left:
            own.append(next(split))
            left -= len(own[-1])
        windows.append(_Window(window.shards, tuple(own)))
    return windows


# ---- reading


class ShardedClips(IterableDataset):
    """Streams batches (lists of items, as `Lrs3Dataset` makes them) from shards; for a DataLoader with batch_size=None.

    source: a folder, an address that webdataset opens, or a command with `{name}` for the file. workers: how many
    consumers this process has; the DataLoader's num_workers must divide it (0 and 1 do), and changes nothing in what
    comes out. rank, world: this process's share. An item's augmentation depends on (seed, epoch, label number) alone,
    and is that of a `Lrs3Dataset` over the same labels. `len()` counts this process's batches of the current epoch.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        modality: str = "audiovisual",
        transform: ClipTransform | None = None,
        noise: Noise | None = None,
        seed: int = 0,
        max_frames: int | None = None,
        max_clips: int | None = None,
        num_buckets: int = 50,
        window: int = 512,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
    ):
        if modality not in MODALITIES:
            raise ValueError(f"expected a modality of {', '.join(MODALITIES)}, got {modality!r}")
        if not 0 <= rank < world or workers < 1:
            raise ValueError(f"expected 0 ≤ rank < world and workers ≥ 1, got {rank}, {world}, {workers}")
        self.source, self.modality = os.fspath(source), modality
        self.transform, self.noise, self.seed = transform or ClipTransform.testing(), noise, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.shards = read_index(source)
        self._planning = dict(  # noqa: C408
            consumers=world * workers,
            seed=seed,
            max_frames=max_frames,
            max_clips=max_clips,
            num_buckets=num_buckets,
            window=window,
            shuffle=shuffle,
        )
        # Epoch and first batch, in shared memory, so that workers that outlive an epoch see the next one.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._position[0])

    def set_epoch(self, epoch: int) -> None:
        """Chooses an epoch; a position loaded for that same epoch is kept."""
        if epoch != self.epoch:
            self._position.copy_(torch.tensor([epoch, 0]))

    def state_dict(self, batch: int) -> dict:
        """`batch`: how many batches of this epoch this process has used; its workers, which read ahead, cannot know."""
        clips = sum(len(shard.numbers) for shard in self.shards)
        state = {"epoch": self.epoch, "batch": batch, "clips": clips}
        return state | {k: self._planning[k] for k in ("seed", "consumers", "max_frames", "max_clips")}

    def load_state_dict(self, state: Mapping) -> None:
        """Iteration of the stored epoch goes on after the stored batch."""
        own = self.state_dict(0)
        fixed = own.keys() - {"epoch", "batch"}
        differing = [f"{k} {state[k]} (now {own[k]})" for k in sorted(fixed) if state[k] != own[k]]
        if differing:
            raise ValueError(f"cannot resume in mid-epoch, the stored run had {', '.join(differing)}")
        self._position.copy_(torch.tensor([state["epoch"], state["batch"]]))

    def _plan(self) -> list[list[_Window]]:
        """The windows of each of this process's consumers."""
        plans = plan_epoch(self.shards, epoch=self.epoch, **self._planning)
        return plans[self.rank * self.workers : (self.rank + 1) * self.workers]

    def __len__(self) -> int:
        return sum(len(window.batches) for plan in self._plan() for window in plan)

    def __iter__(self) -> Iterator[list[dict]]:
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info else (0, 1)
        if self.workers % readers:
            raise ValueError(f"the DataLoader has {readers} workers, which does not divide the {self.workers} planned")
        # The epoch's batches go round the consumers, and a DataLoader goes round its workers: batch n is consumer
        # n mod workers' turn, whoever reads it.
        plans, epoch, start = self._plan(), self.epoch, int(self._position[1])
        turns = [(start + reader + i * readers) % self.workers for i in range(self.workers // readers)]
        skipped = [start // self.workers + (c < start % self.workers) for c in range(self.workers)]
        streams = [self._consume(plans[c], epoch, skipped[c]) for c in turns]
        while streams:
            for stream in list(streams):
                batch = next(stream, None)
                if batch is None:
                    streams.remove(stream)
                else:
                    yield batch

    def _consume(self, plan: list[_Window], epoch: int, skip: int) -> Iterator[list[dict]]:
        for window in plan:
            wanted = window.batches[skip:]
            skip = max(0, skip - len(window.batches))
            if not wanted:
                continue
            clips = self._read(window.shards, {number for batch in wanted for number in batch})
            for batch in wanted:
                yield [self._item(number, clips.pop(number), epoch) for number in batch]

    def _read(self, shards: tuple[Shard, ...], wanted: set[int]) -> dict[int, dict]:
        """The wanted clips' files, still encoded."""
        tariterators = _webdataset().tariterators
        clips = {}
        for shard in shards:
            place = _place(self.source, shard.name)
            own = wanted.intersection(shard.numbers)
            if not own:
                continue
            try:
                with _open(self.source, shard.name) as stream:
                    members = tariterators.tar_file_expander([{"url": place, "stream": stream}])
                    for sample in tariterators.group_by_keys(members):
                        number = int(sample["__key__"])
                        if number in own:
                            clips[number] = sample
                            own.remove(number)
            except (OSError, tarfile.TarError, ValueError, EOFError) as error:
                raise ShardError(f"{place}: cannot be read ({_first_line(error)})") from None
            if own:
                raise ShardError(f"{place}: is truncated, {len(own)} of {len(shard.numbers)} clips are missing")
        return clips

    def _item(self, number: int, sample: dict, epoch: int) -> dict:
        about = json.loads(sample["json"])
        place = f"{sample['__url__']}/{about['id']}"
        audio = video = None
        if self.modality != "audio":
            video = read_video(f"{place}.mp4", content=sample["mp4"])
        if self.modality != "video":
            suffix = "wav" if "wav" in sample else "mp4"
            audio = read_audio(f"{place}.{suffix}", content=sample[suffix])
        audio, video = self.transform(audio, video, clip_rng(self.seed, epoch, number), self.noise)
        return {
            "audio": audio,
            "video": None if video is None else torch.from_numpy(video),
            "text": about["text"],
            "id": about["id"],
        }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
