"""Configurations of the model and of its parts; `LlamaSmopConfig` checks that they fit together."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, WhisperConfig
from transformers.activations import ACT2FN

from llama_smop.models import config_checks as check
from llama_smop.models.lora import lora_settings
from llama_smop.models.rates import Rate, check_rates, chosen_rate, known_rates, rate_text
from llama_smop.models.units import (
    LLAMA_3_BOS,
    LLAMA_3_EOS,
    LLAMA_3_IDS,
    LLAMA_3_TOKENS,
    SPECIAL_TOKEN_FIELDS,
    SPECIAL_TOKENS,
    STREAMS,
)
from llama_smop.ops import checks, dispatch
from llama_smop.projector_forms import PAPER, SMoPForm

SHARED_EXPERTS = ("JEJR", "JEDR")
MARKER_FIELDS = SPECIAL_TOKEN_FIELDS[1:]  # all but the pad token's


class AvHubertVideoConfig(PreTrainedConfig):
    """The video half of AV-HuBERT; the defaults are Large.

    The front-end is Conv3d (5, 7, 7) with `frontend_channels` and spatial stride `frontend_stride`, a max pool when
    `frontend_pool`, and a ResNet of `trunk_channels`/`trunk_blocks`. `norm` is "batch" (the published weights) or
    "group", which sees one frame at a time, so that training from scratch does not mix a clip with its batch.
    `frontend_activation` is "prelu" (the published weights) or "relu", as fairseq's `resnet_relu_type`.
    """

    model_type = "avhubert_video"

    image_size: int = 88
    frontend_channels: int = 64
    frontend_stride: int = 2
    frontend_pool: bool = True
    frontend_activation: str = "prelu"
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
        part, width, share = "video_config.", (1, 2**16), (0, 1)
        check.whole(self, part, frontend_channels=(1, 8192), norm_groups=(1, 8192))
        check.wholes(self, part, trunk_channels=(1, 8192), trunk_blocks=(1, 256))
        check.whole(self, part, image_size=(1, 4096), frontend_stride=(1, 64), num_hidden_layers=check.LAYERS)
        names = ("num_attention_heads", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups")
        check.whole(self, part, hidden_size=width, intermediate_size=(1, 2**20), **dict.fromkeys(names, (1, 4096)))
        names = ("hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop")
        check.number(self, part, **dict.fromkeys(names, share), layer_norm_eps=share, initializer_range=(0, 10))
        check.flag(self, part, "frontend_pool", "layer_norm_first")
        check.choice(self, part, norm=("batch", "group"), hidden_act=ACT2FN, frontend_activation=("prelu", "relu"))
        check.finite_with_dtype(self, part)
        self.trunk_channels, self.trunk_blocks = list(self.trunk_channels), list(self.trunk_blocks)
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
    """The projector: `kind` "smop" (the sparse mixture) or "dense" (Llama-AVSR's, one MLP for each modality).

    What follows `recompute` are the options of `SMoPProjector` beyond the paper's; a dense projector has none of them.
    """

    model_type = "smop_projector"

    kind: str = "smop"
    num_experts: int = 4
    top_k: int = 2
    sharing: str = "DEDR"
    hidden_features: int = 2048
    activation: str = "relu"
    layer_norm: bool = True
    backend: str = "auto"
    recompute: str | int = "none"
    shared_experts: int = 0
    input_norm: str | None = None
    gated: bool = False
    normalize_weights: bool = True
    weight_scale: float = 1.0
    router: str = "linear"
    router_hidden: int = 512
    router_bias: bool = False
    router_jitter: float = 0.0
    balance: str | None = "switch"
    merge: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        part = "projector_config."
        check.whole(self, part, num_experts=(1, 4096), top_k=(1, 4096), hidden_features=(1, 2**20))
        check.flag(self, part, "layer_norm")
        check.choice(
            self, part, kind=("smop", "dense"), sharing=(*SHARED_EXPERTS, "DEDR"), backend=("auto", *dispatch.BACKENDS)
        )
        check.choice(self, part, activation=checks.ACTIVATIONS)
        if check.is_whole(self.recompute):
            check.whole(self, part, recompute=(0, 2**63 - 1))
        else:
            check.choice(self, part, recompute=checks.RECOMPUTE)
        check.finite_with_dtype(self, part)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"projector_config.top_k must lie in [1, num_experts] = [1, {self.num_experts}], got {self.top_k}"
            )
        check.whole(self, part, shared_experts=(0, 4096), router_hidden=(1, 2**20))
        try:
            self.form.check()
        except ValueError as error:
            raise ValueError(f"{part}{error}") from None
        if self.kind == "dense" and self.form != PAPER:
            options = ", ".join(self.form.described())
            raise ValueError(f"projector_config: {options} is for kind smop; a dense projector has no such options")

    @property
    def form(self) -> SMoPForm:
        return SMoPForm.of(self)


class LlamaSmopConfig(PreTrainedConfig):
    """Everything that defines a Llama-SMoP.

    Args:
        text_config, audio_config, video_config, projector_config: configurations (or dicts) of the parts.
        modalities: which towers exist: ("audio",), ("video",) or both. A model with both also takes one alone.
        rate_audio, rate_video: neighbouring tower frames (50 and 25 a second) made into one token.
        rates: the pairs (audio, video) of a model for several rates; None = one. The first is the default, which
            rate_audio and rate_video then say.
        rate_projectors: of a model for several rates, "shared" by all or "separate", one for each (`rates`).
        compression: "pool" averages them, "stack" concatenates them.
        audio_token_id, audio_end_token_id, video_token_id, video_end_token_id: the markers round the speech tokens.
        load_balancing_coef, router_z_coef: weights of the auxiliary losses in `loss`.
        ctc_weight: weight of a CTC loss per text token on each tower's compressed tokens, 0 = no CTC heads.
        freeze_towers: towers stay in eval mode and get no gradient (LoRA inside them still learns).
        tower_batch_norm_train: parity with the published training run, whose frozen AV-HuBERT normalises with
            batch statistics and moves its running ones.
        lora: for each of "language_model" and "video_tower", {"r", "alpha", "targets"}; empty = none.
        sources: where parts that are not in the checkpoint come from, by part: a hub name or a folder.
        first_added_token: from this id on the language model's source has no rows; None = none but the special tokens.

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

    # Outputs that the Trainer leaves out of its predictions, which are the logits alone.
    keys_to_ignore_at_inference = [  # noqa: RUF012 - a list by transformers' protocol
        *("cache", "past_key_values", "lm_loss", "load_balancing_loss", "router_z_loss", "ctc_loss"),
        *("expert_counts", "router_entropy", "router_logits"),
    ]

    text_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    video_config: dict | PreTrainedConfig | None = None
    projector_config: dict | PreTrainedConfig | None = None
    modalities: list[str] | tuple[str, ...] = STREAMS
    rate_audio: int = 4
    rate_video: int = 2
    rates: list | tuple | None = None
    rate_projectors: str = "shared"
    compression: str = "pool"
    audio_token_id: int = LLAMA_3_IDS["audio_token_id"]
    audio_end_token_id: int = LLAMA_3_IDS["audio_end_token_id"]
    video_token_id: int = LLAMA_3_IDS["video_token_id"]
    video_end_token_id: int = LLAMA_3_IDS["video_end_token_id"]
    pad_token_id: int | None = LLAMA_3_IDS["pad_token_id"]
    bos_token_id: int | None = LLAMA_3_BOS
    eos_token_id: int | list[int] | None = LLAMA_3_EOS
    load_balancing_coef: float = 0.01
    router_z_coef: float = 0.001
    ctc_weight: float = 0.0
    freeze_towers: bool = True
    tower_batch_norm_train: bool = False
    lora: dict[str, Any] | None = None
    sources: dict[str, str] | None = None
    first_added_token: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.text_config = _text_config(self.text_config)
        self.audio_config = _part("audio_config", self.audio_config, WhisperConfig, _WHISPER_MEDIUM_EN)
        self.video_config = _part("video_config", self.video_config, AvHubertVideoConfig)
        self.projector_config = _part("projector_config", self.projector_config, ProjectorConfig)
        if not isinstance(self.modalities, list | tuple):
            raise ValueError(f"modalities must be a list of {STREAMS}, got {self.modalities!r}")
        for name in ("lora", "sources"):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} must be settings by part, got {getattr(self, name)!r}")
        self.modalities = [m for m in STREAMS if m in self.modalities] + [
            m for m in self.modalities if m not in STREAMS
        ]
        self.lora, self.sources = dict(self.lora or {}), dict(self.sources or {})
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self._check()

    @property
    def token_features(self) -> dict[str, int]:
        """Width of a compressed token, by modality, at the default rate."""
        return self.token_features_at(self.known_rates[0])

    def token_features_at(self, rate: Rate) -> dict[str, int]:
        """Width of a compressed token, by modality."""
        audio, video = rate if self.compression == "stack" else (1, 1)
        widths = {"audio": self.audio_config.d_model * audio, "video": self.video_config.hidden_size * video}
        return {m: widths[m] for m in self.modalities}

    @property
    def known_rates(self) -> tuple[Rate, ...]:
        """The rates that the model takes, the default first."""
        return known_rates(self)

    def rate(self, asked: str | Sequence[int] | None = None) -> Rate:
        """The rate asked for, as a pair or as "16,5"; None = the default. ValueError: the model has no such rate."""
        return chosen_rate(self.known_rates, asked)

    @property
    def separate_projectors(self) -> bool:
        """Whether every rate has a projector of its own."""
        return self.rates is not None and self.rate_projectors == "separate"

    @property
    def special_token_ids(self) -> list[int]:
        """The markers' and, if there is such a row, the pad token's, ascending."""
        padded = self.pad_token_id is not None and self.pad_token_id < self.text_config.vocab_size
        pad = (self.pad_token_id,) if padded else ()
        return sorted({*(getattr(self, name) for name in MARKER_FIELDS), *pad})

    @property
    def projector_sharing(self) -> str:
        """The configured sharing; JEJR for one modality, where all compute the same and JEJR has no idle parameters."""
        return self.projector_config.sharing if len(self.modalities) == 2 else "JEJR"

    def _check(self) -> None:
        unknown = [m for m in self.modalities if m not in STREAMS]
        if unknown or not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities must be of {STREAMS}, got {list(self.modalities)}")
        check.choice(self, compression=("pool", "stack"))
        check.choice(self, rate_projectors=("shared", "separate"))
        check_rates(self)
        weights = ("load_balancing_coef", "router_z_coef", "ctc_weight")
        check.number(self, **dict.fromkeys(weights, (0, 1e6)))
        check.flag(self, "", "freeze_towers", "tower_batch_norm_train")
        check.transformer(self.text_config, "text_config.")
        check.transformer(self.audio_config, "audio_config.")
        check.finite_with_dtype(self)
        self._check_widths()
        unknown = set(self.lora) - {"language_model", "video_tower"}
        if unknown:
            raise ValueError(f"lora knows the parts language_model and video_tower, got {sorted(unknown)}")
        for settings in self.lora.values():
            lora_settings(settings)
        unknown = set(self.sources) - {"language_model", "audio_tower", "video_tower"}
        if unknown or not all(isinstance(source, str) for source in self.sources.values()):
            raise ValueError(
                "sources must name language_model, audio_tower and video_tower by name or folder, got "
                f"{dict(self.sources)}"
            )
        self._check_tokens()

    def _check_widths(self) -> None:
        shared = self.projector_config.kind == "smop" and self.projector_sharing in SHARED_EXPERTS
        for rate in self.known_rates:
            widths = self.token_features_at(rate)
            if shared and len(set(widths.values())) > 1:
                raise ValueError(
                    f"{self.projector_sharing} shares its experts, so audio and video tokens must be of one width, got "
                    f"{widths['audio']} and {widths['video']} (compression {self.compression!r}); use DEDR or other "
                    "towers"
                )
            if widths != self.token_features and not self.separate_projectors:
                raise ValueError(
                    f"rates {' and '.join(map(rate_text, self.known_rates))} share a projector, so tokens must be of "
                    f"one width at all of them, and compression {self.compression!r} makes them as wide as they hold "
                    "frames; use compression 'pool' or rate_projectors 'separate'"
                )

    def _check_tokens(self) -> None:
        vocabulary = self.text_config.vocab_size
        needed = ("pad_token_id",) if self.ctc_weight else ()  # CTC's blank
        added = () if self.first_added_token is None else ("first_added_token",)
        for name in (*MARKER_FIELDS, *needed, *added):
            value = getattr(self, name)
            if not check.is_whole(value) or not 0 <= value < vocabulary:
                raise ValueError(
                    f"{name} = {value!r:.60} lies outside the language model's vocabulary of {vocabulary}; "
                    "add the special tokens and resize the embeddings"
                )
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                check.whole(self, **{name: (0, 2**31)})
        if self.eos_token_id is not None and self.eos_token_id != []:
            several = isinstance(self.eos_token_id, list | tuple)
            (check.wholes if several else check.whole)(self, eos_token_id=(0, 2**31))


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
    "vocab_size": LLAMA_3_TOKENS + len(SPECIAL_TOKENS),
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": LLAMA_3_BOS,
    "eos_token_id": LLAMA_3_EOS,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}


def _part(name: str, config, kind, defaults: dict | None = None):
    if config is None:
        return kind(**(defaults or {}))
    if isinstance(config, dict):
        return kind(**config)
    if not isinstance(config, kind):
        raise ValueError(f"{name} must be settings of a {kind.__name__}, got {config!r:.60}")
    return config


def _text_config(config):
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict | None):
        raise ValueError(f"text_config must be settings of a language model, got {config!r:.60}")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = dict(LLAMA_3_2_1B if config is None else config)
    kind = config.pop("model_type", "llama")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"text_config.model_type must be that of a causal language model, got {kind!r:.60}")
    return AutoConfig.for_model(kind, **config)


AutoConfig.register(LlamaSmopConfig.model_type, LlamaSmopConfig, exist_ok=True)

__all__ = ["AvHubertVideoConfig", "LlamaSmopConfig", "ProjectorConfig"]
