"""A server of streams with exact, known timings, so that each figure of a client can be computed by hand.

A request's `model` is a plan, for example `first=0.5,gap=0.02,chunks=10,ending=cut`: Plan's fields. The same events are
given over a real socket here (`python -m tests.bench.fake PORT`) and on a virtual clock in tests/bench/virtual.py.
"""

import asyncio
import json
import sys
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What one request gets, times in seconds after its arrival."""

    accept: float = 0.0  # until the status line
    first: float = 0.1  # until the first text
    gap: float = 0.01  # between two chunks of text
    chunks: int = 10
    tokens: int = 1  # a chunk
    reasoning: int = 0  # chunks of it, before those of the answer
    prompt: int = 5  # tokens
    ending: str = (
        "stop"  # stop, length, repetition, abort, silent (no finish reason), cut, error, refuse, busy, bad, hang
    )
    continuous: int = 1  # usage in each chunk, where it is asked for
    qvq: str = ""  # `ended` of the qvq object
    comment: int = 1  # a keep-alive comment comes first
    limit: int = 0  # streams at once; more are refused

    @classmethod
    def parse(cls, text: str) -> "Plan":
        given = dict(item.split("=") for item in text.replace(";", ",").split(",") if "=" in item)
        kinds: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        return cls(**{name: kinds[name](value) for name, value in given.items()})


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STATUS = {"refuse": 503, "busy": 429, "bad": 400}


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def events(plan: Plan, body: dict[str, Any]) -> list[tuple[float, bytes]]:
    """Each event of a stream with its time; none where the plan's status is not 200."""
    options = body.get("stream_options") or {}
    total = plan.chunks * plan.tokens

    def usage(tokens: int) -> dict[str, Any]:
        return {"prompt_tokens": plan.prompt, "completion_tokens": tokens, "total_tokens": plan.prompt + tokens}

    def chunk(delta: dict[str, Any], tokens: int, finish: str | None = None, **more: Any) -> bytes:
        continuous = plan.continuous and options.get("continuous_usage_stats")
        more |= {"usage": usage(tokens)} if continuous else {}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], **more})

    made = [(plan.accept, b": keep-alive\n\n")] if plan.comment else []
    made.append((plan.accept, chunk({"role": "assistant", "content": ""}, 0)))
    for at in range(plan.chunks):
        part = "reasoning" if at < plan.reasoning else "content"
        made.append((plan.first + at * plan.gap, chunk({part: "ab " * plan.tokens}, (at + 1) * plan.tokens)))
    last = made[-1][0]
    if plan.ending in ("stop", "length", "repetition", "abort"):
        qvq = {"qvq": {"ended": plan.qvq, "visual_tokens": 4, "reasoning_tokens": plan.reasoning * plan.tokens}}
        made.append((last, chunk({}, total, plan.ending, **(qvq if plan.qvq else {}))))
    if plan.ending == "error":
        made.append((last, event({"error": {"message": "EngineCore encountered an issue", "code": 500}})))
    if plan.ending == "late":  # a status of 200, and then no room
        made[1:] = [(plan.accept, event({"error": {"message": "no room", "code": 503}}))]
    if plan.ending in ("stop", "length", "repetition", "abort", "silent"):
        made.append((last, event({"choices": [], "usage": usage(total)})))
        made.append((last, event(b"[DONE]")))
    return made


class Server(asyncio.Protocol):
    """HTTP/1.1 as far as the clients under test speak it; one write an event."""

    streams = 0
    """Streams that run, of all connections."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.data, self.streaming = transport, b"", False

    def connection_lost(self, error: Exception | None) -> None:
        self.over()

    def over(self) -> None:
        Server.streams -= self.streaming
        self.streaming = False

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, separator, rest = self.data.partition(b"\r\n\r\n")
        if not separator:
            return
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self.data = rest[length:]
        if lines[0].startswith("GET"):
            models = {"object": "list", "data": [{"id": "plan", "object": "model"}]}
            self.answer(200, json.dumps(models).encode())
        else:
            self.stream(json.loads(rest[:length]))

    def answer(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    def stream(self, body: dict[str, Any]) -> None:
        plan, loop = Plan.parse(body["model"]), asyncio.get_running_loop()
        if plan.limit and Server.streams >= plan.limit:
            plan = replace(plan, ending="refuse")
        if plan.ending in STATUS:
            refusal = json.dumps({"error": {"message": "no", "code": STATUS[plan.ending]}}).encode()
            loop.call_later(plan.accept, self.answer, STATUS[plan.ending], refusal)
            return
        Server.streams += 1
        self.streaming = True
        self.play(loop.time(), iter(events(plan, body)), plan, HEAD)

    def play(self, start: float, left: Any, plan: Plan, head: bytes = b"") -> None:
        """The next event at its time, and the one after it."""
        found, loop = next(left, None), asyncio.get_running_loop()
        if found is None:
            self.over()
            if plan.ending == "cut":
                self.transport.close()
            elif plan.ending != "hang":
                self.transport.write(b"0\r\n\r\n")
            return

        def write() -> None:
            if not self.transport.is_closing():
                self.transport.write(b"%s%x\r\n%s\r\n" % (head, len(found[1]), found[1]))
                self.play(start, left, plan)

        loop.call_at(start + found[0], write)


async def serve(port: int) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(Server, "127.0.0.1", port, backlog=4096)


async def main() -> None:
    await (await serve(int(sys.argv[1]))).serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
