"""The keyword arguments that every processor of transformers takes, as far as they mean something for this one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin
from transformers.processing_utils import AudioKwargs, ImagesKwargs, ProcessingKwargs, TextKwargs, VideosKwargs

from llama_smop.models.clips import check_frame_rate, check_rate
from llama_smop.models.units import AUDIO_RATE


class LlamaSmopProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {  # noqa: RUF012 - transformers' protocol
        "text_kwargs": {"padding": True},
        "audio_kwargs": {"sampling_rate": AUDIO_RATE},
        "common_kwargs": {"return_tensors": "pt"},
    }


KINDS = {
    "text_kwargs": TextKwargs,
    "audio_kwargs": AudioKwargs,
    "videos_kwargs": VideosKwargs,
    "images_kwargs": ImagesKwargs,
}
KNOWN = {"common_kwargs", *KINDS, *(name for kind in KINDS.values() for name in kind.__annotations__)}
# Outputs of other processors that this one does not make.
NOT_MADE = (
    *("return_mm_token_type_ids", "return_text_replacement_offsets", "return_offsets_mapping"),
    *("return_overflowing_tokens", "return_special_tokens_mask", "return_token_type_ids", "return_length", "text_pair"),
)


@dataclass(frozen=True)
class CallSettings:
    """Of one call. sampling_rate: Hz. padding: "longest", "max_length" or "do_not_pad"."""

    sampling_rate: int
    padding: str
    max_length: int | None
    multiple: int
    truncation: bool
    padding_side: str | None

    def padded_length(self, lengths: Sequence[int]) -> int:
        """Of sequences of these lengths.

        Raises:
            ValueError: they may not be padded and differ, or one is longer than it may be and would be truncated.
        """
        length = max(lengths)
        if self.truncation and self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"a sequence of {length} tokens does not fit max_length = {self.max_length}, and speech is not "
                "truncated: leave truncation out, or cut the clip"
            )
        if self.padding == "do_not_pad":
            if len(set(lengths)) > 1:
                raise ValueError(f"sequences of {min(lengths)} to {length} tokens make no batch without padding")
            return length
        if self.padding == "max_length" and self.max_length is not None:
            length = max(length, self.max_length)
        return -(-length // self.multiple) * self.multiple


def call_settings(processor: ProcessorMixin, given: Mapping[str, Any]) -> CallSettings:
    """The settings of `processor(…, **given)`.

    Raises:
        TypeError: a name that no processor has. ValueError: a setting that this one cannot keep.
    """
    for name in given:
        if name not in KNOWN:
            raise TypeError(f"{type(processor).__name__} got an unexpected keyword argument {name!r}")
    merged = processor._merge_kwargs(
        LlamaSmopProcessorKwargs, tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **given
    )
    text, audio = merged["text_kwargs"], merged["audio_kwargs"]
    wanted = {kind.get("return_tensors") for kind in (text, audio)} - {None}
    if any(str(getattr(kind, "value", kind)) != "pt" for kind in wanted):
        raise ValueError(
            f'the processor makes PyTorch tensors: return_tensors must be "pt", got {sorted(map(str, wanted))}'
        )
    asked = [name for name in NOT_MADE if text.get(name)]
    if asked:
        raise ValueError(f"the processor does not make what {', '.join(asked)} asks for; leave it out")
    check_frame_rate(merged["videos_kwargs"])
    padding = text.get("padding", True)
    padding = {True: "longest", False: "do_not_pad", None: "longest"}.get(padding, padding)
    # A tokenizer's own side is that of text alone; this processor chooses by whether text follows the prompt.
    side = given.get("text_kwargs", {}).get("padding_side")
    return CallSettings(
        sampling_rate=check_rate(audio.get("sampling_rate", AUDIO_RATE)),
        padding=str(getattr(padding, "value", padding)),
        max_length=text.get("max_length"),
        multiple=text.get("pad_to_multiple_of") or 1,
        truncation=text.get("truncation") not in (None, False, "do_not_truncate"),
        padding_side=side,
    )
