"""One job: odd files get a line that helps, switches change what they say and nothing else, jobs wait their turn."""

import json
import threading
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("gradio") is None:  # not imported yet: that takes seconds
    pytest.skip("needs gradio", allow_module_level=True)

from llama_smop.serve.service import STOPPED_AT_ONCE, Refused, Service, Switches
from tests.data.faces.packages import needs_face_models
from tests.serve.conftest import together

pytestmark = together


def refusal(service, path, name=None, **switches) -> str:
    with pytest.raises(Refused) as caught:
        service.run(path, name or path.name, Switches(**switches))
    return str(caught.value)


def test_a_recording_that_was_stopped_at_once_says_so(service, files):
    assert refusal(service, files["one-byte.webm"]) == STOPPED_AT_ONCE


@pytest.mark.parametrize("name", ["text.mp4", "truncated.mp4"])
def test_a_file_that_is_no_recording_is_named_as_its_visitor_knows_it(service, files, name):
    line = refusal(service, files[name], "holiday.mp4")
    assert line.startswith("holiday.mp4: ") and str(files[name].parent) not in line and "\n" not in line


def test_a_recording_that_is_too_long_is_refused(model_path, files):
    assert "longer than" in refusal(Service(model_path, longest_s=0.5), files["crop.mp4"])


def test_a_sense_that_the_recording_lacks_is_named(service, files):
    assert "has no picture" in refusal(service, files["sound.wav"], modality="video")


@pytest.mark.parametrize(
    "switches", [{"snr": 99.0}, {"snr": float("nan")}, {"blur": -1.0}, {"face": "left"}, {"modality": "smell"}]
)
def test_a_switch_out_of_bounds_is_named(switches):
    with pytest.raises(Refused) as caught:
        Switches(**switches)
    assert caught.value.field in switches and caught.value.field in str(caught.value)


def test_a_silent_film_is_read_from_the_lips_and_a_sound_file_is_heard(service, files):
    assert list(service.run(files["silent.mp4"], "a", Switches()).transcripts) == ["video"]
    assert list(service.run(files["sound.wav"], "a", Switches()).transcripts) == ["audio"]


@needs_face_models
def test_without_a_face_the_sound_is_used_and_that_is_said(service, files):
    outcome = service.run(files["faceless.mp4"], "a", Switches(compare=True))
    assert list(outcome.transcripts) == ["audio"]
    assert any("no face" in line for line in outcome.transcript.warnings)


def test_comparing_gives_both_senses_first_and_then_each_alone(service, files):
    outcome = service.run(files["crop.mp4"], "a", Switches(compare=True))
    assert list(outcome.transcripts) == ["audiovisual", "audio", "video"]
    for modality, transcript in outcome.transcripts.items():
        assert {piece.modality for piece in transcript.pieces} == {modality}
        alone = service.run(files["crop.mp4"], "a", Switches(modality))
        assert alone.transcript.text == transcript.text, "the same as when it is asked for by itself"


def given(service, path, **switches):
    ((_, found),) = service.run(path, "a", Switches(**switches), views=True).parts
    return found


def test_babble_is_as_loud_as_asked_and_leaves_the_lips_alone(service, files):
    clean, noisy = given(service, files["crop.mp4"]), given(service, files["crop.mp4"], snr=5.0)
    added = noisy.heard - clean.heard
    ratio = 10 * np.log10(np.square(clean.heard).sum() / np.square(added).sum())
    assert ratio == pytest.approx(5.0, abs=0.01)
    assert np.array_equal(clean.seen, noisy.seen)
    again = given(service, files["crop.mp4"], snr=5.0)
    assert np.array_equal(noisy.heard, again.heard), "the same switches give the same noise"


def test_blur_smooths_the_mouth_and_leaves_the_sound_alone(service, files):
    sharp, soft = given(service, files["crop.mp4"]), given(service, files["crop.mp4"], blur=4.0)
    edges = [np.abs(np.diff(x.seen.astype(float), axis=2)).mean() for x in (sharp, soft)]
    assert edges[1] < 0.5 * edges[0]
    assert np.array_equal(sharp.heard, soft.heard)


def test_every_token_shares_itself_out_over_experts_of_its_own_sense(service, files):
    experts = service.run(files["crop.mp4"], "a", Switches(), views=True).experts
    assert [e.stream for e in experts] == ["audio", "video"]
    for times, others in zip(experts, (slice(4, 8), slice(0, 4)), strict=True):
        assert np.allclose(times.weights.sum(axis=0), 1, atol=1e-5)
        assert not times.weights[others].any(), "DEDR: a sense has experts of its own"
        assert ((times.weights > 0).sum(axis=0) <= 2).all(), "two are chosen"


def test_the_json_tells_what_was_asked_for_and_nothing_of_this_machine(service, files):
    text = service.run(files["crop.mp4"], "../../secret/talk.mp4", Switches(snr=0.0)).as_json(service.name)
    content = json.loads(text)
    assert content["file"] == "talk.mp4" and content["model"] == "tiny-model" and content["switches"]["snr"] == 0.0
    assert str(files["crop.mp4"].parent) not in text


def test_one_job_waits_for_the_other(service, files):
    holding, go = threading.Event(), threading.Event()

    def first(what, done, total):
        holding.set()
        assert go.wait(30)

    done = []
    jobs = [
        threading.Thread(target=lambda: done.append(service.run(files["sound.wav"], "1", Switches(), progress=first))),
        threading.Thread(target=lambda: done.append(service.run(files["sound.wav"], "2", Switches()))),
    ]
    jobs[0].start()
    assert holding.wait(30)
    jobs[1].start()
    jobs[1].join(0.3)
    assert not done, "the second began while the first was at work"
    go.set()
    for job in jobs:
        job.join(30)
    assert [outcome.name for outcome in done] == ["1", "2"]
