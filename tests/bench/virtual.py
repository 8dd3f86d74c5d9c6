"""A virtual clock: an event loop whose time jumps to whatever is due next, and a server that lives on it."""

import asyncio
import math
import random
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qvq_bench.client import Reply
from qvq_bench.workload import Request

from tests.bench.fake import STATUS, Plan, events

T = TypeVar("T")


class Selector(selectors.SelectSelector):
    """Where the loop would wait, its clock moves on instead."""

    loop: "Loop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is due any more: the code under test waits for ever")
        self.loop.now = round(self.loop.now + timeout, 9)  # no error that grows
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = Selector()
        selector.loop, self.now = self, 1_000.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, on a clock that begins at 1000 s and does not wait."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(work)


@dataclass
class Stream:
    """A Reply whose parts come at their times."""

    status: int
    plan: Plan
    body: dict[str, Any]
    arrived: float

    async def parts(self) -> AsyncIterator[bytes]:
        if self.status != 200:
            yield b'{"error": {"message": "no room"}}'
            return
        clock = asyncio.get_running_loop().time
        for at, event in events(self.plan, self.body):
            await asyncio.sleep(self.arrived + at - clock())
            half = len(event) // 2  # parts are cut anywhere
            yield event[:half]
            yield event[half:]
        if self.plan.ending == "cut":
            raise ConnectionResetError("the peer went away")
        if self.plan.ending == "hang":
            await asyncio.sleep(1e9)


def sender(plan_of: Callable[[dict[str, Any]], Plan]) -> Any:
    """A Send that answers each body by a plan."""

    @asynccontextmanager
    async def send(body: dict[str, Any]) -> AsyncIterator[Reply]:
        plan, arrived = plan_of(body), asyncio.get_running_loop().time()
        if plan.ending == "unreachable":
            raise ConnectionRefusedError("nobody listens")
        await asyncio.sleep(plan.accept)
        yield Stream(STATUS.get(plan.ending, 200), plan, body, arrived)

    return send


async def empty_request(index: int) -> Request:
    """A request that says nothing."""
    return Request(index, {"messages": [], "max_tokens": 8}, 0, "en", False)


@dataclass
class Simulated:
    """A server whose figures are functions of how many requests it works on, so that its capacity is known."""

    tpot: Callable[[int], float] = lambda n: 0.02
    ttft: Callable[[int], float] = lambda n: 0.1
    refuses_above: float = math.inf
    preempts_above: float = math.inf
    kv_tokens: int = 10_000_000
    noise: float = 0.0
    """Sigma of the lognormal noise on each request's times."""
    tokens: int = 20
    running: int = 0
    preemptions: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @asynccontextmanager
    async def send(self, body: dict[str, Any]) -> AsyncIterator[Reply]:
        if self.running >= self.refuses_above:
            await asyncio.sleep(0.05)
            yield Stream(503, Plan(ending="refuse"), body, 0.0)
            return
        self.running += 1
        self.preemptions += self.running > self.preempts_above
        noise = math.exp(self.rng.gauss(0, self.noise)) if self.noise else 1.0
        first, gap = self.ttft(self.running) * noise, self.tpot(self.running) * noise
        try:
            plan = Plan(first=first, gap=gap, chunks=self.tokens, prompt=100)
            yield Stream(200, plan, body, asyncio.get_running_loop().time())
        finally:
            self.running -= 1

    async def watch(self) -> dict[str, Any]:
        usage = min(self.running * (100 + self.tokens) / self.kv_tokens, 1.0)
        return {"running": self.running, "waiting": 0.0, "kv_usage": usage, "preemptions": self.preemptions,
                "kv_capacity_tokens": self.kv_tokens}  # fmt: skip
