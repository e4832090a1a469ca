"""Shards that come through a command or from a server, and both when they fail."""

import logging
import shutil
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from llama_smop.data.shards import index as where
from llama_smop.data.shards import read
from llama_smop.data.shards.index import Shard, ShardError, read_index
from tests.data.test_shards import clips, ids, loader, plan


def test_shards_through_a_command(shards):
    source = clips(f"pipe:cat {shards}/{{name}}")
    assert ids(loader(source, plan(source))) == ids(loader(clips(shards), plan(source)))


def test_a_command_that_still_writes_after_the_archives_end_is_heard_out(shards, tmp_path, monkeypatch):
    """Closed too early it would end with an error, and a whole shard would count as unreadable."""
    monkeypatch.setattr(read, "WAITS_S", ())
    script = tmp_path / "fetch"
    script.write_text(
        f"#!/bin/sh\ncat {shards}/$1 || exit 1\n"
        "case $1 in *.tar) sleep 0.2; head -c 300000 /dev/zero || exit 23;; esac\n"
    )
    script.chmod(0o755)
    source = clips(f"pipe:{script} {{name}}")
    assert ids(loader(source, plan(source))) == ids(loader(clips(shards), plan(source)))


@pytest.mark.skipif(shutil.which("curl") is None, reason="addresses are read with curl")
def test_shards_over_http(shards, monkeypatch):
    monkeypatch.setattr(read, "WAITS_S", ())
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=shards))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        source = clips(address)
        assert ids(loader(source, plan(source))) == ids(loader(clips(shards), plan(source)))
        with pytest.raises(ShardError, match=rf"^{address}/nowhere/index\.json: not the index"):
            read_index(f"{address}/nowhere")
        with pytest.raises(ShardError, match=rf"^{address}/gone\.tar: cannot be read"):
            read.read_shard(address, Shard("gone.tar", (0,), (25,)))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="addresses are read with curl")
def test_a_server_that_falls_silent_is_given_up(monkeypatch):
    """In the middle of a file, its connection open: without a limit a training would wait for ever."""
    monkeypatch.setattr(where, "SILENCE_S", 1)
    monkeypatch.setattr(read, "WAITS_S", ())
    done = Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x")  # more, and curl's mean of the last seconds falls below its limit later
            self.wfile.flush()
            done.wait(30)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ShardError, match="the command ended with 28"):
            read.read_shard(f"http://127.0.0.1:{server.server_port}", Shard("a.tar", (0,), (25,)))
    finally:
        done.set()
        server.shutdown()
        server.server_close()


def test_a_command_that_fails_is_tried_again(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(read, "WAITS_S", (0, 0))
    monkeypatch.setattr(read.logger, "propagate", True)
    script = tmp_path / "fetch"
    script.write_text(
        f'#!/bin/sh\ncase $1 in *.json) ;; *) echo x >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -gt "$2" ] || '
        f"exit 1;; esac\ncat {shards}/$1\n"
    )
    script.chmod(0o755)
    source = clips(f"pipe:{script} {{name}} 2")
    with caplog.at_level(logging.WARNING):
        assert source.load(0, "audio", 0).text
    assert sum("trying again" in record.getMessage() for record in caplog.records) == 2
    (tmp_path / "calls").unlink()
    with pytest.raises(ShardError, match=r"clips-00000\d\.tar 99: cannot be read"):
        clips(f"pipe:{script} {{name}} 99").load(0, "audio", 0)
