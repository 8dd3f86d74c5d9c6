"""A trace by torch's profiler of a running vLLM, summed: the time of its steps, and of its kernels by name.

    python -m benchmarks.step_time RESULT.json TRACE.json.gz...

A trace is made while a load runs, by a server that was started with `--open-routes /start_profile,/stop_profile --
--profiler-config '{"profiler": "torch", "torch_profiler_dir": "DIR", "torch_profiler_with_stack": false}'`:

    curl -X POST URL/start_profile; sleep 2; curl -X POST URL/stop_profile

`steps` tells the card's time of each kind of step, as vLLM names it: requests (tokens) in prefill and in generation.
"""

import collections
import datetime
import gzip
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

WORK = ("kernel", "gpu_memcpy", "gpu_memset")
NAME = 160
"""Characters of a kernel's name that are kept: a template's arguments fill kilobytes."""


def summed(path: Path) -> dict[str, Any]:
    """Milliseconds of the trace, of its idle gaps, of its steps (median) and of its kernels (sum)."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        events = [event for event in json.load(file)["traceEvents"] if "dur" in event]
    work = sorted((event["ts"], event["dur"], event["name"][:NAME]) for event in events if event.get("cat") in WORK)
    if not work:
        sys.exit(f"step_time: {path} has no work of a GPU; a worker's trace, named rank…, has.")
    busy, end = 0.0, work[0][0]
    for start, duration, _ in work:
        busy += max(0.0, start + duration - max(end, start))
        end = max(end, start + duration)
    steps, kernels = collections.defaultdict(list), collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "gpu_user_annotation" and event["name"].startswith("execute_context"):
            steps[event["name"]].append(event["dur"] / 1000)
    for _, duration, name in work:
        kernels[name].append(duration / 1000)
    span = end - work[0][0]
    return {
        "span_ms": round(span / 1000, 1),
        "idle_ms": round((span - busy) / 1000, 1),
        "steps": [[name, len(times), round(statistics.median(times), 2)] for name, times in sorted(steps.items())],
        "kernels": sorted(([name, len(t), round(sum(t), 2)] for name, t in kernels.items()), key=lambda row: -row[2]),
    }


def main() -> None:
    result, *traces = sys.argv[1:]
    told = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.step_time", *sys.argv[1:]]),
        "traces": {Path(trace).name: summed(Path(trace)) for trace in traces},
    }
    Path(result).write_text(json.dumps(told, indent=1) + "\n")
    for name, trace in told["traces"].items():
        print(name, *trace["steps"], *trace["kernels"][:10], sep="\n  ")


if __name__ == "__main__":
    main()
