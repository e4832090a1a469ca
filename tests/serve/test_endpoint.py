"""The endpoint speaks as OpenAI's does: formats, errors, tokens; it takes only so much, and leaves nothing behind."""

import asyncio
import json
import re
import threading
import zlib
from importlib.util import find_spec

import pytest

if find_spec("gradio") is None:  # not imported yet: that takes seconds
    pytest.skip("needs gradio", allow_module_level=True)

from llama_smop.serve import endpoint
from llama_smop.serve.access import LOOPBACK, ROOM, Access, Guard, TooLarge
from llama_smop.serve.shelf import Shelf
from tests.serve.conftest import site, together

pytestmark = together
URL = "/v1/audio/transcriptions"
MOST = 200_000


def client(service, shelf, auth=None, most=MOST):
    return site(service, shelf, Access(auth), most, LOOPBACK)


def post(to, path, name="talk.mp4", headers=None, **fields):
    return to.post(URL, files={"file": (name, path.read_bytes())}, data=fields, headers=headers or {})


@pytest.fixture(scope="module")
def shelf():
    made = Shelf()
    yield made
    made.close()


@pytest.fixture(scope="module")
def open_(service, shelf):
    return client(service, shelf)


@pytest.fixture(autouse=True)
def _nothing_stays(shelf):
    yield
    assert list(shelf.root.glob("*/*")) == [], "files stay behind"


def refused(response, status: int, param: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    return body["error"]["message"]


def test_every_format_tells_the_same_text(open_, files):
    answers = {kind: post(open_, files["crop.mp4"], response_format=kind) for kind in endpoint.FORMATS}
    assert {kind: answer.status_code for kind, answer in answers.items()} == dict.fromkeys(endpoint.FORMATS, 200)
    text = answers["json"].json()["text"]
    assert text and set(answers["json"].json()) == {"text"}
    assert answers["text"].text == text + "\n"
    assert re.match(r"1\n00:00:00,000 --> 00:00:0[01],\d{3}\n", answers["srt"].text)
    assert re.match(r"WEBVTT\n\n00:00:00.000 --> 00:00:0[01]\.\d{3}\n", answers["vtt"].text)
    assert answers["vtt"].headers["content-type"].startswith("text/vtt")
    verbose = answers["verbose_json"].json()
    assert verbose["text"] == text and verbose["task"] == "transcribe"
    assert verbose["duration"] == pytest.approx(1.2, abs=0.1)
    assert [segment["text"] for segment in verbose["segments"]] == [text]
    assert post(open_, files["crop.mp4"]).json() == {"text": text}, "json where no format is asked for"


# What OpenAI's specification requires of a segment (TranscriptionSegment): typed clients refuse one without them.
SEGMENT = {
    "id": int,
    "seek": int,
    "start": float,
    "end": float,
    "text": str,
    "tokens": list,
    "temperature": float,
    "avg_logprob": float,
    "compression_ratio": float,
    "no_speech_prob": float,
}


def test_a_segment_has_what_typed_clients_require(open_, service, files):
    body = post(open_, files["crop.mp4"], response_format="verbose_json").json()
    (segment,) = body["segments"]
    assert {name: type(segment[name]) for name in SEGMENT} == SEGMENT
    assert service.processor.tokenizer.decode(segment["tokens"]) == segment["text"]
    assert segment["avg_logprob"] < 0 and 0 <= segment["no_speech_prob"] < 0.5, "it was found by its loudness"
    text = segment["text"].encode()
    assert segment["compression_ratio"] == len(text) / len(zlib.compress(text))
    (unheard,) = post(open_, files["silent.mp4"], response_format="verbose_json").json()["segments"]
    assert unheard["no_speech_prob"] is None, "nothing was listened to"


def test_what_clients_send_besides_is_taken(open_, service, files):
    sent = {"model": service.name, "language": "en", "prompt": "x", "temperature": "0", "modality": "audio"}
    sent |= {"chunking_strategy": "auto"}
    answer = post(open_, files["crop.mp4"], response_format="verbose_json", **sent).json()
    assert answer["segments"][0]["modality"] == "audio"
    (model,) = open_.get("/v1/models").json()["data"]
    assert model["id"] == service.name and open_.get(f"/v1/models/{service.name}").json() == model


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("model", "whisper-1", 404),
        ("response_format", "diarized_json", 400),
        ("stream", "true", 400),
        ("chunking_strategy", "server_vad", 400),
        ("timestamp_granularities[]", "phoneme", 400),
        ("snr", "loud", 400),
        ("snr", "nan", 400),
        ("snr", "1e9", 400),
        ("blur", "-1", 400),
        ("face", "left", 400),
        ("face", "9" * 5000, 400),
        ("modality", "smell", 400),
        ("tempratur", "0", 400),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(open_, files, field, value, status):
    assert refused(post(open_, files["crop.mp4"], **{field: value}), status, field)


@pytest.mark.parametrize(
    ("name", "says"), [("one-byte.webm", "stopped"), ("text.mp4", "talk.mp4: "), ("truncated.mp4", "talk.mp4: ")]
)
def test_an_odd_file_gets_one_line(open_, files, shelf, name, says):
    message = refused(post(open_, files[name]), 400, "file")
    assert says in message and str(shelf.root) not in message and "\n" not in message


def test_a_request_without_a_file_says_what_is_needed(open_):
    refused(open_.post(URL, data={"model": "x"}), 404, "model")
    refused(open_.post(URL, data={"response_format": "json"}), 400, "file")
    refused(open_.post(URL, content=b"{}", headers={"Content-Type": "application/json"}), 400, "file")
    refused(open_.post(URL, content=b"--", headers={"Content-Type": "multipart/form-data"}), 400)
    refused(open_.get(URL), 404)
    refused(open_.post("/v1/chat/completions", json={}), 404)
    refused(open_.options(URL), 404)
    assert open_.head(URL).status_code == 404
    assert "not 'whisper-1'" in refused(open_.get("/v1/models/whisper-1"), 404, "model")


@pytest.mark.parametrize("name", ["../../../tmp/a.mp4", "/etc/passwd", "a\x00b.mp4", "..", "%2e%2e%2f", "x" * 500])
def test_names_from_outside_reach_no_path(open_, files, name):
    assert post(open_, files["silent.mp4"], name=name).status_code == 200


def test_too_large_a_file_is_refused(service, shelf, files):
    small = client(service, shelf, most=10_000)
    assert "0.00953674 MB" in refused(post(small, files["crop.mp4"]), 413, "file")

    def undeclared():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"\0" * 2 * ROOM

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    refused(small.post(URL, content=undeclared(), headers=headers), 413, "file")


def test_no_more_is_read_than_is_taken():
    async def reads_all(scope, receive, send):
        while True:
            await receive()

    received = []

    async def receive():
        received.append(1)
        return {"type": "http.request", "body": b"\0" * 1000, "more_body": True}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
    with pytest.raises(TooLarge):
        asyncio.run(Guard(reads_all, LOOPBACK, 5500, None)(scope, receive, None))
    assert len(received) == 6


@pytest.mark.parametrize(
    ("auth", "header", "let_in"),
    [
        ("ann:s3cret", "Bearer s3cret", True),
        ("ann:s3cret", "Basic YW5uOnMzY3JldA==", True),
        ("ann:s3cret", "Basic Ym9iOnMzY3JldA==", False),
        ("ann:s3cret", "Bearer ann:s3cret", False),
        ("ann:s3cret", "Bearer ", False),
        ("ann:s3cret", "Basic &&&", False),
        ("ann:s3cret", None, False),
        ("token", "Bearer token", True),
        ("token", "bearer  token", True),
        ("token", "Bearer tokeN", False),
        ("token", "token", False),
    ],
)
def test_a_token_lets_in(auth, header, let_in):
    assert Access(auth).header(header) is let_in


def test_a_token_is_asked_for_before_anything_is_read(service, shelf, files):
    guarded = client(service, shelf, "token")
    answer = post(guarded, files["sound.wav"], headers={"Authorization": "Bearer wrong"}, response_format="no such")
    assert refused(answer, 401) == refused(guarded.get("/v1/models"), 401) == refused(guarded.get("/v1/models/x"), 401)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert post(guarded, files["sound.wav"], headers={"Authorization": "Bearer token"}).status_code == 200
    assert guarded.get("/config").status_code == 401, "the page asks too"


@pytest.mark.parametrize("auth", ["", ":", "ann:", ":secret"])
def test_an_empty_password_is_no_password(auth):
    with pytest.raises(ValueError, match="--auth takes USER:PASSWORD or a token"):
        Access(auth)


def test_other_sites_cannot_use_a_visitors_browser(open_, files):
    assert "other sites" in refused(post(open_, files["sound.wav"], headers={"Origin": "https://evil.example"}), 403)
    rebound = {"Host": "evil.example:7860"}
    assert "other names" in refused(post(open_, files["sound.wav"], headers=rebound), 421)
    own = {"Origin": "http://127.0.0.1:7860"}
    assert post(open_, files["sound.wav"], headers=own).status_code == 200


def test_requests_beyond_the_queue_are_sent_away(service, shelf, files, monkeypatch):
    monkeypatch.setattr(endpoint, "QUEUE", 2)
    begun, go, ran = threading.Event(), threading.Event(), []

    def slow(path, name, switches):
        ran.append(name)
        begun.set()
        assert go.wait(30)
        raise endpoint.Refused("enough")

    monkeypatch.setattr(service, "run", slow)
    answers = []
    with client(service, shelf) as full:
        ask = [threading.Thread(target=lambda: answers.append(post(full, files["sound.wav"]))) for _ in range(2)]
        for thread in ask:
            thread.start()
        assert begun.wait(30)
        while len(list(shelf.root.glob("results/*"))) < 2 and ask[1].is_alive():
            threading.Event().wait(0.02)
        assert "waiting" in refused(post(full, files["text.mp4"]), 429)
        assert len(ran) == 1, "one job at a time"
        go.set()
        for thread in ask:
            thread.join(30)
    assert [json.loads(answer.text)["error"]["message"] for answer in answers] == ["enough"] * 2
    assert len(ran) == 2
