"""How often a password may be guessed, and how much disk visitors may fill."""

import ipaddress
import math
import time
from collections.abc import Callable
from contextvars import ContextVar

from llama_smop.serve.shelf import Shelf

FREE = 5  # wrong passwords that cost no time
LONGEST_S = 60.0
ADDRESSES = 10_000  # remembered
# Who sends the request that is being answered, as the socket knows it: headers can be made up.
_visitor: ContextVar[str] = ContextVar("visitor", default="")


class Guesses:
    """Wrong passwords by address: after FREE of them one waits a second, and twice as long after each further one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._wrong: dict[str, tuple[int, float]] = {}  # how many, and when the next one is heard

    def wait(self) -> int:
        """Seconds until this visitor's next guess is heard."""
        return max(0, math.ceil(self._wrong.get(_visitor.get(), (0, 0.0))[1] - self._clock()))

    def judge(self, right: bool) -> bool:
        """Whether a guess lets this visitor in: a right one does, unless it comes too early."""
        if self.wait():
            return False
        count = self._wrong.pop(_visitor.get(), (0, 0.0))[0] + 1
        if not right:
            wait = min(LONGEST_S, 2.0 ** (count - FREE - 1)) if count > FREE else 0.0
            self._wrong[_visitor.get()] = count, self._clock() + wait
            if len(self._wrong) > ADDRESSES:
                del self._wrong[next(iter(self._wrong))]  # the one who guessed last the longest ago
        return right


class Patience:
    """ASGI middleware: says who asks, and tells those who guess too early to wait.

    refusal: makes the response of a path, a status and a text.
    """

    def __init__(self, app, guesses: Guesses, refusal: Callable):
        self._app, self._guesses, self._refusal = app, guesses, refusal

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            _visitor.set(network((scope.get("client") or ("",))[0]))
            login = scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login")
            guess = login or any(name == b"authorization" for name, _ in scope["headers"])
            if guess and (left := self._guesses.wait()):
                text = f"too many wrong passwords; try again in {left} seconds"
                await self._refusal(scope["path"], 429, text)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Room:
    """ASGI middleware: refuses files for which the shelf has no room beside those that are on their way.

    most: bytes of a request that declares no length. refusal: as in `Patience`.
    """

    def __init__(self, app, shelf: Shelf, most: int, refusal: Callable):
        self._app, self._shelf, self._most, self._refusal = app, shelf, most, refusal

    async def __call__(self, scope, receive, send) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] != "http" or not headers.get(b"content-type", b"").lower().startswith(b"multipart/"):
            await self._app(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        with self._shelf.room_for(int(length) if length.isdigit() else self._most) as enough:
            if enough:
                await self._app(scope, receive, send)
            else:
                text = "there is no room for more files now; try again in some minutes"
                await self._refusal(scope["path"], 507, text)(scope, receive, send)


def network(host: str) -> str:
    """An address as it counts: of IPv6 the first 64 bits, which one user has all of."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
