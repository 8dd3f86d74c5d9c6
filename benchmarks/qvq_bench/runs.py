"""`run` and `sweep`: from a command to a result file."""

import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvq_bench import EXIT_INTERRUPTED, EXIT_NOT_OK, ceiling, result
from qvq_bench.bench import Bench, Plan, Target
from qvq_bench.load import Measured
from qvq_bench.summary import known_before, unsettled
from qvq_bench.sweep import Capacity, Level, Objective, Verdict, bound_by, find_capacity, so_far
from qvq_bench.workload import Workload
from qvq_serve.errors import UsageError


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep looks for, and where."""

    objective: Objective
    start: float
    highest: float
    repeats: int
    tolerance: float
    resume: bool = False


def begin(kind: str, argv: list[str], workload: Workload, plan: Plan, bench: Bench) -> dict[str, Any]:
    """A result before its first step."""
    server = bench.before.get("server", {})
    return {
        **result.header(kind, argv),
        "target": {"url": bench.target.url, "model": bench.model},
        "server": server or None,
        "driver": driver(),
        "alone": ceiling.alone(server, bench.before.get("model", {})),
        "workload": {
            "name": workload.name,
            "hash": workload.hash,
            "seed": workload.seed,
            "settings": workload.settings,
        },
        "plan": asdict(plan),
        "caches": "warm: a step's images and texts are its own, but what the workload repeats",
        "steps": [],
    }


def driver() -> str | None:
    """The NVIDIA driver of this machine; None without one."""
    from qvq_serve.gpu import driver_version

    try:
        return driver_version()
    except Exception:
        return None


def add_step(
    found: dict[str, Any], path: Path | None, summary: dict[str, Any], made: Measured, **more: Any
) -> dict[str, Any]:
    """Adds a step to a result, and writes it."""
    step = {**more, **summary, **result.pack_step(made)}
    found["steps"].append(step)
    if path:
        result.write(path, found)
    return step


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def number(value: float | None, form: str = ".4g", factor: float = 1.0) -> str:
    """A figure for a reader; `-` where there is none."""
    return "-" if value is None else format(value * factor, form)


def line(summary: dict[str, Any]) -> str:
    """A step in one line: outcomes, then speed, then memory."""
    latency, memory, outcomes = summary["latency"], summary["memory"], summary["outcomes"]
    first, each = latency["time_to_first_token"], latency["time_per_output_token"]
    return (
        f"load {summary['load']:g}: "
        + ", ".join(f"{count} {name}" for name, count in outcomes.items() if count or name == "ok")
        + f"; {number(summary['throughput']['output_tokens_per_second'])} tok/s"
        + f", TTFT p95 {number(first['p95'])} s, TPOT p95 {number(each['p95'], '.4g', 1e3)} ms"
        + f", KV peak {number(memory['kv_usage_peak'], '.0%')}, preemptions {number(memory['preemptions'], '.0f')}"
    )


def brief(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without its histograms: the last line of stdout."""
    return {key: value for key, value in summary.items() if key not in ("histograms", "requests", "samples")}


async def run_once(
    target: Target,
    workload: Workload,
    plan: Plan,
    load: float,
    min_ok: float,
    out: Path | None,
    argv: list[str],
    show: bool,
) -> int:
    """One load. Exit code 1 where too little was ok or the client did not keep up, 130 after Ctrl-C."""
    if out:
        result.check_writable(out)
    async with Bench(target, workload, plan, show) as bench:
        found = begin("run", argv, workload, plan, bench)
        summary, made = await bench.step(load, f"load {load:g}")
    say(line(summary))
    for message, count in summary["errors"].items():
        say(f"  {count} x {message}")
    if note := unsettled(summary, plan.warmup, workload.arrivals["kind"]):
        say(f"qvq-bench: {note}")
    if note := known_before(summary, workload.settings):
        say(f"qvq-bench: {note}")
    print(json.dumps(brief(summary)))
    add_step(found, out, summary, made)  # behind what is shown: a full disk shall not lose it
    if not summary["client"]["valid"]:
        say(f"qvq-bench: this result is NOT VALID: {summary['client']['why']}")
        return EXIT_NOT_OK
    if summary["interrupted"]:
        return EXIT_INTERRUPTED
    if summary["ok_share"] is None or summary["ok_share"] < min_ok:
        say(f"qvq-bench: ok {number(summary['ok_share'], '.2%')} is below --min-ok {min_ok:.2%}")
        return EXIT_NOT_OK
    return 0


async def sweep_server(
    target: Target, workload: Workload, plan: Plan, settings: SweepSettings, out: Path, argv: list[str], show: bool
) -> int:
    """A sweep. Exit code 1 where not even the lowest load held, or the client did not keep up; 130 after Ctrl-C.

    What was measured is in the file.
    """
    result.check_writable(out)
    async with Bench(target, workload, plan, show) as bench:
        found = begin("sweep", argv, workload, plan, bench)
        found["objective"] = {"text": settings.objective.text, "min_headroom": settings.objective.min_headroom}
        if settings.resume and out.exists():
            found = resumed(result.read(out), found, out)
            bench.next_index = found["next_index"]
        try:
            capacity = await find_capacity(
                measure_on(bench, found, settings.objective, out),
                settings.start, settings.highest, whole=workload.arrivals["kind"] == "closed",
                repeats=settings.repeats, tolerance=settings.tolerance,
            )  # fmt: skip
        except (asyncio.CancelledError, ServerGone) as end:
            why = "server" if isinstance(end, ServerGone) else "interrupted"
            what = f"no server answers at {target.url} any more" if why == "server" else why
            say(f"qvq-bench: {what}; {out} has {len(found['steps'])} steps, and --resume goes on from there")
            if not found["steps"]:
                return EXIT_NOT_OK if why == "server" else EXIT_INTERRUPTED
            capacity = so_far(levels_of(found["steps"], settings.objective), why)
        found["next_index"] = bench.next_index
    found["capacity"] = described(capacity, found["steps"], settings.objective)
    say(sentence(found["capacity"], workload.arrivals["kind"]))
    here = median_step(found["steps"], capacity.load) if capacity.load is not None else None
    for note in (
        (unsettled(here, plan.warmup, workload.arrivals["kind"]), known_before(here, workload.settings)) if here else ()
    ):
        if note:
            say(f"qvq-bench: {note}")
    print(json.dumps(found["capacity"]))
    result.write(out, found)
    if capacity.why == "interrupted":
        return EXIT_INTERRUPTED
    return EXIT_NOT_OK if capacity.load is None or capacity.why in ("client", "server") else 0


class ServerGone(Exception):
    """Nothing answers where the server was."""


def levels_of(steps: list[dict[str, Any]], objective: Objective) -> list[Level]:
    """Steps by their load, judged."""
    levels: dict[float, Level] = {}
    for step in steps:
        levels.setdefault(step["load"], Level(step["load"])).verdicts.append(objective.judge(step))
    return list(levels.values())


def measure_on(bench: Bench, found: dict[str, Any], objective: Objective, out: Path) -> Any:
    """Measures a load, or takes it from the result file where that has it."""
    known = {(step["load"], step["repeat"]): step for step in found["steps"]}

    async def measure(load: float, repeat: int) -> Verdict:
        if (step := known.get((load, repeat))) is None:
            summary, made = await bench.step(load, f"load {load:g}, {repeat + 1}.")
            if summary["interrupted"]:
                raise asyncio.CancelledError
            if summary["errors"] and not await bench.answers():
                raise ServerGone  # what was measured says nothing of this load
            verdict = objective.judge(summary)
            more = {"repeat": repeat, "holds": verdict.holds, "failed": verdict.failed, "next_index": bench.next_index}
            step = add_step(found, out, summary, made, **more)
            say(f"{line(step)} -> {'holds' if verdict.holds else '; '.join(verdict.failed)}")
        else:
            verdict = objective.judge(step)
        if not verdict.valid:
            say(f"qvq-bench: the client does not keep up: {step['client']['why']}")
        return verdict

    return measure


def resumed(old: dict[str, Any], new: dict[str, Any], path: Path) -> dict[str, Any]:
    """An earlier result to go on from. Raises UsageError where it measured something else."""
    for key in ("kind", "workload", "plan", "objective", "server"):
        if old.get(key) != json.loads(json.dumps(new[key])):
            raise UsageError(f"--resume {path}: its {key} is another one; choose another --out, or the same settings.")
    models = [found["target"]["model"] for found in (old, new)]
    if models[0] != models[1]:
        raise UsageError(f"--resume {path}: it measured the model {models[0]}, not {models[1]}; choose another --out.")
    steps = [step for step in old["steps"] if step["client"]["valid"]]  # the others are measured again
    sent = max([old.get("next_index", 0), *(step["next_index"] for step in old["steps"])])
    return old | {"steps": steps, "next_index": sent, "resumed": [*old.get("resumed", []), new["date"]]}


def median_step(steps: list[dict[str, Any]], load: float) -> dict[str, Any]:
    """Of the repeats of a load whose verdict is the load's, the one with the median throughput."""
    every = [step for step in steps if step["load"] == load]
    holds = sum(step.get("holds", False) and step["client"]["valid"] for step in every) * 2 > len(every)
    at = [step for step in every if step.get("holds", False) == holds] or every
    return sorted(at, key=lambda step: step["throughput"]["output_tokens_per_second"] or 0.0)[len(at) // 2]


def described(capacity: Capacity, steps: list[dict[str, Any]], objective: Objective) -> dict[str, Any]:
    """The capacity with the figures at it, and what bound it."""
    here, above = (None if load is None else median_step(steps, load) for load in (capacity.load, capacity.next_load))
    bound = bound_by(above, objective.judge(above)) if above else None
    if capacity.why == "client":
        bound = "client"
    figures = {} if here is None else {
        "output_tokens_per_second": here["throughput"]["output_tokens_per_second"],
        "requests_per_second": here["throughput"]["requests_per_second"],
        "useful": here["useful"],
        "headroom": here["memory"]["headroom"],
        "ceiling": here["ceiling"],
    }  # fmt: skip
    return {
        "load": capacity.load,
        "confidence": capacity.confidence,
        "next_load": capacity.next_load,
        "next_failed": above["failed"] if above else None,
        "bound_by": bound,
        "ended": capacity.why,
        "repeats": len(next((level.verdicts for level in capacity.levels if level.load == capacity.load), [])),
        "measurements": len(steps),
        **figures,
    }


def load_unit(kind: str) -> str:
    """What a load of a kind of arrivals is counted in."""
    return {"closed": "users", "trace": "x the recorded speed"}.get(kind, "requests/s")


def sentence(capacity: dict[str, Any], kind: str) -> str:
    """The capacity for a reader."""
    if capacity["load"] is None:
        if capacity["ended"] == "client":
            return "no capacity: the client could not make the lowest load"
        if capacity["ended"] == "server":
            return "no capacity: the server was gone before a load held"
        return f"no capacity: not even the lowest load held ({'; '.join(capacity['next_failed'] or [])})"
    times = round(capacity["confidence"] * capacity["repeats"])
    speed = number(capacity["output_tokens_per_second"], ",.0f")
    least = "at least " if capacity["next_load"] is None else ""
    held = f"capacity: {least}{capacity['load']:g} {load_unit(kind)}, {speed} output tokens/s "
    held += f"(held in {times} of {capacity['repeats']} measurements); "
    if early := {"interrupted": "interrupted", "server": "the server was gone"}.get(capacity["ended"]):
        held += f"{early} before it was bracketed; "
    if capacity["next_load"] is None:
        why = "the client could not make more" if capacity["ended"] == "client" else "nothing above was tried"
        return held + why
    return held + f"bound by {capacity['bound_by']}: at {capacity['next_load']:g}, {'; '.join(capacity['next_failed'])}"
