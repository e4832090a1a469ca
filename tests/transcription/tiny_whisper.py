"""An untrained Whisper in a folder, with the tokenizer and the decoder that word times need."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperForConditionalGeneration

WORDS = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "bin", "blue", "now", "?"]


def save_whisper(folder: Path, whisper, tokenizer) -> Path:
    whisper.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=whisper.config.num_mel_bins, chunk_length=30).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_whisper(folder: Path, model) -> Path:
    """Its encoder is the audio tower of `model`, which hears 4 s."""
    torch.manual_seed(1)
    whisper = WhisperForConditionalGeneration(model.config.audio_config)
    whisper.model.encoder.load_state_dict(model.audio_tower.state_dict())
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True)), unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_whisper(folder, whisper, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?"))
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace('"chunk_length": 30', '"chunk_length": 4'))
    return folder
