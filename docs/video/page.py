"""Picture the page of a server that runs: python docs/video/page.py http://127.0.0.1:7860/ talk.mp4 page.png

Needs Chromium, playwright and pillow.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SIZE = {"width": 1180, "height": 1010}
COLOURS = 256
PATIENCE_MS = 180_000


def picture(address: str, film: str) -> bytes:
    """A PNG of the page with a film transcribed in babble at 0 dB, played to its middle."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(PATIENCE_MS)
        page.goto(address)
        page.set_input_files("#video input[type=file]", film)
        page.wait_for_selector("#video video")
        page.locator("#babble label").nth(3).click()
        page.click("#go")
        page.wait_for_selector(".senses")
        page.wait_for_function("document.querySelector('.clip').readyState > 1")
        page.evaluate("const clip = document.querySelector('.clip'); clip.controls = false; clip.currentTime = 0.6")
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(2000)
        return page.screenshot()


if __name__ == "__main__":
    address, film, out = sys.argv[1:]
    shown = Image.open(io.BytesIO(picture(address, film))).convert("RGB")
    shown.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(Path(out), optimize=True)
