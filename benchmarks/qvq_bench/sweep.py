"""The capacity of a server: the highest load that it carries within the objectives, found by measuring.

The search knows nothing of servers: it asks for the verdict on a load, and is tested on simulated ones.
"""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from qvq_serve.errors import UsageError, nearest

SHORT = {
    "ttft": "time_to_first_token",
    "ttfa": "time_to_first_answer_token",
    "tpot": "time_per_output_token",
    "e2e": "end_to_end",
    "gap": "chunk_gap",
}
LONG = {name: short.upper() for short, name in SHORT.items()}
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}
QUANTILE_NAMES = ("mean", "p50", "p90", "p95", "p99", "p99.9", "max")
CLOSE = 1.15
"""A verdict whose figure is within this factor of its limit is measured again: noise could turn it."""


@dataclass(frozen=True)
class Objective:
    """What a load must hold: latencies at most, each in seconds, and the share of requests that end well at least."""

    limits: dict[tuple[str, str], float]
    """{(latency, quantile): seconds}"""
    ok: float = 0.99
    min_headroom: float = 0.0
    """Share of the KV cache that is never used."""
    text: str = ""

    @classmethod
    def parse(cls, text: str, min_headroom: float = 0.0) -> "Objective":
        """`ttft_p95=5s,tpot_p95=80ms,ok=99%`. Raises UsageError with what was not understood."""
        limits: dict[tuple[str, str], float] = {}
        ok = 0.99
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = item.partition("=")
            short, _, quantile = name.partition("_")
            if name == "ok":
                ok = percent(item, value)
            elif equals and short in SHORT and quantile in QUANTILE_NAMES:
                limits[SHORT[short], quantile] = seconds(item, value)
            else:
                known = ["ok", *(f"{short}_{quantile}" for short in SHORT for quantile in QUANTILE_NAMES)]
                raise UsageError(f"--slo {item}: unknown objective.{nearest(name, known)} Example: ttft_p95=5s,ok=99%.")
        return cls(limits, ok, min_headroom, text)

    def judge(self, summary: dict[str, Any]) -> "Verdict":
        """Whether a step held, by how much, and what did not."""
        failed: list[str] = []
        worst = math.inf
        for (latency, quantile), limit in self.limits.items():
            found = summary["latency"][latency][quantile]
            if found is None:
                failed.append(f"{LONG[latency]} {quantile} was not measured")
                worst = 0.0
                continue
            worst = min(worst, limit / max(found, 1e-9))
            if found > limit:
                failed.append(f"{LONG[latency]} {quantile} {shown(found)} > {shown(limit)}")
        share = summary["ok_share"]
        if share is None or share < self.ok:
            failed.append("no request ended" if share is None else f"ok {share:.1%} < {self.ok:.1%}")
            worst = min(worst, 1 / CLOSE**2)
        memory = summary["memory"]
        if memory["preemptions"]:
            failed.append(f"{memory['preemptions']:.0f} preemptions")
            worst = min(worst, 1 / CLOSE**2)
        usage = memory["kv_usage_peak"]
        if self.min_headroom and (usage is None or memory.get("samples_missed", 0) > memory.get("samples", 0)):
            failed.append("KV headroom was not measured")
            worst = 0.0
        elif usage is not None and 1 - usage < self.min_headroom:
            failed.append(f"KV headroom {1 - usage:.1%} < {self.min_headroom:.1%}")
            worst = min(worst, (1 - usage) / self.min_headroom)
        return Verdict(not failed, worst, failed, summary["client"]["valid"])


def shown(seconds: float) -> str:
    """A time for a reader: `5 s`, `80 ms`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def seconds(item: str, text: str) -> float:
    """`80ms`, `5s`, `1.5m` in seconds."""
    for unit, factor in UNITS.items():
        number = text.removesuffix(unit)
        if number != text:
            try:
                if 0 < (value := float(number) * factor) < math.inf:
                    return value
            except ValueError:
                continue
    raise UsageError(f"--slo {item}: '{text}' is no time. Give for example 80ms or 5s.")


def percent(item: str, text: str) -> float:
    """`99%` or `0.99` as 0.99."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"--slo {item}: '{text}' is no share. Give for example 99%.")
    return value


@dataclass(frozen=True)
class Verdict:
    """One measurement of a load against the objective."""

    holds: bool
    margin: float
    """The smallest of limit / figure: above 1 it held."""
    failed: list[str]
    valid: bool = True
    """The client kept up."""


@dataclass
class Level:
    """All that was measured at one load."""

    load: float
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """By the majority; a tie does not hold, and neither does what the client could not keep up with."""
        return sum(verdict.holds and verdict.valid for verdict in self.verdicts) * 2 > len(self.verdicts)

    @property
    def close(self) -> bool:
        """Whether noise could turn it."""
        margins = sorted(verdict.margin for verdict in self.verdicts)
        return 1 / CLOSE < margins[len(margins) // 2] < CLOSE or len({verdict.holds for verdict in self.verdicts}) > 1


@dataclass(frozen=True)
class Capacity:
    """What a sweep found."""

    load: float | None
    """The highest load that held; None where not even the lowest did."""
    confidence: float | None
    """Share of that load's repeats that held."""
    next_load: float | None
    """The lowest load above it that did not hold; None where the sweep ended before one was found."""
    why: str
    """What ended the search: bracketed, highest, lowest, client, interrupted, or server (it was gone)."""
    levels: list[Level]


def so_far(levels: list[Level], why: str) -> Capacity:
    """What is known of the capacity: the lowest load that did not hold, and the highest below it that did."""
    valid = [Level(level.load, [verdict for verdict in level.verdicts if verdict.valid]) for level in levels]
    high = min((level.load for level in valid if level.verdicts and not level.holds), default=None)
    low = max((level.load for level in levels if level.holds and level.load < (high or math.inf)), default=None)
    verdicts = next((level.verdicts for level in levels if level.load == low), [])
    confidence = sum(verdict.holds for verdict in verdicts) / len(verdicts) if verdicts else None
    return Capacity(low, confidence, high, why, sorted(levels, key=lambda level: level.load))


Measure = Callable[[float, int], Awaitable[Verdict]]
"""(load, repeat) to a verdict."""


async def find_capacity(
    measure: Measure,
    start: float,
    highest: float,
    *,
    whole: bool,
    factor: float = 2.0,
    tolerance: float = 0.04,
    repeats: int = 3,
) -> Capacity:
    """Climbs by `factor` until a load does not hold, and bisects (in the ratio of loads) to within `tolerance`.

    A load that is near its limit is measured `repeats` times, and so are the two that bracket the capacity in the end:
    where they do not stand, the search goes on from there. `whole`: loads are whole numbers, users. The search ends
    early where the client did not keep up, since nothing above can be measured then.
    """
    levels: dict[float, Level] = {}

    async def level(load: float, times: int) -> Level:
        found = levels.setdefault(load, Level(load))
        while len(found.verdicts) < times or (found.close and len(found.verdicts) < repeats):
            found.verdicts.append(await measure(load, len(found.verdicts)))
            if not found.verdicts[-1].valid:
                raise ClientLate
        return found

    try:
        return await searched(level, levels, start, highest, whole, factor, tolerance, repeats)
    except ClientLate:
        return so_far(list(levels.values()), "client")


class ClientLate(Exception):
    """The client did not keep up."""


async def searched(
    level: Callable[[float, int], Awaitable[Level]],
    levels: dict[float, Level],
    start: float,
    highest: float,
    whole: bool,
    factor: float,
    tolerance: float,
    repeats: int,
) -> Capacity:
    """The search itself. Raises what `level` raises."""
    low: float | None = None
    high: float | None = None
    load = start
    while True:
        if (await level(load, 1)).holds:
            low = load
        else:
            high = load
        if high is None:  # climb
            if load < highest:
                load = min(rounded(load * factor, whole), highest)
            elif (await level(load, repeats)).holds:
                return so_far(list(levels.values()), "highest")
        elif low is None:  # down from the start
            lower = rounded(load / factor, whole)
            if lower < load and lower >= start / factor**6:
                load = lower
            elif not (await level(load, repeats)).holds:
                return so_far(list(levels.values()), "lowest")
            else:
                high = above(levels, load)
        elif high / low > 1 + tolerance and low < (middle := rounded(math.sqrt(low * high), whole)) < high:
            load = middle
        else:  # both neighbours must stand when they are measured again
            if not (await level(low, repeats)).holds:
                high = low
                low = below(levels, high)
                load = rounded(high / factor, whole) if low is None else low
            elif (await level(high, repeats)).holds:
                low, high = high, above(levels, high)
                load = low if high is not None else min(rounded(low * factor, whole), highest)
                if high is None and low >= highest:
                    return so_far(list(levels.values()), "highest")
            else:
                return so_far(list(levels.values()), "bracketed")


def rounded(load: float, whole: bool) -> float:
    return float(max(round(load), 1)) if whole else float(f"{load:.4g}")


def below(levels: dict[float, Level], load: float) -> float | None:
    """The highest measured load below that held."""
    return max((other for other, level in levels.items() if other < load and level.holds), default=None)


def above(levels: dict[float, Level], load: float) -> float | None:
    """The lowest measured load above that did not hold."""
    return min((other for other, level in levels.items() if other > load and not level.holds), default=None)


def bound_by(summary: dict[str, Any], verdict: Verdict) -> str:
    """Which limit the first load above the capacity met: client, KV cache, queue, encoder or compute; or unknown.

    By evidence, in this order: the client did not keep up; requests were preempted, or waited while the KV cache was
    nearly full; they were refused, or waited while there was room (the limit of sequences); the first token came late
    though tokens then came in time, and images were new (prefill: the vision encoder and the prompt); else compute.
    """
    memory, outcomes = summary["memory"], summary["outcomes"]
    usage, waiting = memory["kv_usage_peak"] or 0.0, memory["waiting_mean"] or 0.0
    if not verdict.valid:
        return "client"
    if memory["preemptions"] or (usage > 0.9 and waiting >= 0.5) or any("headroom" in text for text in verdict.failed):
        return "KV cache"
    if outcomes["refused"] or waiting >= 1:
        return "queue"
    late = [text for text in verdict.failed if text.startswith(("TTFT", "TTFA"))]
    decode = [text for text in verdict.failed if text.startswith(("TPOT", "GAP"))]
    if late and not decode and summary["throughput"]["images_per_second"]:
        return "encoder" if memory["waiting_mean"] is not None else "unknown"
    return "compute"
