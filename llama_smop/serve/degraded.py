"""What the switches of the page do to each piece before the model gets it, and what it then gets."""

from dataclasses import dataclass, field

import numpy as np

from llama_smop.data.degrade import degrade
from llama_smop.data.noise import NoiseSource, add_noise
from llama_smop.data.transforms import ClipTransform, crop
from llama_smop.models.units import SAMPLES_PER_VIDEO_FRAME, cut_or_pad

SNRS = (-30.0, 60.0)  # decibels
BLURS = (0.0, 20.0)  # pixels of a crop


@dataclass(frozen=True)
class Given:
    """A piece as the model gets it.

    heard: samples float32 (n,) before they are normalised. seen: crops uint8 (T, 88, 88, 3). streams: what the
    processor takes, audio (n,) and video (T, 1, 88, 88), float32. Each is None where the piece lacks it.
    """

    heard: np.ndarray | None
    seen: np.ndarray | None
    streams: tuple[np.ndarray | None, np.ndarray | None]


@dataclass
class Degraded:
    """A transform for `Recording.transcribe`: babble at `snr` decibels, mouths blurred by `blur` pixels.

    The same piece of the same recording always gets the same noise. given: of every piece, in order; kept where `keep`.
    """

    noise: NoiseSource | None = None
    snr: float | None = None
    blur: float = 0.0
    keep: bool = False
    given: list[Given] = field(default_factory=list)
    _pieces: int = 0

    def __call__(
        self, audio: np.ndarray | None, video: np.ndarray | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        rng = np.random.default_rng([0, self._pieces])
        self._pieces += 1
        if audio is not None and video is not None:
            audio = cut_or_pad(audio, len(video) * SAMPLES_PER_VIDEO_FRAME)
        if audio is not None and self.snr is not None and self.noise is not None:
            audio = add_noise(audio, self.noise.sample(len(audio), rng), self.snr)
        if video is not None and self.blur:
            video = degrade(video, f"blur:{self.blur:g}")
        streams = ClipTransform.testing()(audio, video)
        if self.keep:
            self.given.append(Given(audio, None if video is None else crop(video), streams))
        return streams
