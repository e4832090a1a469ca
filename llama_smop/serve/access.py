"""Who may ask for what: a password, the names this server answers to, and how much a request may hold."""

import base64
import binascii
import secrets
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from llama_smop.serve.limits import Guesses

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ROOM = 1 << 20  # bytes of a request beside its file
NOT_FETCHED = "this server fetches no addresses; send the file itself"
# A browser asks nobody else for anything, whatever the page's libraries would like: fonts, scripts, programs.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)


class Access:
    """The password of `--auth`, USER:PASSWORD or a token alone; None lets everybody in. Who guesses has to wait.

    Raises:
        ValueError: an empty user or password.
    """

    def __init__(self, auth: str | None = None):
        user, colon, password = (auth or "").partition(":")
        self.user: str | None = user if colon else None
        self._password = password if colon else user
        self.needed = auth is not None
        self.guesses = Guesses()
        if self.needed and not (self._password and (user or not colon)):
            raise ValueError("--auth takes USER:PASSWORD or a token, neither part empty")

    def login(self, user: str, password: str) -> bool:
        """Whether the page lets these in; with a token alone the user's name does not matter."""
        right = _same(password, self._password)
        return not self.needed or self.guesses.judge(right and (self.user is None or _same(user, self.user)))

    def header(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header does: `Bearer PASSWORD`, or `Basic` with user and password."""
        if not self.needed:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() == "bearer":
            return self.guesses.judge(_same(given.strip(), self._password))
        if scheme.lower() == "basic":
            try:
                user, _, password = base64.b64decode(given, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                return False
            return self.login(user, password)
        return False


def _same(a: str, b: str) -> bool:
    return secrets.compare_digest(a.encode("utf-8", "replace"), b.encode("utf-8", "replace"))


class Guard:
    """ASGI middleware: refuses requests for other hosts, from other sites' pages, and with too large a body.

    A page of another site could else reach a server on loopback through its visitor's browser. hosts: names that the
    server answers to, None = any. most: bytes of a body. refusal: makes the response of a status and a text.
    """

    def __init__(self, app, hosts: tuple[str, ...] | None, most: int, refusal: Callable):
        self._app, self._hosts, self._most, self._refusal = app, hosts, most, refusal

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        reason = self._refused(scope["method"], scope["path"], headers)
        if reason is not None:
            await self._refusal(scope["path"], *reason)(scope, receive, send)
            return
        await self._app(scope, _limited(receive, self._most), _confined(send))

    def _refused(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = urlsplit(f"//{headers.get('host', '')}").hostname
        if self._hosts is not None and host not in self._hosts:
            return 421, "this server answers to other names only"
        if "file=http" in path.lower():  # gradio would fetch it, and pass it on
            return 403, NOT_FETCHED
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and urlsplit(origin).hostname != host:
            return 403, "requests from other sites' pages are refused"
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most:
            return 413, too_large(self._most - ROOM)
        return None


def too_large(most: int) -> str:
    return f"the file is too large: {most / (1 << 20):g} MB is the most that is taken"


class TooLarge(Exception):
    """A body without a declared length that went beyond the limit."""


def _limited(receive: Callable[[], Awaitable[dict]], most: int) -> Callable[[], Awaitable[dict]]:
    left = most

    async def counted() -> dict:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise TooLarge
        return message

    return counted


def _confined(send: Callable[[dict], Awaitable[None]]) -> Callable[[dict], Awaitable[None]]:
    async def sent(message: dict) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            message = message | {"headers": headers}
        await send(message)

    return sent
