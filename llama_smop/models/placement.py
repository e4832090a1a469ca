"""Where speech tokens stand in the sequence that the language model reads."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from llama_smop.models.outputs import SpeechFeatures


class SpeechPlacementMixin:
    """For a model with a language model's embeddings and the markers' ids in its config."""

    config: Any
    get_input_embeddings: Any

    def place_speech(
        self, input_ids: Tensor | None, speech: SpeechFeatures, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, L, O) of `input_ids` (B, L), or `inputs_embeds`, with each clip's speech tokens at its
        placeholders; without ids those are found by the markers' embeddings."""
        if input_ids is None and inputs_embeds is None:
            raise ValueError("speech needs input_ids or inputs_embeds that say where it stands, got neither")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        input_ids = self._marker_ids(embeds) if input_ids is None else input_ids
        S = speech.tokens.shape[1]
        previous = nn.functional.pad(input_ids, (1, 0), value=-1)[:, :-1]
        places = torch.zeros_like(input_ids, dtype=torch.bool)
        index = torch.zeros_like(input_ids)
        for token_id, start, stop in (
            (self.config.audio_token_id, 0, speech.audio_tokens),
            (self.config.video_token_id, speech.audio_tokens, S),
        ):
            here = (input_ids == token_id) & (previous == token_id)
            _check_counts(here.sum(1), speech.mask[:, start:stop].sum(1))
            index = torch.where(here, start + here.cumsum(1) - 1, index)
            places |= here
        index = index.clamp(0, S - 1)[..., None].expand(-1, -1, speech.tokens.shape[-1])
        return torch.where(places[..., None], speech.tokens.gather(1, index).to(embeds.dtype), embeds)

    def _marker_ids(self, embeds: Tensor) -> Tensor:
        """(B, L) ids of the markers in (B, L, O) embeddings, -1 elsewhere."""
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for token_id in (self.config.audio_token_id, self.config.video_token_id):
            marker = self.get_input_embeddings()(torch.full((), token_id, device=embeds.device))
            ids = ids.masked_fill((embeds == marker).all(-1), token_id)
        return ids


def _check_counts(placeholders: Tensor, tokens: Tensor) -> None:
    """Each clip (B,) must have as many placeholders as speech tokens; on a GPU checked without waiting for it."""
    agree = (placeholders == tokens).all()
    if is_tracing(agree):
        return
    if agree.device.type == "cpu":
        if not agree:
            raise ValueError(
                f"input_ids have {placeholders.tolist()} placeholders where the clips have {tokens.tolist()} speech "
                "tokens; make both with one LlamaSmopProcessor of this model's rates, and at one rate"
            )
    else:
        torch._assert_async(agree, "placeholders in input_ids and speech tokens differ in number")
