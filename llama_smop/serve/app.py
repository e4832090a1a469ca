"""Page, endpoint and results as one application."""

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response

from llama_smop.serve import page
from llama_smop.serve.access import ROOM, Access, Guard
from llama_smop.serve.endpoint import error, router
from llama_smop.serve.limits import Patience, Room
from llama_smop.serve.service import Service
from llama_smop.serve.shelf import Shelf

TYPES = {
    "clip.mp4": "video/mp4",
    "clip.wav": "audio/wav",
    "crop.mp4": "video/mp4",
    "transcript.srt": "application/x-subrip",
    "transcript.vtt": "text/vtt",
    "transcript.json": "application/json",
}


def build(service: Service, shelf: Shelf, access: Access, most: int, hosts: tuple[str, ...] | None) -> FastAPI:
    """The application. most: bytes of a file. hosts: names that it answers to, None = any."""
    app = FastAPI(title="llama-smop", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(router(service, access, shelf, most))

    # The key in the address cannot be guessed, and only who got the result knows it.
    @app.get(page.RESULTS + "/{key}/{name}")
    def result(key: str, name: str) -> Response:
        file = shelf.find(key, name) if name in TYPES else None
        if file is None:
            return PlainTextResponse("this result is gone; transcribe the recording again\n", 404)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return FileResponse(file, media_type=TYPES[name], headers=headers)

    gr.mount_gradio_app(
        app,
        page.build(service, shelf),
        path="/",
        auth=access.login if access.needed else None,
        auth_message=None if access.user is not None else "Any user name, and the token as password.",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=most,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **page.look(),
    )
    app.add_middleware(Room, shelf=shelf, most=most + ROOM, refusal=_refusal)
    if access.needed:
        app.add_middleware(Patience, guesses=access.guesses, refusal=_refusal)
    app.add_middleware(Guard, hosts=hosts, most=most + ROOM, refusal=_refusal)
    return app


def _refusal(path: str, status: int, text: str) -> Response:
    if path.startswith("/v1/"):
        return error(status, text, "file" if status == 413 else None)
    return PlainTextResponse(text + "\n", status)
