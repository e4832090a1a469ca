import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.data.media import MediaError
from llama_smop.data.transforms import ClipTransform

webdataset = pytest.importorskip("webdataset")

from llama_smop.data.shards import Shard, ShardedClips, ShardError, plan_epoch, read_index, write_shards  # noqa: E402

few = settings(derandomize=True, deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def shards(small_corpus, tmp_path_factory):
    """The nine training clips in five shards."""
    out = tmp_path_factory.mktemp("shards") / "train"
    write_shards(small_corpus, "train.csv", out, clips_per_shard=2, progress=False)
    return out


def stream(source, **settings_):
    return ShardedClips(source, transform=ClipTransform.training(), **{"max_clips": 2, **settings_})


def ids(batches):
    return [[item["id"] for item in batch] for batch in batches]


def test_shards_are_ordinary_tars_with_every_clip_once(small_corpus, shards):
    names = Counter()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            names.update(tar.getnames())
    expected = Counter(f"{n:08d}.{suffix}" for n in range(9) for suffix in ("mp4", "wav", "json"))
    assert names == expected
    clip = Lrs3Dataset(small_corpus, "train.csv").clips[4]
    index = read_index(shards)
    assert {n: f for s in index for n, f in zip(s.numbers, s.frames, strict=True)}[4] == clip.n_frames


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


def test_items_are_those_of_the_plain_dataset(small_corpus, shards):
    plain = Lrs3Dataset(small_corpus, "train.csv", transform=ClipTransform.training(), seed=5)
    by_id = {plain.clips[i].id: i for i in range(len(plain))}
    data = stream(shards, seed=5)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        plain.set_epoch(epoch)
        items = [item for batch in data for item in batch]
        assert sorted(item["id"] for item in items) == sorted(by_id)
        for item in items:
            expected = plain[by_id[item["id"]]]
            assert item["text"] == expected["text"]
            np.testing.assert_array_equal(item["audio"], expected["audio"])
            assert torch.equal(item["video"], expected["video"])


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


@given(some_shards(), st.integers(1, 6), st.integers(100, 800), st.integers(0, 3), st.integers(1, 40), st.booleans())
@few
def test_consumers_share_every_clip_in_equally_many_batches(shards, consumers, max_frames, epoch, window, shuffle):
    if len(shards) < consumers:
        with pytest.raises(ShardError, match="write smaller shards or use fewer workers"):
            plan_epoch(shards, consumers, max_frames=max_frames)
        return
    settings_ = {"max_frames": max_frames, "window": window, "shuffle": shuffle, "epoch": epoch}
    try:
        plans = plan_epoch(shards, consumers, **settings_)
    except ShardError as error:
        assert "fewer clips than another has batches" in str(error)
        return
    frames = {n: f for s in shards for n, f in zip(s.numbers, s.frames, strict=True)}
    batches = [[b for w in plan for b in w.batches] for plan in plans]
    assert Counter(n for own in batches for b in own for n in b) == Counter(frames.keys())
    assert len({len(own) for own in batches}) == 1
    for plan in plans:
        for w in plan:
            held = {n for s in w.shards for n in s.numbers}
            for batch in w.batches:
                assert held.issuperset(batch), "a batch needs a clip that is not in memory"
                assert len(batch) == 1 or len(batch) * max(frames[n] for n in batch) <= max_frames
    assert plans == plan_epoch(shards, consumers, **settings_)


def test_ranks_share_the_clips(shards):
    seen, lengths = Counter(), set()
    for rank in range(2):
        data = stream(shards, rank=rank, world=2, workers=2)
        batches = ids(data)
        lengths.add(len(batches))
        assert len(batches) == len(data)
        seen.update(name for batch in batches for name in batch)
    assert len(seen) == 9 and set(seen.values()) == {1}
    assert len(lengths) == 1


@pytest.mark.parametrize("batch", range(7))
def test_resuming_gives_the_rest_of_the_epoch(shards, batch):
    whole = stream(shards, workers=3)
    whole.set_epoch(2)
    expected = ids(whole)
    resumed = stream(shards, workers=3)
    resumed.load_state_dict(whole.state_dict(batch))
    resumed.set_epoch(2)  # as the Trainer does
    assert ids(resumed) == expected[batch:]
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert ids(resumed) == ids(whole), "the epoch after a resumed one differs"


def test_data_workers_change_nothing(shards, monkeypatch):
    data = stream(shards, workers=2)
    data.set_epoch(1)
    state = data.state_dict(1)
    alone = ids(data)
    loader = DataLoader(data, batch_size=None, num_workers=2, collate_fn=list)
    assert ids(loader) == alone
    data.load_state_dict(state)
    assert ids(loader) == alone[1:]
    monkeypatch.setattr("llama_smop.data.shards.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=3))
    with pytest.raises(ValueError, match="3 workers, which does not divide the 2 planned"):
        next(iter(data))


def test_epochs_and_seeds_shuffle(shards):
    def epoch(number, seed=0):
        data = stream(shards, seed=seed)
        data.set_epoch(number)
        return ids(data)

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)


def test_a_stored_position_of_another_run_is_refused(shards):
    state = stream(shards, workers=2).state_dict(1)
    with pytest.raises(ValueError, match=r"stored run had consumers 2 \(now 1\)"):
        stream(shards).load_state_dict(state)


def test_shards_through_a_command(shards):
    assert ids(stream(f"pipe:cat {shards}/{{name}}")) == ids(stream(shards))


def test_damage_is_named(small_corpus, tmp_path):
    out = tmp_path / "shards"
    write_shards(small_corpus, "train.csv", out, clips_per_shard=3, progress=False)
    tar = out / "clips-000001.tar"
    whole = tar.read_bytes()
    for share in (0.9, 0.4):
        tar.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ShardError, match=r"clips-000001\.tar: (is truncated|cannot be read)"):
            list(stream(out))
    tar.unlink()
    with pytest.raises(ShardError, match=r"clips-000001\.tar: cannot be read"):
        list(stream(out))
    with pytest.raises(ShardError, match=r"index\.json: not the index"):
        stream(tmp_path / "nowhere")
    (out / "index.json").write_text('{"format": 99}')
    with pytest.raises(ShardError, match="expected an index of format 1"):
        stream(out)


def test_unusable_clips_and_folders_are_named(small_corpus, corpus_copy, tmp_path):
    clip = Lrs3Dataset(corpus_copy, "train.csv").clips[3].video_path(corpus_copy)
    clip.unlink()
    with pytest.raises(MediaError, match=rf"{clip.name}: no such file"):
        write_shards(corpus_copy, "train.csv", tmp_path / "shards", clips_per_shard=2, progress=False)
    assert not (tmp_path / "shards" / "index.json").exists()
    with pytest.raises(ShardError, match="of other clips_per_shard: choose another folder"):
        write_shards(corpus_copy, "train.csv", tmp_path / "shards", clips_per_shard=3, progress=False)
    with pytest.raises(ShardError, match="is not empty and holds no shards"):
        write_shards(small_corpus, "train.csv", small_corpus / "labels", progress=False)
