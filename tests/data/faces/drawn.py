"""A talk as a camera would film it: generated speakers, drawn as heads."""

import numpy as np

from llama_smop.data.synthetic.head import draw_head


def speaker(number: int, frames: int | None = None):
    """(mouth crops uint8 (T, 96, 96, 3), heads uint8 (T, 288, 288, 3), samples) of a generated clip's beginning."""
    from llama_smop.data.synthetic.corpus import VOICES, make_clip
    from llama_smop.data.synthetic.grammar import GRID

    crops, samples, _ = make_clip(("bin", "blue", "at", "f", "two", "now"), VOICES[number], GRID, number, number)
    crops = crops[:frames]
    return crops, draw_head(crops, VOICES[number].face), samples[: len(crops) * 640]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(a.astype(np.int16) - b).mean())
