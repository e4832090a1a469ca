"""Write a film of two drawn people, of whom the right one speaks: python docs/video/talk.py talk.mp4"""

import sys

import numpy as np

from llama_smop.data.media import write_video
from llama_smop.data.synthetic.corpus import VOICES, make_clip
from llama_smop.data.synthetic.grammar import GRID
from llama_smop.data.synthetic.head import draw_head, filmed

WORDS = ("bin", "blue", "at", "f", "two", "now")
SIZE = (320, 320)  # of each one's half of the picture


def talk() -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (T, 320, 640, 3) and samples float32 (T·640,)."""
    crops, samples, _ = make_clip(WORDS, VOICES[0], GRID, 0, 0)
    silent, _, _ = make_clip(WORDS, VOICES[2], GRID, 2, 2)
    listener = draw_head(np.repeat(silent[:1], len(crops), axis=0), VOICES[2].face)
    speaker = draw_head(crops, VOICES[0].face)
    halves = zip(filmed(listener, SIZE, angle=8), filmed(speaker, SIZE, drift=0.02), strict=True)
    return np.stack([np.hstack(pair) for pair in halves]), samples


if __name__ == "__main__":
    frames, samples = talk()
    write_video(sys.argv[1], frames, audio=samples)
