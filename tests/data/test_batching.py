from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop.data.batching import FrameBatchSampler

few = settings(derandomize=True, deadline=None, max_examples=60)
lengths_of = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(lengths_of, st.integers(1, 1500), st.integers(1, 50), st.integers(0, 3), st.booleans())
@few
def test_every_clip_once_and_no_batch_too_large(lengths, max_frames, num_buckets, epoch, shuffle):
    sampler = FrameBatchSampler(lengths, max_frames, num_buckets, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert Counter(i for b in batches for i in b) == Counter(range(len(lengths)))
    assert len(batches) == len(sampler)
    for batch in batches:
        assert batch
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= max_frames or len(batch) == 1, f"{padded} frames in a batch of at most {max_frames}"


@given(lengths_of, st.integers(1, 7), st.integers(0, 2))
@few
def test_fixed_number_of_clips(lengths, max_clips, epoch):
    sampler = FrameBatchSampler(lengths, max_clips=max_clips)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [max_clips] * (len(batches) - 1)


@given(lengths_of, st.integers(1, 8), st.integers(50, 1500), st.integers(0, 2))
@few
def test_ranks_share_every_clip_in_equally_many_batches(lengths, world, max_frames, epoch):
    if world > len(lengths):
        with pytest.raises(ValueError, match="cannot be shared out"):
            FrameBatchSampler(lengths, max_frames, world=world)
        return
    seen, counts = Counter(), set()
    for rank in range(world):
        sampler = FrameBatchSampler(lengths, max_frames, rank=rank, world=world, num_buckets=10)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        counts.add(len(batches))
        seen.update(i for b in batches for i in b)
        assert len(batches) == len(sampler)
    assert seen == Counter(range(len(lengths)))
    assert len(counts) == 1, f"ranks got {counts} batches and would wait for each other forever"


def test_epochs_differ_and_seeds_differ_but_runs_do_not():
    lengths = [50 + i % 30 for i in range(200)]

    def epoch(number, seed=0):
        sampler = FrameBatchSampler(lengths, 800, num_buckets=4, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)
    assert len(epoch(0)) == len(epoch(7)), "the schedule needs epochs of equal length"


def test_buckets_keep_padding_small():
    lengths = [20 + (i * 37) % 400 for i in range(1000)]
    batches = list(FrameBatchSampler(lengths, 1500))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.03 * sum(lengths)


def test_order_of_length_without_shuffling():
    batches = list(FrameBatchSampler([30, 10, 20, 40], max_clips=2, shuffle=False))
    assert batches == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"lengths": [], "max_frames": 10}, "at least one clip"),
        ({"lengths": [3, 0], "max_frames": 10}, "positive lengths"),
        ({"lengths": [3]}, "max_frames, max_clips"),
        ({"lengths": [3], "max_frames": 0}, "max_frames ≥ 1"),
        ({"lengths": [3, 3], "max_frames": 10, "rank": 2, "world": 2}, "rank < world"),
    ],
)
def test_wrong_settings_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        FrameBatchSampler(**arguments)
