"""What our chat route adds to vLLM's own: seconds a request, and a streamed chunk; in turns against one server.

    python -m benchmarks.overhead RESULT.json

Starts the demo on the CPU and asks it greedily, one request at a time, through /v1/chat/completions (ours, all of our
hooks but the guard) and through /invocations, vLLM's own handler of the same request on the same engine. Ten rounds;
in each, both sides take turns; a figure is the median of the rounds' differences, with the least and the largest.
Since that is about nothing beside the machine's noise, the events of a stream are also put through our part of the
route alone, in this process, without and with a hook that looks at each piece.
"""

import asyncio
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from benchmarks.startup import PORT, QVQ_SERVE, URL, machine, wait_until_up
from qvq_serve.api.chat import streamed
from qvq_serve.hooks import Context, Hook, Part
from qvq_serve.hooks.chain import Chain
from qvq_serve.hooks.reasoning import PARSERS, Parsed
from qvq_serve.profile import Profile

ROUNDS, REQUESTS, CHUNKS = 10, 40, 400
ROUTES = {"ours": "/v1/chat/completions", "vllm": "/invocations"}


def short(client: httpx.Client, route: str) -> float:
    """Seconds of a request of one token, the median of many."""
    return statistics.median(timed(client, route, max_tokens=1) for _ in range(REQUESTS))


def stream(client: httpx.Client, route: str) -> float:
    """Seconds of a stream of CHUNKS tokens, the median of a few."""
    return statistics.median(timed(client, route, max_tokens=CHUNKS, ignore_eos=True, stream=True) for _ in range(4))


def timed(client: httpx.Client, route: str, **body: object) -> float:
    request = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0} | body
    started = time.perf_counter()
    client.post(f"{URL}{route}", json=request).raise_for_status()
    return time.perf_counter() - started


def alone(events: list[str], *hooks: Hook) -> float:
    """Seconds a chunk that our part of the route takes, over recorded events of a stream."""

    async def recorded() -> AsyncGenerator[str, None]:
        for event in events:
            yield event

    async def ours() -> float:
        parser = SimpleNamespace(parsed=lambda: Parsed(False, CHUNKS, CHUNKS), sent={"reasoning": "", "content": ""})
        request = SimpleNamespace(n=1, thinking_token_budget=None)
        context = Context(request, state={PARSERS: [parser]})
        started = time.perf_counter()
        async for _ in streamed(context, Chain(hooks, 1), recorded(), None):
            pass
        return time.perf_counter() - started

    async def theirs() -> float:
        started = time.perf_counter()
        async for _ in recorded():
            pass
        return time.perf_counter() - started

    def median(side: Callable[[], Coroutine[Any, Any, float]]) -> float:
        return statistics.median(asyncio.run(side()) for _ in range(50))

    return (median(ours) - median(theirs)) / len(events)


class Looking(Hook):
    """A hook that looks at each piece."""

    name = "looking"

    async def on_text(self, context: Context, choice: int, part: Part, text: str) -> None:
        """Nothing more."""


def main() -> None:
    command = [str(QVQ_SERVE), "--demo", "--port", str(PORT), "--open-routes", "/invocations", "--loop-pattern", "0"]
    with Path("/tmp/overhead.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    rounds = []
    try:
        wait_until_up(process)
        with httpx.Client(timeout=120) as client:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": CHUNKS, "ignore_eos": True}
            text = client.post(f"{URL}{ROUTES['vllm']}", json=body | {"stream": True}).text
            events = [f"{event}\n\n" for event in text.split("\n\n") if event]
            for number in range(-1, ROUNDS):  # the first warms up
                sides = sorted(ROUTES) if number % 2 else sorted(ROUTES, reverse=True)
                row = {f"{side}_{name}": measure(client, ROUTES[side])
                       for name, measure in (("request", short), ("stream", stream)) for side in sides}  # fmt: skip
                if number >= 0:
                    rounds.append(row)
                    print(row, flush=True)
    finally:
        process.terminate()
        process.wait(60)
    requests = [row["ours_request"] - row["vllm_request"] for row in rounds]
    chunks = [(row["ours_stream"] - row["vllm_stream"]) / CHUNKS for row in rounds]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.overhead RESULT.json",
        "machine": machine(),
        "added_us_a_request": spread(requests),
        "added_us_a_chunk": spread(chunks),
        "our_part_alone_us_a_chunk": round(alone(events) * 1e6, 2),
        "our_part_alone_with_a_hook_us_a_chunk": round(alone(events, Looking(Profile())) * 1e6, 2),
        "stream_ratio": round(statistics.median(row["ours_stream"] / row["vllm_stream"] for row in rounds), 4),
        "rounds": rounds,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "rounds"})


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and largest, in microseconds."""
    figures = {"median": statistics.median(seconds), "least": min(seconds), "largest": max(seconds)}
    return {name: round(value * 1e6, 1) for name, value in figures.items()}


if __name__ == "__main__":
    main()
