"""What the generated speakers say: sentences of one word from each slot."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import yaml


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
            if not words or len(set(words)) != len(words):
                raise CorpusError(f"grammar slot {name!r}: expected distinct words, got {list(words)}")
            for word in words:
                if not isinstance(word, str):
                    raise CorpusError(f"grammar slot {name!r}: a word is text, got {word!r} (YAML needs it quoted)")
                if not word or word != word.lower() or not word.replace("'", "").isalpha():
                    raise CorpusError(f"grammar slot {name!r}: a word is lower-case letters, got {word!r}")

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Grammar":
        """Reads YAML: `slots:`, name → list of words, in the order they are said; if need be `spoken:`, respellings."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CorpusError(f"{path}: no grammar in YAML ({' '.join(str(error).split())})") from None
        slots = content.get("slots") if isinstance(content, dict) else None
        if not isinstance(slots, dict) or not all(isinstance(words, list) for words in slots.values()):
            raise CorpusError(f"{path}: expected `slots:` with a list of words each")
        spoken = content.get("spoken") or {}
        if not isinstance(spoken, dict) or set(content) - {"slots", "spoken"}:
            raise CorpusError(f"{path}: expected `slots:` and `spoken:`, a respelling for each word, and nothing else")
        return cls(tuple((str(name), tuple(words)) for name, words in slots.items()), tuple(spoken.items()))

    @property
    def size(self) -> int:
        """How many different sentences there are."""
        return prod(len(words) for _, words in self.slots)

    def sentence(self, number: int) -> tuple[str, ...]:
        """The words of sentence `number`, 0 ≤ number < size."""
        words = []
        for _, choices in reversed(self.slots):
            number, k = divmod(number, len(choices))
            words.append(choices[k])
        return tuple(reversed(words))

    def as_spoken(self, words: Iterable[str]) -> str:
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
