"""What every request passes and every answer carries: who may ask, and what a browser may load."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Nothing inline and nothing from outside: a text that got past the escaping could still do nothing.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Before all else. ``token`` None: whoever reaches this machine's own address may look.

    Then only requests to that address by its usual names are answered: a page elsewhere that has
    its own name point here reads nothing.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self._refusal(scope["method"], Headers(scope=scope))
        await (refused or self._app)(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> PlainTextResponse | None:
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("this page is only read: expected GET\n", 405)
        if self._token is None:
            name = headers.get("host", "").rsplit(":", 1)[0]
            if name in LOCAL_NAMES or headers.get("host") in LOCAL_NAMES:
                return None
            return PlainTextResponse("expected localhost as the host's name\n", 421)
        told = _told(headers.get("authorization", ""))
        if hmac.compare_digest(told.encode(), self._token.encode()):
            return None
        ask = {"WWW-Authenticate": 'Basic realm="gradualdiff dashboard", charset="UTF-8"'}
        return PlainTextResponse("expected the token as the password\n", 401, ask)


def _told(authorization: str) -> str:
    """The token: a bearer's, or the password that a browser asked for, beside any name."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        decoded = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return decoded.partition(":")[2]
