"""Serve until Ctrl-C."""

import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import uvicorn

from llama_smop.serve.access import LOOPBACK, Access
from llama_smop.serve.babble import noise_source
from llama_smop.serve.service import Service
from llama_smop.serve.shelf import Shelf

logger = logging.getLogger(__name__)

MEGABYTE = 1 << 20
GRACE_S = 3  # that open pages have at the end


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    share: bool = False,
    most_mb: int = 200,
    disk_mb: int = 5000,
    longest_s: float = 1800.0,
    babble: str | Path | None = None,
    word_times: bool = False,
    aligner: str | Path | None = None,
) -> None:
    """Serve a model's page and endpoint until the process is told to end.

    Args:
        host, port: to listen on; port 0 = a free one.
        auth: USER:PASSWORD or a token. share: ask gradio's public relay for an address on the internet.
        most_mb, longest_s: megabytes and seconds of a recording. disk_mb: megabytes of all visitors' files.
        babble: a folder of clips or a noise file; by default the recording's own sound is used.
        word_times, aligner: as in `Options`.

    Raises:
        ValueError: no model there, no clip to make babble of, a wrong `auth`, no disk for one recording.
        OSError: the port is taken.
    """
    access = Access(auth)
    if disk_mb <= most_mb:
        raise ValueError(f"--max-disk-mb {disk_mb} leaves no room for a file of {most_mb} MB (--max-mb)")
    with _listener(host, port) as listener, closing(Shelf(most=disk_mb * MEGABYTE)) as shelf:
        port = listener.getsockname()[1]
        local = host in LOOPBACK
        # SIGTERM by itself would leave visitors' files behind.
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            os.environ["GRADIO_TEMP_DIR"] = str(shelf.uploads)  # gradio looks when it is imported, too
            from llama_smop.serve.app import build

            noise = None if babble is None else noise_source(babble)
            service = Service(model, noise, longest_s, word_times, aligner)
            app = build(service, shelf, access, most_mb * MEGABYTE, LOOPBACK if local and not share else None)
            if not access.needed and (share or not local):
                logger.warning("everybody who reaches this address can use the model; --auth USER:PASSWORD keeps it")
            # One line of its own; requests and their addresses are not logged.
            # Who asks is who is connected (`limits`): headers of proxies are not believed.
            quiet = {"log_level": "warning", "access_log": False, "proxy_headers": False}
            config = uvicorn.Config(app, timeout_graceful_shutdown=GRACE_S, **quiet)
            name = f"[{host}]" if ":" in host else host
            print(f"{service.name}: http://{name}:{port}/ (Ctrl-C ends it)", flush=True)
            if share:
                print(f"shared: {_shared(host, port)}", flush=True)
            server = _Server(config)
            server.run(sockets=[listener])
            if server.told is not None:
                signal.raise_signal(server.told)
        finally:
            signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Ends at SIGINT and SIGTERM. uvicorn would raise the signal again while its loop runs, which prints tracebacks.

    told: the signal, None before one came.
    """

    told: int | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def told(number: int, frame) -> None:
            self.told = number
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # open pages are cut off, which is no fault
            self.handle_exit(number, frame)

        before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on ({error.strerror}); --port takes another one") from None


def _shared(host: str, port: int) -> str:
    """The address of a tunnel through gradio's relay. Raises ValueError: there is none."""
    from gradio.networking import setup_tunnel

    try:
        return setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        raise ValueError(f"--share: gradio's relay gave no address ({' '.join(str(error).split())})") from None
