"""From what a load left behind to the figures of one step: outcomes first, then speed, then memory, then the ceiling.

The window is the measured time: it begins after the warm-up and ends when no more is sent, or, where a number of
requests was asked for, with the last of them. A request counts for the time to its first token if it was sent in the
window, and for what comes later if it was still alive in the window.
"""

import itertools
import math
import statistics
from collections import Counter
from typing import Any

import numpy as np

from qvq_bench import ceiling
from qvq_bench.client import OUTCOMES, UNFINISHED, Row
from qvq_bench.load import LAG_LIMIT_S, LAG_PERIOD_S, Measured
from qvq_serve.hooks import OWN_ANSWER

QUANTILES = (50, 90, 95, 99, 99.9)
LATENCIES = ("time_to_first_token", "time_to_first_answer_token", "time_per_output_token", "end_to_end", "client_queue")
BINS_PER_DECADE, LOWEST_S = 50, 1e-6
"""Of the histograms: bin i counts values from LOWEST_S x 10^(i/50) on, 4.7 % wide."""
LEAST_CHUNKS = 64
"""Chunks of a cut-off stream for its time per token to count, where none was finished."""
QUEUE_LIMIT_S = 0.25
"""An open-loop client that sends later than this at its 99th percentile does not make the load that it says."""


def summarise(made: Measured, load: float, judged: bool) -> dict[str, Any]:
    """The figures of a step; seconds, tokens and bytes. A figure that cannot be known is None.

    `judged`: answers end where the model ends them. Where each length is set by the workload (`ignore_eos`), nothing is
    said of usefulness.
    """
    window = max(made.stop - made.start, 0.0)
    alive = [row for row in made.rows if row.end is None or row.end >= made.start]
    per_chunk = tokens_per_chunk(alive)
    inside = {row.index: tokens_between(row, made.start, made.stop, per_chunk or 0.0) for row in alive}
    output = None if per_chunk is None and any(row.chunks for row in alive) else sum(inside.values())
    outcomes = Counter(row.outcome for row in alive)
    ended = sum(outcomes[name] for name in OUTCOMES)
    seen = [sample for sample in made.samples if made.start <= sample["at"] <= made.stop]
    whole = [row for row in alive if row.outcome == "ok" and row.share == 1]
    memory = memory_figures(seen, whole) | {"samples": len(seen), "samples_missed": made.missed}
    gpus = max(int(first(made.samples, "server").get("gpus") or 1), 1)
    read = [row for row in alive if row.first is not None and made.start <= row.first <= made.stop]
    done = [row for row in alive if row.outcome == "ok" and row.end is not None and made.start <= row.end <= made.stop]
    latencies: dict[str, Any] = {name: values(made, alive, name, per_chunk) for name in LATENCIES}
    latencies["chunk_gap"] = gaps(alive, made.start, made.stop)
    return {
        "load": load,
        "window_s": window,
        "interrupted": made.interrupted,
        "in_flight": [under_way(made.rows, at) for at in (made.start, made.stop)],
        "sent": sum(row.sent is not None and made.start <= row.sent <= made.stop for row in made.rows),
        "outcomes": {name: outcomes[name] for name in (*OUTCOMES, UNFINISHED)},
        "ok_share": outcomes["ok"] / ended if ended else None,
        "errors": dict(Counter(row.message for row in alive if row.message).most_common(5)),
        "throughput": {
            "output_tokens_per_second": rate(output, window),
            "output_tokens_per_second_per_gpu": rate(output, window * gpus),
            "prompt_tokens_per_second": rate(sum(row.prompt_tokens or 0 for row in read), window),
            "requests_per_second": rate(len(done), window),
            "images_per_second": rate(sum(row.images for row in done), window),
        },
        "useful": useful(alive, inside, done, window) if judged else None,
        "latency": {name: quantiles(found) for name, found in latencies.items()},
        "histograms": {name: histogram(found) for name, found in latencies.items()},
        "memory": memory,
        "ceiling": reached(seen, read, window, output, memory),
        "client": client(made),
    }


def unsettled(step: dict[str, Any], warmup: float, kind: str) -> str | None:
    """What is wrong with a window that begins before the first answers have ended, or, of an open loop, in which ever
    more requests are under way; None where nothing is.

    Nothing is in a closed loop where the workload sets each length (`useful` is None), as its users begin in the middle
    of their answers.
    """
    answer = step["latency"]["end_to_end"]["p50"]
    if kind != "closed":
        before, after = step["in_flight"]
        if after - before <= max(0.05 * step["sent"], 2 * (before + after) ** 0.5):  # by chance, twice its deviation
            return None
        return (
            f"{after} requests were under way at the window's end and {before} at its begin: the load is above what "
            "the server carries, or the --warmup shorter than its answers; latencies would grow in a longer run"
        )
    if not warmup or step["useful"] is None or answer is None or answer <= warmup:
        return None
    return (
        f"an answer takes {answer:.0f} s at the median and the warm-up {warmup:g} s: the users are still in step, and "
        "a longer run would give another tokens/s; choose a --warmup of one answer's time"
    )


KNOWN_SHARE = 0.5


def known_before(step: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """What is wrong where images or prompts were to be new, and the server's caches had them; None where nothing is.

    `settings` are the workload's. What is one's own, or repeats itself, no seed draws; what is preempted is read again.
    """
    memory, images = step["memory"], settings["images"]
    if settings["own"] or settings["files"] or images["repeated"]:
        return None
    known = {"images": memory["image_hit_ratio"]}
    if not settings["text"]["shared_prefix"] and not memory["preemptions"]:
        known["prompts' tokens"] = memory["prefix_hit_ratio"]
    for what, hits in known.items():
        if hits is not None and hits >= KNOWN_SHARE:
            return (
                f"the server knew {hits:.0%} of the {what}: an earlier run sent them, as the same --seed draws the "
                "same; give this one another --seed"
            )
    return None


def under_way(rows: list[Row], at: float) -> int:
    """Requests that were sent and had not ended at a time."""
    return sum(row.sent is not None and row.sent <= at and (row.end is None or row.end >= at) for row in rows)


def rate(amount: float | None, seconds: float) -> float | None:
    return amount / seconds if amount is not None and seconds > 0 else None


def first(samples: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The first value of a kind that does not change."""
    return next((sample[name] for sample in samples if name in sample), {})


def tokens_per_chunk(rows: list[Row]) -> float | None:
    """Tokens of a chunk of text, of the requests whose tokens are known; None where none is."""
    known = [row for row in rows if row.output_tokens is not None and row.chunks]
    chunks = sum(row.chunks for row in known)
    return sum(row.output_tokens or 0 for row in known) / chunks if chunks else None


def tokens_between(row: Row, start: float, stop: float, per_chunk: float) -> float:
    """Output tokens of a request that came in a window, each chunk with its even share of the request's."""
    if not row.chunks:
        came = row.end is not None and start <= row.end <= stop
        return float(row.output_tokens or 0) if came else 0.0
    share = row.output_tokens / row.chunks if row.output_tokens is not None else per_chunk
    times = np.frombuffer(row.times)
    return float(np.searchsorted(times, stop, "right") - np.searchsorted(times, start, "right")) * share


def values(made: Measured, alive: list[Row], name: str, per_chunk: float | None) -> list[float]:
    """A latency's values of the requests that count for it, in seconds.

    Of a request that the load's end cut off, the time per token is that between its chunks, by the tokens of a chunk.
    It counts only from half an answer on: the first tokens of a stream wait for the prompts that came with it, and a
    stream of three tokens would show nothing else (a p95 of 931 ms instead of 76, on an H100 at 64 users).
    """
    at_start = name in ("time_to_first_token", "time_to_first_answer_token", "client_queue")
    rows = [row for row in alive if not at_start or (row.sent or 0.0) >= made.start]
    found = [getattr(row, name) for row in rows]
    if name == "time_to_first_token":  # cut off without one, after a longer wait than any: at least that long
        longest = max((value for value in found if value is not None), default=0.0)
        waited = [made.stop - (row.sent or 0.0) for row in rows if row.outcome == UNFINISHED and row.first is None]
        found += [seconds for seconds in waited if seconds > longest]
    if name == "time_per_output_token" and per_chunk is not None:
        finished = [row.chunks for row in alive if row.outcome == "ok"]
        least = float(np.median(finished)) / 2 if finished else LEAST_CHUNKS
        for row in rows:
            if row.output_tokens is None and row.chunks >= max(least, 2) and row.outcome == UNFINISHED:
                found.append((row.times[-1] - row.times[0]) / ((row.chunks - 1) * per_chunk))
    return [value for value in found if value is not None]


def gaps(rows: list[Row], start: float, stop: float) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Seconds between two chunks of a stream, of all streams, in the window."""
    streams = [np.frombuffer(row.times) for row in rows if row.chunks > 1]
    parts = [np.diff(times[(times >= start) & (times <= stop)]) for times in streams]
    return np.concatenate(parts) if parts else np.empty(0)


def quantiles(found: Any) -> dict[str, float | int | None]:
    """{"count", "mean", "p50" ... "p99.9", "max"}, in the values' unit; by linear interpolation."""
    if not len(found):
        return {"count": 0} | dict.fromkeys(["mean", *(f"p{q:g}" for q in QUANTILES), "max"])
    array = np.asarray(found, float)
    marks = {f"p{q:g}": float(value) for q, value in zip(QUANTILES, np.percentile(array, QUANTILES), strict=True)}
    return {"count": len(array), "mean": float(array.mean()), **marks, "max": float(array.max())}


def histogram(found: Any) -> dict[str, int]:
    """{bin: count}, without the empty bins."""
    array = np.maximum(np.asarray(found, float), LOWEST_S)
    if not len(array):
        return {}
    bins, counts = np.unique(np.floor(np.log10(array / LOWEST_S) * BINS_PER_DECADE).astype(int), return_counts=True)
    return {str(number): int(count) for number, count in zip(bins, counts, strict=True)}


def way(row: Row) -> str:
    """How a request ended, in one word: by the `qvq` object, else by its finish reason, else by its outcome."""
    if row.outcome != "ok":
        return row.outcome
    if row.ended:
        return row.ended
    return {"stop": "answered", "repetition": "looped"}.get(row.finish or "", row.finish or "")


def useful(alive: list[Row], inside: dict[int, float], done: list[Row], window: float) -> dict[str, Any]:
    """Tokens of requests that ended in an answer, answers a second, and where the other tokens went.

    A request that the load's end cut off may still have been answered, and is left out.
    """
    by_way: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    for row in alive:
        if row.outcome != UNFINISHED:
            by_way[way(row)] += inside[row.index]  # type: ignore[assignment]
            ended[way(row)] += 1
    total = sum(by_way.values())
    answered = sum(by_way[name] for name in OWN_ANSWER)
    lengths = [row.output_tokens for row in alive if row.output_tokens is not None and way(row) in OWN_ANSWER]
    return {
        "answers_per_second": rate(sum(way(row) in OWN_ANSWER for row in done), window),
        "output_tokens_per_second": rate(answered, window),
        "share": answered / total if total else None,
        "lost": {name: count / total for name, count in by_way.items() if name not in OWN_ANSWER and total},
        "ended": dict(ended),
        "tokens_per_answer": sum(lengths) / len(lengths) if lengths else None,
    }


def peak(samples: list[dict[str, Any]], name: str) -> float | None:
    found = [sample[name] for sample in samples if name in sample]
    return max(found) if found else None


def mean(samples: list[dict[str, Any]], name: str) -> float | None:
    found = [sample[name] for sample in samples if name in sample]
    return sum(found) / len(found) if found else None


def grown(samples: list[dict[str, Any]], name: str) -> float | None:
    """How much a counter grew from sample to sample; one that is lower than before has begun again."""
    found = [sample[name] for sample in samples if name in sample]
    steps = itertools.pairwise(found)
    return sum(later - (earlier if later >= earlier else 0.0) for earlier, later in steps) if len(found) > 1 else None


def ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def memory_figures(seen: list[dict[str, Any]], ok: list[Row]) -> dict[str, Any]:
    """The memory of the step at its peak, and the three headrooms (benchmarks/README.md defines them)."""
    capacity = first(seen, "kv_capacity_tokens") or None
    usage = peak(seen, "kv_usage")
    free = free_bytes(seen)
    kv_free = capacity * (1 - usage) if capacity and usage is not None else None  # type: ignore[operator]
    typical = sum((row.prompt_tokens or 0) + (row.output_tokens or 0) for row in ok) / len(ok) if ok else None
    busy = [sample for sample in seen if sample.get("kv_usage") and sample.get("running")]
    held = [sample["kv_usage"] * capacity / sample["running"] for sample in busy if capacity]
    if held:  # the longest answers end behind the window: no less than what those that ran held
        typical = max(typical or 0.0, statistics.median(held))
    last: dict[str, Any] = next((sample["memory"] for sample in reversed(seen) if "memory" in sample), {})
    return {
        "headroom": {
            "kv_tokens": kv_free,
            "bytes": min(free.values()) if free else None,
            "requests": kv_free / typical if kv_free is not None and typical else None,
        },
        "kv_capacity_tokens": capacity,
        "kv_usage_peak": usage,
        "kv_usage_mean": mean(seen, "kv_usage"),
        "typical_request_tokens": typical,
        "preemptions": grown(seen, "preemptions"),
        "running_mean": mean(seen, "running"),
        "running_peak": peak(seen, "running"),
        "waiting_mean": mean(seen, "waiting"),
        "waiting_peak": peak(seen, "waiting"),
        "prefix_hit_ratio": ratio(grown(seen, "prefix_hits"), grown(seen, "prefix_queries")),
        "image_hit_ratio": ratio(grown(seen, "image_hits"), grown(seen, "image_queries")),
        "free_bytes": free,
        "by_use": last,
        "host_available_bytes": lowest_host(seen),
        "api_resident_bytes": peak(seen, "api_resident_bytes"),
    }


def free_bytes(seen: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of each card (or of a CPU server's host) free at the peak: asked here, else as the server says."""
    low: dict[str, float] = {}
    local = any("cards" in sample for sample in seen)
    own = {name for sample in seen for name in sample.get("headroom", {})}  # this machine may have other cards too
    for sample in seen:
        cards = {name: card["total"] - card["used"] for name, card in sample.get("cards", {}).items()}
        if own & set(cards):
            cards = {name: left for name, left in cards.items() if name in own}
        for name, left in (cards if local else sample.get("headroom", {})).items():
            if not math.isnan(left):  # the server's driver did not answer
                low[name] = min(left, low.get(name, left))
    return low


def lowest_host(seen: list[dict[str, Any]]) -> float | None:
    found = [sample["host"]["available"] for sample in seen if "host" in sample]
    return min(found) if found else None


def reached(
    seen: list[dict[str, Any]], read: list[Row], window: float, output: float | None, memory: dict[str, Any]
) -> dict[str, float | None]:
    """The shares of the ceiling, and decode steps a second: tokens a second over the requests that ran."""
    running, capacity, usage = memory["running_mean"], memory["kv_capacity_tokens"], memory["kv_usage_mean"]
    steps = output / window / running if output is not None and running and window else None
    prompts = [row for row in read if seen and seen[0]["at"] <= (row.first or 0.0)]
    if output is None or steps is None or not capacity or usage is None:
        return {"steps_per_second": steps, "mbu": None, "mfu": None}
    cached = grown(seen, "prompt_tokens_cached") or 0.0
    found = ceiling.shares(
        first(seen, "server"), first(seen, "model"), steps, usage * capacity, prompts, window, output, cached
    )
    return {"steps_per_second": steps, **found}


def client(made: Measured) -> dict[str, Any]:
    """Whether the client kept up in the window: how late its event loop was, and how late it sent in all."""
    lag = quantiles(made.lag[int(made.start / LAG_PERIOD_S) : math.ceil(made.stop / LAG_PERIOD_S)])
    late = quantiles([row.client_queue for row in made.rows if row.client_queue is not None])
    why = None
    if (lag["p95"] or 0.0) > LAG_LIMIT_S:
        why = f"the client's event loop was {lag['p95']:.3f} s late at p95; more than {LAG_LIMIT_S} s measures itself"
    elif (late["p99"] or 0.0) > QUEUE_LIMIT_S:
        why = f"requests were sent {late['p99']:.3f} s late at p99; the load was not the one asked for"
    return {"valid": why is None, "why": why, "lag": lag, "queue": late}
