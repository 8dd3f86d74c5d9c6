"""How soon loops are found, how often honest text is taken for one, and what a look costs on this CPU.

    python -m benchmarks.detection RESULT.json [TEXTS]

Loops: each kind of `tests/governor/cases.py` with 100 seeds of tuning and 100 held out, and those reported in public.
Honest: TEXTS (1,000) texts of 8,192 tokens of each half, looked at every EVERY tokens. A find is due within 2 periods +
K tokens after a loop's start, K = EVERY + MORE, or 1,536 where it has no period; `strict` counts 2 periods + EVERY,
`later` 4 periods + 2 K. Delays are in tokens.
"""

import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.startup import machine
from qvq_serve.governor.detect import EVERY, MORE, repetition
from tests.governor import cases

SEEDS = 100
GRACE = EVERY + MORE
HALVES = {"tuning": 0, "held out": 3001}
"""The first seed of each half, in steps of two. Odd seeds below 1201 were looked at: they tuned what is there."""


def loops(found: list[cases.Case]) -> dict[str, Any]:
    """How many of these cases were found in time. A find before the loop's start counts as none."""
    rows = [(case, cases.first_find(case, cases.words())) for case in found]
    delays = [(case, at - (case.start or 0) if at and at > (case.start or 0) else 10**9) for case, at in rows]
    known = [delay for _, delay in delays if delay < 10**9]
    slack = [(delay, case.within - GRACE if case.period else case.within, bool(case.period)) for case, delay in delays]
    return {
        "cases": len(rows),
        "in_time": sum(delay <= two + GRACE * with_period for delay, two, with_period in slack),
        "strict": sum(delay <= two + EVERY * with_period for delay, two, with_period in slack),
        "later": sum(delay <= 2 * (two + GRACE) if with_period else delay <= two for delay, two, with_period in slack),
        "never": len(rows) - len(known),
        "median_delay": round(statistics.median(known)) if known else None,
    }


def honest(texts: int, first: int) -> dict[str, Any]:
    """False finds by kind among so many texts, with their seeds."""
    kinds: dict[str, Any] = {kind: {"texts": 0, "finds": []} for kind in cases.HONEST}
    for index in range(texts):
        kind, seed = list(kinds)[index % len(kinds)], first + 2 * (index // len(kinds))
        kinds[kind]["texts"] += 1
        at = cases.first_find(cases.honest(kind, seed), cases.words())
        if at is not None:
            kinds[kind]["finds"].append({"seed": seed, "at": at})
    return kinds


def look_ms(rows: int) -> float:
    """Median milliseconds of one look at so many requests."""
    window = torch.randint(0, 150_000, (rows, 2048), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        repetition(window, cases.words())
        times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times), 1)


def main() -> None:
    out, texts = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.detection RESULT.json", *sys.argv[2:]]),
        "machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "every": EVERY,
        "look_ms": {rows: look_ms(rows) for rows in (1, 16, 64, 256)},
        "loops": {}, "honest": {},
    }  # fmt: skip
    for name, first in HALVES.items():
        seeds = range(first, first + 2 * SEEDS, 2)
        result["loops"][name] = {kind: loops([cases.loop(kind, seed, GRACE) for seed in seeds]) for kind in cases.LOOPS}
        result["honest"][name] = honest(texts, first)
    result["public"] = loops(cases.public(GRACE))
    out.write_text(json.dumps(result, indent=1) + "\n")
    print("| loops | half | cases | in time | strict | later | never | median delay, tokens |\n" + "| --- " * 8 + "|")
    for name, kinds in [*result["loops"].items(), ("public", {"public": result["public"]})]:
        for kind, row in kinds.items():
            print(f"| {kind} | {name} | " + " | ".join(str(value) for value in row.values()) + " |")
    print("\n| honest | half | texts | false finds |\n" + "| --- " * 4 + "|")
    for name, kinds in result["honest"].items():
        for kind, row in kinds.items():
            print(f"| {kind} | {name} | {row['texts']} | {len(row['finds'])} |")
    print("\n| requests | one look, ms |\n| --- | --- |")
    for rows, spent in result["look_ms"].items():
        print(f"| {rows} | {spent} |")


if __name__ == "__main__":
    main()
