"""Configurations of the model and of its parts; `LlamaSmopConfig` checks that they fit together."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, WhisperConfig

from llama_smop.ops import dispatch

MODALITIES = ("audio", "video")
SHARED_EXPERTS = ("JEJR", "JEDR")
WHISPER_FRAMES_PER_SECOND = 50


class AvHubertVideoConfig(PreTrainedConfig):
    """The video half of AV-HuBERT; the defaults are Large.

    The front-end is Conv3d (5, 7, 7) with `frontend_channels` and spatial stride `frontend_stride`, a max pool when
    `frontend_pool`, and a ResNet of `trunk_channels`/`trunk_blocks`. `norm` is "batch" (the published weights) or
    "group", which sees one frame at a time, so that training from scratch does not mix a clip with its batch.
    """

    model_type = "avhubert_video"

    image_size: int = 88
    frontend_channels: int = 64
    frontend_stride: int = 2
    frontend_pool: bool = True
    trunk_channels: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    trunk_blocks: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    norm: str = "batch"
    norm_groups: int = 4
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    layer_norm_first: bool = True
    layer_norm_eps: float = 1e-5
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.trunk_channels, self.trunk_blocks = list(self.trunk_channels), list(self.trunk_blocks)
        if self.norm not in ("batch", "group"):
            raise ValueError(f'video_config.norm must be "batch" or "group", got {self.norm!r}')
        if len(self.trunk_channels) != len(self.trunk_blocks):
            raise ValueError(
                "video_config.trunk_channels and trunk_blocks must have one entry a stage, got "
                f"{len(self.trunk_channels)} and {len(self.trunk_blocks)}"
            )
        if self.norm == "group":
            for channels in (self.frontend_channels, *self.trunk_channels):
                if channels % self.norm_groups:
                    raise ValueError(
                        f"video_config.norm_groups = {self.norm_groups} must divide every channel count, got {channels}"
                    )
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"video_config.{name} = {getattr(self, name)} must divide hidden_size = {self.hidden_size}"
                )


class ProjectorConfig(PreTrainedConfig):
    """The projector: `kind` "smop" (the sparse mixture) or "dense" (Llama-AVSR's, one MLP for each modality)."""

    model_type = "smop_projector"

    kind: str = "smop"
    num_experts: int = 4
    top_k: int = 2
    sharing: str = "DEDR"
    hidden_features: int = 2048
    activation: str = "relu"
    layer_norm: bool = True
    backend: str = "auto"
    recompute: str = "none"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.kind not in ("smop", "dense"):
            raise ValueError(f'projector_config.kind must be "smop" or "dense", got {self.kind!r}')
        if self.sharing not in (*SHARED_EXPERTS, "DEDR"):
            raise ValueError(f"projector_config.sharing must be JEJR, JEDR or DEDR, got {self.sharing!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"projector_config.top_k must lie in [1, num_experts] = [1, {self.num_experts}], got {self.top_k}"
            )
        dispatch.check_activation(self.activation)


class LlamaSmopConfig(PreTrainedConfig):
    """Everything that defines a Llama-SMoP.

    Args:
        text_config, audio_config, video_config, projector_config: configurations (or dicts) of the parts.
        modalities: which towers exist: ("audio",), ("video",) or both. A model with both also takes one alone.
        rate_audio, rate_video: neighbouring tower frames (50 and 25 a second) made into one token.
        compression: "pool" averages them, "stack" concatenates them.
        audio_token_id, audio_end_token_id, video_token_id, video_end_token_id: the markers round the speech tokens.
        load_balancing_coef, router_z_coef: weights of the auxiliary losses in `loss`.
        ctc_weight: weight of a CTC loss per text token on each tower's compressed tokens, 0 = no CTC heads.
        freeze_towers: towers stay in eval mode and get no gradient (LoRA inside them still learns).
        tower_batch_norm_train: parity with the published training run, whose frozen AV-HuBERT normalises with
            batch statistics and moves its running ones.
        lora: for each of "language_model" and "video_tower", {"r", "alpha", "targets"}; empty = none.
        sources: where parts that are not in the checkpoint come from, by part: a hub name or a folder.

    Raises:
        ValueError: parts that do not fit together, in one line that says what was expected and what came.
    """

    model_type = "llama_smop"
    sub_configs = {  # noqa: RUF012 - transformers' protocol
        "text_config": AutoConfig,
        "audio_config": WhisperConfig,
        "video_config": AvHubertVideoConfig,
        "projector_config": ProjectorConfig,
    }

    # What the Trainer leaves out of an evaluation's predictions, which are the logits alone.
    keys_to_ignore_at_inference = [  # noqa: RUF012 - a list by transformers' protocol
        *("past_key_values", "lm_loss", "load_balancing_loss", "router_z_loss", "ctc_loss"),
        *("expert_counts", "router_entropy", "router_logits"),
    ]

    text_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    video_config: dict | PreTrainedConfig | None = None
    projector_config: dict | PreTrainedConfig | None = None
    modalities: list[str] | tuple[str, ...] = MODALITIES
    rate_audio: int = 4
    rate_video: int = 2
    compression: str = "pool"
    audio_token_id: int = 128257
    audio_end_token_id: int = 128258
    video_token_id: int = 128259
    video_end_token_id: int = 128260
    pad_token_id: int | None = 128256
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    load_balancing_coef: float = 0.01
    router_z_coef: float = 0.001
    ctc_weight: float = 0.0
    freeze_towers: bool = True
    tower_batch_norm_train: bool = False
    lora: dict[str, Any] | None = None
    sources: dict[str, str] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.text_config = _text_config(self.text_config)
        self.audio_config = _part(self.audio_config, WhisperConfig, _WHISPER_MEDIUM_EN)
        self.video_config = _part(self.video_config, AvHubertVideoConfig)
        self.projector_config = _part(self.projector_config, ProjectorConfig)
        self.modalities = [m for m in MODALITIES if m in self.modalities] + [
            m for m in self.modalities if m not in MODALITIES
        ]
        self.lora, self.sources = dict(self.lora or {}), dict(self.sources or {})
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self._check()

    @property
    def token_features(self) -> dict[str, int]:
        """Width of a compressed token, by modality."""
        stacked = self.compression == "stack"
        widths = {
            "audio": self.audio_config.d_model * (self.rate_audio if stacked else 1),
            "video": self.video_config.hidden_size * (self.rate_video if stacked else 1),
        }
        return {m: widths[m] for m in self.modalities}

    @property
    def projector_sharing(self) -> str:
        """With a single modality every sharing is the same thing, and JEJR is it without idle parameters."""
        return self.projector_config.sharing if len(self.modalities) == 2 else "JEJR"

    def _check(self) -> None:
        unknown = [m for m in self.modalities if m not in MODALITIES]
        if unknown or not self.modalities:
            raise ValueError(f"modalities must be of {MODALITIES}, got {list(self.modalities)}")
        if self.compression not in ("pool", "stack"):
            raise ValueError(f'compression must be "pool" or "stack", got {self.compression!r}')
        for name in ("rate_audio", "rate_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        widths = self.token_features
        shared = self.projector_config.kind == "smop" and self.projector_sharing in SHARED_EXPERTS
        if shared and len(set(widths.values())) > 1:
            raise ValueError(
                f"{self.projector_sharing} shares its experts, so audio and video tokens must be of one width, got "
                f"{widths['audio']} and {widths['video']} (compression {self.compression!r}); use DEDR or other towers"
            )
        unknown = set(self.lora) - {"language_model", "video_tower"}
        if unknown:
            raise ValueError(f"lora knows the parts language_model and video_tower, got {sorted(unknown)}")
        vocabulary = self.text_config.vocab_size
        for name in ("audio_token_id", "audio_end_token_id", "video_token_id", "video_end_token_id"):
            if not 0 <= getattr(self, name) < vocabulary:
                raise ValueError(
                    f"{name} = {getattr(self, name)} lies outside the language model's vocabulary of {vocabulary}; "
                    "add the special tokens and resize the embeddings"
                )


# d 1024, 24 layers: the encoder of openai/whisper-medium.en.
_WHISPER_MEDIUM_EN = {
    "d_model": 1024,
    "encoder_layers": 24,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_layers": 24,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
}
# Llama 3.2-1B with the five special tokens.
LLAMA_3_2_1B = {
    "vocab_size": 128261,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}


def _part(config, kind, defaults: dict | None = None):
    if isinstance(config, dict):
        return kind(**config)
    return kind(**(defaults or {})) if config is None else config


def _text_config(config):
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(LLAMA_3_2_1B if config is None else config)
    return AutoConfig.for_model(config.pop("model_type", "llama"), **config)


__all__ = ["AvHubertVideoConfig", "LlamaSmopConfig", "ProjectorConfig"]
