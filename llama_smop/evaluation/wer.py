"""Word error rate as the recipe counts it: Σ word edit distance / Σ words, lower-cased, split on white space."""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

from llama_smop.data.synthetic.grammar import Grammar


@dataclass(frozen=True)
class WordErrors:
    """Counts over a set of clips; `wer` is a fraction (0.05 is 5 %)."""

    words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        return self.errors / self.words


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Word errors of `hypotheses` against `references`, clip by clip.

    Raises:
        ValueError: unequal numbers of texts, or no reference word at all.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"expected one hypothesis for each of {len(references)} references, got {len(hypotheses)}")
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    if not any(r for r, _ in pairs):
        raise ValueError("the references hold no word, so a word error rate is undefined")
    spoken = [(r, h) for r, h in pairs if r]
    counts = jiwer.process_words([r for r, _ in spoken], [h for _, h in spoken])
    # jiwer takes no empty reference: all words that are found in a silent clip are insertions.
    heard_in_silence = sum(len(h.split()) for r, h in pairs if not r)
    return WordErrors(
        words=counts.hits + counts.substitutions + counts.deletions,
        substitutions=counts.substitutions,
        deletions=counts.deletions,
        insertions=counts.insertions + heard_in_silence,
    )


def snr_order(snr: float | None) -> tuple[bool, float]:
    """Sort key of noise ratios: clean (None) first, then from quiet noise to loud."""
    return snr is not None, -(snr or 0)


def snr_label(snr: float | None) -> str:
    return "clean" if snr is None else f"{snr:g} dB"


def per_cent(wer: float) -> str:
    """A rate in per cent: one decimal, two below 10 %, as published numbers are given."""
    return f"{100 * wer:.{1 if wer >= 0.1 else 2}f}"


def guess_per_slot(grammar: Grammar) -> float:
    """Expected word error rate of a word drawn at random in each slot of the grammar."""
    return 1 - sum(1 / len(words) for _, words in grammar.slots) / len(grammar.slots)
