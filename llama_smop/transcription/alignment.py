"""Where each token of a known text is in a recording: the best path through scores of tokens and frames."""

import numpy as np


def align(scores: np.ndarray) -> np.ndarray:
    """The frames [first, end) of each of N tokens that come one after the other, (N, 2) int64.

    The path of the highest sum of scores (Viterbi 1967): every frame belongs to a token, and each token has a frame at
    least. Where there are more tokens than frames, the frames are shared out evenly.

    Args:
        scores: (T, N), how well each token fits each frame; larger is better.
    """
    T, N = scores.shape
    if N > T:
        edges = np.linspace(0, T, N + 1)
        return np.stack([np.floor(edges[:-1]), np.ceil(edges[1:])], axis=1).astype(np.int64)
    best = np.full(N, -np.inf)
    best[0] = scores[0, 0]
    moved = np.zeros((T, N), bool)  # whether a token begins at a frame
    for t in range(1, T):
        before = np.r_[-np.inf, best[:-1]]
        moved[t] = before > best
        best = np.maximum(before, best) + scores[t]
    edges = np.empty(N + 1, np.int64)
    token, edges[0], edges[N] = N - 1, 0, T
    for t in range(T - 1, 0, -1):
        if moved[t, token]:
            edges[token] = t
            token -= 1
    return np.stack([edges[:-1], edges[1:]], axis=1)
