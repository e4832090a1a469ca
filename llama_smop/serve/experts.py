"""Which experts the tokens of a piece went to, over time."""

from dataclasses import dataclass

import numpy as np
import torch

from llama_smop.models.units import STREAMS


@dataclass(frozen=True)
class ExpertTimes:
    """One stream of one piece.

    start, end: seconds. weights: float32 (X, tokens), the share that each expert had in each token, 0 where it was not
    chosen.
    """

    stream: str
    start: float
    end: float
    weights: np.ndarray


@torch.inference_mode()
def expert_times(model, processor, streams: tuple, start: float, end: float) -> list[ExpertTimes]:
    """The expert weights of a piece's streams, audio (n,) and video (T, 1, 88, 88), transformed; none for a
    projector that chooses no experts: a dense one, or one that merges them."""
    if model.config.projector_config.kind != "smop" or model.config.projector_config.merge:
        return []
    inputs = processor(**{name: [x] for name, x in zip(STREAMS, streams, strict=True) if x is not None})
    inputs = inputs.to(model.device)
    keys = ("input_features", "audio_mask", "video_values", "video_mask")
    speech = model.get_speech_features(**{key: inputs[key] for key in keys if key in inputs})
    chosen, weights = (x[0].float().cpu() for x in (speech.projection.expert_indices, speech.projection.expert_weights))
    experts = model.projector_at().routed_experts
    shares = torch.zeros(len(chosen), experts + 1).scatter_(1, chosen.long(), weights)[:, :experts]
    split = speech.audio_tokens
    parts = ((name, shares[part]) for name, part in zip(STREAMS, (slice(0, split), slice(split, None)), strict=True))
    return [ExpertTimes(name, start, end, part.T.numpy().copy()) for name, part in parts if len(part)]
