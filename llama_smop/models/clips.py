"""What a user hands the processor as a clip, an array or a file, to what the features are made of."""

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from torch import Tensor

from llama_smop.models.units import AUDIO_RATE, SAMPLES_PER_VIDEO_FRAME, VIDEO_RATE, cut_or_pad

MOUTH = 96  # pixels, the width and height of a mouth crop

# Reading files and the recipe's transforms belong to `llama_smop.data`, which stands above this package; they are
# imported when a user hands over a file or a raw clip, and training, which does neither, does not get here.


def listed(clips: Any, name: str, dimensions: int) -> list | None:
    """A clip by itself as a list of one: a path, an array of so many dimensions, or numbers. Nested lists of single
    clips, as a chat template makes them, are flattened."""
    if clips is None:
        return None
    if isinstance(clips, str | os.PathLike):
        return [clips]
    if isinstance(clips, list | tuple):
        if clips and isinstance(clips[0], int | float | np.number):
            return [clips]
        nested = [isinstance(clip, list | tuple) and len(clip) == 1 and not np.isscalar(clip[0]) for clip in clips]
        return [
            clip[0] if inner and _is_clip(clip[0], dimensions) else clip
            for clip, inner in zip(clips, nested, strict=True)
        ]
    shape = tuple(getattr(clips, "shape", ()))
    if len(shape) == dimensions:
        return [clips]
    if dimensions == 1 and len(shape) == 2:
        if 1 in shape:
            return [clips]
        raise ValueError(
            f"{name} of shape {shape} may be {shape[0]} clips or {min(shape)} channels: give a list of mono clips (N,)"
        )
    return list(clips) if len(shape) == dimensions + 1 else [clips]


def _is_clip(clip: Any, dimensions: int) -> bool:
    return isinstance(clip, str | os.PathLike) or len(getattr(clip, "shape", ())) == dimensions


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else str(tuple(shape)) if shape else "a single number"


# -- files -------------------------------------------------------------------------------------------------------------


def local_path(name: str | os.PathLike) -> str:
    """The path behind a file:// address; other names as they are."""
    name = os.fspath(name)
    return unquote(urlparse(name).path) if name.startswith("file://") else name


def read_audio(path: str | os.PathLike) -> np.ndarray:
    """(N,) float32 at 16 kHz of a sound file, or of a video's sound. Raises MediaError, one line."""
    from llama_smop.data import media

    path = local_path(path)
    # As in training: the sound of a video may lie in a .wav beside it.
    return media.read_audio(media.audio_path(path) if "video" in media.streams(path) else path)


def read_video(path: str | os.PathLike, with_sound: bool) -> np.ndarray:
    """(T, 96, 96, 3) uint8 at 25 Hz of a video of a mouth. Raises MediaError; ValueError where it shows more."""
    from llama_smop.data import media

    path = local_path(path)
    height, width = next(iter(media.stream_video(path))).shape[:2]
    if (height, width) != (MOUTH, MOUTH):
        raise ValueError(
            f"{path}: shows {width}×{height} pixels, no mouth crop of {MOUTH}×{MOUTH}; cut it with `llama-smop crop`, "
            "or hand it to the pipeline, which finds the mouth"
        )
    return media.read_video(path, with_sound=with_sound and media.audio_path(path).samefile(path))


# -- arrays ------------------------------------------------------------------------------------------------------------


def as_audio(audio: Any, rate: int) -> np.ndarray:
    """(N,) float32 at 16 kHz of a file, or of mono samples at `rate` Hz, (N,), (N, 1) or (1, N)."""
    if isinstance(audio, str | os.PathLike):
        return read_audio(audio)
    try:
        array = np.asarray(audio.detach().cpu().float() if isinstance(audio, Tensor) else audio)
        integers = array.dtype.kind in "iu" and not isinstance(audio, list | tuple)
        array = array.astype(np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"a clip's audio must be a path or mono samples, got {_kind(audio)}") from None
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim != 1:
        raise ValueError(f"a clip's audio must be (N,) or (N, 1) mono samples, got {_kind(audio)}")
    if not np.isfinite(array).all():
        raise ValueError("a clip's audio holds samples that are not finite numbers")
    if integers:
        raise ValueError("a clip's audio must be floats in [-1, 1], got integers; divide by their largest value")
    if rate != AUDIO_RATE:
        from llama_smop.data.timeline import resampled

        array = np.concatenate([np.zeros(0, np.float32), *resampled([array], rate, AUDIO_RATE)])
    return array


def as_video(video: Any, with_sound: bool = False) -> Tensor | np.ndarray:
    """A file or uint8 RGB frames as (T, 96, 96, 3) uint8; frames that are transformed already as float (T, 1, H, W)."""
    if isinstance(video, str | os.PathLike):
        return read_video(video, with_sound)
    try:
        tensor = torch.as_tensor(np.asarray(video) if not isinstance(video, Tensor) else video)
    except (TypeError, ValueError):
        raise ValueError(f"a clip's video must be a path or an array of frames, got {_kind(video)}") from None
    if tensor.dtype == torch.uint8 and tensor.dim() == 4 and 3 in (tensor.shape[1], tensor.shape[3]):
        frames = tensor if tensor.shape[3] == 3 else tensor.permute(0, 2, 3, 1)
        if frames.shape[1:3] != (MOUTH, MOUTH):
            raise ValueError(f"uint8 frames must be mouth crops (T, {MOUTH}, {MOUTH}, 3), got {tuple(frames.shape)}")
        return frames.cpu().numpy()
    tensor = tensor.float()
    if tensor.dim() != 4 or tensor.shape[1] != 1:
        raise ValueError(
            f"a clip's video must be (T, 1, H, W) grey frames, transformed already, or (T, {MOUTH}, {MOUTH}, 3) uint8 "
            f"mouth crops, got {_kind(video)}"
        )
    return tensor


def prepared(
    audio: Sequence | None, video: Sequence | None, rate: int, normalize: bool
) -> tuple[list[np.ndarray] | None, list[Tensor] | None]:
    """(N,) float32 samples and (T, 1, H, W) float frames of each clip, the sound as long as its picture.

    normalize: the recipe's transforms: one layer norm over a clip's sound, which leaves normalised sound as it is,
        and uint8 frames cropped, grey and scaled.
    """
    both = audio is not None and video is not None
    if video is not None:
        video = [as_video(clip, with_sound=both) for clip in video]
    if audio is not None:
        audio = [as_audio(clip, rate) for clip in audio]
    if both:
        lengths = [len(clip) * SAMPLES_PER_VIDEO_FRAME for clip in video]
        audio = [cut_or_pad(clip, n) for clip, n in zip(audio, lengths, strict=True)]
    if audio is not None and normalize:
        from llama_smop.data.transforms import layer_norm

        audio = [layer_norm(clip) if len(clip) else clip for clip in audio]
    return audio, None if video is None else [_grey(clip, normalize) for clip in video]


def _grey(video: Tensor | np.ndarray, normalize: bool) -> Tensor:
    if isinstance(video, Tensor):
        return video
    if not normalize:
        raise ValueError("uint8 frames are to be normalised: leave out do_normalize=False, or transform them before")
    from llama_smop.data.transforms import VideoTransform

    return torch.from_numpy(VideoTransform()(video))


def check_rate(rate: Any) -> int:
    """A sampling rate in Hz; ValueError where it cannot be one."""
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not 1_000 <= rate <= 768_000:
        raise ValueError(f"sampling_rate must be whole Hz of 1000 to 768000, got {rate!r:.60}")
    return int(rate)


def check_frame_rate(settings: dict) -> None:
    """ValueError for settings of other video processors that would change the frames."""
    if settings.get("fps") not in (None, VIDEO_RATE) or settings.get("num_frames") is not None:
        raise ValueError(f"video is taken at {VIDEO_RATE} frames a second, all of them: leave out fps and num_frames")
