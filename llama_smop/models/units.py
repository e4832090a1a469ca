"""Rates, streams, modalities and special tokens, shared by the model and its data."""

import numpy as np

# -- rates, per second -------------------------------------------------------------------------------------------------

AUDIO_RATE = 16_000  # samples
VIDEO_RATE = 25  # video frames, and AV-HuBERT's
WHISPER_RATE = 50  # frames of Whisper's encoder
SAMPLES_PER_VIDEO_FRAME = AUDIO_RATE // VIDEO_RATE  # 640
SAMPLES_PER_WHISPER_FRAME = AUDIO_RATE // WHISPER_RATE  # 320


def cut_or_pad(audio: np.ndarray, samples: int) -> np.ndarray:
    """`audio` (n,) cut to `samples`, or padded with zeros at its end."""
    if len(audio) >= samples:
        return audio[:samples]
    return np.pad(audio, (0, samples - len(audio)))


# -- streams and modalities --------------------------------------------------------------------------------------------

STREAMS = ("audio", "video")  # a clip's; each has a tower
MODALITIES = (*STREAMS, "audiovisual")  # the model's inputs


def streams_of(modality: str) -> tuple[str, ...]:
    """The streams that a modality consists of, audio first."""
    return STREAMS if modality == "audiovisual" else (modality,)


# -- tokens ------------------------------------------------------------------------------------------------------------

PAD, AUDIO, AUDIO_END, VIDEO, VIDEO_END = SPECIAL_TOKENS = ("<pad>", "<audio>", "</audio>", "<video>", "</video>")
# The fields of `LlamaSmopConfig` with the ids of SPECIAL_TOKENS, in the same order.
SPECIAL_TOKEN_FIELDS = (
    "pad_token_id",
    "audio_token_id",
    "audio_end_token_id",
    "video_token_id",
    "video_end_token_id",
)
# Llama 3's own tokens; the special tokens follow them.
LLAMA_3_TOKENS, LLAMA_3_BOS, LLAMA_3_EOS = 128256, 128000, 128001
LLAMA_3_IDS = dict(zip(SPECIAL_TOKEN_FIELDS, range(LLAMA_3_TOKENS, LLAMA_3_TOKENS + len(SPECIAL_TOKENS)), strict=True))

IGNORED_LABEL = -100  # torch's and transformers' mark of a position without a target
