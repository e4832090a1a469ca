"""Transcripts as subtitles: SRT and WebVTT, cues of at most two lines of 42 characters, in order, never overlapping."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINE = 42  # characters
LINES = 2
SHORTEST_S = 0.2  # of a cue


@dataclass(frozen=True)
class Word:
    """A word and its times in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Cue:
    """One subtitle: its times in seconds and its lines."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(pieces: Iterable[tuple[float, float, str, Sequence[Word] | None]]) -> list[Cue]:
    """Cues of (start, end, text, words or None) in order; without words a piece's time is shared out."""
    found: list[Cue] = []
    for start, end, text, words in pieces:
        lines = textwrap.wrap(" ".join(text.split()), LINE)
        blocks = [lines[i : i + LINES] for i in range(0, len(lines), LINES)]
        spoken = list(words or ())
        if len(spoken) != len(text.split()):
            spoken = _spread(text.split(), start, end)
        for block in blocks:
            count = sum(len(line.split()) for line in block)
            said, spoken = spoken[:count], spoken[count:]
            earliest = found[-1].end if found else 0.0
            first = max(said[0].start, earliest)
            found.append(Cue(first, max(said[-1].end, first + SHORTEST_S), tuple(block)))
    return found


def _spread(words: Sequence[str], start: float, end: float) -> list[Word]:
    """Words in equal measure a letter."""
    letters = sum(len(word) + 1 for word in words)
    at, spread = start, []
    for word in words:
        until = at + (end - start) * (len(word) + 1) / letters
        spread.append(Word(word, at, until))
        at = until
    return spread


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
