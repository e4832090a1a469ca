"""How a router spreads a test set's tokens over its experts."""

import torch

from llama_smop.data.batching import FrameBatchSampler
from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.models.generation import SPEECH_INPUTS
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.units import STREAMS

MAX_FRAMES = 1500  # of a batch


@torch.inference_mode()
def expert_activation(
    model: LlamaSmopForConditionalGeneration, processor: LlamaSmopProcessor, data: Lrs3Dataset
) -> dict | None:
    """Each modality's share of choices by expert over clips with all of the model's streams, at its default rate, and
    which experts each modality can choose; None for a projector that chooses none: a dense one, or one that merges its
    experts. Experts that all tokens share are not counted."""
    projector, settings = model.projector_at(), model.config.projector_config
    if settings.kind != "smop" or settings.merge:
        return None
    present = tuple(model.config.modalities)
    X, E = projector.routed_experts, projector.num_experts
    counts = torch.zeros(2, X, dtype=torch.long)
    for batch in FrameBatchSampler(data.lengths, MAX_FRAMES, shuffle=False):
        items = [data[index] for index in batch]
        inputs = processor(**{m: [item[m] for item in items] for m in present}, do_normalize=False).to(model.device)
        speech = model.get_speech_features(**{k: inputs[k] for k in SPEECH_INPUTS if k in inputs})
        chosen, split = speech.projection.expert_indices, speech.audio_tokens
        for m, part in enumerate((slice(None, split), slice(split, None))):
            ids = chosen[:, part][speech.mask[:, part]]
            counts[m] += torch.bincount(ids.flatten().long().cpu(), minlength=X + 1)[:X]
    separate = X == 2 * E
    return {
        "sharing": projector.sharing,
        "shares": {m: (counts[i] / counts[i].sum()).tolist() for i, m in enumerate(STREAMS) if m in present},
        "experts_of": {
            m: list(range(i * E, (i + 1) * E)) if separate else list(range(E))
            for i, m in enumerate(STREAMS)
            if m in present
        },
    }
