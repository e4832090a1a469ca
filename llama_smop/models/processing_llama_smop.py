"""`LlamaSmopProcessor`: clips and text to what the model takes, and ids back to text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, WhisperFeatureExtractor
from transformers.processing_utils import Unpack

from llama_smop.models import config_checks as check
from llama_smop.models.call_settings import CallSettings, LlamaSmopProcessorKwargs, call_settings
from llama_smop.models.chat import AUDIO_CLIP, VIDEO_CLIP, default_template, with_clips_read
from llama_smop.models.clips import listed, prepared
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.rates import Rate, check_rates, chosen_rate, known_rates
from llama_smop.models.tokenizer import PROMPTS
from llama_smop.models.units import (
    AUDIO,
    AUDIO_END,
    AUDIO_RATE,
    IGNORED_LABEL,
    PAD,
    SAMPLES_PER_VIDEO_FRAME,
    SAMPLES_PER_WHISPER_FRAME,
    SPECIAL_TOKENS,
    STREAMS,
    VIDEO,
    VIDEO_END,
    WHISPER_RATE,
)
from llama_smop.system import files

MIN_AUDIO_FRAMES = 25
# Beside a saved processor: without this package transformers then says that it is missing.
AUTO_MODULE = "processing_llama_smop"
AUTO_CODE = 'from llama_smop import LlamaSmopProcessor\n\n__all__ = ["LlamaSmopProcessor"]\n'


class LlamaSmopProcessor(ProcessorMixin):
    """Makes `BOS <audio> A </audio> <video> V </video> PROMPT text EOS` and the features behind A and V.

    Args:
        feature_extractor: a `WhisperFeatureExtractor`.
        tokenizer: any tokenizer that knows `<pad> <audio> </audio> <video> </video>`, BOS and EOS.
        rate_audio, rate_video, rates: tower frames to a token, as in the model's config.
        audio_window: Whisper positions (50 a second), the model's `audio_config.max_source_positions`.
        prompts: the text after the speech tokens for "audio", "video" and "audiovisual".
        chat_template: by default that of `llama_smop.models.chat`.
    """

    valid_processor_kwargs = LlamaSmopProcessorKwargs

    def __init__(
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        rate_audio: int = 4,
        rate_video: int = 2,
        audio_window: int = 1500,
        prompts: dict[str, str] | None = None,
        chat_template: str | None = None,
        rates: list | None = None,
    ):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.rate_audio, self.rate_video, self.audio_window = rate_audio, rate_video, audio_window
        self.rates = rates
        check_rates(self, "the processor's ")
        check.whole(self, "the processor's ", audio_window=(1, 2**20))
        if prompts is not None and not (
            isinstance(prompts, dict) and all(isinstance(p, str) for p in prompts.values())
        ):
            raise ValueError(f"the processor's prompts must be a text for each modality, got {prompts!r:.60}")
        own = dict(prompts or {})
        if "audio_video" in own:  # as earlier versions saved it
            own.setdefault("audiovisual", own.pop("audio_video"))
        self.prompts = PROMPTS | own
        self.chat_template = chat_template or default_template(self.prompts)
        self.audio_token, self.video_token = AUDIO, VIDEO
        self.audio_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([AUDIO, VIDEO])
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in SPECIAL_TOKENS if t not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer lacks the special tokens {' '.join(missing)}; add them with "
                "llama_smop.models.tokenizer.add_special_tokens and resize the model's embeddings"
            )
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer must have a BOS and an EOS token")

    @classmethod
    def for_config(
        cls, config: LlamaSmopConfig, feature_extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerBase
    ) -> "LlamaSmopProcessor":
        return cls(
            feature_extractor,
            tokenizer,
            rate_audio=config.rate_audio,
            rate_video=config.rate_video,
            rates=config.rates,
            audio_window=config.audio_config.max_source_positions,
        )

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "input_features", "audio_mask", "video_values", "video_mask"]
        return names if self.rates is None else [*names, "rate"]

    def __call__(
        self,
        text: Sequence[str] | str | None = None,
        audio: Sequence | None = None,
        video: Sequence | None = None,
        *,
        videos: Sequence | None = None,
        prompt: Sequence[str] | str | None = None,
        do_normalize: bool = True,
        padding_side: str | None = None,
        rate: Rate | str | None = None,
        **kwargs: Unpack[LlamaSmopProcessorKwargs],
    ) -> BatchFeature:
        """A batch for `forward` (with `text`) or for `generate` (without).

        Args:
            text: what each clip says; then EOS and `labels` (B, L) follow, -100 on all but the text and EOS. A text
                with `<audio></audio>` or `<video></video>` is a whole prompt instead, as `apply_chat_template` writes.
            audio: for each clip (N,) or (N, 1) mono floats at `sampling_rate`, or a file with sound. With video it is
                cut or padded with zeros to the video's length.
            video, or videos: for each clip uint8 RGB mouth crops (T, 96, 96, 3) at 25 Hz, such a file, or (T, 1, H, W)
                floats that are transformed already; T is cut to whole tokens. A single clip need not be in a list.
            prompt: in place of the modality's own; one for all clips or one for each.
            do_normalize: layer norm over each clip's sound, as in training; False where it is done already.
            padding_side: "right" with text, "left" without.
            rate: one of `rates`, as a pair or as "16,5"; None = the default.
            kwargs: those of every processor of transformers, of which these mean something here: `sampling_rate` (Hz,
                16000 by default), `padding` (True, "longest", "max_length" or False), `max_length`,
                `pad_to_multiple_of`, `return_tensors` ("pt").

        Returns:
            input_ids, attention_mask (B, L) int64; of audio input_features (B, mels, 2·audio_window) float32 and
            audio_mask (B, F) bool; of video video_values (B, T, 1, H, W) float32 and video_mask (B, T) bool. Of a
            model for several rates also rate, (audio, video), for the same argument of the model.

        Raises:
            ValueError: an unknown rate, no clip, unequal numbers of clips and texts, a clip shorter than one token or
                longer than the window, text that the tokenizer cannot carry (the word is named), a setting that cannot
                be kept.
        """
        images = kwargs.pop("images", None)  # transformers' chat template hands over None
        settings, rate = call_settings(self, kwargs), chosen_rate(self.known_rates, rate)
        texts = [text] if isinstance(text, str) else text
        if images is not None or (video is not None and videos is not None):
            raise ValueError(
                "expected audio and video, got " + ("images" if video is None else "both video and videos")
            )
        audio, video = listed(audio, "audio", 1), listed(videos if video is None else video, "video", 4)
        streams = {name: clips for name, clips in zip(STREAMS, (audio, video), strict=True) if clips is not None}
        if not streams:
            if text is not None and not _is_text(text):  # other processors take the sound first
                raise ValueError("the first argument is the text; name the others: processor(audio=…)")
            raise ValueError("expected audio, video or both, got neither")
        clips = len(next(iter(streams.values())))
        prompts = None if prompt is None or isinstance(prompt, str) else list(prompt)
        for name, given in (*streams.items(), ("text", texts), ("prompt", prompts)):
            if given is not None and len(given) != clips:
                raise ValueError(f"expected one {name} for each of {clips} clips, got {len(given)}")
        if clips == 0:
            raise ValueError("expected at least one clip, got none")
        audio, video = prepared(audio, video, settings.sampling_rate, do_normalize)
        batch: dict[str, Any] = {} if self.rates is None else {"rate": rate}
        counts = {"audio": [0] * clips, "video": [0] * clips}
        if video is not None:
            counts["video"] = [self.video_tokens(len(v), rate) for v in video]
            batch |= self._pad_video(video, [n * rate[1] for n in counts["video"]])
        if audio is not None:
            counts["audio"] = [self.audio_tokens(len(a), rate) for a in audio]
            batch |= self._log_mel(audio, [self.audio_frames(len(a)) for a in audio])
        written = texts is not None and [t for t in texts if AUDIO_CLIP in t or VIDEO_CLIP in t]
        if written:
            if prompt is not None or len(written) < clips:
                raise ValueError("expected prompts with places for the clips, or texts that say what is said, got both")
            prefixes = [self._written(t, a, v) for t, a, v in zip(texts, *counts.values(), strict=True)]
            texts = None
        else:
            modality = "audiovisual" if len(streams) == 2 else next(iter(streams))
            prompts = prompts or [self.prompts[modality] if prompt is None else prompt] * clips
            prefixes = [
                self._speech_ids(a, v) + self.encode(p) for p, a, v in zip(prompts, *counts.values(), strict=True)
            ]
        side = settings.padding_side if padding_side is None else padding_side
        return BatchFeature(batch | self._pad_text(prefixes, texts, side, settings))

    def apply_transcription_request(
        self,
        audio: Sequence | None = None,
        video: Sequence | None = None,
        prompt: Sequence[str] | str | None = None,
        rate: Rate | str | None = None,
        **kwargs: Unpack[LlamaSmopProcessorKwargs],
    ) -> BatchFeature:
        """A batch for `generate` of files or arrays, each as long as the model's window at most: `processor(audio=…,
        video=…)`, by the name that transformers' speech models have for it."""
        return self(audio=audio, video=video, prompt=prompt, rate=rate, **kwargs)

    def apply_chat_template(
        self, conversation: list, *args, load_audio_from_video: bool = False, tokenize: bool = False, **kwargs
    ) -> Any:
        """transformers' `apply_chat_template`, for one message of a user with a clip of audio, video or both. Files are
        read by this package.

        load_audio_from_video: the sound of the video is an audio part too.
        """
        if tokenize:
            conversation = with_clips_read(conversation, load_audio_from_video)
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> list[str]:
        """transformers' `save_pretrained`. A few lines of code beside the files say which package is missing where
        somebody opens them without it; AutoProcessor would take the tokenizer for the processor."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / f"{AUTO_MODULE}.py", AUTO_CODE)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"auto_map": {"AutoProcessor": f"{AUTO_MODULE}.{type(self).__name__}"}}

    def unfit(
        self, samples: int | None = None, frames: int | None = None, text: str = "", rate: Rate | str | None = None
    ) -> str | None:
        """Why the model cannot take a clip at a rate, None where it can. samples, frames: its lengths, None = no such
        stream."""
        rate = chosen_rate(self.known_rates, rate)
        try:
            if frames is not None:
                self.video_tokens(frames, rate)
            if samples is not None:
                self.audio_tokens(samples if frames is None else frames * SAMPLES_PER_VIDEO_FRAME, rate)
            self.encode(text)
        except ValueError as error:
            return str(error)
        return None

    # -- lengths ---------------------------------------------------------------------------------------------------

    def audio_frames(self, samples: int) -> int:
        """Whisper frames of a clip: 50 a second in integer arithmetic, at least 25, at most the window."""
        if samples < 1:
            raise ValueError("a clip has no audio samples")
        if samples > self.audio_window * SAMPLES_PER_WHISPER_FRAME:
            raise ValueError(
                f"a clip of {samples / AUDIO_RATE:.2f} s is longer than the audio window of "
                f"{self.audio_window / WHISPER_RATE:.2f} s; cut it, as `llama-smop transcribe` does"
            )
        frames = samples // SAMPLES_PER_WHISPER_FRAME
        return min(max(frames, MIN_AUDIO_FRAMES), self.audio_window)

    @property
    def known_rates(self) -> tuple[Rate, ...]:
        return known_rates(self)

    def audio_tokens(self, samples: int, rate: Rate | None = None) -> int:
        return self._tokens(self.audio_frames(samples), (rate or self.known_rates[0])[0], "audio")

    def video_tokens(self, frames: int, rate: Rate | None = None) -> int:
        return self._tokens(frames, (rate or self.known_rates[0])[1], "video")

    @staticmethod
    def _tokens(frames: int, rate: int, modality: str) -> int:
        if frames < rate:
            raise ValueError(
                f"a clip of {frames} {modality} frames is shorter than one token of {rate} frames; leave it out"
            )
        return frames // rate

    # -- features --------------------------------------------------------------------------------------------------

    def _log_mel(self, audio: list[np.ndarray], frames: list[int]) -> dict[str, Tensor]:
        # Beyond the longest clip all columns of silence are equal: one is computed, and fills the rest of the window.
        extractor, window = self.feature_extractor, self.audio_window * SAMPLES_PER_WHISPER_FRAME
        hop = extractor.hop_length
        samples = min(window, -(-(max(map(len, audio)) + extractor.n_fft) // hop) * hop)
        mel = extractor(audio, sampling_rate=AUDIO_RATE, padding="max_length", max_length=samples, return_tensors="pt")[
            "input_features"
        ]
        features = _batch_buffer(*mel.shape[:2], window // hop)
        features[..., : mel.shape[2]] = mel
        features[..., mel.shape[2] :] = mel[..., -1:]
        return {"input_features": features, "audio_mask": prefix_mask(frames)}

    def _pad_video(self, video: list[Tensor], frames: list[int]) -> dict[str, Tensor]:
        values = _batch_buffer(len(video), max(frames), *video[0].shape[1:])
        for i, (clip, n) in enumerate(zip(video, frames, strict=True)):
            n = min(n, len(clip))
            values[i, :n], values[i, n:] = clip[:n], 0
        return {"video_values": values, "video_mask": prefix_mask(frames)}

    # -- text ------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text without BOS and EOS; ValueError naming the word that the tokenizer cannot carry."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids = encoded["input_ids"]
        forbidden = set(self.tokenizer.all_special_ids) | set(
            self.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        )
        for position, token in enumerate(ids):
            if token in forbidden:
                word = self.tokenizer.convert_ids_to_tokens(token)
                if "offset_mapping" in encoded:
                    start, end = encoded["offset_mapping"][position]
                    word = text[start:end]
                raise ValueError(f"the tokenizer cannot carry {word!r} of the text {text!r}")
        return ids

    def _speech_ids(self, audio: int, video: int) -> list[int]:
        ids = [self.tokenizer.bos_token_id]
        for count, start, end in ((audio, AUDIO, AUDIO_END), (video, VIDEO, VIDEO_END)):
            if count:
                # The first marker keeps its embedding; the others are placeholders for the clip's tokens.
                ids += self.tokenizer.convert_tokens_to_ids([start] * (count + 1) + [end])
        return ids

    def _written(self, text: str, audio: int, video: int) -> list[int]:
        """Ids of a prompt, with so many placeholders where its clips stand."""
        for clip, count, name in ((AUDIO_CLIP, audio, "audio"), (VIDEO_CLIP, video, "video")):
            if text.count(clip) != bool(count):
                raise ValueError(f"expected {int(bool(count))} {clip} in the prompt, got {text.count(clip)} ({name})")
        places = {AUDIO_CLIP: self._speech_ids(audio, 0)[1:], VIDEO_CLIP: self._speech_ids(0, video)[1:]}
        special = {
            self.tokenizer.bos_token: [self.tokenizer.bos_token_id],
            self.tokenizer.eos_token: [self.tokenizer.eos_token_id],
        }
        ids = [self.tokenizer.bos_token_id] * (not text.startswith(self.tokenizer.bos_token))
        for part in re.split("(" + "|".join(map(re.escape, (*places, *special))) + ")", text):
            ids += places.get(part) or special.get(part) or self.encode(part)
        return ids

    def _pad_text(
        self, prefixes: list[list[int]], texts: Sequence[str] | None, side: str | None, settings: CallSettings
    ) -> dict[str, Tensor]:
        eos = [self.tokenizer.eos_token_id]
        targets = [[]] * len(prefixes) if texts is None else [self.encode(t) + eos for t in texts]
        side = ("left" if texts is None else "right") if side is None else side
        if side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right", got {side!r}')
        length = settings.padded_length([len(p) + len(t) for p, t in zip(prefixes, targets, strict=True)])
        shape = (len(prefixes), length)
        ids = torch.full(shape, self.tokenizer.convert_tokens_to_ids(PAD))
        mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED_LABEL)
        for i, (prefix, target) in enumerate(zip(prefixes, targets, strict=True)):
            n = len(prefix) + len(target)
            begin = length - n if side == "left" else 0
            ids[i, begin : begin + n] = torch.tensor(prefix + target)
            mask[i, begin : begin + n] = 1
            if target:
                labels[i, begin + len(prefix) : begin + n] = torch.tensor(target)
        return {"input_ids": ids, "attention_mask": mask} | ({} if texts is None else {"labels": labels})

    def decode_new(self, generated: Tensor, prompt_length: int) -> list[str]:
        """Texts of what `generate` added to prompts of `prompt_length` ids."""
        return [t.strip() for t in self.tokenizer.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)]


def _is_text(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, list | tuple) and all(isinstance(text, str) for text in given))


def _batch_buffer(*shape: int) -> Tensor:
    """Uninitialised float32; in a data worker in shared memory, so that the batch is not copied to the main process."""
    values = torch.empty(shape)
    return values if torch.utils.data.get_worker_info() is None else values.share_memory_()


def prefix_mask(lengths: Sequence[int]) -> Tensor:
    """(B, max length) bool, True on the first `lengths[b]` places."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


AutoProcessor.register(LlamaSmopConfig, LlamaSmopProcessor, exist_ok=True)

__all__ = ["LlamaSmopProcessor"]
