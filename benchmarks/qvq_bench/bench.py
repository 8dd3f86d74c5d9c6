"""A bench: one workload against one server, step by step."""

import asyncio
import multiprocessing
import signal
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from tqdm import tqdm

from qvq_bench import client
from qvq_bench.arrivals import due_times
from qvq_bench.load import Load, Measured, run_load
from qvq_bench.server import Watcher
from qvq_bench.summary import summarise
from qvq_bench.workload import Request, Workload
from qvq_serve.errors import UsageError

LOCAL = ("127.0.0.1", "localhost", "::1")
IDLE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Target:
    """Where the server is, and how it is spoken to."""

    url: str
    key: str | None = field(default=None, repr=False)
    model: str | None = None
    """None: the first that it lists."""
    metrics_url: str | None = None
    timeout: float = 3600.0

    @property
    def metrics(self) -> str:
        return self.metrics_url or f"{self.url}/metrics"


@dataclass(frozen=True)
class Plan:
    """How long each step is."""

    requests: int | None = None
    seconds: float | None = None
    warmup: float = 0.0
    drain: bool = True
    sample_every: float = 0.5


DRAWN: list[Workload] = []
"""The workload of a worker process."""


def begin_worker(workload: Workload) -> None:
    """Ctrl-C is for the parent: it ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    DRAWN.append(workload)


def made_in_worker(index: int, share: float) -> Request:
    return DRAWN[0].request(index, share)


class Prepared:
    """Requests drawn ahead of need, in processes of their own: no stream may wait while an image is drawn."""

    def __init__(self, workload: Workload, workers: int = 2) -> None:
        self.made: dict[int, Future[Request]] = {}
        self.next_index = 0
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, context, initializer=begin_worker, initargs=(workload,))

    def ahead(self, stop: int) -> None:
        """Has the load's requests below `stop` drawn."""
        for index in range(self.next_index, stop):
            self.made[index] = self.pool.submit(made_in_worker, index, self.load.share(index))
        self.next_index = max(self.next_index, stop)

    async def __call__(self, index: int) -> Request:
        self.ahead(index + 32)
        return await asyncio.wrap_future(self.made.pop(index))

    async def begin(self, load: Load, count: int) -> None:
        """Waits until a load's first `count` requests, its users' at least, are there; forgets those of the last."""
        for left in self.made.values():
            left.cancel()
        self.made, self.load, self.next_index = {}, load, load.first_index
        self.ahead(load.first_index + count)
        await asyncio.gather(*(asyncio.wrap_future(made) for made in self.made.values()))

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def no_server(target: Target, error: Exception) -> UsageError:
    return UsageError(f"--url {target.url}: no server answers there ({error}).")


async def first_model(pool: aiohttp.ClientSession, target: Target) -> str:
    """The first model that the server lists. Raises ConnectionError without a server, UsageError without a model."""
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    url = f"{target.url}/v1/models"
    try:
        with client.connection_errors():
            async with pool.get(url, headers=headers, timeout=aiohttp.ClientTimeout(total=30)) as response:
                if response.status != 401:
                    return str((await response.json())["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise UsageError(f"{url}: lists no model. Name it by --model.") from None
    raise UsageError(f"--url {target.url}: the server wants a key: --key or QVQ_API_KEY.")


class Bench:
    """An open session with a server. `async with Bench(...)`; raises UsageError where there is no server."""

    def __init__(self, target: Target, workload: Workload, plan: Plan, show: bool = True) -> None:
        self.target, self.workload, self.plan, self.show = target, workload, plan, show
        self.model, self.next_index = target.model or "", 0

    async def __aenter__(self) -> "Bench":
        self.session = client.session(self.target.timeout)
        self.send = client.http(self.session, self.target.url, self.target.key)
        self.watch = Watcher(self.session, self.target.metrics, urlsplit(self.target.url).hostname in LOCAL)
        self.prepared = Prepared(self.workload)
        try:
            self.model = self.model or await first_model(self.session, self.target)
            try:
                self.before = await self.watch()
            except ConnectionError as error:
                raise UsageError(
                    f"--metrics-url {self.target.metrics}: nothing answers there ({error}); give the address of the "
                    "server's /metrics."
                ) from None
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, ConnectionError):
                raise no_server(self.target, error) from None
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.prepared.close()
        await self.session.close()

    async def step(self, level: float, what: str = "") -> tuple[dict[str, Any], Measured]:
        """Puts one load on the server; its summary, and all that was measured. Ctrl-C ends it early (`interrupted`)."""
        await self.idle()
        plan, arrivals = self.plan, self.workload.arrivals
        due = None if arrivals["kind"] == "closed" else due_times(arrivals, level, self.workload.seed + self.next_index)
        load = Load(
            level,
            due,
            arrivals.get("think", 0.0),
            plan.requests,
            plan.seconds,
            plan.warmup,
            plan.drain,
            self.next_index,
        )
        first = min(load.users + 8 if due is None else 64, plan.requests or sys.maxsize)
        await self.prepared.begin(load, first)
        with Bar(load, what, self.show) as told:
            made = await run_load(
                self.send, self.prepared, load, self.model, self.watch, plan.sample_every, told.update
            )
        self.next_index = max(made.next_index, self.next_index + 1)
        judged = not self.workload.ignores_eos
        return summarise(made, level, judged), made

    async def answers(self) -> bool:
        """Whether anything answers at the server's address."""
        try:
            await first_model(self.session, self.target)
        except ConnectionError:
            return False
        except UsageError:
            pass
        return True

    async def idle(self) -> None:
        """Waits until nothing runs: what a step left behind must not be measured with the next."""
        until = time.monotonic() + IDLE_TIMEOUT_S
        while time.monotonic() < until:
            try:
                now = await self.watch()
            except ConnectionError:
                return  # no metrics, for now: nothing can be told
            if not now.get("running") and not now.get("waiting"):
                return
            await asyncio.sleep(0.2)


class Bar:
    """A line of progress: what is done, tokens a second, KV cache in use, and the time left."""

    def __init__(self, load: Load, what: str, show: bool) -> None:
        self.began = time.monotonic()
        self.last = self.began, 0
        self.by_time = load.seconds is not None
        total = load.warmup + load.seconds if load.seconds is not None else load.requests
        unit = "s" if self.by_time else "req"
        form = "{desc} {percentage:3.0f}% |{bar:20}| {n:.0f}/{total:.0f} {unit}{postfix} [{remaining} left]"
        self.bar = tqdm(total=total, unit=unit, desc=what, file=sys.stderr, disable=not show, bar_format=form)

    def update(self, made: Measured, done: int) -> None:
        chunks, now = sum(row.chunks for row in made.rows), time.monotonic()
        speed = (chunks - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = now, chunks
        usage = made.samples[-1].get("kv_usage") if made.samples else None
        running = sum(row.end is None for row in made.rows)
        shown = f"KV {usage:.0%}" if usage is not None else "KV -"
        self.bar.set_postfix_str(f"{done} done, {running} running, {speed:.0f} tok/s, {shown}", refresh=False)
        self.bar.n = min(now - self.began if self.by_time else done, self.bar.total or done)
        self.bar.refresh()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
