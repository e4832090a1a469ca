"""The recipe's transforms, from decoded clips to what the encoders are trained on.

Video: /255, crop 88, grey, time mask (training), (x − 0.421) / 0.165. Audio: cut or padded to the video, time mask
(training), noise, then one layer norm over the whole clip. Randomness comes from the generator handed in, so that a
clip's augmentation is a function of (seed, epoch, index) and of nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llama_smop.models.units import AUDIO_RATE, SAMPLES_PER_VIDEO_FRAME, VIDEO_RATE, cut_or_pad

CROP = 88
AddNoise = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # (audio, rng) -> audio
GREY = (0.2989, 0.587, 0.114)
MEAN, STD = 0.421, 0.165


def clip_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one clip's augmentation in one epoch."""
    return np.random.default_rng([seed, epoch, index])


def layer_norm(audio: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """Zero mean and unit variance over the whole clip, float32 (n,)."""
    wide = audio.astype(np.float64)
    wide -= wide.mean()
    return (wide / np.sqrt(np.mean(wide * wide) + eps)).astype(np.float32)


def time_mask(x: np.ndarray, window: int, stride: int, rng: np.random.Generator) -> np.ndarray:
    """`x` (n, …) with ⌈n / stride⌉ stretches, each shorter than `window`, set to zero."""
    x = x.copy()
    length = len(x)
    for _ in range(-(-length // stride)):
        width = int(rng.integers(window))
        if 0 < width < length:
            start = int(rng.integers(length - width))
            x[start : start + width] = 0
    return x


def crop(video: np.ndarray, size: int = CROP, rng: np.random.Generator | None = None) -> np.ndarray:
    """The centre of `video` (T, H, W, C), or with `rng` a random place, the same in every frame."""
    height, width = video.shape[1:3]
    if height < size or width < size:
        raise ValueError(f"expected frames of at least {size}×{size} to crop, got {height}×{width}")
    if rng is None:
        top, left = round((height - size) / 2), round((width - size) / 2)
    else:
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return video[:, top : top + size, left : left + size]


@dataclass(frozen=True)
class VideoTransform:
    """uint8 RGB (T, H, W, 3) → float32 (T, 1, 88, 88)."""

    train: bool = False
    mask_window: int = 10  # frames
    mask_stride: int = VIDEO_RATE

    def __call__(self, video: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
            raise ValueError(f"expected uint8 frames (T, H, W, 3), got {video.dtype} {video.shape}")
        if self.train and rng is None:
            raise ValueError("training transforms need a random generator: clip_rng(seed, epoch, index)")
        cropped = crop(video, rng=rng if self.train else None)
        grey = cropped @ (np.array(GREY, dtype=np.float32) / 255)
        if self.train and rng is not None:
            grey = time_mask(grey, self.mask_window, self.mask_stride, rng)
        return ((grey - np.float32(MEAN)) / np.float32(STD))[:, None]


@dataclass(frozen=True)
class AudioTransform:
    """float32 (n,) at 16 kHz → float32 (n,), masked in training, with `noise` added where it is given, normalised."""

    train: bool = False
    mask_window: int = 10 * SAMPLES_PER_VIDEO_FRAME
    mask_stride: int = AUDIO_RATE

    def __call__(
        self, audio: np.ndarray, rng: np.random.Generator | None = None, noise: AddNoise | None = None
    ) -> np.ndarray:
        """noise: called as `noise(audio, rng)`, see noise.py."""
        if audio.ndim != 1:
            raise ValueError(f"expected mono samples (n,), got shape {audio.shape}")
        if rng is None and (self.train or noise is not None):
            raise ValueError("training transforms and noise need a random generator: clip_rng(seed, epoch, index)")
        if self.train and rng is not None:
            audio = time_mask(audio, self.mask_window, self.mask_stride, rng)
        if noise is not None and rng is not None:
            audio = noise(audio, rng)
        return layer_norm(audio)


@dataclass(frozen=True)
class ClipTransform:
    """Both together. In audio-visual mode the audio is first cut or padded to the video's length, 640 samples a
    frame."""

    audio: AudioTransform = AudioTransform()
    video: VideoTransform = VideoTransform()

    @classmethod
    def testing(cls) -> "ClipTransform":
        return cls()

    def __call__(
        self,
        audio: np.ndarray | None,
        video: np.ndarray | None,
        rng: np.random.Generator | None = None,
        noise: AddNoise | None = None,
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        if audio is not None and video is not None:
            audio = cut_or_pad(audio, len(video) * SAMPLES_PER_VIDEO_FRAME)
        if video is not None:
            video = self.video(video, rng)
        if audio is not None:
            audio = self.audio(audio, rng, noise)
        return audio, video
