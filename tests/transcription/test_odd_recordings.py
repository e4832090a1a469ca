"""What becomes of recordings that are damaged, uneven, or show a face that is hard to read: text, a warning, or a line.

Other cases: no face, a face that leaves, no sound, no picture: test_recording.py, test_transcribe.py; two faces of
which one speaks: tests/data/faces/test_speaker.py.
"""

import numpy as np
import pytest

from llama_smop.data.media import MediaError, write_video
from llama_smop.data.video_writer import write_frames
from llama_smop.transcription.attempts import attempts
from llama_smop.transcription.recording import Options
from tests.data.faces.planted import track
from tests.transcription.test_recording import _by_energy, grey, loud, pair, pieces, planted, told  # noqa: F401


def damaged(path, how: str):
    write_video(path, grey(40), audio=loud((1.6, 0.1)))
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "one byte": b"\0", "text": b"no film at all", "half": content[: len(content) // 2]}[how]
    )
    return path


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("empty", "the file is empty"),
        ("one byte", "cannot be opened, it is truncated or not a media file"),
        ("text", "cannot be opened, it is truncated or not a media file"),
        ("half", "truncated"),
    ],
)
@pytest.mark.parametrize("modality", [None, "audio", "video"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, pair, told, how, reason, modality):  # noqa: F811
    (found,) = attempts([damaged(tmp_path / "a.mp4", how)], *pair, Options(modality=modality))
    assert isinstance(found, MediaError)
    told_line = str(found)
    assert told_line.startswith(f"{tmp_path}/a.mp4: ") and reason in told_line and "\n" not in told_line
    assert not told


def test_sound_that_goes_on_after_the_picture_is_read_alone(tmp_path, pair, told, monkeypatch):  # noqa: F811
    write_frames(tmp_path / "a.mp4", iter(grey(45)), sound=[loud((3.4, 0.1))])
    planted(monkeypatch, [track(0, [3.0] * 45)], 45)
    found, parts = pieces(tmp_path / "a.mp4", pair)
    assert [(p.start, p.modality) for p in parts] == [(0.0, "audiovisual"), (1.8, "audio")]
    assert told[0] == (1.8, 45) and told[1][1] is None
    assert found.seconds == pytest.approx(3.4, abs=0.1)


def test_a_picture_that_goes_on_after_the_sound_is_read_where_there_is_speech(tmp_path, pair, told, monkeypatch):  # noqa: F811
    write_frames(tmp_path / "a.mp4", iter(grey(90)), sound=[loud((1.6, 0.1))])
    planted(monkeypatch, [track(0, [3.0] * 90)], 90)
    found, parts = pieces(tmp_path / "a.mp4", pair)
    assert [p.modality for p in parts] == ["audiovisual"] and parts[0].end < 2.2
    assert found.seconds == pytest.approx(3.6, abs=0.1)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("small", "face 0: the face is small: a mouth of 14 pixels, and 22 are needed"),
        ("dark", "face 0: the face is dark: grey value 20 of 255"),
        ("aside", "face 0: the face is seen from the side"),
    ],
)
def test_a_face_that_is_hard_to_read_is_read_with_a_warning(tmp_path, pair, told, monkeypatch, change, line):  # noqa: F811
    from llama_smop.data.faces.geometry import PLACE

    write_video(tmp_path / "a.mp4", grey(60), audio=loud((2.4, 0.1)))
    face = track(0, [3.0] * 60)
    for points in face.points:
        if change == "small":
            points *= 0.3
        if change == "aside":
            points[PLACE[2]] += (40, 0)
    if change == "dark":
        face.brightness = [20.0] * 60
    planted(monkeypatch, [face], 60)
    found, parts = pieces(tmp_path / "a.mp4", pair)
    assert found.warnings == [line]
    assert [p.modality for p in parts] == ["audiovisual"] and np.shape(parts[0].box) == (4,)
