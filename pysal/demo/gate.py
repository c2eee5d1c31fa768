"""What may be asked of the page's server: the routes the page needs, by the page itself, with the files of its own session.

Gradio serves far more than a page needs (an API with its description, a proxy, streams) and trusts what a client says of files:
a payload that names a path is read, wherever the path leads, and one that names an address is fetched. So nothing gets to it
that is not on a list here, and a path only if the same session uploaded it.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 20 * 1024 * 1024  # of an upload
MOST_OF_A_SESSION = 10 * MOST_BYTES  # of all uploads of a session, as long as they are kept
MOST_OF_ALL = 50 * MOST_BYTES
MOST_ASKED = 1024 * 1024  # bytes of any other request
SESSIONS = 1000  # the oldest of more are forgotten
UPLOADS_LAST = 2 * 3600  # seconds: Gradio looks once an hour for uploads that are an hour old

# What the page asks for, found by watching it in a browser. `queue/data` and `heartbeat` are streams.
PUBLIC = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d+)?|/(assets|static|svelte)/.+"
    r"|/gradio_api/(theme\.css|startup-events|app_id/?)|/found/[^/]+/explanation\.(png|npz)"
)
OWN = {
    "GET": re.compile(r"/gradio_api/(queue/data|upload_progress|heartbeat/[^/]+|file=.+)"),
    "POST": re.compile(r"/gradio_api/(queue/join|run/predict|upload|cancel|reset/?)"),
}
# What Gradio's page says of an upload; of these the path alone is handed on.
FILE = {"path", "url", "orig_name", "size", "mime_type", "is_stream", "meta", "alt_text", "b64"}


class Refused(Exception):
    """A request that is not handed on: a status, and a sentence for whoever sent it."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass
class Session:
    """What belongs to one browser: its uploads, and the names under which its tabs ask."""

    uploads: set[str] = field(default_factory=set)
    hashes: set[str] = field(default_factory=set)
    sizes: deque[tuple[float, int]] = field(default_factory=deque)

    def held(self, now: float) -> int:
        """Return the bytes of the uploads that are still kept."""
        while self.sizes and self.sizes[0][0] < now - UPLOADS_LAST:
            self.sizes.popleft()
        return sum(size for _, size in self.sizes)


class Gate:
    """ASGI middleware that hands on what is allowed and answers everything else with one sentence.

    Args:
        app: the application behind it.
        clock: seconds, growing.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._owners: dict[str, str] = {}  # the name a tab asks under -> its session
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page uses no web socket
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._admit(scope, receive, send)
        except Refused as refused:
            await PlainTextResponse(str(refused), refused.status)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        _check_origin(headers, method)
        cookie = f"pysal-demo-{(urlsplit('//' + headers.get('host', '')).port or 80)}"  # browsers keep one for all ports
        token = cookie_parser(headers.get("cookie", "")).get(cookie, "")
        if method in ("GET", "HEAD") and PUBLIC.fullmatch(path):
            await self._app(scope, receive, self._greeting(send, cookie, token) if path == "/" else send)
            return
        if method not in OWN or not OWN[method].fullmatch(path):
            raise Refused(404, "pysal demo: there is nothing here.")
        session = self._sessions.get(token)
        if session is None:
            raise Refused(403, "pysal demo: this page is of an earlier server or another browser: load it again.")
        action = path.removeprefix("/gradio_api/")
        if method == "GET":
            self._check_own(token, session, action, scope["query_string"].decode("latin-1"))
            await self._app(scope, receive, send)
        elif action == "upload":
            await self._upload(session, scope, receive, send)
        else:
            body = self._checked(token, session, await _whole(headers, receive))
            changed = [pair for pair in scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")]
            changed.append((b"content-length", str(len(body)).encode()))
            await self._app({**scope, "headers": changed}, _once(body, receive), send)

    def _greeting(self, send: Send, cookie: str, token: str) -> Send:
        """Return a `send` that gives a new browser its session."""
        with self._lock:
            known = token in self._sessions
            if not known:
                token = secrets.token_urlsafe(24)
                self._sessions[token] = Session()
                while len(self._sessions) > SESSIONS:
                    _, forgotten = self._sessions.popitem(last=False)
                    for name in forgotten.hashes:
                        self._owners.pop(name, None)
            self._sessions.move_to_end(token)

        async def greeting(message: Message) -> None:
            if message["type"] == "http.response.start" and not known:
                MutableHeaders(scope=message).append("set-cookie", f"{cookie}={token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        return greeting

    def _check_own(self, token: str, session: Session, action: str, query: str) -> None:
        """Refuse a stream or a file of somebody else."""
        if action.startswith("file="):
            if action.removeprefix("file=") not in session.uploads:
                raise Refused(403, "pysal demo: this file was not uploaded by this browser.")
        elif action.startswith("heartbeat/"):
            self._claim(token, session, action.removeprefix("heartbeat/"))
        elif action == "queue/data":
            self._claim(token, session, *parse_qs(query).get("session_hash", [""]))

    def _claim(self, token: str, session: Session, *names: object) -> None:
        """Note that tabs of these names are this session's, unless they are another's."""
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9]{1,64}", name):
                raise Refused(400, "pysal demo: a request must say which tab it is of.")
            with self._lock:
                if self._owners.setdefault(name, token) != token:
                    raise Refused(403, "pysal demo: this tab is another browser's.")
                session.hashes.add(name)
                if len(session.hashes) > SESSIONS:
                    raise Refused(429, "pysal demo: too many tabs: load the page again.")

    def _checked(self, token: str, session: Session, body: bytes) -> bytes:
        """Return a question as it is handed on: with paths of this session's uploads, and none beside."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "pysal demo: a request must be JSON.") from None
        if not isinstance(asked, dict):
            raise Refused(400, "pysal demo: a request must be a JSON object.")
        self._claim(token, session, asked.get("session_hash"))
        return json.dumps({name: _without_strange_files(value, session.uploads) for name, value in asked.items()}).encode()

    async def _upload(self, session: Session, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand an upload on, and note whose its files are."""
        size = _length(Headers(scope=scope), MOST_BYTES + 64 * 1024)  # what is around the file takes some bytes, too
        now = self._clock()
        with self._lock:
            if (
                session.held(now) + size > MOST_OF_A_SESSION
                or sum(one.held(now) for one in self._sessions.values()) + size > MOST_OF_ALL
            ):
                raise Refused(429, "pysal demo: the uploads of the last two hours fill the room there is: try again later.")
            session.sizes.append((now, size))
        parts: list[bytes] = []
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and status == 200:
                parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    session.uploads |= set(json.loads(b"".join(parts)))
            await send(message)

        await self._app(scope, receive, noting)


def _check_origin(headers: Headers, method: str) -> None:
    """Refuse what a page of another site, another port or a file sends; links to the page are followed."""
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None:
        # urlsplit raises ValueError for brackets that do not close
        match = re.fullmatch(r"https?://(.+)", origin)
        if match is None or match[1].lower() != host.lower():
            raise Refused(403, "pysal demo: pages of other sites may not ask this server.")
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
    if site not in ("none", "same-origin") and not (method == "GET" and mode == "navigate"):
        raise Refused(403, "pysal demo: pages of other sites may not ask this server.")


def _length(headers: Headers, most: int) -> int:
    """Return the length that a request says it has."""
    given = headers.get("content-length", "")
    if not re.fullmatch(r"\d{1,12}", given):
        raise Refused(411, "pysal demo: a request must say how long it is.")
    if int(given) > most:
        raise Refused(413, f"pysal demo: a request must be at most {most} bytes, got {given}.")
    return int(given)


async def _whole(headers: Headers, receive: Receive) -> bytes:
    """Return the body of a request of moderate size."""
    _length(headers, MOST_ASKED)
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "pysal demo: the request broke off.")
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _once(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that tells a body that was read already, then what comes after it."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _without_strange_files(value: Any, uploads: set[str]) -> Any:
    """Return what was asked, each file in it as its path alone.

    Raises:
        Refused: a file that this session did not upload, or anything that looks like one.
    """
    if isinstance(value, list):
        return [_without_strange_files(one, uploads) for one in value]
    if not isinstance(value, dict):
        return value
    if not value.keys() & {"path", "url", "meta", "b64"}:
        return {name: _without_strange_files(one, uploads) for name, one in value.items()}
    path = value.get("path")
    if value.keys() - FILE or not isinstance(path, str) or path not in uploads:
        raise Refused(403, "pysal demo: this file was not uploaded by this browser.")
    name = value.get("orig_name")
    return {"path": path, "orig_name": name if isinstance(name, str) else None, "meta": {"_type": "gradio.FileData"}}
