"""Build a Llama-SMoP of Whisper, AV-HuBERT and a language model, each by name or path, and a new projector."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, WhisperFeatureExtractor

from llama_smop.models.configuration_llama_smop import LlamaSmopConfig, ProjectorConfig
from llama_smop.models.hub import fetch
from llama_smop.models.lora import lora_settings
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.part_weights import load_part, part_config, part_weights
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.tokenizer import add_special_tokens, token_ids
from llama_smop.models.units import STREAMS


def assemble(
    *, language_model: str | Path, dtype: torch.dtype = torch.float32, **settings
) -> tuple[LlamaSmopForConditionalGeneration, LlamaSmopProcessor]:
    """The model, its towers frozen, and its processor; arguments and errors as in `assembled_config`."""
    config, tokenizer, feature_extractor = assembled_config(language_model=language_model, **settings)
    model = LlamaSmopForConditionalGeneration(config).to(dtype)
    for part, source in config.sources.items():
        load_part(getattr(model, part), part_weights(part, source, dtype), source)
    return model, LlamaSmopProcessor.for_config(config, feature_extractor, tokenizer)


def assembled_config(
    *,
    language_model: str | Path,
    audio_tower: str | Path | None = None,
    video_tower: str | Path | None = None,
    modalities: Sequence[str] | None = None,
    projector: dict | ProjectorConfig | None = None,
    lora: str | dict | None = None,
    **settings,
) -> tuple[LlamaSmopConfig, PreTrainedTokenizerBase, WhisperFeatureExtractor]:
    """The configuration, tokenizer and feature extractor that the parts' own make together.

    Args:
        language_model: a causal language model with a tokenizer: hub name, folder, or .gguf file.
        audio_tower: a Whisper model: hub name or folder. None = no audio.
        video_tower: a fairseq AV-HuBERT .pt file, or the folder that it was converted to. None = no video.
        modalities: by default those of the towers given.
        projector: settings of `ProjectorConfig`.
        lora: a preset's name (`lora.PRESETS`) or {"r", "alpha"} for the language model; or a dict of such by part,
            "language_model" and "video_tower".
        settings: further fields of `LlamaSmopConfig` (rates, compression, …).

    Raises:
        ValueError: a part that cannot be found, or parts that do not fit together.
    """
    sources = {"language_model": language_model, "audio_tower": audio_tower, "video_tower": video_tower}
    # A checkpoint that names a file must find it from any working directory.
    sources = {
        part: str(Path(source).absolute() if Path(source).exists() else source)
        for part, source in sources.items()
        if source is not None
    }
    lora = {} if lora is None else lora
    if isinstance(lora, str) or "r" in lora:
        lora = {"language_model": lora}
    present = tuple(m for m in STREAMS if f"{m}_tower" in sources)
    for modality in STREAMS:
        if modalities and (modality in modalities) != (modality in present):
            tower = f"{modality}_tower"
            raise ValueError(
                f"modalities are {', '.join(modalities)}, so {tower} is needed and not given"
                if modality in modalities
                else f"{tower} is given, and modalities are {', '.join(modalities)}: leave it out (null in YAML)"
            )
    if not present:
        raise ValueError("expected audio_tower, video_tower or both, got neither")
    parts = {}
    feature_extractor = WhisperFeatureExtractor()
    if audio_tower is not None:
        parts["audio_config"] = part_config("audio_tower", audio_tower)
        feature_extractor = fetch(WhisperFeatureExtractor, audio_tower)
    if video_tower is not None:
        parts["video_config"] = part_config("video_tower", video_tower)
    tokenizer = fetch(AutoTokenizer, language_model)
    add_special_tokens(tokenizer)
    ids = token_ids(tokenizer)
    text_config = part_config("language_model", language_model)
    # Some models have more embedding rows than tokens; the new tokens then use the spare rows.
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    text_config.pad_token_id = ids["pad_token_id"]
    config = LlamaSmopConfig(
        **parts,
        text_config=text_config,
        projector_config=projector,
        modalities=present,
        **ids,
        lora={part: lora_settings(value) for part, value in lora.items()},
        sources=sources,
        **settings,
    )
    return config, tokenizer, feature_extractor
