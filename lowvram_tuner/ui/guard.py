"""Who may talk to the page: requests addressed to this machine, sent by this page itself.

A web page from anywhere can make a browser send requests to 127.0.0.1, and a name that an attacker controls can be made to
point there (DNS rebinding). So the guard looks at two headers that a script cannot forge: `Host` must be an address of this
machine, and `Origin` (or `Sec-Fetch-Site`, where a browser sends no origin) must be the page itself. Programs that are not
browsers send neither and pass. It also sends a policy that keeps a browser from loading anything from elsewhere, so that a
picture in a model's answer cannot tell the world about it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

Scope = dict[str, Any]
Asgi = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

# Gradio's own page needs inline scripts and evaluates templates; everything must come from this server all the same.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' data: blob:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
)


class RequestGuard:
    """ASGI middleware. `listen`: other machines may use this one's addresses; `share`: Gradio's tunnel may, too."""

    def __init__(self, app: Asgi, listen: bool = False, share: bool = False) -> None:
        self.app = app
        self.listen = listen
        self.share = share
        self.names = {"localhost"} | (_own_names() if listen else set())

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        reason = self.refusal(_headers(scope), scope.get("method", "GET"))
        if reason:
            await _refuse(scope, send, reason)
        else:
            await self.app(scope, receive, _with_headers(send))

    def refusal(self, headers: dict[str, list[str]], method: str) -> str | None:
        """Why a request with these headers (small names) is refused, or None."""
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not self.ours(hosts[0]):
            return "Host is not an address of this machine; open the page at http://127.0.0.1."
        for origin in headers.get("origin", []):
            if urlsplit(origin).netloc.lower() != hosts[0].lower():
                return "Origin is not this page."
        site = headers.get("sec-fetch-site", ["none"])[0]
        if site in ("cross-site", "same-site") and not _is_link(headers, method):
            return "The request comes from another site."
        return None

    def ours(self, host: str) -> bool:
        """Whether a Host header names this machine: an address cannot be rebound, a name can, so names must be known."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            urlsplit(f"//{host}").port  # noqa: B018  raises ValueError for a port that is none
        except ValueError:
            return False
        if "@" in host or "/" in host:
            return False
        if name in self.names or (self.share and name.endswith(".gradio.live")):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.listen or address.is_loopback


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """("user", "password") of "user:password"; ValueError with what is accepted when it is something else."""
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ValueError("--auth needs a name and a password, for example --auth anna:quiet-otter.")
    return user, password


def check_exposure(listen: bool, share: bool, auth: tuple[str, str] | None) -> None:
    """ValueError when the page would be open to others without a password."""
    if auth is None and (listen or share):
        flag = "--listen" if listen else "--share"
        raise ValueError(f"{flag} opens the page to other people; add --auth user:password.")


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name.split('.')[0]}.local", name.split(".")[0]}


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope.get("headers", []):
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _is_link(headers: dict[str, list[str]], method: str) -> bool:
    """A person followed a link to the page: a top-level GET."""
    mode, target = headers.get("sec-fetch-mode", [""])[0], headers.get("sec-fetch-dest", [""])[0]
    return method in ("GET", "HEAD") and mode == "navigate" and target == "document"


def _with_headers(send: Callable) -> Callable:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {n for n, _ in _HEADERS}
            kept = [(n, v) for n, v in message.get("headers", []) if n.lower() not in names]
            message = {**message, "headers": [*kept, *_HEADERS]}
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Callable, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = reason.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
