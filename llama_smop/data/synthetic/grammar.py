"""The sentences of the generated speakers: one word from each slot."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from llama_smop.system.read_yaml import read_yaml


class CorpusError(ValueError):
    """The corpus cannot be made as asked."""


@dataclass(frozen=True)
class Grammar:
    """Sentences are one word from each slot in turn; `spoken` respells what espeak-ng would misread."""

    slots: tuple[tuple[str, tuple[str, ...]], ...]
    spoken: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if not self.slots:
            raise CorpusError("a grammar needs at least one slot of words")
        for name, words in self.slots:
            for word in words:
                if not isinstance(word, str):
                    raise CorpusError(f"grammar slot {name!r}: a word is text, got {word!r} (YAML needs it quoted)")
            if not words or len(set(words)) != len(words):
                raise CorpusError(f"grammar slot {name!r}: expected distinct words, got {list(words)}")
            for word in words:
                if not word or word != word.lower() or not word.replace("'", "").isalpha():
                    raise CorpusError(f"grammar slot {name!r}: a word is lower-case letters, got {word!r}")

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Grammar":
        """Reads YAML: `slots:`, name → list of words, in the order they are said; if need be `spoken:`, respellings."""
        try:
            content = read_yaml(path)
        except ValueError as error:
            raise CorpusError(str(error)) from None
        slots = content.get("slots") if isinstance(content, dict) else None
        if not isinstance(slots, dict) or not all(isinstance(words, list) for words in slots.values()):
            raise CorpusError(f"{path}: expected `slots:` with a list of words each")
        spoken = content.get("spoken") or {}
        if not isinstance(spoken, dict) or set(content) - {"slots", "spoken"}:
            raise CorpusError(f"{path}: expected `slots:` and `spoken:`, a respelling for each word, and nothing else")
        if not all(isinstance(text, str) and text for pair in spoken.items() for text in pair):
            raise CorpusError(f"{path}: `spoken:` respells words as text, got {spoken} (YAML needs it quoted)")
        try:
            return cls(tuple((str(name), tuple(words)) for name, words in slots.items()), tuple(spoken.items()))
        except CorpusError as error:
            raise CorpusError(f"{path}: {error}") from None

    @property
    def size(self) -> int:
        """The number of different sentences."""
        return prod(len(words) for _, words in self.slots)

    def sentence(self, number: int) -> tuple[str, ...]:
        """The words of sentence `number`, 0 ≤ number < size."""
        words = []
        for _, choices in reversed(self.slots):
            number, k = divmod(number, len(choices))
            words.append(choices[k])
        return tuple(reversed(words))

    def as_spoken(self, words: Iterable[str]) -> str:
        """The sentence as espeak-ng is given it, with the respellings."""
        respelt = dict(self.spoken)
        return " ".join(respelt.get(word, word) for word in words)


# GRID has 25 letters, most of which rhyme with "b" or "a"; these twelve sound and look different.
GRID = Grammar(
    slots=(
        ("command", ("bin", "lay", "place", "set")),
        ("colour", ("blue", "green", "red", "white")),
        ("preposition", ("at", "by", "in", "with")),
        ("letter", tuple("aefhilmoqrwx")),
        ("digit", ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")),
        ("adverb", ("again", "now", "please", "soon")),
    ),
    spoken=(("a", "eigh"),),  # espeak-ng says "a" as a schwa, and "ay" as "eye"
)
