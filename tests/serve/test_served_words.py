"""Word times in `serve`: over HTTP as OpenAI's clients ask for them, on the page, in the files for download."""

import re
from importlib.util import find_spec
from itertools import pairwise

import pytest

if find_spec("gradio") is None:  # not imported yet: that takes seconds
    pytest.skip("needs gradio", allow_module_level=True)

from llama_smop.cli import main
from llama_smop.models import model_folder
from llama_smop.serve.access import LOOPBACK, Access
from llama_smop.serve.service import Service, Switches
from tests.serve.conftest import site, together

pytestmark = together
URL = "/v1/audio/transcriptions"
SAID = "bin blue now blue"


@pytest.fixture(scope="module")
def timing(model_path, whisper_folder):
    return Service(model_path, longest_s=20, word_times=True, aligner=whisper_folder)


@pytest.fixture(autouse=True)
def _said(monkeypatch):
    """The words of each piece are given."""
    from llama_smop.transcription import pieces

    real = pieces.recognise_batch

    def recognise(*arguments, **given):
        texts, speech = real(*arguments, **given)
        return [SAID] * len(texts), speech

    monkeypatch.setattr(pieces, "recognise_batch", recognise)


@pytest.fixture
def web(timing, shelf):
    return site(timing, shelf, Access(), 200_000, LOOPBACK)


def post(web, path, **fields):
    return web.post(URL, files={"file": ("talk.mp4", path.read_bytes())}, data=fields)


def seconds(clock: str) -> float:
    hours, minutes, rest = clock.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


@pytest.mark.parametrize("key", ["timestamp_granularities[]", "timestamp_granularities"])
@pytest.mark.parametrize("name", ["crop.mp4", "sound.wav"])
def test_verbose_json_has_the_words_where_a_client_asks_for_them(web, timing, files, key, name):
    sent = {"model": timing.name, "response_format": "verbose_json", key: ["word", "segment"]}
    answer = post(web, files[name], **sent)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [word["word"] for word in body["words"]] == body["text"].split() == SAID.split()
    assert all(set(word) == {"word", "start", "end"} for word in body["words"])
    times = [time for word in body["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert body["segments"][0]["start"] <= times[0] and times[-1] <= body["segments"][-1]["end"]
    assert not body["warnings"]


def test_verbose_json_has_no_words_where_nobody_asks_for_them(web, files):
    for asked in ({}, {"timestamp_granularities[]": "segment"}):
        body = post(web, files["sound.wav"], response_format="verbose_json", **asked).json()
        assert "words" not in body and len(body["segments"]) == 1


@pytest.mark.parametrize("wanted", ["json", "text", "srt", "vtt"])
def test_words_in_a_format_that_cannot_hold_them_are_refused(web, files, wanted):
    answer = post(web, files["sound.wav"], response_format=wanted, **{"timestamp_granularities[]": "word"})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": f"word times are in response_format verbose_json, not in {wanted}",
        "type": "invalid_request_error",
        "param": "timestamp_granularities[]",
        "code": None,
    }


def test_a_server_without_word_times_says_how_to_have_them(service, shelf, files):
    plain = site(service, shelf, Access(), 200_000, LOOPBACK)
    answer = post(plain, files["sound.wav"], response_format="verbose_json", **{"timestamp_granularities[]": ["word"]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "--word-times" in error["message"] and error["param"] == "timestamp_granularities[]"


def test_subtitles_begin_and_end_with_words(web, files):
    asked = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    words = post(web, files["sound.wav"], **asked).json()["words"]
    for kind in ("srt", "vtt"):
        text = post(web, files["sound.wav"], response_format=kind).text
        clocks = re.search(r"(\S+) --> (\S+)", text)
        assert seconds(clocks[1]) == pytest.approx(words[0]["start"], abs=1e-3)
        assert seconds(clocks[2]) == pytest.approx(max(words[-1]["end"], words[0]["start"] + 0.2), abs=1e-3)


def test_on_the_page_each_word_plays_itself_and_the_json_has_it(web, timing, files, shelf):
    from llama_smop.serve import page

    folder = shelf.new()
    outcome = timing.run(files["crop.mp4"], "talk.mp4", Switches(), views=True)
    shown = page.show(outcome, timing, files["crop.mp4"], folder)
    (piece,) = outcome.transcript.pieces
    spans = re.findall(r'<span class="word" data-seek="([\d.]+)" data-until="([\d.]+)">(\w+)</span>', shown)
    assert spans == [(f"{word.start:.3f}", f"{word.end:.3f}", word.word) for word in piece.words]
    assert [word for _, _, word in spans] == SAID.split()
    (kept,) = web.get(f"/results/{folder.name}/transcript.json").json()["pieces"]
    assert [word["word"] for word in kept["words"]] == SAID.split()
    assert all(a["end"] <= b["start"] for a, b in pairwise(kept["words"]))


def test_where_only_lips_were_read_it_is_said_that_words_have_no_times(web, files):
    asked = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    body = post(web, files["silent.mp4"], **asked).json()
    assert body["text"] == SAID and body["words"] == []
    assert [line for line in body["warnings"] if "words have no times where only lips were read" in line]


def test_the_whisper_that_the_model_records_is_taken(model_path, whisper_folder, tmp_path, files):
    model, processor = model_folder.load(model_path)
    model.config.sources["audio_tower"] = str(whisper_folder)
    folder = model_folder.save(model, processor, tmp_path / "model")
    assert Service(folder, word_times=True).run(files["sound.wav"], "a", Switches()).transcript.pieces[0].words


def test_a_model_that_records_no_whisper_is_one_line(model_path):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", str(model_path), "--port", "0", "--word-times"])
    assert "name one with --aligner" in str(ended.value.code) and "\n" not in str(ended.value.code)
