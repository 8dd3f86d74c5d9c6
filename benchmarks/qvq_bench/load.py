"""One load: who sends when, for how long, and what is watched meanwhile."""

import array
import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qvq_bench.client import Row, Send, ask
from qvq_bench.workload import Request

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples, less their whole parts, are even over 0 to 1, however many are taken, and over neighbours too."""
PAUSE_S = 1.0
"""For which a user that was refused, or got an error, waits: asking again at once would be another load."""
LAG_PERIOD_S = 0.01
LAG_LIMIT_S = 0.05
"""A client whose event loop is later than this for 5 % of the time measures itself: the result is not valid."""

Requests = Callable[[int], Awaitable[Request]]
Watch = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Load:
    """How much is asked, and for how long. At least one of `requests` and `seconds` must be given."""

    level: float
    """Users of a closed loop, or requests a second."""
    due: Iterator[float] | None = None
    """Open loop: when requests are due, in seconds from the start. None for a closed loop."""
    think: float = 0.0
    requests: int | None = None
    seconds: float | None = None
    """The measured time, after the warm-up."""
    warmup: float = 0.0
    """Seconds before anything is measured; the users of a closed loop begin one after another in its first half.

    Where the workload sets each length, each user begins in the middle of an answer (`Workload.request`): answers all
    begun together would end together, their next prompts would come in waves, and the KV cache would fill for as long
    as the longest answer takes.
    """
    drain: bool = True
    """Wait for what still runs at the end; otherwise it is cut off, and counted as `unfinished`."""
    first_index: int = 0
    """Of the workload's requests: a step that begins where the last one ended meets no cached image or prefix."""

    @property
    def users(self) -> int:
        """Of a closed loop; 0 for an open one. They take the first indexes, one each, in their order."""
        return int(self.level) if self.due is None else 0

    def share(self, index: int) -> float:
        """Of the answer to that request, what is left of it as it is sent: even over the users, 0 to 1."""
        number = index - self.first_index
        return (number + 1) * GOLDEN % 1 if self.warmup and number < self.users else 1.0


@dataclass
class Measured:
    """What a load left behind. Times are seconds from its start."""

    rows: list[Row] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    lag: "array.array[float]" = field(default_factory=lambda: array.array("d"))
    """How late the event loop was, each LAG_PERIOD_S from the start."""
    start: float = 0.0
    """Of the measured window."""
    stop: float = 0.0
    missed: int = 0
    """Samples that failed."""
    interrupted: bool = False
    next_index: int = 0


async def run_load(
    send: Send,
    requests: Requests,
    load: Load,
    model: str,
    watch: Watch | None = None,
    sample_every: float = 0.5,
    progress: Callable[[Measured, int], None] | None = None,
) -> Measured:
    """Puts a load on a server. A cancellation ends it early and keeps what was measured (`interrupted`)."""
    clock = asyncio.get_running_loop().time
    began, made = clock(), Measured(start=load.warmup)
    counter = itertools.count(load.first_index + load.users)
    running: set[asyncio.Task[Row]] = set()
    broken: list[asyncio.Task[Row]] = []
    until = began + load.warmup + load.seconds if load.seconds is not None else float("inf")
    final = load.first_index + load.requests if load.requests is not None else float("inf")

    async def one(index: int, due: float) -> Row:
        due = clock() if load.due is None else due  # before the request is made: a client that makes them late is late
        request = await requests(index)
        body = request.body | {"model": model}
        row = Row(
            index,
            due,
            request.images,
            request.repeated,
            request.language,
            request.share,
        )
        made.rows.append(row)
        await ask(send, body, row)
        return row

    def over(task: asyncio.Task[Row]) -> None:
        """Of an open loop's: what could not be made stays, for `arrive` and `finished` to raise."""
        if task.cancelled() or task.exception() is None:
            running.discard(task)
        else:
            broken.append(task)

    async def user(number: int) -> None:
        await asyncio.sleep(load.warmup / 2 * number / load.level)
        index = load.first_index + number
        while clock() < until and index < final:
            row = await one(index, 0.0)
            await asyncio.sleep(load.think if row.outcome == "ok" else max(load.think, PAUSE_S))
            index = next(counter)

    async def arrive() -> None:
        for offset in load.due or ():
            if began + offset >= until:
                made.stop = load.warmup + (load.seconds or 0.0)  # nothing was due in what is left of the window
                break
            if (index := next(counter)) >= final:
                break
            await asyncio.sleep(began + offset - clock())
            for task in broken:
                task.result()
            running.add(task := asyncio.create_task(one(index, began + offset)))
            task.add_done_callback(over)

    watchers = [asyncio.create_task(measure_lag(made, began, LAG_PERIOD_S))]
    if watch:
        watchers.append(asyncio.create_task(sample(made, watch, began, sample_every)))
    if progress:
        watchers.append(asyncio.create_task(tell(made, progress)))
    if load.due is None:
        senders = [asyncio.create_task(user(number)) for number in range(load.users)]
    else:
        senders = [asyncio.create_task(arrive())]
    try:
        await finished(senders, running, until, load.drain)
    except asyncio.CancelledError:
        made.interrupted = True
    finally:
        await stop([*senders, *running])
        if made.interrupted or not made.stop:
            made.stop = min(clock(), until) - began
        made.next_index = next(counter)
        if watch:  # the state in which the load left the server
            with contextlib.suppress(ConnectionError):
                made.samples.append({"at": clock() - began, **await watch()})
        await stop(watchers)
    for row in made.rows:
        shift(row, began)
    return made


async def finished(
    senders: list[asyncio.Task[None]], running: set[asyncio.Task[Row]], until: float, drain: bool
) -> None:
    """Until all is answered, or without a drain until the load's time is over. Raises what a sender raised."""
    clock = asyncio.get_running_loop().time
    waiting: set[asyncio.Task[Any]] = set(senders)
    while waiting:
        limit = None if drain or until == float("inf") else max(until - clock(), 0)
        done, left = await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        waiting = (left | running) - done
        if limit is not None and clock() >= until:
            return


async def stop(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancels the tasks, and waits until they are over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def measure_lag(made: Measured, began: float, period: float) -> None:
    """How late this event loop is at even times: what the client adds to each time that it measures.

    A time that passed while it stood still is looked at when it goes on, so that a long stall counts for all of them.
    """
    clock = asyncio.get_running_loop().time
    for number in itertools.count(1):
        due = began + number * period
        await asyncio.sleep(due - clock())
        made.lag.append(clock() - due)


async def sample(made: Measured, watch: Watch, began: float, period: float) -> None:
    """Samples of the server's state, at even times; those that fail, or whose time passed meanwhile, are counted."""
    clock = asyncio.get_running_loop().time
    number = 0
    while True:
        await asyncio.sleep(began + number * period - clock())
        at = clock() - began
        try:
            made.samples.append({"at": at, **await watch()})
        except (ConnectionError, ValueError, KeyError):  # the last two: a page that is none of metrics
            made.missed += 1
        following = max(number + 1, math.ceil((clock() - began) / period))
        made.missed += following - number - 1
        number = following


async def tell(made: Measured, progress: Callable[[Measured, int], None]) -> None:
    """Shows how far it is, twice a second."""
    while True:
        await asyncio.sleep(0.5)
        progress(made, sum(row.end is not None for row in made.rows))


def shift(row: Row, began: float) -> None:
    """The row's times from the event loop's clock to seconds since the load's start."""
    for name in ("due", "sent", "first", "first_answer", "last", "end"):
        if (value := getattr(row, name)) is not None:
            setattr(row, name, value - began)
    row.times = array.array("d", (value - began for value in row.times))
