"""Transcribe clips, each under a length limit of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from llama_smop.models.generation import SPEECH_INPUTS
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.outputs import SpeechFeatures
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.rates import Rate
from llama_smop.models.units import VIDEO_RATE, WHISPER_RATE

# Fast speech is about 4.5 words or 7 tokens a second.
TOKENS_PER_SECOND, LEAST_TOKENS = 8, 16


class PerClipLimit(StoppingCriteria):
    """Ends each clip at its own limit of new tokens, so that a transcript does not depend on longer clips beside it."""

    def __init__(self, prompt_length: int, limits: Tensor):
        self.prompt_length, self.limits = prompt_length, limits

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        rows = input_ids.shape[0] // len(self.limits)  # beams
        limits = self.limits.to(input_ids.device).repeat_interleave(rows)
        return input_ids.shape[1] - self.prompt_length >= limits


@dataclass(frozen=True)
class Written:
    """What the model wrote of a clip.

    tokens: without the one that ends it. avg_logprob: the mean natural logarithm of their probabilities, the end's
    included where the model wrote it, as in Whisper; None where it wrote nothing.
    """

    tokens: tuple[int, ...]
    avg_logprob: float | None


class TokenScores(LogitsProcessor):
    """Keeps the log probability of every token that one greedy `generate` writes."""

    def __init__(self):
        self._chosen: list[Tensor] = []  # (B,) of each step
        self._next: Tensor | None = None  # (B, vocabulary), of the step whose tokens are not known yet

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1])
        self._next = scores.float().log_softmax(-1)
        return scores

    def _take(self, tokens: Tensor) -> None:
        if self._next is not None:
            self._chosen.append(self._next.gather(1, tokens[:, None]).squeeze(1))

    def written(self, new: Tensor, ends: Sequence[int], pad: int) -> list[Written]:
        """Of each row of what was generated, (B, new); `ends`: ids that end a text."""
        self._take(new[:, -1])
        scores = torch.stack(self._chosen, 1).tolist()
        return [self._row(tokens, known, ends, pad) for tokens, known in zip(new.tolist(), scores, strict=True)]

    @staticmethod
    def _row(tokens: list[int], scores: list[float], ends: Sequence[int], pad: int) -> Written:
        length = next((i for i, token in enumerate(tokens) if token == pad or token in ends), len(tokens))
        scored = length + (length < len(tokens) and tokens[length] in ends)
        return Written(tuple(tokens[:length]), sum(scores[:scored]) / scored if scored else None)


def token_limits(batch: BatchFeature) -> Tensor:
    """(B,) new tokens that each clip's duration leaves room for: 16 + 8 a second."""
    if "audio_mask" in batch:
        seconds = batch["audio_mask"].sum(1) / WHISPER_RATE
    else:
        seconds = batch["video_mask"].sum(1) / VIDEO_RATE
    return LEAST_TOKENS + (seconds * TOKENS_PER_SECOND).ceil().long()


def transcribe_batch(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    *,
    audio: Sequence | None = None,
    video: Sequence | None = None,
    num_beams: int = 1,
    rate: Rate | str | None = None,
    **settings,
) -> list[str]:
    """Texts of transformed clips, greedy or by beam search, deterministic.

    rate: one of the model's; None = the default. `settings` go to `generate`; a `max_new_tokens` there replaces the
    limit that fits each clip's duration.
    """
    return recognise_batch(model, processor, audio=audio, video=video, num_beams=num_beams, rate=rate, **settings)[0]


def _refuse_other_results(settings: dict) -> None:
    chosen = settings.get("generation_config")

    def setting(name: str):
        return settings.get(name, getattr(chosen, name, None))

    if (setting("num_return_sequences") or 1) > 1:
        raise ValueError("each recording gets one text: leave out num_return_sequences, or call the model's generate")
    if setting("return_dict_in_generate"):
        raise ValueError("recordings get texts: leave out return_dict_in_generate, or call the model's generate")


@torch.inference_mode()
def recognise_batch(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    *,
    audio: Sequence | None = None,
    video: Sequence | None = None,
    num_beams: int = 1,
    rate: Rate | str | None = None,
    written: list[Written] | None = None,
    **settings,
) -> tuple[list[str], SpeechFeatures]:
    """Texts as in `transcribe_batch`, and the towers' frames that they were written from.

    written: a list to which tokens and scores of each clip are added; for greedy decoding alone.

    Raises:
        ValueError: settings by which `generate` returns something else than one text a clip.
    """
    _refuse_other_results(settings)
    batch = processor(audio=audio, video=video, do_normalize=False, rate=rate).to(model.device)
    batch.pop("rate", None)
    prompt = batch["input_ids"].shape[1]
    if "max_new_tokens" not in settings:
        limits = token_limits(batch)
        settings["max_new_tokens"] = int(limits.max())
        settings["stopping_criteria"] = StoppingCriteriaList([PerClipLimit(prompt, limits)])
    scores = None if written is None else TokenScores()
    if scores is not None:
        if num_beams > 1:
            raise ValueError(f"scores of tokens are kept for greedy decoding alone, not for {num_beams} beams")
        settings["logits_processor"] = [*(settings.get("logits_processor") or ()), scores]
    streams = {name: batch.pop(name) for name in SPEECH_INPUTS if name in batch}
    speech = model.get_speech_features(**streams, rate=rate)
    embeds = model.place_speech(batch["input_ids"], speech)
    generated = model.generate(**batch, inputs_embeds=embeds, num_beams=num_beams, **settings)
    if scores is not None:
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list | tuple) else [ends]
        written += scores.written(generated[:, prompt:], ends, model.config.pad_token_id)
    return processor.decode_new(generated, prompt), speech
