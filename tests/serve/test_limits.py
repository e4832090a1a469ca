"""Passwords cannot be tried at will, disks not be filled, and this machine not be sent to fetch something."""

import asyncio
import json
import os
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("gradio")

import safehttpx
from fastapi.testclient import TestClient

from llama_smop.cli import main
from llama_smop.serve import limits
from llama_smop.serve import shelf as shelves
from llama_smop.serve.access import LOOPBACK, NOT_FETCHED, Access
from llama_smop.serve.app import build
from llama_smop.serve.limits import FREE, LONGEST_S, Guesses, network
from llama_smop.serve.page import EVERYTHING
from llama_smop.serve.shelf import Shelf

ENDPOINT = "/v1/audio/transcriptions"


def client(service, shelf, access=None, address="10.0.0.1", most=200_000) -> TestClient:
    app = build(service, shelf, access or Access(), most, LOOPBACK)
    return TestClient(app, base_url="http://127.0.0.1:7860", client=(address, 50_000))


# ------------------------------------------------------------------------------------------------------------- guesses


def test_each_wrong_guess_after_some_doubles_the_wait():
    now = [0.0]
    guesses, waits = Guesses(clock=lambda: now[0]), []
    for _ in range(FREE + 8):
        assert not guesses.judge(False)
        waits.append(guesses.wait())
        assert not waits[-1] or not guesses.judge(True), "a right one that comes too early tells nothing"
        now[0] += waits[-1]
    assert waits == [0] * FREE + [1, 2, 4, 8, 16, 32, LONGEST_S, LONGEST_S]
    assert guesses.judge(True) and not guesses.judge(False) and guesses.wait() == 0, "forgotten once one is right"


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(limits, "ADDRESSES", 3)
    guesses = Guesses()
    for number in range(10):
        limits._visitor.set(str(number))
        guesses.judge(False)
    assert list(guesses._wrong) == ["7", "8", "9"]


def test_one_network_is_one_guesser():
    assert network("2001:db8::1") == network("2001:db8::ffff:2") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") != network("10.0.0.2")
    assert network("testclient") == "testclient"


@pytest.mark.parametrize("way", ("page", "endpoint"))
def test_who_guesses_is_told_to_wait_and_others_are_not(service, shelf, way):
    access = Access("ann:s3cret")
    guesser = client(service, shelf, access)
    other = client(service, shelf, access, "10.0.0.2")

    def ask(of, password, **headers):
        if way == "page":
            return of.post("/login", data={"username": "ann", "password": password}, headers=headers)
        return of.get("/v1/models", headers={"Authorization": f"Bearer {password}", **headers})

    wrong = [ask(guesser, f"guess {number}").status_code for number in range(FREE + 1)]
    assert set(wrong) == {400 if way == "page" else 401}
    for password in ("another", "s3cret"):
        answer = ask(guesser, password)
        assert answer.status_code == 429 and "too many wrong passwords; try again in 1 seconds" in answer.text
    assert ask(guesser, "s3cret", **{"X-Forwarded-For": "10.0.0.9"}).status_code == 429, "a header makes nobody another"
    assert ask(other, "s3cret").status_code == 200
    access.guesses._wrong.clear()  # a second goes by
    assert ask(guesser, "s3cret").status_code == 200


def test_guesses_at_once_are_no_way_round(service, shelf):
    """All are on their way before the first is judged."""
    access, heard = Access("token"), []
    access.guesses.judge, judge = lambda right: heard.append(right) or judge(right), access.guesses.judge
    app = build(service, shelf, access, 200_000, LOOPBACK)

    async def all_at_once():
        import httpx

        transport = httpx.ASGITransport(app, client=("10.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as sender:
            data = [{"username": "x", "password": str(n)} for n in range(40)] + [{"username": "x", "password": "token"}]
            return await asyncio.gather(*(sender.post("/login", data=form) for form in data))

    answers = asyncio.run(all_at_once())
    assert [answer.status_code for answer in answers].count(200) == 0
    assert access.guesses._wrong["10.0.0.1"][0] == FREE + 1


# ---------------------------------------------------------------------------------------------------------------- disk


def test_files_beyond_the_room_are_refused_and_old_ones_make_place(service, files):
    size = files["crop.mp4"].stat().st_size
    shelf = Shelf(most=3 * size)
    web = client(service, shelf)

    def send(times=1):
        return [web.post(ENDPOINT, files={"file": ("a.mp4", files["crop.mp4"].read_bytes())}) for _ in range(times)]

    try:
        assert {answer.status_code for answer in send(4)} == {200}, "what is done takes no room"
        folder = shelf.new()
        folder.joinpath("clip.mp4").write_bytes(bytes(2 * size))
        (answer,) = send()
        assert answer.status_code == 507 and "no room for more files" in answer.json()["error"]["message"]
        upload = web.post("/gradio_api/upload", files={"files": ("a.mp4", bytes(2 * size))})
        assert upload.status_code == 507 and list(shelf.uploads.iterdir()) == []
        for path in (folder / "clip.mp4", folder):
            os.utime(path, (time.time() - shelves.SHORT_S - 1,) * 2)
        assert send()[0].status_code == 200 and not folder.exists()
    finally:
        shelf.close()


def test_files_on_their_way_have_their_room():
    shelf = Shelf(most=100)
    try:
        with ExitStack() as sent:
            assert [sent.enter_context(shelf.room_for(40)) for _ in range(3)] == [True, True, False]
        with shelf.room_for(100) as enough:
            assert enough
    finally:
        shelf.close()


def test_a_disk_too_small_for_one_file_is_one_line(model_path):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", str(model_path), "--port", "0", "--max-mb", "200", "--max-disk-mb", "200"])
    assert ended.value.code == "llama-smop: --max-disk-mb 200 leaves no room for a file of 200 MB (--max-mb)"


# ----------------------------------------------------------------------------------------------------------- addresses


@pytest.fixture
def elsewhere(monkeypatch):
    """A server that counts as one of the internet, and the paths that it was asked for."""
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    monkeypatch.setattr(safehttpx, "is_public_ip", lambda ip: True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/film.mp4", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_client_that_names_an_address_as_its_file_has_nothing_fetched(service, shelf, elsewhere):
    address, asked = elsewhere
    web = client(service, shelf)
    (job,) = (d["id"] for d in web.get("/config").json()["dependencies"] if len(d["inputs"]) == 6)
    file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}, "orig_name": "film.mp4"}
    for number, given in enumerate((["video", file, None], ["sound", None, file])):
        sent = {"data": [*given, EVERYTHING, "none", "none"], "fn_index": job, "session_hash": f"s{number}"}
        with web:
            assert web.post("/gradio_api/queue/join", json=sent).status_code == 200
            with web.stream("GET", f"/gradio_api/queue/data?session_hash=s{number}") as events:
                told = [json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line]
        (done,) = [event for event in told if event["msg"] == "process_completed"]
        assert not done["success"] and done["output"]["error"] == NOT_FETCHED
    for path in (
        f"/gradio_api/file={address}",
        f"/file={address}",
        f"/gradio_api/file={address.replace('http', 'HTTP')}",
    ):
        for method in ("GET", "HEAD"):
            assert web.request(method, path).status_code in (403, 404), path
    assert asked == []
