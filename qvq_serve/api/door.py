"""The door: an ASGI middleware before everything, that knows each request, its key, and what may come in.

Closed routes, keys, body size, drain, overload, one log line a request. Pure ASGI, so that streams pass untouched.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qvq_serve import metrics
from qvq_serve.api import lifecycle
from qvq_serve.engine import API_KEY_VARIABLE, launched_profile
from qvq_serve.hooks.chain import names
from qvq_serve.profile import Profile, keys_in

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

log = logging.getLogger("vllm.qvq_serve")
OPEN_ROUTES = ("/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/chat/completions")
PROBES = ("/health", "/ready", "/metrics")
"""They need no key, and are logged only where they fail."""
STALL_S, LOOK_S = 60.0, 5.0
"""That a client may let a body, or an answer that it does not read, wait; and how often that is looked at. As nginx."""
GONE = 499
"""The status in the log of a request whose client went away, as nginx's."""
DROPPED_HEADERS = (b"x-vllm-priority", b"x-data-parallel-rank", b"x-request-id", b"x-session-id")
"""By which a client would choose its place in the queue, or the engine's name of a request, which must be unique."""


class Keys:
    """The keys that open the server: one that was given, or the lines of a file, read again when the file changes."""

    def __init__(self, profile: Profile, given: str | None) -> None:
        self.file = Path(profile.api_key_file) if profile.api_key_file else None
        self.digests = [digest(given)] if given else []
        self.stamp: tuple[int, int] | None = None

    def any(self) -> bool:
        return bool(self.file or self.digests)

    def refresh(self) -> None:
        """Read the file again if it changed; a file that cannot be read, or has no key, leaves the keys as they are."""
        if self.file is None:
            return
        try:
            stat = self.file.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self.stamp:
                return
            found = keys_in(self.file)
        except (OSError, UnicodeDecodeError) as error:
            log.warning("the file of keys cannot be read (%s); the keys stay as they are", error)
            return
        self.stamp = stamp
        if found:
            self.digests = [digest(key) for key in found]
        else:
            log.warning("the file of keys has no key; the keys stay as they are")

    def owner(self, authorization: str) -> str | None:
        """The digest of the key in an Authorization header, if it opens; compared in constant time with each."""
        self.refresh()
        scheme, _, key = authorization.partition(" ")
        given = digest(key.strip(" \t"), "latin-1") if scheme.lower() == "bearer" else ""
        matches = [known for known in self.digests if hmac.compare_digest(known, given)]
        return matches[0] if matches else None


def digest(key: str, encoding: str = "utf-8") -> str:
    """Of the key's bytes, as a file or a client has them; a header's are read as Latin-1."""
    return hashlib.sha256(key.encode(encoding)).hexdigest()


class Refusal(Exception):
    """What the door answers itself."""

    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.headers = status, reason, message, headers or {}


class Door:
    """ASGI middleware; vLLM loads it by --middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.passages = set[Passage]()
        self.watching: asyncio.Task[None] | None = None
        self.profile = launched_profile()
        self.keys = Keys(self.profile, os.environ.get(API_KEY_VARIABLE))
        self.open_routes = {*OPEN_ROUTES, *names(self.profile.open_routes)}
        if self.profile.metrics_port:
            self.open_routes -= {"/metrics"}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Passage(self, scope, receive, send)
        self.passages.add(request)
        self.watching = self.watching or asyncio.create_task(self.watch(), name="stalled clients")
        try:
            admitted = request.admitted()
            await request.read_unsized()
            await self.app(admitted, request.receive, request.send)
        except Refusal as refusal:
            await request.refused(refusal)
        except asyncio.CancelledError:
            if not request.stalled:
                raise
            request.task.uncancel()
            await request.refused(Refusal(408, "stalled", f"the body has stood still for {STALL_S:g} s"))
        except Exception:
            request.status = request.status or 500  # Starlette answers it, outside of this
            raise
        finally:
            self.passages.discard(request)
            request.done()

    async def watch(self) -> None:
        """End requests whose clients stand still: each holds a place, and a drain."""
        while True:
            await asyncio.sleep(LOOK_S)
            for request in self.passages:
                if request.waiting and not request.stalled and time.monotonic() - request.waiting > STALL_S:
                    request.stalled = True
                    request.task.cancel()


class Passage:
    """One request on its way through the door."""

    def __init__(self, door: Door, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.door, self.scope, self._receive, self._send = door, scope, receive, send
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.path, self.method = scope["path"], scope["method"]
        self.id = clean(self.headers.get("x-request-id", "")) or uuid.uuid4().hex
        self.started, self.status, self.body_bytes = time.monotonic(), 0, 0
        self.counted = self.sent = False
        self.messages: deque[Message] = deque()
        self.state: dict[str, Any] = {}
        self.last_sent = self.started
        self.comments: asyncio.Task[None] | None = None
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        self.waiting = 0.0
        """Since when the client is waited for: to send more of its body, or to read."""
        self.arrived = self.ended = self.gone = self.stalled = False

    def admitted(self) -> MutableMapping[str, Any]:
        """The scope for the app. Raises Refusal."""
        door, profile = self.door, self.door.profile
        if self.path not in door.open_routes:
            raise Refusal(404, "closed", f"{self.path} is not served here; --open-routes {self.path} opens a route of "
                          "vLLM's (its requests go round the hooks, the guard and the limits)")  # fmt: skip
        owner = None
        if door.keys.any() and self.path not in PROBES and self.method != "OPTIONS":  # a browser asks without one
            owner = door.keys.owner(self.headers.get("authorization", ""))
            if owner is None:
                raise Refusal(
                    401, "key", "a valid key is needed: Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
                )
        if self.method == "POST":
            offers = b",".join(value for name, value in self.scope["headers"] if name == b"connection").lower()
            if "upgrade" in self.headers and b"upgrade" in offers:
                raise Refusal(400, "upgrade", f"Upgrade: {self.headers['upgrade']} is not spoken here, and its body is "
                              "lost; send HTTP/1.1 without it (Java's client: version(Version.HTTP_1_1))")  # fmt: skip
            if lifecycle.STATE.draining:
                raise Refusal(503, "draining", "the server is shutting down; ask another one", retry())
            if int_or(self.headers.get("content-length"), 0) > profile.max_body_bytes:
                raise self.too_large()
            lifecycle.STATE.in_flight += 1
            metrics.IN_FLIGHT.inc()
            self.counted = True
        kept = [(name, value) for name, value in self.scope["headers"] if name.lower() not in DROPPED_HEADERS]
        self.state = {**self.scope.get("state", {}), "qvq_owner": owner, "qvq_request_id": self.id}
        return {**self.scope, "headers": kept, "state": self.state}

    def too_large(self) -> Refusal:
        return Refusal(413, "body", f"the body has more than {self.door.profile.max_body_bytes} bytes")

    async def read_unsized(self) -> None:
        """Read a body that does not say its length, before the app does. Raises Refusal for one that is too large."""
        if self.method != "POST" or "content-length" in self.headers:
            return  # the HTTP server holds a body to its length
        while not self.arrived:
            self.messages.append(await self.received())
            if self.body_bytes > self.door.profile.max_body_bytes:
                raise self.too_large()

    async def receive(self) -> Message:
        return self.messages.popleft() if self.messages else await self.received()

    async def received(self) -> Message:
        """The next message of the HTTP server's."""
        if not self.arrived:
            self.waiting = time.monotonic()
        message = await self._receive()
        self.waiting = 0.0
        if message["type"] == "http.disconnect":
            self.gone, self.arrived = not self.ended, True
            return message
        self.body_bytes += len(message.get("body", b""))
        self.arrived = not message.get("more_body", False)
        return message

    async def keep_alive(self, seconds: float) -> None:
        """Comments in a silent stream, so that no proxy takes it for dead.

        Not vLLM's --sse-keep-alive-interval: its task for each chunk took 7 % of the throughput of the demo.
        """
        while True:
            await asyncio.sleep(seconds - (time.monotonic() - self.last_sent))
            if time.monotonic() - self.last_sent >= seconds:
                await self._send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
                self.last_sent = time.monotonic()

    async def send(self, message: Message) -> None:
        self.last_sent = time.monotonic()
        if message["type"] == "http.response.start":
            self.sent, self.status = True, message["status"]
            extra = {"x-request-id": self.id}
            if self.status in (429, 503) and self.path not in PROBES:
                metrics.REJECTED.labels("overload").inc()
                extra |= retry()
            silence = self.door.profile.keep_alive
            if silence and any(value.startswith(b"text/event-stream") for _, value in message.get("headers", ())):
                self.comments = asyncio.create_task(self.keep_alive(silence))
            message["headers"] = [*message.get("headers", ()), *encoded(extra)]
        elif not message.get("more_body"):
            self.ended = True
            if self.comments:
                self.comments.cancel()
        self.waiting = self.last_sent
        await self._send(message)
        self.waiting = 0.0

    async def refused(self, refusal: Refusal) -> None:
        """Send an answer of the door's own, shaped as OpenAI's."""
        metrics.REJECTED.labels(refusal.reason).inc()
        if self.sent:
            return
        self.status = refusal.status
        kind = {401: "AuthenticationError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
        shaped = {"message": refusal.message, "type": kind.get(refusal.status, "BadRequestError"), "param": None,
                  "code": refusal.status}  # fmt: skip
        body = json.dumps({"error": shaped}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": self.id}
        if self.body_bytes or self.method == "POST":
            headers["connection"] = "close"  # the rest of a body is not read
        headers |= refusal.headers
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": encoded(headers)})
        await self._send({"type": "http.response.body", "body": body})

    def done(self) -> None:
        """Count it, and log it: never a prompt, an image or a key."""
        if self.comments:
            self.comments.cancel()
        lifecycle.STATE.running -= self.state.get("qvq_running", False)
        if self.gone or (self.stalled and self.sent):
            self.status = GONE
        if self.counted:
            lifecycle.STATE.in_flight -= 1
            metrics.IN_FLIGHT.dec()
            if self.status == 200:
                lifecycle.STATE.finished.append(time.monotonic())
        if self.path in PROBES and self.status in (200, 0):
            return
        seconds = round(time.monotonic() - self.started, 4)
        fields = {"request_id": self.id, "method": self.method, "path": self.path, "status": self.status,
                  "seconds": seconds, "body_bytes": self.body_bytes}  # fmt: skip
        path = quote(self.path)  # as it came: a line break in it would begin a line of the log
        log.info("%s %s %s in %.3f s (%s)", self.method, path, self.status, seconds, self.id, extra=fields)


def retry() -> dict[str, str]:
    """When to come again, from the queue and the rate."""
    return {"retry-after": str(lifecycle.STATE.retry_after())}


def encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def clean(request_id: str) -> str:
    """A client's request id, if it is short and plain enough for a log."""
    plain = request_id.isascii() and request_id.replace("-", "").replace("_", "").isalnum()
    return request_id if plain and len(request_id) <= 128 else ""


def int_or(text: str | None, default: int) -> int:
    try:
        return int(text or default)
    except ValueError:
        return default
