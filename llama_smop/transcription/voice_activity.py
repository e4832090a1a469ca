"""Where speech is in a recording, and where to cut it: in silence, or at the least certain moment of long speech.

The probabilities come from Silero's voice activity model where its package is installed (only its weights are read: its
import would set the number of threads of the whole process), else from the energy of the sound.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

RATE = 16000
STEP = 512  # samples of a probability, 32 ms
CONTEXT = 64  # samples before a step that the model hears too
PACKAGE = "silero-vad==6.2.3"

SPEECH = 0.5  # speech begins at this probability
SILENCE = 0.35  # and ends below this one
MIN_SILENCE_S = 0.3  # a shorter pause does not end speech
MIN_SPEECH_S = 0.1  # shorter sounds are no speech
PAD_S = 0.15  # kept around speech
JOIN_S = 1.0  # speech that pauses for less stays in one piece
OVERLAP_S = 1.0  # of pieces that had to be cut within speech


@dataclass(frozen=True)
class Span:
    """A piece of a recording, in seconds. `overlap`: how much of it, at its start, the piece before has too."""

    start: float
    end: float
    overlap: float = 0.0


class SileroVoiceActivity(nn.Module):
    """Silero VAD v6 for 16 kHz: the magnitude of a Fourier transform, four convolutions, an LSTM.

    Call it with the steps of a recording in order, float32 (N, 64 + 512), each begun by the end of the step before. It
    returns N probabilities and keeps the LSTM's state.
    """

    def __init__(self):
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)
        self._state: tuple[Tensor, Tensor] | None = None

    @classmethod
    def installed(cls) -> "SileroVoiceActivity | None":
        """The model with the weights of the installed package, or None."""
        found = find_spec("silero_vad")
        file = None if found is None else Path(found.origin).parent / "data" / "silero_vad_16k.safetensors"
        if file is None or not file.is_file():
            return None
        model = cls()
        weights = {name.replace("lstm_cell.", "lstm."): value for name, value in load_file(file).items()}
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            weights[f"lstm.{name}_l0"] = weights.pop(f"lstm.{name}")
        model.load_state_dict(weights)
        return model.eval()

    @torch.inference_mode()
    def forward(self, steps: Tensor) -> Tensor:
        x = nn.functional.pad(steps[:, None], (0, 64), "reflect")
        x = self.stft_conv(x)
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        x, self._state = self.lstm(x.transpose(1, 2), self._state)
        return self.final_conv(x.relu().transpose(1, 2)).sigmoid().flatten()


class EnergyVoiceActivity:
    """Probabilities from loudness alone: how far a step is above the quietest tenth of the last half minute."""

    MEMORY = 30 * RATE // STEP
    RISE_DB = 12.0  # above the floor, where the probability is one half
    QUIET_DB = -60.0  # what a recording is taken to begin with, for a second: it may begin with speech

    def __init__(self):
        self._levels = [self.QUIET_DB] * (RATE // STEP)

    def __call__(self, steps: Tensor) -> Tensor:
        levels = 10 * torch.log10(steps[:, CONTEXT:].square().mean(dim=1) + 1e-10)
        probabilities = []
        for level in levels.tolist():
            self._levels = [*self._levels[1 - self.MEMORY :], level]
            floor = min(float(np.percentile(self._levels, 10)), level)
            probabilities.append(1 / (1 + np.exp(-(level - floor - self.RISE_DB) / 2)))
        return torch.tensor(probabilities, dtype=torch.float32)


def speech_probabilities(sound: Iterable[np.ndarray], model=None) -> Iterator[float]:
    """The probability of speech in each 512 samples of a recording that comes in blocks, float32 at 16 kHz."""
    model = model or SileroVoiceActivity.installed() or EnergyVoiceActivity()
    kept = np.zeros(CONTEXT, np.float32)  # the context, then what is not yet a whole step
    for block in sound:
        kept = np.concatenate([kept, block.astype(np.float32)])
        steps = (len(kept) - CONTEXT) // STEP
        if steps:
            yield from _run(model, kept, steps)
            kept = kept[steps * STEP :]
    if len(kept) > CONTEXT:
        yield from _run(model, np.pad(kept, (0, CONTEXT + STEP - len(kept))), 1)


def _run(model, samples: np.ndarray, steps: int) -> list[float]:
    windows = torch.from_numpy(samples).unfold(0, CONTEXT + STEP, STEP)[:steps]
    return model(windows).tolist()


def speech_pieces(probabilities: Iterable[float], longest: float) -> Iterator[Span]:
    """Pieces of at most `longest` seconds that hold all the speech; what is silent for long is in none.

    A piece ends in silence where there is one. Speech that goes on for longer is cut where the probability is lowest in
    the second half of the piece; if that is speech too, the next piece begins `OVERLAP_S` earlier.
    """
    second = RATE / STEP
    pad = min(PAD_S, longest / 8)
    limit = longest - 2 * pad
    piece: Span | None = None
    for start, end, overlap in _regions(probabilities, limit):
        a, b = max(0.0, start / second - (0 if overlap else pad)), end / second + pad
        if piece is not None and not overlap and a - piece.end < JOIN_S and b - piece.start <= longest:
            piece = Span(piece.start, b, piece.overlap)
            continue
        if piece is not None:
            yield piece
            a = a if overlap else max(a, piece.end)
        piece = Span(a, b, overlap)
    if piece is not None:
        yield piece


def _regions(probabilities: Iterable[float], limit: float) -> Iterator[tuple[int, int, float]]:
    """Steps of speech, (first, end, overlap in seconds), each at most `limit` seconds long."""
    second = RATE / STEP
    most = max(2, int(limit * second))
    overlap_steps = min(int(OVERLAP_S * second), most // 4)
    speaking = False
    first = last = 0
    overlap = 0.0
    heard: list[float] = []  # since `first`
    step = -1
    for step, p in enumerate(probabilities):
        if not speaking and p >= SPEECH:
            speaking, first, overlap, heard = True, step, 0.0, []
        if not speaking:
            continue
        heard.append(p)
        if p >= SILENCE:
            last = step
        elif step - last >= MIN_SILENCE_S * second:
            speaking = False
            if last + 1 - first >= MIN_SPEECH_S * second:
                yield first, last + 1, overlap
            continue
        if len(heard) >= most:
            half = len(heard) // 2
            cut = len(heard) - 1 - int(np.argmin(heard[: half - 1 : -1]))  # the latest of equals
            quiet = heard[cut] < SILENCE
            yield first, first + cut + (0 if quiet else 1), overlap
            back = 0 if quiet else min(overlap_steps, cut)
            overlap = back / second
            heard = heard[cut - back + (0 if quiet else 1) :]
            first = step + 1 - len(heard)
    if speaking and last + 1 - first >= MIN_SPEECH_S * second:
        yield first, last + 1, overlap
