"""Who speaks, on planted tracks."""

import numpy as np
import pytest

pytest.importorskip("cv2")

from llama_smop.data.faces.speaker import choose, mouth_opening, sound_envelope
from tests.data.faces.planted import face, syllables, track


def test_an_opening_is_measured_in_distances_of_the_eyes():
    points = np.stack([face(0.0), face(20.0), 3 * face(20.0)])
    assert mouth_opening(points) == pytest.approx([0, 20 / 74.16, 20 / 74.16], rel=1e-3)


def test_the_envelope_follows_the_sound():
    samples = np.repeat([0.0, 0.5, 0.05], 640).astype(np.float32)
    quiet, loud, middle, beyond = sound_envelope(samples, 4)
    assert quiet == beyond < middle < loud


@pytest.mark.parametrize("lag", [-6, 0, 6])
def test_the_face_that_moves_with_the_sound_speaks_though_another_is_larger_and_livelier(lag):
    said = syllables(100, 3.1)
    speaker = track(0, 12 * np.roll(said, lag))
    chewing = track(0, 14 * syllables(100, 1.7), size=300)
    assert choose([chewing, speaker], 0, 100, said) == 1
    assert choose([speaker, chewing], 0, 100, said) == 0


def test_without_sound_the_mouth_that_moves_speaks():
    assert choose([track(0, [3.0] * 60, size=300), track(0, 10 * syllables(60, 3))], 0, 60, None) == 1


def test_of_speakers_one_after_the_other_each_has_its_part():
    said = syllables(100, 3.1)
    early = np.where(np.arange(100) < 50, said, 0)
    faces = [track(0, 12 * early), track(0, 12 * (said - early))]
    assert choose(faces, 0, 50, said) == 0
    assert choose(faces, 50, 100, said) == 1


def test_the_largest_or_a_number_is_taken_when_asked_for():
    said = syllables(60, 3)
    faces = [track(0, 10 * said), track(0, [1.0] * 60, size=300), track(200, [1.0] * 40)]
    assert choose(faces, 0, 60, said, "largest") == 1
    assert choose(faces, 0, 60, said, 1) == 1
    assert choose(faces, 0, 60, said, 2) is None, "that face is not there then"
    with pytest.raises(ValueError, match="there is no face 3: 3 were found, counted from 0"):
        choose(faces, 0, 60, said, 3)
    with pytest.raises(ValueError, match="got 'tallest'"):
        choose(faces, 0, 60, said, "tallest")


def test_where_no_face_is_there_is_none_to_choose():
    assert choose([track(100, [1.0] * 50)], 0, 60, None) is None
    assert choose([], 0, 60, None) is None
