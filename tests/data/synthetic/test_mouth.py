import numpy as np
import pytest

from llama_smop.data.synthetic.articulation import PARAMETERS, articulation, visemes
from llama_smop.data.synthetic.corpus import UNSEEN_VOICES, VOICES
from llama_smop.data.synthetic.face import draw_face
from llama_smop.data.synthetic.mouth import render
from llama_smop.data.synthetic.speech import Segment, speak
from llama_smop.models.units import VIDEO_RATE

COLUMN = {name: i for i, name in enumerate(PARAMETERS)}


def track(*phonemes, each=0.12):
    return tuple(Segment(name, i * each, (i + 1) * each) for i, name in enumerate(phonemes))


def held(phoneme):
    """What the mouth does in the middle of a long sound."""
    return articulation((Segment(phoneme, 0.4, 0.8),), 30)[15]


def test_stress_and_length_marks_do_not_matter():
    assert visemes("'u:") == visemes("u") == visemes(",u:")
    assert visemes("t#") == visemes("t")
    assert visemes("I2") == visemes("I")
    assert len(visemes("'aU")) == 2 and visemes("tS") == ("postalveolar",)


def test_every_phoneme_of_ordinary_english_has_a_viseme():
    text = "the quick brown fox jumps over a lazy dog while five boys measure thin ice near our pure air and hear oil"
    unknown = {p.name for p in speak(text).phonemes if p.name != "_" and visemes(p.name) == ("schwa",)}
    assert all("@" in name or name in ("a#", "I#", "-") for name in unknown), unknown


@pytest.mark.parametrize("stop", ["p", "b", "m"])
def test_lips_close_for_bilabials_even_between_open_vowels(stop):
    mouth = articulation(track("a", stop, "A:"), 20)
    assert mouth[:, COLUMN["open"]].min() < 0.15
    assert mouth[:, COLUMN["open"]].max() > 0.6


def test_each_kind_of_sound_shows():
    assert held("'u:")[COLUMN["round"]] > 0.8 > 0.2 > held("'i:")[COLUMN["round"]]
    assert held("'i:")[COLUMN["spread"]] > 0.8
    assert held("A:")[COLUMN["jaw"]] > 0.8 > 0.3 > held("s")[COLUMN["jaw"]]
    assert held("f")[COLUMN["tuck"]] > 0.8 and held("v")[COLUMN["tuck"]] > 0.8
    assert held("T")[COLUMN["tongue"]] > 0.8
    assert np.abs(held("s") - held("z")).max() < 1e-6


def test_rounding_spreads_to_neighbouring_consonants():
    before_u, before_i = (articulation(track("s", vowel), 10)[1, COLUMN["round"]] for vowel in ("u:", "i:"))
    assert before_u > before_i + 0.2


def test_the_mouth_rests_before_and_after_and_never_jumps():
    speech = speak("set white with f seven now")
    count = int(speech.phonemes[-1].end * VIDEO_RATE) + 20
    mouth = articulation(speech.phonemes, count, offset=0.3)
    assert mouth[:4].max() < 0.05 and mouth[-4:].max() < 0.05
    assert mouth.min() >= 0 and mouth.max() <= 1
    # 25 frames a second are too few to be smooth; at a tenth of the speed nothing may jump.
    slow = tuple(Segment(p.name, 10 * p.start, 10 * p.end) for p in speech.phonemes)
    fine = articulation(slow, 10 * count)
    assert np.isfinite(fine).all()


def test_rendering_is_a_function_of_its_arguments():
    mouth = articulation(track("m", "A:", "u:"), 8)
    frames = render(mouth, VOICES[0].face, seed=1)
    assert frames.shape == (8, 96, 96, 3) and frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, render(mouth, VOICES[0].face, seed=1))
    assert not np.array_equal(frames, render(mouth, VOICES[0].face, seed=2))
    assert not np.array_equal(frames, render(mouth, VOICES[1].face, seed=1))


def test_lips_can_be_read_across_faces():
    """The nearest picture on another face, after taking away that face at rest, is mostly of the same sound."""
    sounds = ["m", "f", "A:", "u:", "i:", "T", "E", "O:", "s"]
    poses = np.stack([held("_")] + [held(sound) for sound in sounds])
    pictures = []
    for voice in VOICES + UNSEEN_VOICES:
        grey = render(poses, voice.face, seed=5)[:, 24:80, 16:80].astype(float).mean(axis=-1)
        change = (grey[1:] - grey[0]).reshape(len(sounds), -1)
        pictures.append(change / np.linalg.norm(change, axis=1, keepdims=True))
    right = total = 0
    for i, own in enumerate(pictures):
        for j, other in enumerate(pictures):
            if i != j:
                right += ((own @ other.T).argmax(axis=1) == np.arange(len(sounds))).sum()
                total += len(sounds)
    assert right / total > 0.8, f"only {right} of {total} mouth shapes are told apart"


def test_faces_differ():
    faces = [voice.face for voice in VOICES + UNSEEN_VOICES]
    assert len({face.skin for face in faces}) >= 5
    assert len({(face.skin, face.wall, face.light) for face in faces}) == len(faces)
    assert draw_face(3) == draw_face(3) != draw_face(9)


def test_all_skin_shows_its_lips():
    """Lips and skin must differ in grey, or a recogniser that sees grey cannot read them."""
    poses = np.stack([held("_"), held("A:")])
    for voice in VOICES + UNSEEN_VOICES:
        closed, opened = render(poses, voice.face, seed=0).astype(float).mean(axis=-1)
        assert np.abs(closed - opened)[40:75, 30:66].mean() > 4, voice.name
