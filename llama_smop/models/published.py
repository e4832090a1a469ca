"""The recipe's models at their published sizes, made without their weights."""

from transformers import LlamaConfig

from llama_smop.models.configuration_llama_smop import LLAMA_3_2_1B, LlamaSmopConfig
from llama_smop.models.lora import PRESETS, lora_settings

PUBLISHED = {
    "llama-3.2-1b": {},
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


def published(language_model: str = "llama-3.2-1b") -> LlamaSmopConfig:
    """The recipe's model with one of the three language models: Whisper medium, AV-HuBERT Large, DEDR E 4 K 2, LoRA.

    Raises:
        ValueError: a name that is not of `PUBLISHED`.
    """
    if language_model not in PUBLISHED:
        raise ValueError(f"unknown language model {language_model!r}; known: {', '.join(PUBLISHED)}")
    return LlamaSmopConfig(
        text_config=LlamaConfig(**LLAMA_3_2_1B | PUBLISHED[language_model]),
        lora={"language_model": lora_settings(PRESETS[language_model])},
    )
