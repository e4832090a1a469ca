"""Llama-SMoP: Whisper's encoder, AV-HuBERT, one projector and a language model, for audio, video or both."""

import logging
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    Cache,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple

from llama_smop.models import arguments
from llama_smop.models.avhubert import AvHubertVideoEncoder
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.ctc import ctc_head, ctc_loss
from llama_smop.models.generation import SPEECH_INPUTS, SpeechGenerationMixin
from llama_smop.models.lm_loss import forward_without_logits, without_logits
from llama_smop.models.lora import inject_lora
from llama_smop.models.outputs import CACHE, LlamaSmopOutput, SpeechFeatures, router_entropy
from llama_smop.models.placement import SpeechPlacementMixin
from llama_smop.models.pretrained import CheckpointMixin
from llama_smop.models.rates import Rate, RateProjectors
from llama_smop.models.units import IGNORED_LABEL, STREAMS
from llama_smop.models.vocabulary import VocabularyMixin
from llama_smop.projector import DenseProjector, SMoPProjector

logger = logging.getLogger(__name__)


class LlamaSmopPreTrainedModel(CheckpointMixin, VocabularyMixin, PreTrainedModel):
    config: LlamaSmopConfig
    base_model_prefix = "model"
    input_modalities = (*STREAMS, "text")
    supports_gradient_checkpointing = True
    # transformers adds those of the parts.
    _no_split_modules = ("WhisperEncoderLayer", "SMoPProjector", "DenseProjector")
    _skip_keys_device_placement = ("cache", "past_key_values")
    # LoRA's factors are trained, so they are not quantised.
    _keep_in_fp32_modules = ("lora_A.default", "lora_B.default")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SMoPProjector | DenseProjector):
            # Under transformers' guard, so that loaded parameters keep their values.
            with init.guard_torch_init_functions():
                module.reset_parameters()


class LlamaSmopForConditionalGeneration(SpeechPlacementMixin, LlamaSmopPreTrainedModel, SpeechGenerationMixin):
    """Transcribes audio, video or both with one set of weights.

    Placeholders: in `input_ids` a clip's audio is the marker `<audio>` A + 1 times, then `</audio>`: the first marker
    keeps its embedding, the A that follow it are replaced by the A audio tokens. Video likewise.
    """

    # How the language model's loss is computed where no logits are asked for (`lm_loss.KINDS`); not saved.
    fused_loss = "auto"
    # transformers' Trainer then hands over `num_items_in_batch`, and leaves the mean over micro-batches to the model.
    accepts_loss_kwargs = True
    _warned = False

    def __init__(self, config: LlamaSmopConfig):
        super().__init__(config)
        if "audio" in config.modalities:
            self.audio_tower = WhisperEncoder(config.audio_config)
        if "video" in config.modalities:
            self.video_tower = AvHubertVideoEncoder(config.video_config)
        self.multi_modal_projector = _projectors(config)
        # In the dtype of the other parts, not in that of the language model's own config.
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        self._known_arguments = arguments.known_to(self, self.language_model)
        if config.ctc_weight:
            vocabulary = config.text_config.vocab_size
            widths = {
                ctc_head(config, m, rate): d
                for rate in config.known_rates
                for m, d in config.token_features_at(rate).items()
            }
            self.ctc_heads = nn.ModuleDict({name: nn.Linear(d, vocabulary) for name, d in widths.items()})
        self.post_init()
        for part, lora in config.lora.items():
            inject_lora(getattr(self, part), lora)
        self.freeze()
        self._refresh_generation_config()

    # -- towers ------------------------------------------------------------------------------------------------

    @property
    def towers(self) -> dict[str, nn.Module]:
        return {m: getattr(self, f"{m}_tower") for m in self.config.modalities}

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """The projector, or those of a model with one for each rate, in the order of the rates."""
        separate = self.config.separate_projectors
        return tuple(map(self.projector_at, self.config.known_rates if separate else self.config.known_rates[:1]))

    def projector_at(self, rate: Rate | None = None) -> nn.Module:
        """The projector of a rate's tokens; None = of the default rate."""
        projector = self.multi_modal_projector
        return projector.at(self.config.rate(rate)) if isinstance(projector, RateProjectors) else projector

    def freeze(self) -> None:
        """Stop gradients to what the config does not train: frozen towers, and all but LoRA in parts that have it."""
        frozen = set(self.config.lora)
        if self.config.freeze_towers:
            frozen |= {f"{m}_tower" for m in self.config.modalities}
        for part in frozen:
            for name, parameter in getattr(self, part).named_parameters():
                if parameter.is_floating_point():  # quantised parameters are never trained
                    parameter.requires_grad_("lora_" in name)

    def train(self, mode: bool = True) -> Self:
        """Frozen towers stay in eval mode: no dropout, and BatchNorm keeps its statistics."""
        super().train(mode)
        if self.config.freeze_towers:
            for tower in self.towers.values():
                tower.eval()
        if self.config.tower_batch_norm_train and "video" in self.config.modalities:
            for module in self.video_tower.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train(mode)
        return self

    def get_audio_states(self, input_features: Tensor) -> Tensor:
        """Log-mel (B, mels, 2·positions) -> Whisper frames (B, positions, D) at 50 Hz."""
        tower = self.audio_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(tower)):
            return tower(input_features.to(tower.conv1.weight.dtype)).last_hidden_state

    def get_video_states(self, video_values: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Lip frames (B, T, 1, H, W) at 25 Hz -> AV-HuBERT frames (B, T, D)."""
        tower = self.video_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(tower)):
            # The first layer's dtype: quantised linear layers compute in another dtype than their weights'.
            return tower(video_values.to(tower.frontend.conv.weight.dtype), video_mask).last_hidden_state

    def get_speech_features(
        self,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        video_values: Tensor | None = None,
        video_mask: Tensor | None = None,
        rate: Rate | str | None = None,
    ) -> SpeechFeatures:
        """Towers, compression and one projector call over the audio and video tokens together.

        Args:
            input_features: (B, mels, 2·positions) log-mel of the whole Whisper window.
            audio_mask: (B, F) bool, the Whisper frames that belong to each clip, real ones first; F ≤ positions.
            video_values, video_mask: (B, T, 1, H, W) and (B, T) bool.
            rate: one of the config's `rates`; None = the default.
        """
        rate = self.config.rate(rate)
        states, masks = {}, {}
        if input_features is not None:
            self._expect("audio", audio_mask)
            states["audio"] = self.get_audio_states(input_features)[:, : audio_mask.shape[1]]
            masks["audio"] = audio_mask.bool()
        if video_values is not None:
            self._expect("video", video_mask)
            masks["video"] = video_mask.bool()
            states["video"] = self.get_video_states(video_values, masks["video"])
        if not states:
            raise ValueError("expected audio (input_features), video (video_values) or both, got neither")
        tokens, token_masks, modality = [], [], []
        projector_width = max(self.config.token_features_at(rate).values())
        for name, frames in states.items():
            x, mask = self.compress(frames, masks[name], rate[STREAMS.index(name)])
            # Separate experts may take streams of two widths: the narrower is padded with zeros, which add nothing.
            tokens.append(nn.functional.pad(x, (0, projector_width - x.shape[-1])))
            token_masks.append(mask)
            modality.append(torch.full_like(mask, self.config.modalities.index(name), dtype=torch.int32))
        mask = torch.cat(token_masks, 1)
        projector = self.projector_at(rate)
        # Any of its parameters: under LoRA the projector is wrapped in a module without their names.
        dtype = next(projector.parameters()).dtype
        projection = projector(torch.cat(tokens, 1).to(dtype), torch.cat(modality, 1), mask)
        return SpeechFeatures(
            tokens=projection.hidden_states,
            mask=mask,
            audio_tokens=token_masks[0].shape[1] if "audio" in states else 0,
            projection=projection,
            states=states,
            state_masks=masks,
            rate=rate,
        )

    def _expect(self, modality: str, mask: Tensor | None) -> None:
        if modality not in self.config.modalities:
            raise ValueError(f"this model has no {modality} tower: its modalities are {self.config.modalities}")
        if mask is None:
            raise ValueError(f"{modality}_mask is required with {modality}: (B, frames) bool, True = real frame")

    def compress(self, frames: Tensor, mask: Tensor, rate: int) -> tuple[Tensor, Tensor]:
        """(B, F, D) -> (B, F // rate, D or rate·D); a token is real when all its frames are, the tail is dropped."""
        B, F, D = frames.shape
        S = F // rate
        windows = frames[:, : S * rate].reshape(B, S, rate, D)
        x = windows.mean(2) if self.config.compression == "pool" else windows.flatten(2)
        return x, mask[:, rate - 1 : S * rate : rate]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        video_values: Tensor | None = None,
        video_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        target_positions: Tensor | None = None,
        skip_logits: bool | None = None,
        rate: Rate | str | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> LlamaSmopOutput:
        """Logits, and with `labels` (B, L; -100 is ignored) the losses.

        `input_ids` and `attention_mask` (B, L) come from `LlamaSmopProcessor`, padded on either side; the speech
        arguments are those of `get_speech_features`. Without speech arguments the language model runs alone.

        cache: keys and values of what came before; `past_key_values` is its former name.
        skip_logits: compute the loss without making all logits, and return None for them; None = in training mode
            with labels, where `fused_loss` and the language model allow it. `logits_to_keep` is then ignored.
        rate: as in `get_speech_features`; that at which the processor made the batch.
        num_items_in_batch: text tokens of all micro-batches and processes of a training step. The losses of the
            micro-batches then add up: the language model's to its mean over all those tokens, each other loss to its
            mean over the micro-batches, weighted by their text tokens.
        kwargs: the language model's own, such as `output_hidden_states`; TypeError for others.
        target_positions: (N,) of `lm_loss.target_positions`, which spares a GPU the wait for their number.
        """
        arguments.refuse_unknown(kwargs, self._known_arguments)
        speech = None
        given = (input_features, audio_mask, video_values, video_mask)
        speech_inputs = dict(zip(SPEECH_INPUTS, given, strict=True))
        if any(v is not None for v in given):
            speech = self.get_speech_features(**speech_inputs, rate=rate)
            inputs_embeds, input_ids = self.place_speech(input_ids, speech, inputs_embeds), None
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            # With a cache the mask also covers the cached tokens; the new tokens are its last.
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        kwargs |= {
            "input_ids": input_ids if inputs_embeds is None else None,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: past_key_values if cache is None else cache,
            "use_cache": (labels is None) if use_cache is None else use_cache,
            "return_dict": True,
        }
        skip = (self.training and labels is not None) if skip_logits is None else skip_logits
        kind = None
        if skip:
            kind = without_logits(self.fused_loss, self.language_model, labels, kwargs, strict=bool(skip_logits))
        if kind is None:
            outputs = self.language_model(labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        else:
            outputs = forward_without_logits(self.language_model, labels, target_positions, kind, **kwargs)
        result = LlamaSmopOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            lm_loss=outputs.loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )
        if speech is not None:
            self._add_speech_losses(result, speech, labels, kwargs.get("num_items_in_batch"))
        return result

    def _add_speech_losses(
        self, result: LlamaSmopOutput, speech: SpeechFeatures, labels: Tensor | None, items: Tensor | int | None
    ) -> None:
        projection, config = speech.projection, self.config
        result.router_logits, result.expert_counts = projection.router_logits, projection.expert_counts
        if config.projector_config.kind == "smop":
            result.load_balancing_loss, result.router_z_loss = projection.load_balancing_loss, projection.router_z_loss
            entropy = router_entropy(projection.router_logits, speech.mask, speech.audio_tokens)
            first = STREAMS.index(config.modalities[0])
            result.router_entropy = entropy[first : first + len(config.modalities)]
        if labels is None:
            self._warn_without_auxiliary_losses()
            return
        share = 1 if items is None else (labels[:, 1:] != IGNORED_LABEL).sum() / items
        if config.projector_config.kind == "smop":
            result.loss = (
                result.loss
                + share * config.load_balancing_coef * result.load_balancing_loss
                + share * config.router_z_coef * result.router_z_loss
            )
        if config.ctc_weight:
            result.ctc_loss = sum(self._ctc_loss(m, speech, labels) for m in speech.states)
            result.loss = result.loss + share * config.ctc_weight * result.ctc_loss

    def _warn_without_auxiliary_losses(self) -> None:
        if not self.training or self._warned or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        smop = self.config.projector_config.kind == "smop"
        parts = {
            "load balancing": smop and self.config.load_balancing_coef,
            "the router's z": smop and self.config.router_z_coef,
            "CTC": self.config.ctc_weight,
        }
        if any(parts.values()):
            self._warned = True
            logger.warning(
                "training without labels in forward, as the Trainer does with label_smoothing_factor: a loss made of "
                "the logits lacks the auxiliary ones (%s); add those of the output, or set their weights to 0",
                ", ".join(name for name, weight in parts.items() if weight),
            )

    def _ctc_loss(self, modality: str, speech: SpeechFeatures, labels: Tensor) -> Tensor:
        """On compressed tokens, not frames: with fewer blanks between the words it is learned much sooner."""
        rate = speech.rate[STREAMS.index(modality)]
        tokens, mask = self.compress(speech.states[modality], speech.state_masks[modality], rate)
        head = self.ctc_heads[ctc_head(self.config, modality, speech.rate)]
        ignored = (IGNORED_LABEL, *_as_tuple(self.config.eos_token_id))
        return ctc_loss(head(tokens), mask, labels, blank=self.config.pad_token_id, ignored=ignored)


def _projectors(config: LlamaSmopConfig) -> nn.Module:
    if config.separate_projectors:
        return RateProjectors.of({rate: _projector(config, rate) for rate in config.known_rates})
    return _projector(config, config.known_rates[0])


def _projector(config: LlamaSmopConfig, rate: Rate) -> nn.Module:
    settings = config.projector_config
    sizes = (max(config.token_features_at(rate).values()), settings.hidden_features, config.text_config.hidden_size)
    common = {name: getattr(settings, name) for name in ("activation", "layer_norm", "backend", "recompute")}
    if settings.kind == "dense":
        return DenseProjector(*sizes, modalities=len(config.modalities), **common)
    return SMoPProjector(
        *sizes,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        sharing=config.projector_sharing,
        **common,
        **settings.form._asdict(),
    )


def _as_tuple(token_id: int | list[int] | None) -> tuple[int, ...]:
    return (token_id,) if isinstance(token_id, int) else tuple(token_id or ())


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


for _auto in (AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq):
    _auto.register(LlamaSmopConfig, LlamaSmopForConditionalGeneration, exist_ok=True)
# Lists of names that `register` does not reach. The Trainer's label smoothing shifts the labels of the models in the
# first, the pipeline for speech recognition takes a model for what the second says.
for _names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES):
    _names[LlamaSmopConfig.model_type] = LlamaSmopForConditionalGeneration.__name__

__all__ = ["LlamaSmopForConditionalGeneration", "LlamaSmopOutput", "SpeechFeatures"]
