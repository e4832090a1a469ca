"""The model's outputs, and the speech features between its towers and its language model."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from llama_smop.functional import SMoPOutput
from llama_smop.models.rates import Rate

# The keys and values of a language model are its `cache`; up to transformers 5.18 at least, `past_key_values`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class SpeechFeatures:
    """The outputs of the towers and the projector for a batch.

    tokens: (B, S, O) projected tokens, the audio tokens of every clip first, then the video tokens.
    mask: (B, S) bool, True = real token.
    audio_tokens: the number of audio tokens among the S.
    projection: the projector's output for the same (B, S) tokens.
    states, state_masks: tower frames (B, F, D) before compression and their masks (B, F), by modality.
    rate: the frames of audio, of video in a token.
    """

    tokens: Tensor
    mask: Tensor
    audio_tokens: int
    projection: SMoPOutput
    states: dict[str, Tensor]
    state_masks: dict[str, Tensor]
    rate: Rate


@dataclass
class LlamaSmopOutput(ModelOutput):
    """The losses add up: loss = lm_loss + ctc_weight · ctc_loss
    + load_balancing_coef · load_balancing_loss + router_z_coef · router_z_loss. With `num_items_in_batch` the last
    three are weighted by the batch's share of these text tokens, and lm_loss is divided by all of them.

    logits: (B, L, vocabulary), None where the loss was made without them. router_logits: (B, S, E) over the speech
    tokens, audio before video. expert_counts: (X,) int32, how often real tokens chose each expert (DEDR: audio's E,
    then video's E). router_entropy: (M,) nats for the model's modalities, audio before video, mean over real tokens;
    NaN where the batch has none of a modality. Losses that do not apply are None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    load_balancing_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    ctc_loss: Tensor | None = None
    expert_counts: Tensor | None = None
    router_entropy: Tensor | None = None
    router_logits: Tensor | None = None
    if CACHE == "cache":
        cache: object | None = None
    else:
        past_key_values: object | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def router_entropy(logits: Tensor, mask: Tensor, audio_tokens: int) -> Tensor:
    """Mean entropy of the router's softmax over the real tokens of each modality, in nats (log E when uniform).

    Args:
        logits: (B, S, E) over speech tokens, audio before video.  mask: (B, S) bool, True = real token.
        audio_tokens: the number of audio tokens among the S.

    Returns:
        (2,) float32, audio then video; NaN for a modality without a real token. Stays on the device.
    """
    log_p = logits.detach().float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    parts = (slice(None, audio_tokens), slice(audio_tokens, None))
    return torch.stack([(entropy[:, p] * mask[:, p]).sum() / mask[:, p].sum() for p in parts])
