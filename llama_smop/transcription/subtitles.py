"""Transcripts as subtitles: SRT and WebVTT, cues of at most two lines of 42 characters, in order, never overlapping."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

LINE = 42  # characters
LINES = 2
SHORTEST_S = 0.2  # of a cue


@dataclass(frozen=True)
class Cue:
    """One subtitle: its times in seconds and its lines."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(pieces: Iterable[tuple[float, float, str]]) -> list[Cue]:
    """Cues of (start, end, text) in order; a piece's time is shared out by letters."""
    found: list[Cue] = []
    for start, end, text in pieces:
        lines = textwrap.wrap(" ".join(text.split()), LINE)
        letters = sum(map(len, lines))
        said = 0
        for first in range(0, len(lines), LINES):
            block = tuple(lines[first : first + LINES])
            begin = start + (end - start) * said / letters
            said += sum(map(len, block))
            begin = max(begin, found[-1].end if found else 0.0)
            until = max(start + (end - start) * said / letters, begin + SHORTEST_S)
            found.append(Cue(begin, until, block))
    return found


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
