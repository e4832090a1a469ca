"""When each word of a transcript is said: Whisper's decoder reads the text, and shows where in the sound it listens.

Some of the decoder's cross-attention heads follow the sound in time (its alignment heads). The text is given to the
decoder, so that it need not recognise anything, and the path of most attention through tokens and frames is taken, as
in openai-whisper (timing.py, MIT). Two corrections come on top: the decoder listens late, and a pause is no part of the
words beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from llama_smop.models.hub import fetch
from llama_smop.models.model_folder import quietly
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.units import AUDIO_RATE, SAMPLES_PER_WHISPER_FRAME, WHISPER_RATE
from llama_smop.transcription.alignment import align

MULTILINGUAL_TOKENS = 51865  # a vocabulary of at least so many tokens has languages
MEDIAN_FRAMES = 7  # of the filter over attention, as openai-whisper has it
LATE_S = 0.1  # the attention comes after the word: median over the generated corpus with Whisper-tiny.en
QUIET_DB = 30.0  # below the loud frames of a piece, where no word is
START, NO_TIMES, TASK, LANGUAGE = "<|startoftranscript|>", "<|notimestamps|>", "<|transcribe|>", "<|en|>"


@dataclass(frozen=True)
class Word:
    """A word and its times in seconds."""

    word: str
    start: float
    end: float


class WhisperAligner:
    """Word times by a Whisper model.

    Args:
        whisper: with attention that returns its weights ("eager"). tokenizer: its own.
        shares_encoder: whether the recogniser's audio tower is this model's encoder, so that its frames can be taken.
    """

    def __init__(
        self,
        whisper: WhisperForConditionalGeneration,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        shares_encoder: bool = False,
    ):
        self.decoder, self.head = whisper.model.decoder, whisper.proj_out
        self.encoder = None if shares_encoder else whisper.model.encoder
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer
        config, settings = whisper.config, whisper.generation_config
        layers = range(config.decoder_layers)
        self._heads = getattr(settings, "alignment_heads", None) or [
            (layer, head) for layer in layers[len(layers) // 2 :] for head in range(config.decoder_attention_heads)
        ]
        self._room = config.max_target_positions
        multilingual = config.vocab_size >= MULTILINGUAL_TOKENS
        self._languages = sorted((getattr(settings, "lang_to_id", None) or {}).values()) if multilingual else []
        self._prompt = [self._id(token) for token in (START, *((LANGUAGE, TASK) if multilingual else ()), NO_TIMES)]

    @classmethod
    def load(cls, source: str | Path, model: LlamaSmopForConditionalGeneration) -> "WhisperAligner":
        """The Whisper of a hub name or folder, on the device and in the dtype of `model`, which wrote the texts.

        Raises:
            ValueError: it cannot be found, is no whole Whisper, or hears less than the model; with what to do.
        """
        kind = fetch(AutoConfig, source).model_type
        if kind != "whisper":
            raise ValueError(f"{source}: is a {kind} model, and --aligner takes a Whisper model")
        dtype = next(model.multi_modal_projector.parameters()).dtype
        with quietly():
            whisper, known = fetch(
                WhisperForConditionalGeneration,
                source,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
            )
        if any(name.startswith("model.decoder.") for name in known["missing_keys"]):
            raise ValueError(f"{source}: holds Whisper's encoder alone, and word times need its decoder")
        tokenizer = fetch(AutoTokenizer, source)
        extractor = fetch(WhisperFeatureExtractor, source)
        shares = _same_weights(whisper.model.encoder, getattr(model, "audio_tower", None))
        return cls(whisper.eval().to(model.device), extractor, tokenizer, shares)

    def _id(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ValueError(f"the aligner has no token {token}; its folder must hold Whisper's tokenizer, too")
        return found

    @torch.inference_mode()
    def __call__(self, text: str, audio: np.ndarray, frames: Tensor | None = None) -> list[Word] | None:
        """The words of a text with their times from the beginning of its sound; None for a text that is too long.

        Args:
            audio: float32 (n,) at 16 kHz, as the recogniser was given it.
            frames: (F, D), the recogniser's audio frames; used where its tower is this model's encoder.
        """
        words = text.split()
        if not words:
            return []
        ids, word_of = self._tokens(words)
        states = self._encode(audio) if frames is None or self.encoder is not None else frames[None]
        states = states[:, : max(1, len(audio) // SAMPLES_PER_WHISPER_FRAME)]
        prompt = self._prompt_for(states)
        if len(prompt) + len(ids) > self._room:
            return None
        given = torch.tensor([[*prompt, *ids]], device=states.device)
        output = self.decoder(input_ids=given, encoder_hidden_states=states, output_attentions=True)
        attention = torch.stack([output.cross_attentions[layer][0, head] for layer, head in self._heads])
        # The row before a token predicts it; the last one predicts the end, and listens to what follows.
        scores = _sharpened(attention[:, len(prompt) - 1 :].float()).T.cpu().numpy().astype(np.float64)
        loud = _loud(audio, states.shape[1])
        first = np.searchsorted(word_of, np.arange(len(words) + 1))  # tokens of the words, and of the end
        edges = np.maximum(align(scores)[first, 0] - round(LATE_S * WHISPER_RATE), 0)
        times = [_loud_part(edges[i], edges[i + 1], loud) for i in range(len(words))]
        return [
            Word(word, float(begin / WHISPER_RATE), float(end / WHISPER_RATE))
            for word, (begin, end) in zip(words, times, strict=True)
        ]

    def _tokens(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the text, and for each the number of its word: each word is a text of its own, after a space."""
        encoded = [self.tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
        return [i for ids in encoded for i in ids], [number for number, ids in enumerate(encoded) for _ in ids]

    def _encode(self, audio: np.ndarray) -> Tensor:
        """(1, positions, D)."""
        parameter = next(self.encoder.parameters())
        mel = self.feature_extractor(audio, sampling_rate=AUDIO_RATE, return_tensors="pt")["input_features"]
        return self.encoder(mel.to(parameter)).last_hidden_state

    def _prompt_for(self, states: Tensor) -> list[int]:
        """The tokens before the text; the language is the one that the model hears."""
        if not self._languages:
            return self._prompt
        start = torch.tensor([self._prompt[:1]], device=states.device)
        hidden = self.decoder(input_ids=start, encoder_hidden_states=states).last_hidden_state
        heard = self.head(hidden)[0, -1, self._languages].argmax()
        return [self._prompt[0], self._languages[int(heard)], *self._prompt[2:]]


def find_aligner(model: LlamaSmopForConditionalGeneration, source: str | Path | None = None) -> WhisperAligner | None:
    """The Whisper named, or else the one that the model's audio tower is recorded to come from; None without either.

    Raises:
        ValueError: it cannot be loaded.
    """
    if source is not None:
        return WhisperAligner.load(source, model)
    recorded = model.config.sources.get("audio_tower")
    if "audio" not in model.config.modalities or recorded is None:
        return None
    try:
        return WhisperAligner.load(recorded, model)
    except ValueError as error:
        raise ValueError(
            f"word times need the Whisper of the audio tower: {error}; or name one with --aligner"
        ) from None


def _loud(audio: np.ndarray, frames: int) -> np.ndarray:
    """(frames,) bool: whether each Whisper frame is loud beside the loudest twentieth."""
    padded = np.zeros(frames * SAMPLES_PER_WHISPER_FRAME, np.float32)
    padded[: min(len(audio), len(padded))] = audio[: len(padded)]
    levels = 10 * np.log10((padded.reshape(frames, -1) ** 2).mean(axis=1) + 1e-10)
    return levels > np.percentile(levels, 95) - QUIET_DB


def _loud_part(begin: int, end: int, loud: np.ndarray) -> tuple[int, int]:
    """The frames from the first loud one to the last; all of them where none is."""
    found = np.flatnonzero(loud[begin:end])
    return (begin + found[0], begin + found[-1] + 1) if len(found) else (begin, end)


def _sharpened(attention: Tensor) -> Tensor:
    """(heads, tokens, F) of attention to (tokens, F): beside the other tokens, smoothed over time, mean of heads."""
    spread = attention.std(dim=1, keepdim=True, correction=0).clamp(min=1e-8)
    attention = (attention - attention.mean(dim=1, keepdim=True)) / spread
    beside = MEDIAN_FRAMES // 2
    if attention.shape[-1] > beside:
        attention = torch.nn.functional.pad(attention, (beside, beside), mode="reflect")
        attention = attention.unfold(-1, MEDIAN_FRAMES, 1).median(dim=-1).values
    return attention.mean(dim=0)


def _same_weights(encoder: torch.nn.Module, tower: torch.nn.Module | None) -> bool:
    if tower is None:
        return False
    ours, theirs = tower.state_dict(), encoder.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == value.shape and torch.equal(ours[name].cpu(), value.to(ours[name].dtype).cpu())
        for name, value in theirs.items()
    )
