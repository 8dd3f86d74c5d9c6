"""Two results side by side: ratios with their spread, and whether they can be told from noise."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from qvq_serve.errors import UsageError

SAME: dict[str, Callable[[dict[str, Any]], Any]] = {
    "card": lambda r: (r.get("server") or {}).get("card"),
    "workload": lambda r: r["workload"]["hash"],
    "seed": lambda r: r["workload"]["seed"],
    "objective": lambda r: r.get("objective"),
    "length of a step": lambda r: {key: value for key, value in r["plan"].items() if key != "sample_every"},
}
FIGURES: dict[str, tuple[str, ...]] = {
    "ok": ("ok_share",),
    "output tokens/s": ("throughput", "output_tokens_per_second"),
    "requests/s": ("throughput", "requests_per_second"),
    "TTFT p50": ("latency", "time_to_first_token", "p50"),
    "TTFT p95": ("latency", "time_to_first_token", "p95"),
    "TPOT p50": ("latency", "time_per_output_token", "p50"),
    "TPOT p95": ("latency", "time_per_output_token", "p95"),
    "end to end p50": ("latency", "end_to_end", "p50"),
    "KV peak": ("memory", "kv_usage_peak"),
}
STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Quantiles of Student's t for two-sided 95 %, by degrees of freedom from 1; the last for all above."""


def compare(a: dict[str, Any], b: dict[str, Any], anyway: bool = False) -> dict[str, Any]:
    """Ratios B / A of each figure at each load that both have, and of the capacities.

    Raises UsageError where the two did not measure the same thing, unless `anyway`.
    """
    other = {name: (read(a), read(b)) for name, read in SAME.items() if read(a) != read(b)}
    if other and not anyway:
        said = "; ".join(f"{name}: {one} and {two}" for name, (one, two) in other.items())
        raise UsageError(f"the results cannot be compared: {said}. --anyway compares them nevertheless.")
    loads = sorted({step["load"] for step in a["steps"]} & {step["load"] for step in b["steps"]})
    if not loads:
        raise UsageError("the results have no load in common, so that nothing can be compared.")
    for found in (a, b):
        late = [step["load"] for step in found["steps"] if not step["client"]["valid"]]
        if late and not anyway:
            raise UsageError(f"at load {late[0]:g} a client did not keep up; --anyway compares nevertheless.")
        if any(step.get("interrupted") for step in found["steps"]) and not anyway:
            raise UsageError("Ctrl-C ended one of the measurements early; --anyway compares nevertheless.")
    rows = []
    for load in loads:
        for name, path in FIGURES.items():
            one, two = (values(found, load, path) for found in (a, b))
            if one and two and all(one + two):
                rows.append({"load": load, "figure": name, **ratio_of(one, two)})
            elif one and two:  # a ratio of logarithms would leave them out
                rows.append({"load": load, "figure": name, "zeros": [one.count(0.0), two.count(0.0)],
                             "repeats": [len(one), len(two)]})  # fmt: skip
    capacities = [found.get("capacity", {}).get("load") for found in (a, b)]
    return {
        "differs": {name: list(pair) for name, pair in other.items()},
        "rows": rows,
        "capacity": capacities,
        "capacity_ratio": capacities[1] / capacities[0] if all(capacities) else None,
    }


def values(found: dict[str, Any], load: float, path: tuple[str, ...]) -> list[float]:
    """A figure of every repeat of a load that has it."""
    made = []
    for step in found["steps"]:
        if step["load"] == load:
            value: Any = step
            for key in path:
                value = value[key]
            if value is not None:
                made.append(float(value))
    return made


def ratio_of(one: list[float], two: list[float]) -> dict[str, Any]:
    """The ratio of geometric means, and its 95 % interval by Welch's t on logarithms; None without two repeats each.

    `told`: whether the interval leaves 1 out; None where there is no interval.
    """
    logs = [[math.log(value) for value in side] for side in (one, two)]
    difference = statistics.mean(logs[1]) - statistics.mean(logs[0])
    made: dict[str, Any] = {"ratio": math.exp(difference), "interval_95": None, "told": None}
    if min(len(one), len(two)) >= 2:
        parts = [statistics.variance(side) / len(side) for side in logs]
        spread = sum(parts)
        freedom = spread**2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, logs, strict=True)) if spread else 1.0
        half = STUDENT_95[min(int(freedom), len(STUDENT_95)) - 1] * math.sqrt(spread)
        low, high = math.exp(difference - half), math.exp(difference + half)
        made |= {"interval_95": [low, high], "told": not low <= 1 <= high}
    return made | {"repeats": [len(one), len(two)]}


def as_table(found: dict[str, Any]) -> str:
    """For a reader: B / A."""
    told = {True: "yes", False: "no", None: "too few repeats"}
    lines = ["| load | figure | B / A | 95 % | differs from noise |", "| --- | --- | --- | --- | --- |"]
    for row in found["rows"]:
        if "zeros" in row:
            said = " and ".join(f"{n} of {m}" for n, m in zip(row["zeros"], row["repeats"], strict=True))
            lines.append(f"| {row['load']:g} | {row['figure']} | - | - | {said} repeats were 0 |")
            continue
        interval = row["interval_95"]
        spread = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-"
        lines.append(f"| {row['load']:g} | {row['figure']} | {row['ratio']:.3f} | {spread} | {told[row['told']]} |")
    if found["capacity_ratio"] is not None:
        lines.append(f"| - | capacity | {found['capacity_ratio']:.3f} | - | - |")
    return "\n".join(lines)
