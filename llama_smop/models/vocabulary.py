"""The language model's embeddings, and the CTC heads, which have a row for each token too."""

import torch
from torch import nn


class VocabularyMixin:
    """Before `PreTrainedModel` among the bases of a model with `language_model` and, perhaps, `ctc_heads`."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """transformers' method; the CTC heads follow, and new rows are saved where the language model's are not.

        Raises:
            ValueError: fewer tokens than the special ones need, or embeddings that cannot be resized; nothing changed.
        """
        head, table = self.get_output_embeddings(), self.get_input_embeddings()
        before = len(table.weight)
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            least = 1 + max(self.config.special_token_ids)
            asked = before if new_num_tokens is None else new_num_tokens
            if asked < least:
                raise ValueError(f"the special tokens need a vocabulary of at least {least}, got {asked}")
            if type(table) is not nn.Embedding or type(head) is not nn.Linear:
                raise ValueError(
                    "only a plain embedding and head can be resized, these are "
                    f"{type(table).__name__} and {type(head).__name__}; resize before quantising or adding adapters"
                )
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        after = len(table.weight)
        if after == before:
            return table
        self.language_model.vocab_size = self.language_model.config.vocab_size = after
        for modality, old in self.ctc_heads.items() if self.config.ctc_weight else ():
            self.ctc_heads[modality] = _resized(old, after)
        if "language_model" in self.config.sources:
            first = min(before, after, self.config.first_added_token or before)
            self.config.first_added_token = first if first < after else None
        return table


@torch.no_grad()
def _resized(head: nn.Linear, rows: int) -> nn.Linear:
    """The same head for another number of tokens; new rows start as the mean of the old."""
    new = nn.Linear(head.in_features, rows, device=head.weight.device, dtype=head.weight.dtype)
    new.requires_grad_(head.weight.requires_grad).train(head.training)
    kept = min(rows, head.out_features)
    for own, old in ((new.weight, head.weight), (new.bias, head.bias)):
        own[:kept], own[kept:] = old[:kept], old.mean(0)
    return new
