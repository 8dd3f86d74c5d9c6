"""One request and what came of it: a chat completion that is streamed, timed on the event loop's monotonic clock.

It speaks to any OpenAI-compatible server. Tokens are those of the server's usage; times are those at which text
arrived, so neither a chunk with nothing but a role nor a keep-alive comment counts as a token.
"""

import array
import asyncio
import json
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

OUTCOMES = ("ok", "incomplete", "error", "refused")
UNFINISHED = "unfinished"
"""The outcome of a request that the load's end cut off: neither the server's success nor its fault."""
REFUSED = (429, 503)
DATA = b"data:"


@dataclass
class Row:
    """One request. Times are seconds on the load's clock, None where the moment never came."""

    index: int
    due: float
    """When the arrivals wanted it sent."""
    images: int = 0
    repeated: bool = False
    language: str = ""
    share: float = 1.0
    """Of the workload's output length that was asked for: less where a user begins in the middle of an answer."""
    sent: float | None = None
    first: float | None = None
    """The first non-empty text, reasoning or answer."""
    first_answer: float | None = None
    last: float | None = None
    end: float | None = None
    outcome: str = UNFINISHED
    status: int | None = None
    finish: str | None = None
    """OpenAI's finish reason."""
    ended: str | None = None
    """How it ended by the `qvq` object, where there is one."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    visual_tokens: int | None = None
    chunks: int = 0
    message: str | None = None
    """What the server said, or what broke, where it is not ok."""
    times: "array.array[float]" = field(default_factory=lambda: array.array("d"), repr=False)
    """When each chunk of text came. Stays out of result files: the histograms have it."""

    @property
    def time_to_first_token(self) -> float | None:
        return difference(self.first, self.sent)

    @property
    def time_to_first_answer_token(self) -> float | None:
        return difference(self.first_answer, self.sent)

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds between two tokens, on average, from the first to the last."""
        if self.output_tokens is None or self.output_tokens < 2 or self.first is None or self.last is None:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def end_to_end(self) -> float | None:
        return difference(self.end, self.sent) if self.outcome == "ok" and self.share == 1 else None

    @property
    def client_queue(self) -> float | None:
        """Seconds that this client was late in sending it."""
        return difference(self.sent, self.due)


def difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


class Reply(Protocol):
    """A response whose head has arrived."""

    status: int

    def parts(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive, cut anywhere. Raises ConnectionError where it breaks off."""


Send = Callable[[dict[str, Any]], AbstractAsyncContextManager[Reply]]
"""Sends a body to the chat route. Raises ConnectionError where there is no server."""


@contextmanager
def connection_errors() -> Iterator[None]:
    """What aiohttp raises where a server is away, breaks off or is too slow, as a ConnectionError."""
    try:
        yield
    except (TimeoutError, aiohttp.ClientError) as error:
        raise ConnectionError(str(error) or type(error).__name__) from None


class HttpReply:
    """aiohttp's response as a Reply."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response, self.status = response, response.status

    async def parts(self) -> AsyncIterator[bytes]:
        with connection_errors():
            async for part in self.response.content.iter_any():
                yield part


def http(session: aiohttp.ClientSession, url: str, key: str | None) -> Send:
    """A Send over a session's pool of connections."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    @asynccontextmanager
    async def send(body: dict[str, Any]) -> AsyncIterator[Reply]:
        with connection_errors():
            response = await session.post(f"{url}/v1/chat/completions", data=json.dumps(body), headers=headers)
        async with response:
            yield HttpReply(response)

    return send


def session(timeout_s: float) -> aiohttp.ClientSession:
    """One pool for a load: as many connections as it has streams, each request at most `timeout_s` seconds."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each stream is an open file, and 1,024 the usual limit
    limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=30)
    # A server closes an idle connection after 5 s or more: what is sent on one meanwhile is lost.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    jar = aiohttp.DummyCookieJar()  # a balancer's cookie would bind all users to one server
    return aiohttp.ClientSession(connector=connector, cookie_jar=jar, timeout=limits, read_bufsize=2**18)


async def lines(reply: Reply) -> AsyncIterator[bytes]:
    """The body's lines without their ends."""
    rest = b""
    async for part in reply.parts():
        *whole, rest = (rest + part).split(b"\n") if rest else part.split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


async def ask(send: Send, body: dict[str, Any], row: Row) -> None:
    """Sends the request and fills its row; never raises but for a cancellation, which leaves it `unfinished`."""
    clock = asyncio.get_running_loop().time
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    row.sent = clock()
    try:
        async with send(body) as reply:
            row.status = reply.status
            if reply.status != 200:
                row.outcome = "refused" if reply.status in REFUSED else "error"
                row.message = said(b"".join([part async for part in reply.parts()]))
                return
            async for line in lines(reply):
                if line.startswith(DATA) and (data := line[len(DATA) :].strip()) != b"[DONE]":
                    read(row, json.loads(data), clock)
        if row.outcome == UNFINISHED:
            row.outcome = "ok" if row.finish and row.output_tokens is not None else "incomplete"
            if row.finish in ("abort", "error") or row.ended == "timeout":  # as vLLM writes at its end, with usage
                row.outcome, row.message = "incomplete", f"the server ended it: {row.ended or row.finish}"
            elif row.outcome == "incomplete":
                row.message = "the stream ended without " + ("usage" if row.finish else "a finish reason")
    except OSError as error:
        # A stream that had begun was cut; one that had not never got through.
        row.outcome, row.message = ("incomplete" if row.chunks else "error"), f"{type(error).__name__}: {error}"
    except ValueError as error:
        row.outcome, row.message = "error", f"an event that is no JSON: {error}"
    except (TypeError, AttributeError) as error:
        row.outcome, row.message = "error", f"an event that is none of a chat completion's: {error}"
    finally:
        row.end = clock()


def read(row: Row, event: dict[str, Any], clock: Callable[[], float]) -> None:
    """One event of the stream."""
    if event.get("error"):
        said = event["error"] if isinstance(event["error"], dict) else {}
        # vLLM's own check of the queue can come after the status was sent.
        row.outcome = "refused" if said.get("code") in REFUSED and not row.chunks else "error"
        row.message = str(said.get("message", event["error"]))[:200]
        return
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        answer = delta.get("content")
        if answer or delta.get("reasoning") or delta.get("reasoning_content"):
            row.last = now = clock()
            row.times.append(now)
            row.chunks += 1
            if row.first is None:
                row.first = now
            if answer and row.first_answer is None:
                row.first_answer = now
        row.finish = choice.get("finish_reason") or row.finish
    if usage := event.get("usage"):
        row.prompt_tokens, row.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        details = usage.get("completion_tokens_details") or {}
        row.reasoning_tokens = details.get("reasoning_tokens", row.reasoning_tokens)
    if qvq := event.get("qvq"):
        row.ended, row.visual_tokens = qvq.get("ended"), qvq.get("visual_tokens")
        row.reasoning_tokens = qvq.get("reasoning_tokens", row.reasoning_tokens)


def said(body: bytes) -> str:
    """The message in the body of an error, OpenAI's or any."""
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]
