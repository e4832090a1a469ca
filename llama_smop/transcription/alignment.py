"""Where each token of a known text is in a recording: the best path through scores of tokens and frames."""

import numpy as np

IMPOSSIBLE = -1e30  # a score; finite, so that sums of it are no NaN


def align(scores: np.ndarray, gaps: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """The frames [first, end) of each of N tokens that come one after the other, (N, 2) int64.

    The path of the highest sum of scores (Viterbi 1967): each frame belongs to a token or to a gap before, between or
    after tokens, each token has a frame at least, and a gap may have none. With log-probabilities of tokens and of the
    blank as the gaps this is the forced alignment of CTC.

    Args:
        scores: (T, N), how well each token fits each frame; larger is better.
        gaps: (T, N + 1), likewise of the gap before each token, and after the last; `IMPOSSIBLE` where there is none.
        apart: (N,) bool, whether there must be a gap before a token.

    Where the text has more tokens than fit into the frames, the frames are shared out evenly.
    """
    T, N = scores.shape
    if N + int(apart[1:].sum()) > T:
        edges = np.linspace(0, T, N + 1)
        return np.stack([np.floor(edges[:-1]), np.ceil(edges[1:])], axis=1).astype(np.int64)
    S = 2 * N + 1
    states = np.empty((T, S))
    states[:, 0::2], states[:, 1::2] = gaps, scores
    skip = np.zeros(S, bool)  # whether a state may follow the one before the last
    skip[3::2] = ~apart[1:]
    best = np.full(S, IMPOSSIBLE)
    best[:2] = states[0, :2]
    came = np.zeros((T, S), np.int8)  # states since the frame before
    for t in range(1, T):
        moved = np.stack([best, np.r_[IMPOSSIBLE, best[:-1]], np.r_[IMPOSSIBLE, IMPOSSIBLE, best[:-2]]])
        moved[2, ~skip] = IMPOSSIBLE
        came[t] = moved.argmax(axis=0)
        best = moved.max(axis=0) + states[t]
    path = np.empty(T, np.int64)
    path[-1] = S - 1 if best[-1] > best[-2] else S - 2
    for t in range(T - 1, 0, -1):
        path[t - 1] = path[t] - came[t, path[t]]
    tokens = 2 * np.arange(N) + 1
    return np.stack([np.searchsorted(path, tokens), np.searchsorted(path, tokens, side="right")], axis=1)
