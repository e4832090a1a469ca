"""The page in a real browser: a file, a webcam and a microphone go in; text, subtitles and downloads come out; nothing
but this machine is asked for anything. Chromium is the system's, its camera and microphone are made up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from tests.serve.conftest import together

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    together,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright, which drives a browser"),
]

MADE_UP = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox")
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def server(model_path, whisper_folder, tmp_path_factory):
    """The address, and the folder below which all its files lie."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "llama_smop.cli", "serve", "--model", str(model_path), "--port", "0"]
    command += ["--aligner", str(whisper_folder)]
    # Without a program named ffmpeg, which the page must not need.
    environment = os.environ | {"TMPDIR": str(folder), "PATH": os.path.dirname(sys.executable)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("torch"))  # torch makes it when it is imported
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process.stdout.readline().split()[1], folder
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_MS / 1000)
    assert list(folder.iterdir()) == [], "the server leaves files behind"


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=MADE_UP)


@pytest.fixture
def page(server, browser):
    """The page, opened; at its end no foreign request has been made, and no script has failed."""
    context = browser.new_context(permissions=["camera", "microphone"], accept_downloads=True)
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    asked, failed = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.on("console", lambda message: failed.append(message.text) if "Content Security" in message.text else None)
    opened.goto(server[0])
    opened.wait_for_selector("#go")
    yield opened
    context.close()
    foreign = [url for url in asked if not url.startswith((server[0], "data:", "blob:"))]
    assert len(asked) > 10 and not foreign, f"asked somebody else: {foreign}"
    assert not failed


def send(page, path) -> None:
    page.set_input_files("#video input[type=file]", path)
    page.wait_for_selector("#video video")


def transcribe(page) -> None:
    page.click("#go")
    page.wait_for_selector(".senses, .refused")


def wait_until(true, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def test_a_file_gives_text_subtitles_pictures_and_downloads(page, files, server):
    send(page, files["crop.mp4"])
    transcribe(page)
    assert page.locator(".senses th").all_inner_texts() == ["Sound + lips", "Sound alone", "Lips alone"]
    page.wait_for_function(
        "document.querySelector('.clip').readyState >= 2 && document.querySelector('.crop').readyState >= 2"
    )
    page.locator("[data-seek]").first.click()
    page.wait_for_function("document.querySelector('.clip').currentTime > 0.2")
    page.wait_for_function("document.querySelector('.crop').currentTime > 0.1")
    cues = page.evaluate("[...document.querySelector('.clip').textTracks[0].cues].map(cue => cue.text)")
    text = page.locator(".senses td").first.inner_text()
    assert " ".join(cues).split() == text.split()
    words = page.locator(".pieces .word")
    assert words.all_inner_texts() == text.split()
    page.evaluate("document.querySelector('.clip').pause()")
    words.last.click()
    began = float(words.last.get_attribute("data-seek"))
    page.wait_for_function(f"document.querySelector('.clip').currentTime >= {began}")
    assert page.locator(".experts svg").count() == 1
    got = {}
    for kind in ("SRT", "JSON"):
        with page.expect_download() as download:
            page.locator(".downloads a", has_text=kind).click()
        got[kind] = download.value.path().read_text()
    assert got["SRT"].startswith("1\n00:00:00,000 --> ")
    content = json.loads(got["JSON"])
    assert content["text"] == text
    assert [word["word"] for piece in content["pieces"] for word in piece["words"]] == text.split()
    page.close()
    assert wait_until(lambda: not [p for p in server[1].rglob("*") if p.is_file()]), (
        "left behind after the page is closed"
    )


def test_the_switches_are_used_and_named(page, files):
    send(page, files["crop.mp4"])
    page.locator("#modality label", has_text="Lips alone").click()
    page.locator("#babble label", has_text="−5 dB").click()
    page.locator("#blur label", has_text="4 pixels").click()
    transcribe(page)
    assert page.locator(".senses th").all_inner_texts() == ["Lips alone"]
    assert page.locator(".senses caption").inner_text() == "With babble at -5 dB and mouth blurred by 4 pixels"


def test_an_odd_file_and_no_file_get_a_line(page, files):
    transcribe(page)
    assert "Choose a file or record something first" in page.locator(".refused").inner_text()
    page.set_input_files("#video input[type=file]", files["text.mp4"])
    page.wait_for_selector("#video button[aria-label=Clear]")
    page.click("#go")
    page.locator(".refused", has_text="text.mp4: ").wait_for()


def record(page, seconds: float) -> None:
    page.locator("#video button[aria-label='Capture from camera']").click()
    page.locator("#video").get_by_text("Click to Access Webcam").click()
    page.locator("#video button", has_text="Record").click()
    page.wait_for_timeout(1000 * seconds)
    page.locator("#video button", has_text="Stop").click()
    page.wait_for_selector("#video button[aria-label=Clear]")


def test_a_webcam_recording_is_taken(page):
    record(page, 8)
    transcribe(page)
    assert page.locator(".senses").count() == 1, page.locator("#result").inner_text()


def test_a_recording_that_is_stopped_at_once_gets_a_friendly_line(page):
    record(page, 0)
    transcribe(page)
    assert "stopped before anything was recorded" in page.locator(".refused").inner_text()


def test_a_microphone_recording_is_taken(page):
    """Its Clear button is there from the first second on, and the recording is not before the server has it."""
    uploads = []
    page.route("**/upload*", lambda route: uploads.append(route))  # held back, as on a slow network
    page.get_by_role("tab", name="Sound").click()
    page.locator("#sound button[aria-label='Record audio']").click()
    page.locator("#sound button", has_text="Record").click()
    page.wait_for_timeout(3000)
    with page.expect_request("**/upload*"):
        page.locator("#sound button.stop-button").click()
    transcribe(page)
    assert "a recording that was just stopped takes a moment" in page.locator(".refused").inner_text()
    uploads[0].continue_()
    page.locator("#sound [aria-label=Download]").wait_for()
    page.click("#go")
    page.wait_for_selector(".senses")
    assert page.locator("audio.clip").count() == 1
