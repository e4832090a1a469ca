"""Transcripts as subtitles: SRT and WebVTT, cues of at most two lines of 42 characters, in order, never overlapping."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llama_smop.transcription.word_times import Word

LINE = 42  # characters
LINES = 2
SHORTEST_S = 0.2  # of a cue
PAUSE_S = 1.0  # between two words that do not share a cue


@dataclass(frozen=True)
class Cue:
    """One subtitle: its times in seconds and its lines."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(pieces: Iterable[tuple]) -> list[Cue]:
    """Cues of (start, end, text) or (start, end, text, words or None), in order.

    With words a cue lasts from its first word to its last, and a pause ends it. Without, a piece's time is shared out
    by letters.
    """
    found: list[Cue] = []
    for start, end, text, *words in pieces:
        timed = _by_words(words[0]) if words and words[0] is not None else _by_letters(start, end, text)
        for begin, until, lines in timed:
            begin = max(begin, found[-1].end if found else 0.0)
            found.append(Cue(begin, max(until, begin + SHORTEST_S), lines))
    return found


def _by_letters(start: float, end: float, text: str) -> Iterator[tuple[float, float, tuple[str, ...]]]:
    lines = textwrap.wrap(" ".join(text.split()), LINE)
    letters = sum(map(len, lines))
    said = 0
    for first in range(0, len(lines), LINES):
        block = tuple(lines[first : first + LINES])
        begin = start + (end - start) * said / letters
        said += sum(map(len, block))
        yield begin, start + (end - start) * said / letters, block


def _by_words(words: Sequence[Word]) -> Iterator[tuple[float, float, tuple[str, ...]]]:
    block: list[Word] = []
    for word in words:
        fits = len(textwrap.wrap(_text([*block, word]), LINE)) <= LINES
        if block and (not fits or word.start - block[-1].end >= PAUSE_S):
            yield from _by_letters(block[0].start, block[-1].end, _text(block))
            block = []
        block.append(word)
    if block:  # more than one cue where a single word is longer than one
        yield from _by_letters(block[0].start, block[-1].end, _text(block))


def _text(words: Sequence[Word]) -> str:
    return " ".join(word.word for word in words)


def srt(cues: Iterable[Cue]) -> str:
    """SubRip text."""
    blocks = (
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n" + "\n".join(cue.lines) + "\n"
        for number, cue in enumerate(cues, 1)
    )
    return "\n".join(blocks)


def vtt(cues: Iterable[Cue]) -> str:
    """WebVTT text."""
    escaped = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
    blocks = (
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n" + "\n".join(cue.lines).translate(escaped) + "\n"
        for cue in cues
    )
    return "\n".join(["WEBVTT\n", *blocks])


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"
