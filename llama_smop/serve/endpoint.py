"""The HTTP endpoint in the shape of OpenAI's `/v1/audio/transcriptions`, which many clients speak."""

import shutil
import zlib
from dataclasses import asdict
from pathlib import Path

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from llama_smop.serve.access import Access, TooLarge, too_large
from llama_smop.serve.service import Outcome, Refused, Service, Switches
from llama_smop.serve.shelf import Shelf
from llama_smop.transcription import subtitles
from llama_smop.transcription.pieces import Piece

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
IGNORED = ("language", "prompt", "temperature")  # that clients send, and these models have no use for
KNOWN = {"file", "model", "response_format", "modality", "snr", "blur", "face", "stream", "chunking_strategy", *IGNORED}
GRANULARITIES = ("timestamp_granularities[]", "timestamp_granularities")
MEL_RATE = 100  # frames a second, in which Whisper's "seek" counts
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]
QUEUE = 16  # requests that may wait


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """A refusal as OpenAI's API writes it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(body, status, headers=headers)


def router(service: Service, access: Access, shelf: Shelf, most: int) -> APIRouter:
    """The routes under /v1. most: bytes of a file."""
    routes = APIRouter(prefix="/v1")
    turn = anyio.CapacityLimiter(1)
    waiting = 0

    def refusal(request: Request) -> JSONResponse | None:
        if access.header(request.headers.get("authorization")):
            return None
        return error(401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key")

    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "llama-smop"}

    @routes.get("/models")
    async def models(request: Request) -> Response:
        return refusal(request) or JSONResponse({"object": "list", "data": [model]})

    @routes.get("/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        if (refused := refusal(request)) is not None:
            return refused
        if name != service.name:
            return error(404, _other_model(service, name), "model", "model_not_found")
        return JSONResponse(model)

    @routes.post("/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        nonlocal waiting
        refused = refusal(request)
        if refused is not None:
            return refused
        if waiting >= QUEUE:
            return error(429, "too many requests are waiting; ask again later", code="rate_limit_exceeded")
        waiting += 1
        folder = shelf.new()
        try:
            async with request.form(max_files=1, max_fields=32, max_part_size=1 << 16) as form:
                wanted, words, switches = _asked(form, service)
                path, name = await _stored(form, folder, most)
            async with turn:
                if await request.is_disconnected():
                    return Response(status_code=499)
                outcome = await anyio.to_thread.run_sync(lambda: service.run(path, name, switches))
            return answer(outcome, wanted, service.name, words)
        except Refused as refused:
            code = "model_not_found" if refused.field == "model" else None
            return error(404 if code else 400, str(refused), refused.field, code)
        except TooLarge:
            return error(413, too_large(most), "file")
        except HTTPException as problem:  # a form that cannot be read
            return error(problem.status_code, str(problem.detail))
        finally:
            waiting -= 1
            shelf.drop(folder)

    @routes.api_route("/{rest:path}", methods=METHODS, include_in_schema=False)
    async def unknown(request: Request) -> Response:
        here = "POST /v1/audio/transcriptions and GET /v1/models are all there is"
        return refusal(request) or error(404, f"{request.method} {request.url.path}: {here}")

    return routes


def _asked(form: FormData, service: Service) -> tuple[str, bool, Switches]:
    """The response format, whether words are to have times, and the switches of a form. Raises Refused."""
    fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
    for key in fields:
        if key not in KNOWN and key not in GRANULARITIES:
            raise Refused(f"{key!r} is not known here", key)
    wanted = fields.get("response_format", "json")
    if wanted not in FORMATS:
        raise Refused(f"response_format takes {', '.join(FORMATS)}, got {wanted!r}", "response_format")
    if fields.get("model", service.name) != service.name:
        raise Refused(_other_model(service, fields["model"]), "model")
    if fields.get("stream", "false").lower() not in ("false", "0", ""):
        raise Refused("streaming is not offered", "stream")
    if fields.get("chunking_strategy", "auto") != "auto":
        raise Refused("chunking_strategy takes auto: recordings are cut where nobody speaks", "chunking_strategy")
    words = False
    for key in GRANULARITIES:
        asked = form.getlist(key)
        if not {"segment", "word"}.issuperset(asked):
            raise Refused(f"{key} takes segment and word", key)
        if "word" in asked and wanted != "verbose_json":
            raise Refused(f"word times are in response_format verbose_json, not in {wanted}", key)
        if "word" in asked and not service.times_words:
            raise Refused("word times need a server that was started with --word-times", key)
        words |= "word" in asked
    switches = Switches(
        modality=fields.get("modality"),
        snr=_number(fields, "snr"),
        blur=_number(fields, "blur") or 0.0,
        face=int(face) if (face := fields.get("face", "auto")).isdecimal() and len(face) < 9 else face,
    )
    return wanted, words, switches


def _other_model(service: Service, name: str) -> str:
    return f"this server has the model {service.name!r}, not {name!r}"


def _number(fields: dict[str, str], name: str) -> float | None:
    if name not in fields:
        return None
    try:
        return float(fields[name])
    except ValueError:
        raise Refused(f"{name} takes a number, got {fields[name]!r}", name) from None


async def _stored(form: FormData, folder: Path, most: int) -> tuple[Path, str]:
    """The file on disk, under a name of ours, and its name, which is for messages alone. Raises Refused, TooLarge."""
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise Refused("a file is needed: a multipart form with the field 'file'", "file")
    if upload.size is not None and upload.size > most:
        raise TooLarge
    path = folder / "input"

    def copy() -> None:
        with open(path, "wb") as target:
            shutil.copyfileobj(upload.file, target)

    await anyio.to_thread.run_sync(copy)
    return path, Path(upload.filename or "recording").name


def answer(outcome: Outcome, wanted: str, model: str, with_words: bool = False) -> Response:
    """An outcome in one of FORMATS. with_words: verbose_json has "words", too."""
    transcript = outcome.transcript
    if wanted == "text":
        return PlainTextResponse(transcript.text + "\n")
    if wanted == "srt":
        return PlainTextResponse(subtitles.srt(outcome.cues))
    if wanted == "vtt":
        return PlainTextResponse(subtitles.vtt(outcome.cues), media_type="text/vtt")
    if wanted == "json":
        return JSONResponse({"text": transcript.text})
    segments = [_segment(number, piece) for number, piece in enumerate(transcript.pieces)]
    words = [asdict(word) for piece in transcript.pieces for word in piece.words or ()]
    return JSONResponse(
        {
            "task": "transcribe",
            "language": "english",
            "duration": transcript.seconds,
            "text": transcript.text,
            "segments": segments,
            **({"words": words} if with_words else {}),
            "model": model,
            "warnings": transcript.warnings,
        }
    )


def _segment(number: int, piece: Piece) -> dict:
    """A piece with all fields of OpenAI's segments, without which strict clients read nothing.

    avg_logprob is that of the tokens and of the end, as in Whisper; no_speech_prob, for which Whisper has a
    token, is what the voice activity model leaves to something other than speech. What is not known is null.
    """
    text, written, speech = piece.text.encode(), piece.written, piece.speech_probability
    return {
        "id": number,
        "seek": round(piece.start * MEL_RATE),
        "start": piece.start,
        "end": piece.end,
        "text": piece.text,
        "tokens": [] if written is None else list(written.tokens),
        "temperature": 0.0,
        "avg_logprob": None if written is None else written.avg_logprob,
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": None if speech is None else round(1 - speech, 4),
        "modality": piece.modality,
    }
