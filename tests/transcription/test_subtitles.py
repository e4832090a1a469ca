"""Subtitles, read back strictly: in order, never overlapping, at most two lines of 42 characters."""

import re

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop.transcription.subtitles import cues, srt, vtt
from llama_smop.transcription.word_times import Word

PIECES = [
    (0.5, 4.0, "place blue in y two now"),
    (4.5, 4.6, "yes"),
    (4.55, 20.0, " ".join(["somewhat longer words"] * 12)),
    (3700.25, 3701.0, "a <b> & c"),
    (3701.0, 3702.0, ""),
]
SRT_TIME = r"(\d\d):(\d\d):(\d\d),(\d{3})"
VTT_TIME = r"(\d\d):(\d\d):(\d\d)\.(\d{3})"


def seconds(*parts: str) -> float:
    hours, minutes, whole, thousandths = map(int, parts)
    assert minutes < 60 and whole < 60
    return hours * 3600 + minutes * 60 + whole + thousandths / 1000


def read(text: str, time: str, numbered: bool) -> list[tuple[float, float, list[str]]]:
    """A strict reader: every line has its place."""
    found = []
    for number, block in enumerate(re.split(r"\n\n", text.removesuffix("\n")), 1):
        lines = block.split("\n")
        if numbered:
            assert lines.pop(0) == str(number)
        match = re.fullmatch(f"{time} --> {time}", lines.pop(0))
        assert match
        assert lines and all(lines)
        found.append((seconds(*match.groups()[:4]), seconds(*match.groups()[4:]), lines))
    return found


def assert_readable(shown, texts) -> None:
    end = 0.0
    for start, stop, lines in shown:
        assert end <= start < stop, "in order, and one at a time"
        assert len(lines) <= 2 and all(len(line) <= 42 for line in lines)
        end = stop
    assert " ".join(word for _, _, lines in shown for word in lines) == " ".join(" ".join(texts).split())


def test_srt_is_read_back():
    shown = read(srt(cues(PIECES)), SRT_TIME, numbered=True)
    assert_readable(shown, [text for _, _, text in PIECES])
    assert shown[0] == (0.5, 4.0, ["place blue in y two now"])
    assert shown[-1] == (3700.25, 3701.0, ["a <b> & c"])
    assert len(shown) == 2 + 4 + 1


def test_vtt_is_read_back_with_its_header_and_escapes():
    head, _, body = vtt(cues(PIECES)).partition("\n\n")
    assert head == "WEBVTT"
    shown = read(body, VTT_TIME, numbered=False)
    assert_readable(shown[:-1], [text for _, _, text in PIECES[:3]])
    assert shown[-1] == (3700.25, 3701.0, ["a &lt;b&gt; &amp; c"])


@pytest.mark.parametrize(("kind", "write"), [("srt", srt), ("vtt", vtt)])
def test_ffmpeg_reads_the_same_cues(tmp_path, kind, write):
    path = tmp_path / f"a.{kind}"
    path.write_text(write(cues(PIECES)), encoding="utf-8")
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(file.streams.subtitles[0]) if packet.size]
        times = [tuple(int(x * p.time_base * 1000) for x in (p.pts, p.pts + p.duration)) for p in packets]
        texts = [subtitle.ass.decode().split(",", 8)[8] for packet in packets for subtitle in packet.decode()]
    assert times == [(round(cue.start * 1000), round(cue.end * 1000)) for cue in cues(PIECES)]
    assert texts[:-1] == ["\\N".join(cue.lines) for cue in cues(PIECES)[:-1]]
    assert kind == "srt" or texts[-1] == "a <b> & c", "in SRT some readers take this for a tag"


def test_other_peoples_readers_agree():
    pysubs2 = pytest.importorskip("pysubs2")
    for form, text in (("srt", srt(cues(PIECES))), ("vtt", vtt(cues(PIECES)))):
        events = pysubs2.SSAFile.from_string(text, format_=form).events
        assert [(e.start, e.end) for e in events] == [
            (round(cue.start * 1000), round(cue.end * 1000)) for cue in cues(PIECES)
        ]


def test_nothing_said_is_an_empty_file_of_its_kind():
    assert srt(cues([(0, 1, "")])) == ""
    assert vtt([]) == "WEBVTT\n"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 8), st.lists(st.text("abcdefgh", min_size=1, max_size=42), max_size=40)), max_size=8
    )
)
def test_any_pieces_give_readable_cues(pieces):
    at, spoken = 0.0, []
    for length, words in pieces:
        spoken.append((at, at + length, " ".join(words)))
        at += length
    shown = cues(spoken)
    assert_readable([(c.start, c.end, list(c.lines)) for c in shown], [text for *_, text in spoken])
    if shown:
        read(srt(shown), SRT_TIME, numbered=True)


def test_with_word_times_cues_begin_and_end_with_their_words():
    words = [Word(f"word{i:02d}", i, i + 0.8) for i in range(20)] + [Word("later", 25.0, 25.5)]
    shown = cues([(0.0, 30.0, " ".join(w.word for w in words), words), (30.0, 31.0, "untimed")])
    times = {w.word: w for w in words}
    for cue in shown[:-1]:
        said = " ".join(cue.lines).split()
        assert (cue.start, cue.end) == (times[said[0]].start, times[said[-1]].end)
    assert [c.lines for c in shown[-2:]] == [("later",), ("untimed",)], "a pause ends a cue"
    assert_readable([(c.start, c.end, list(c.lines)) for c in shown], [" ".join(times), "untimed"])


def test_a_word_longer_than_a_cue_is_shown_whole():
    shown = cues([(0.0, 3.0, "", [Word("a" * 100, 0.0, 3.0), Word("b", 3.0, 3.1)])])
    assert "".join(line for cue in shown for line in cue.lines) == "a" * 100 + "b"
    assert all(len(cue.lines) <= 2 for cue in shown)
