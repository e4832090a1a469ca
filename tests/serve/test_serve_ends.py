"""`serve` ends at Ctrl-C and SIGTERM while a page is open: without tracebacks, and without files left behind."""

import os
import signal
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

import pytest

from tests.serve.conftest import together

pytestmark = [
    together,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]
PATIENCE_S = 120


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_ends_in_good_order_while_a_page_is_open(model_path, tmp_path, number, status):
    files, noted = tmp_path / "files", tmp_path / "errors"
    files.mkdir()
    command = [sys.executable, "-m", "llama_smop.cli", "serve", "--model", str(model_path), "--port", "0"]
    environment = os.environ | {"TMPDIR": str(files), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch")}
    with (
        open(noted, "w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            address = process.stdout.readline().split()[1]
            with urllib.request.urlopen(f"{address}gradio_api/heartbeat/visitor", timeout=PATIENCE_S) as page:
                page.readline()  # goes on for as long as the page is open
                assert list(files.iterdir())
                process.send_signal(number)
                assert process.wait(PATIENCE_S) == status
        finally:
            process.kill()
    said = noted.read_text()
    assert "Traceback" not in said and "ERROR" not in said and said.count("\n") <= 1, said
    assert list(files.iterdir()) == [], "the server leaves files behind"
