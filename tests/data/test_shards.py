import json
import math
import tarfile
from collections import Counter
from concurrent.futures import Future
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from llama_smop.data.lrs3 import read_labels
from llama_smop.data.media import MediaError
from llama_smop.data.noise import Noise
from llama_smop.data.shards import read
from llama_smop.data.shards.index import Shard, ShardError, read_index
from llama_smop.data.shards.plan import Deal, ShardBatches
from llama_smop.data.shards.read import ShardClips
from llama_smop.data.shards.write import write_shards
from llama_smop.data.sources import FolderClips
from llama_smop.data.training_plan import Draw, DrawnClips, Stage, TrainingPlan, batches_in
from llama_smop.training.setbacks import ReplacedClips
from tests.data.conftest import TRAINING

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("webdataset")

few = settings(derandomize=True, deadline=None, max_examples=40)


@pytest.fixture
def fetched(monkeypatch):
    """Names of the files that were opened in this process, in order."""
    names, opened = [], read.open_file

    def open_file(source, name):
        names.append(name)
        return opened(source, name)

    monkeypatch.setattr(read, "open_file", open_file)
    return names


def clips(source, **settings_):
    return ShardClips(read_index(source), **settings_)


def drawn(source, noise=None, seed=0):
    return DrawnClips(source, TRAINING, noise, seed)


def plan(source, batches=None, seed=0, **settings_):
    """Clean audio only, over as many batches as asked for or one epoch."""
    made = source.batches(**{"max_clips": 2, **settings_})
    return TrainingPlan(made, [Stage(batches or len(made), {"audio": 1}, noise=False)], seed)


def loader(source, plan, **settings_):
    return DataLoader(drawn(source), batch_sampler=plan, collate_fn=list, **settings_)


def ids(batches):
    return [[item["id"] for item in batch] for batch in batches]


def same(one, other):
    assert (one["id"], one["text"]) == (other["id"], other["text"])
    for stream in ("audio", "video"):
        np.testing.assert_array_equal(one[stream], other[stream])


# ---- writing


def test_shards_are_ordinary_tars_with_every_clip_once(small_corpus, shards):
    names = Counter()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            names.update(tar.getnames())
    assert names == Counter(f"{n:08d}.{suffix}" for n in range(9) for suffix in ("mp4", "wav", "json"))
    index, labels = read_index(shards), read_labels(small_corpus, "train.csv")
    assert {n: f for s in index.shards for n, f in zip(s.numbers, s.frames, strict=True)}[4] == labels[4].n_frames
    assert set(index.words) == {word for clip in labels for word in clip.text.split()}


def test_writing_goes_on_after_an_interruption_and_gives_the_same_bytes(small_corpus, shards, tmp_path):
    out = tmp_path / "again"
    write_shards(small_corpus, "train.csv", out, clips_per_shard=2, progress=False)
    kept = out / "clips-000000.tar"
    before = kept.stat().st_mtime_ns
    (out / "clips-000003.tar").unlink()
    (out / "index.json").unlink()
    write_shards(small_corpus, "train.csv", out, clips_per_shard=2, progress=False)
    assert kept.stat().st_mtime_ns == before, "a finished shard was written again"
    for path in shards.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_unusable_clips_and_folders_are_named(small_corpus, corpus_copy, tmp_path):
    clip = read_labels(corpus_copy, "train.csv")[3].video_path(corpus_copy)
    clip.unlink()
    with pytest.raises(MediaError, match=rf"{clip.name}: no such file"):
        write_shards(corpus_copy, "train.csv", tmp_path / "shards", clips_per_shard=2, progress=False)
    assert not (tmp_path / "shards" / "index.json").exists()
    with pytest.raises(ShardError, match=r"other settings \(clips_per_shard\): choose another folder"):
        write_shards(corpus_copy, "train.csv", tmp_path / "shards", clips_per_shard=3, progress=False)
    with pytest.raises(ShardError, match="is not empty and holds no shards"):
        write_shards(small_corpus, "train.csv", small_corpus / "labels", progress=False)


# ---- planning


@st.composite
def some_shards(draw):
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    frames = st.integers(20, 200)
    shards, first = [], 0
    for i, size in enumerate(sizes):
        lengths = draw(st.lists(frames, min_size=size, max_size=size))
        shards.append(Shard(f"{i}.tar", tuple(range(first, first + size)), tuple(lengths)))
        first += size
    return shards


@given(
    some_shards(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(100, 800),
    st.integers(0, 3),
    st.integers(1, 40),
)
@few
def test_consumers_share_every_clip_in_equally_many_batches(shards, world, workers, max_frames, epoch, window):
    if len(shards) < world * workers:
        with pytest.raises(ShardError, match="write smaller shards or use fewer workers"):
            Deal(shards, world * workers)
        return
    deal = Deal(shards, world * workers, window)
    windows = deal.windows(epoch)
    assert Counter(place for own in windows for w in own for place in w) == Counter(range(len(shards)))
    ranks = [ShardBatches(deal, max_frames, rank=rank, world=world) for rank in range(world)]
    for rank in ranks:
        rank.set_epoch(epoch)
    try:
        batches = [list(rank) for rank in ranks]
    except ShardError as error:
        assert "fewer clips than another has batches" in str(error)
        return
    frames = {n: f for s in shards for n, f in zip(s.numbers, s.frames, strict=True)}
    assert Counter(n for own in batches for b in own for n in b) == Counter(frames.keys())
    assert {len(own) for own in batches} == {len(rank) for rank in ranks} and len({len(own) for own in batches}) == 1
    for rank, own in enumerate(batches):
        for worker in range(workers):
            held = [{n for place in w for n in shards[place].numbers} for w in windows[rank * workers + worker]]
            turns = [next(i for i, h in enumerate(held) if h.issuperset(batch)) for batch in own[worker::workers]]
            assert turns == sorted(turns), "a batch goes back to shards that its worker has left"
        for batch in own:
            assert len(batch) == 1 or len(batch) * max(frames[n] for n in batch) <= max_frames
    assert batches == [list(rank) for rank in ranks]


def test_epochs_and_seeds_shuffle_and_every_epoch_has_its_own_length(shards):
    def epoch(number, seed=0):
        batches = clips(shards, seed=seed).batches(max_clips=2)
        batches.set_epoch(number)
        return list(batches)

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)
    batches, lengths = clips(shards, workers=2, window=3).batches(max_clips=2), []
    for number in range(4):
        batches.set_epoch(number)
        lengths.append(len(list(batches)))
    assert batches_in(batches, 4) == sum(lengths)
    assert batches_in(batches, 2.5) == sum(lengths[:2]) + math.ceil(lengths[2] / 2)


def test_ranks_of_a_step_draw_one_modality_and_share_the_clips(shards):
    stages = [Stage(12, {"audio": 1, "video": 1, "audiovisual": 1}, noise=True)]
    source = clips(shards, world=2, workers=2)
    plans = [list(TrainingPlan(source.batches(rank, 2, max_clips=2), stages)) for rank in range(2)]
    for step in zip(*plans, strict=True):
        assert len({draw.modality for batch in step for draw in batch}) == 1
    first = Counter(draw.index for batches in plans for batch in batches for draw in batch if draw.epoch == 0)
    assert first == Counter(range(9))


# ---- reading


def test_items_are_those_of_the_plain_source(small_corpus, shards):
    plain, sharded = drawn(FolderClips(small_corpus, "train.csv"), seed=5), drawn(clips(shards), seed=5)
    assert len(plain) == len(sharded) == 9
    for modality in ("audio", "video", "audiovisual"):
        for epoch in (0, 1):
            for number in range(9):
                draw = Draw(number, epoch, modality, noise=False)
                same(sharded[draw], plain[draw])


@pytest.mark.parametrize("workers", (1, 2, 3))
def test_a_loader_that_goes_on_in_mid_epoch_gives_the_rest(shards, workers):
    """Over the end of an epoch, with as many data workers, without any, and from every place."""
    source = clips(shards, workers=workers, window=3)
    whole = plan(source, batches=9)
    expected = ids(loader(source, whole))
    assert ids(loader(source, whole, num_workers=workers)) == expected
    for skipped in (1, 4, 7):
        rest = accelerate.skip_first_batches(loader(source, whole, num_workers=workers), skipped)
        assert ids(rest) == expected[skipped:]


def test_a_worker_does_not_wait_for_what_its_parent_was_reading(shards):
    source = clips(shards, workers=1, window=3)
    whole = plan(source, batches=3)
    expected = ids(loader(source, whole))
    for position in list(source._held):
        source._held[position] = Future()  # as if the parent's thread had not come to it
    assert ids(loader(source, whole, num_workers=1, timeout=60)) == expected


def read_ahead(source):
    """Wait for what its thread is reading."""
    assert all(shard.result(timeout=60) for shard in source._held.values())


def test_going_on_fetches_nothing_that_was_passed(shards, fetched):
    whole = plan(clips(shards, window=3))
    deal = clips(shards, window=3).deal
    windows = [[deal.shards[place] for place in window] for window in deal.windows(0)[0]]
    source = clips(shards, window=3)
    list(loader(source, whole))
    read_ahead(source)
    assert fetched[:5] == [shard.name for window in windows for shard in window], "not in the order they are dealt"
    next_epoch = {deal.shards[place].name for place in deal.windows(1)[0][0]}
    for skipped, batch in enumerate(whole):
        source = clips(shards, window=3)
        fetched.clear()
        next(iter(accelerate.skip_first_batches(loader(source, whole), skipped)))
        read_ahead(source)
        at = next(i for i, window in enumerate(windows) if any(batch[0].index in shard.numbers for shard in window))
        passed = {shard.name for window in windows[:at] for shard in window} - next_epoch
        assert fetched[: len(windows[at])] == [shard.name for shard in windows[at]]
        assert not passed & set(fetched), f"after {skipped} batches"


def test_the_next_window_is_read_ahead_and_past_ones_are_let_go(shards):
    source = clips(shards, window=3)
    for now, after in pairwise(source.deal.windows(0)[0]):
        source.load(source.index.shards[now[0]].numbers[0], "audio", 0)
        assert set(source._held) == {*now, *after}
        read_ahead(source)


@pytest.mark.parametrize("workers", (0, 1))
def test_damage_is_named(small_corpus, tmp_path, workers):
    out = tmp_path / "shards"
    write_shards(small_corpus, "train.csv", out, clips_per_shard=3, progress=False)
    tar = out / "clips-000001.tar"
    whole = tar.read_bytes()
    source = clips(out)
    for share in (0.9, 0.4):
        tar.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ShardError, match=rf"^{tar}: (is truncated|cannot be read)"):
            list(loader(clips(out), plan(source), num_workers=workers))
    tar.unlink()
    with pytest.raises(ShardError, match=rf"^{tar}: cannot be read"):
        list(loader(clips(out), plan(source), num_workers=workers))


def test_an_index_that_cannot_be_used_is_named(shards, tmp_path):
    with pytest.raises(ShardError, match=r"index\.json: not the index"):
        read_index(tmp_path / "nowhere")
    index = json.loads((shards / "index.json").read_text())
    for change, message in (
        ({"format": 1}, "expected an index of format 2; `llama-smop corpus shard`"),
        ({"shards": index["shards"][1:]}, "expected every clip once"),
        ({"shards": [index["shards"][0] | {"name": "../x.tar"}]}, "expected plain names"),
        ({"shards": [index["shards"][0] | {"name": "x;reboot"}]}, "expected plain names"),
    ):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(ShardError, match=message):
            read_index(tmp_path)


def test_a_bad_clip_gives_way_to_its_nearest_of_the_same_shard(corpus_copy, tmp_path):
    labels = read_labels(corpus_copy, "train.csv")
    bad = labels[4].video_path(corpus_copy)
    bad.write_bytes(bad.read_bytes()[:1500])
    write_shards(corpus_copy, "train.csv", tmp_path / "shards", clips_per_shard=5, progress=False)
    source = clips(tmp_path / "shards")
    item = ReplacedClips(drawn(source), limit=2)[Draw(4, 0, "video", False)]
    shard = next(s for s in source.index.shards if 4 in s.numbers)
    assert list(item["bad_clips"]) == [f"{shard.name}/{labels[4].id}.mp4"]
    others = [n for n in shard.numbers if n != 4]
    least = min(abs(labels[n].n_frames - labels[4].n_frames) for n in others)
    assert item["id"] in {labels[n].id for n in others if abs(labels[n].n_frames - labels[4].n_frames) == least}


def test_babble_comes_from_the_first_shard(shards, fetched):
    """It is that of a label file with the same clips, whatever has been read before."""
    source = clips(shards)
    babble = source.babble
    assert fetched == ["clips-000000.tar"]
    first, again = (babble.sample(16_000, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.std() > 0
    noisy = drawn(source, Noise(babble, (0,)))
    draws = [Draw(n, 0, "audio", noise=True) for n in range(9)]
    forwards = [noisy[draw]["audio"] for draw in draws]
    backwards = [drawn(clips(shards), Noise(clips(shards).babble, (0,)))[draw]["audio"] for draw in reversed(draws)]
    for one, other in zip(forwards, reversed(backwards), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(forwards[0], drawn(source)[draws[0]]["audio"])
