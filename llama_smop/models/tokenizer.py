"""The special tokens in a tokenizer, the prompts, and a word-level tokenizer for small vocabularies."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llama_smop.models.units import PAD, SPECIAL_TOKEN_FIELDS, SPECIAL_TOKENS

BOS, EOS, UNKNOWN = "<|begin_of_text|>", "<|end_of_text|>", "<unk>"
PROMPTS = {
    "audio": "Transcribe speech to text.",
    "video": "Transcribe video to text.",
    "audiovisual": "Transcribe speech and video to text.",
}


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add `<pad> <audio> </audio> <video> </video>` in the published order; how many were new.

    `<pad>` becomes the padding token.
    """
    return tokenizer.add_special_tokens(
        {"pad_token": PAD, "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != PAD]},
    )


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids that a `LlamaSmopConfig` needs, by its fields' names; the tokenizer has the special tokens."""
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    own = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return dict(zip(SPECIAL_TOKEN_FIELDS, ids, strict=True)) | own


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are `words` (lower-cased, sorted) and those of the prompts, split at white space."""
    vocabulary = {w.lower() for w in words} | {w.lower() for prompt in PROMPTS.values() for w in prompt.split()}
    if any(not w or w.split() != [w] for w in vocabulary):
        raise ValueError("a word must be a string without white space")
    ids = {token: i for i, token in enumerate((BOS, EOS, UNKNOWN, *sorted(vocabulary)))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)
    add_special_tokens(tokenizer)
    return tokenizer
