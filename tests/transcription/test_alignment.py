"""The best path through tokens and frames, beside all paths tried one by one."""

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest

from llama_smop.transcription.alignment import IMPOSSIBLE, align


def total(places: np.ndarray, scores: np.ndarray, gaps: np.ndarray, apart: np.ndarray) -> float:
    """The sum of a path's scores, or -inf where it is none."""
    owner = np.full(len(scores), -1)
    for token, (first, end) in enumerate(places):
        if first >= end:
            return -np.inf
        owner[first:end] = token
    if any(b < a for (_, a), (b, _) in pairwise(places)):
        return -np.inf
    if any(apart[i] and places[i][0] == places[i - 1][1] for i in range(1, len(places))):
        return -np.inf
    gap = [sum(frame >= end for _, end in places) for frame in range(len(scores))]
    return sum(gaps[t, gap[t]] if k < 0 else scores[t, k] for t, k in enumerate(owner))


@pytest.mark.parametrize("seed", range(8))
def test_no_path_is_better(seed):
    rng = np.random.default_rng(seed)
    T, N = 6, 2
    scores, gaps = rng.normal(size=(T, N)), rng.normal(size=(T, N + 1))
    apart = np.array([False, seed % 2 == 0])
    if seed >= 4:
        gaps[:, 0] = IMPOSSIBLE
    found = align(scores, gaps, apart)
    every = [
        total(np.reshape(edges, (N, 2)), scores, gaps, apart)
        for edges in combinations_with_replacement(range(T + 1), 2 * N)
    ]
    assert total(found, scores, gaps, apart) == pytest.approx(max(every))


def test_tokens_are_found_where_they_are_and_pauses_belong_to_none():
    planted = [(3, 8), (8, 9), (15, 30)]
    scores = np.full((40, 3), -1.0)
    for token, (first, end) in enumerate(planted):
        scores[first:end, token] = 1.0
    assert align(scores, np.zeros((40, 4)), np.zeros(3, bool)).tolist() == [list(place) for place in planted]


def test_more_tokens_than_frames_are_shared_out():
    found = align(np.zeros((4, 9)), np.zeros((4, 10)), np.zeros(9, bool))
    assert (np.diff(found, axis=0) >= 0).all() and (found[:, 0] < found[:, 1]).all()
    assert found[0, 0] == 0 and found[-1, 1] == 4
