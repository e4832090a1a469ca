"""A Llama-SMoP small enough to train from scratch on two CPU cores in minutes."""

from collections.abc import Iterable, Sequence

from transformers import LlamaConfig, WhisperConfig, WhisperFeatureExtractor

from llama_smop.models.configuration_llama_smop import AvHubertVideoConfig, LlamaSmopConfig, ProjectorConfig
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.tokenizer import token_ids, word_tokenizer
from llama_smop.models.units import STREAMS, WHISPER_RATE
from llama_smop.projector_forms import SMoPForm


def build_tiny(
    words: Iterable[str],
    *,
    kind: str = "smop",
    sharing: str = "DEDR",
    num_experts: int = 4,
    top_k: int = 2,
    hidden_features: int = 192,
    width: int = 128,
    audio_layers: int = 2,
    video_layers: int = 2,
    video_stride: int = 4,
    video_channels: int = 8,
    video_activation: str = "prelu",
    text_layers: int = 3,
    max_seconds: float = 3.0,
    modalities: Sequence[str] = STREAMS,
    rate_audio: int = 4,
    rate_video: int = 2,
    compression: str = "pool",
    ctc_weight: float = 1.5,
    backend: str = "auto",
    recompute: str | int = "none",
    **settings,
) -> tuple[LlamaSmopForConditionalGeneration, LlamaSmopProcessor]:
    """An untrained model, all of it trainable, and its processor, over a vocabulary of `words`.

    video_stride, video_channels: of the first convolution on the lips' picture; below a stride of 8 a pool halves the
    picture once more. video_activation: "prelu", AV-HuBERT's, or "relu", which is quicker. settings: further fields of
    `ProjectorConfig` (its activation, norm and form) and of `LlamaSmopConfig`.

    The initial scales (Whisper 0.12, Llama 0.08) matter: at the usual 0.02 such a model stays near chance for minutes.
    Parameters are drawn from torch's generator: seed it for the same model twice.
    """
    tokenizer = word_tokenizer(words)
    ids = token_ids(tokenizer)
    own_ids = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    form = {n: settings.pop(n) for n in ("activation", "layer_norm", *SMoPForm._fields) if n in settings}
    config = LlamaSmopConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            initializer_range=0.08,
            tie_word_embeddings=True,
            **own_ids,
        ),
        audio_config=WhisperConfig(
            vocab_size=len(tokenizer),
            d_model=width,
            encoder_layers=audio_layers,
            encoder_attention_heads=4,
            encoder_ffn_dim=4 * width,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=width,
            max_source_positions=round(max_seconds * WHISPER_RATE),
            init_std=0.12,
            **own_ids,
            decoder_start_token_id=tokenizer.bos_token_id,
        ),
        video_config=AvHubertVideoConfig(
            frontend_channels=video_channels,
            frontend_stride=video_stride,
            frontend_pool=video_stride < 8,
            frontend_activation=video_activation,
            trunk_channels=(16, 32, 64),
            trunk_blocks=(1, 1, 1),
            norm="group",
            hidden_size=width,
            num_hidden_layers=video_layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            num_conv_pos_embeddings=32,
            initializer_range=0.08,
        ),
        projector_config=ProjectorConfig(
            kind=kind,
            num_experts=num_experts,
            top_k=top_k,
            sharing=sharing,
            hidden_features=hidden_features,
            backend=backend,
            recompute=recompute,
            **form,
        ),
        modalities=modalities,
        rate_audio=rate_audio,
        rate_video=rate_video,
        compression=compression,
        **ids,
        ctc_weight=ctc_weight,
        **settings,
        freeze_towers=False,
    )
    feature_extractor = WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins)
    model = LlamaSmopForConditionalGeneration(config)
    return model, LlamaSmopProcessor.for_config(config, feature_extractor, tokenizer)
