"""How the published run made its batches, for comparison with its golden data."""

import torch
from torch.nn.utils.rnn import pad_sequence

from llama_smop import LlamaSmopProcessor


class PublishedProcessor(LlamaSmopProcessor):
    """Every clip counts as long as the longest of its batch, and the language model attends to the padding.

    Audio frames are counted in `count_dtype`, which loses frames at some lengths; None counts in integers.
    """

    count_dtype: torch.dtype | None = None

    def __call__(self, text=None, audio=None, video=None, **kwargs):
        streams = {
            name: list(pad_sequence([torch.as_tensor(clip) for clip in clips], batch_first=True))
            for name, clips in (("audio", audio), ("video", video))
            if clips is not None
        }
        batch = super().__call__(text=text, **streams, **kwargs)
        batch["attention_mask"].fill_(1)
        return batch

    def audio_frames(self, samples: int) -> int:
        frames = super().audio_frames(samples)
        if self.count_dtype is None:
            return frames
        counted = int(torch.tensor(samples, dtype=self.count_dtype) / 16000 * 50)
        return min(max(counted, 25), self.audio_window)
