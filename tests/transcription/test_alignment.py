"""The best path through tokens and frames, beside all paths tried one by one."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from llama_smop.transcription.alignment import align


def total(edges, scores: np.ndarray) -> float:
    return sum(scores[first:end, token].sum() for token, (first, end) in enumerate(pairwise(edges)))


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_path_is_better(tokens, seed):
    T = 8
    scores = np.random.default_rng(seed).normal(size=(T, tokens))
    found = align(scores)
    assert (found[1:, 0] == found[:-1, 1]).all() and found[0, 0] == 0 and found[-1, 1] == T
    every = [total((0, *inner, T), scores) for inner in combinations(range(1, T), tokens - 1)]
    assert total((*found[:, 0], T), scores) == pytest.approx(max(every))


def test_more_tokens_than_frames_are_shared_out():
    found = align(np.zeros((4, 9)))
    assert (np.diff(found, axis=0) >= 0).all() and (found[:, 0] < found[:, 1]).all()
    assert found[0, 0] == 0 and found[-1, 1] == 4
