"""The command line of qvq-bench. The last line on stdout is the result's summary as JSON; the rest goes to stderr."""

import argparse
import asyncio
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qvq_bench import EXIT_INTERRUPTED
from qvq_serve import __version__
from qvq_serve.cli import Parser
from qvq_serve.errors import QvqError, UsageError

MOST_LOAD = 100_000
SLO = "ttft_p95=10s,tpot_p95=100ms,ok=99%"


def target_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server (default %(default)s); any OpenAI-compatible one")
    add("--key", help="its key (default: QVQ_API_KEY)")
    add("--model", help="the model's name (default: the first that the server lists)")
    add("--metrics-url", metavar="URL", help="where its metrics are (default: /metrics of --url)")


def load_flags(parser: argparse.ArgumentParser) -> None:
    """What is asked, and for how long."""
    add = parser.add_argument
    add(
        "--workload",
        default="qvq-long",
        metavar="NAME|FILE",
        help="a workload's name or TOML file (default %(default)s)",
    )
    add("--seed", type=int, metavar="N", help="another seed than the workload's own")
    add("--arrivals", metavar="KIND", help="another kind: closed, constant, poisson, bursts, ramp, trace")
    add("--requests", type=int, metavar="N", help="requests of a step")
    add("--seconds", type=float, metavar="S", help="measured seconds of a step, after the warm-up")
    add(
        "--warmup",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds of a step before anything is measured (default 0)",
    )
    add("--no-drain", action="store_true", help="cut off what still runs when the seconds are over (`unfinished`)")
    add("--sample-every", type=float, default=0.5, metavar="S", help="seconds between samples of memory (default 0.5)")
    add("--timeout", type=float, default=3600.0, metavar="S", help="seconds that a request may take (default 3600)")
    add("--quiet", action="store_true", help="no line of progress")


def slo_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--slo", default=SLO, help="what a load must hold (default %(default)s); latencies: ttft ttfa tpot e2e gap")
    add(
        "--min-headroom",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the KV cache that must stay unused (default 0)",
    )
    add("--start", type=float, default=1.0, metavar="N", help="the first load: users, or requests a second (default 1)")
    add("--max-load", type=float, default=4096.0, metavar="N", help="the highest load that is tried (default 4096)")
    add("--repeats", type=int, default=3, metavar="N", help="measurements of a load that decides (default 3)")
    add(
        "--tolerance",
        type=float,
        default=0.04,
        metavar="X",
        help="how near the bracket must be, as a ratio (default 0.04)",
    )


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `qvq-bench`, and those of its commands by name."""
    parser = Parser(prog="qvq-bench", description="Tokens per second and memory headroom of a server, as a capacity.")
    parser.add_argument("--version", action="version", version=f"qvq-bench {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, required=True)
    by_name: dict[str, Parser] = {}

    def add(name: str, help: str, run: Callable[[argparse.Namespace], int]) -> Parser:
        made: Parser = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False
        )
        made.set_defaults(run=run)
        by_name[name] = made
        return made

    run = add("run", "put one load on a server", run_run)
    target_flags(run)
    load_flags(run)
    run.add_argument("--load", type=float, default=1.0, metavar="N", help="users, or requests a second (default 1)")
    run.add_argument(
        "--min-ok", type=float, default=0.99, metavar="X", help="below this share of ok, exit code 1 (default 0.99)"
    )
    run.add_argument("--out", type=Path, metavar="FILE", help="write a result file")

    sweep = add("sweep", "find the highest load that a server carries", run_sweep)
    target_flags(sweep)
    load_flags(sweep)
    slo_flags(sweep)
    sweep.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the result file, written after each step"
    )
    sweep.add_argument(
        "--resume", action="store_true", help="go on from the result file; what it has is not measured again"
    )

    several = add("serve-and-sweep", "start qvq-serve with each of several settings, and sweep each", run_several)
    several.add_argument(
        "--serve", action="append", required=True, metavar="ARGUMENTS",
        help='arguments of qvq-serve, for example "--profile qvq72b_h200x1_fp8"; once for each setting',
    )  # fmt: skip
    several.add_argument("--port", type=int, default=8099, help="of the server (default %(default)s)")
    several.add_argument(
        "--start-timeout", type=float, default=1800.0, metavar="S", help="seconds that a start may take"
    )
    load_flags(several)
    slo_flags(several)
    several.add_argument("--out", type=Path, required=True, metavar="DIR", help="result files and report.html")
    several.add_argument("--resume", action="store_true", help="go on from the result files there")

    quality = add("quality", "ask a suite of questions, and tell how many answers are right", run_quality)
    target_flags(quality)
    quality.add_argument("--suite", default="demo", metavar="NAME", help="demo, demo-seen, demo-blank, demo-weak, "
                         "tutorial, mmmu, mathvista, mathvision, olympiadbench (default %(default)s)")  # fmt: skip
    quality.add_argument("--data", type=Path, metavar="PATH", help="the files of a public set, in its own format")
    quality.add_argument("--limit", type=int, default=500, metavar="N", help="questions, at most (default 500)")
    quality.add_argument("--first", type=int, default=0, metavar="SEED", help="the first drawn case (default 0)")
    quality.add_argument("--users", type=int, default=16, metavar="N", help="questions at a time (default 16)")
    quality.add_argument(
        "--body", default="{}", metavar="JSON",
        help='added to each request, for example \'{"temperature": 0, "governor": {"loop": true}}\'',
    )  # fmt: skip
    quality.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="seconds that a request may take")
    quality.add_argument("--quiet", action="store_true", help="no line of progress")
    quality.add_argument("--out", type=Path, metavar="FILE", help="write a result file")

    report = add("report", "make one HTML page and a Markdown table of result files", run_report)
    report.add_argument("results", nargs="+", type=Path, metavar="FILE")
    report.add_argument("--out", type=Path, metavar="FILE", help="the HTML page (default: beside the first result)")
    report.add_argument("--users", type=int, metavar="N", help="say how many replicas so many users need")

    compare = add("compare", "ratios of two results, and whether they can be told from noise", run_compare)
    compare.add_argument("a", type=Path, metavar="A")
    compare.add_argument("b", type=Path, metavar="B")
    compare.add_argument("--anyway", action="store_true", help="compare different cards, workloads or seeds too")
    return parser, by_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit code: 0; 1 where too little was ok; 2 for bad arguments or files; 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser, commands = build_parser()
        known = commands.get(given[0]) if given else None  # a command's own parser knows its nearest flag
        options = known.parse_args(given[1:]) if known else parser.parse_args(given)
        options.argv = without_key(given)
        return int(options.run(options))
    except QvqError as error:
        print(f"qvq-bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("qvq-bench: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def without_key(given: list[str]) -> list[str]:
    """The command line as a result file may show it."""
    kept = [item if not item.startswith("--key=") else "--key=..." for item in given]
    return ["..." if at and kept[at - 1] == "--key" else item for at, item in enumerate(kept)]


def until_interrupted(work: Coroutine[Any, Any, int]) -> int:
    """Runs to the end; at the first Ctrl-C or SIGTERM the step that runs is ended, and what was measured is kept."""

    async def guarded() -> int:
        task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            return EXIT_INTERRUPTED

    return asyncio.run(guarded())


def workload_of(options: argparse.Namespace) -> Any:
    from qvq_bench.workload import load_workload

    return load_workload(options.workload, options.seed, options.arrivals)


def plan_of(options: argparse.Namespace) -> Any:
    from qvq_bench.bench import Plan

    for name in ("requests", "seconds", "sample_every", "timeout"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: must be more than 0, and finite.")
    if options.requests is None and options.seconds is None:
        raise UsageError("how long a step is: give --requests N or --seconds S.")
    if options.seconds is not None and options.sample_every > options.seconds / 2:
        raise UsageError(f"--sample-every {options.sample_every:g}: at most half of --seconds, or nothing is sampled.")
    if options.no_drain and options.seconds is None:
        raise UsageError("--no-drain: needs --seconds, the end at which to cut off.")
    if not 0 <= options.warmup < math.inf or (options.warmup and options.seconds is None):
        raise UsageError(f"--warmup {options.warmup:g}: must be 0 or more, and needs --seconds.")
    return Plan(options.requests, options.seconds, options.warmup, not options.no_drain, options.sample_every)


def target_of(options: argparse.Namespace) -> Any:
    from qvq_bench.bench import Target

    key = options.key or os.environ.get("QVQ_API_KEY")
    try:
        host = urlsplit(options.url).hostname
    except ValueError:
        host = None
    if not options.url.startswith(("http://", "https://")) or not host:
        raise UsageError(f"--url {options.url}: give a URL such as http://127.0.0.1:8000.")
    return Target(options.url.rstrip("/").removesuffix("/v1"), key, options.model, options.metrics_url, options.timeout)


def checked_load(name: str, load: float, workload: Any) -> float:
    """A load that can be. Raises UsageError for one that cannot."""
    if not 0 < load <= MOST_LOAD:
        raise UsageError(f"{name} {load:g}: must be more than 0, and at most {MOST_LOAD:g}.")
    if workload.arrivals["kind"] == "closed" and load != int(load):
        raise UsageError(
            f"{name} {load:g}: users of a closed loop are whole numbers; rates need --arrivals, e.g. poisson."
        )
    return load


def run_run(options: argparse.Namespace) -> int:
    from qvq_bench.runs import run_once

    if not 0 <= options.min_ok <= 1:
        raise UsageError(f"--min-ok {options.min_ok:g}: must be between 0 and 1.")
    workload = workload_of(options)
    load = checked_load("--load", options.load, workload)
    return until_interrupted(
        run_once(
            target_of(options),
            workload,
            plan_of(options),
            load,
            options.min_ok,
            options.out,
            options.argv,
            not options.quiet,
        )
    )


def sweep_settings(options: argparse.Namespace, workload: Any) -> Any:
    from qvq_bench.runs import SweepSettings
    from qvq_bench.sweep import LONG, Objective

    if not 0 <= options.min_headroom < 1:
        raise UsageError(f"--min-headroom {options.min_headroom:g}: must be 0 or more and less than 1.")
    if options.repeats < 1:
        raise UsageError(f"--repeats {options.repeats}: must be 1 or more.")
    if options.tolerance <= 0:
        raise UsageError(f"--tolerance {options.tolerance:g}: must be more than 0.")
    start, highest = (
        checked_load("--start", options.start, workload),
        checked_load("--max-load", options.max_load, workload),
    )
    if highest < start:
        raise UsageError(f"--max-load {highest:g}: is less than --start {start:g}.")
    objective = Objective.parse(options.slo, options.min_headroom)
    cut = {name for name, _ in objective.limits} & {"end_to_end", "time_to_first_answer_token"}
    if options.no_drain and cut:
        raise UsageError(
            f"--slo {options.slo}: with --no-drain {' and '.join(LONG[name] for name in sorted(cut))} would be that of "
            "the short answers, which end before the cut; leave out --no-drain."
        )
    return SweepSettings(objective, start, highest, options.repeats, options.tolerance, options.resume)


def run_sweep(options: argparse.Namespace) -> int:
    from qvq_bench.runs import sweep_server

    workload = workload_of(options)
    settings = sweep_settings(options, workload)
    return until_interrupted(
        sweep_server(
            target_of(options), workload, plan_of(options), settings, options.out, options.argv, not options.quiet
        )
    )


def run_several(options: argparse.Namespace) -> int:
    from qvq_bench.serve import serve_and_sweep

    workload = workload_of(options)
    settings = sweep_settings(options, workload)
    return until_interrupted(serve_and_sweep(options, workload, plan_of(options), settings))


def run_quality(options: argparse.Namespace) -> int:
    from qvq_bench.quality import measure
    from qvq_bench.suites import DRAWN, READ, items
    from qvq_serve.errors import nearest

    known = [*DRAWN, *READ]
    if options.suite not in known:
        raise UsageError(f"--suite {options.suite}: unknown.{nearest(options.suite, known)} Known: {', '.join(known)}.")
    for name in ("limit", "users"):
        if (value := getattr(options, name)) < 1:
            raise UsageError(f"--{name} {value}: must be 1 or more.")
    try:
        body = json.loads(options.body)
    except ValueError as error:
        raise UsageError(f"--body {options.body}: is no JSON ({error}).") from None
    if not isinstance(body, dict):
        raise UsageError(f"--body {options.body}: must be an object, such as {{}}.")
    if options.suite in ("mathvision", "olympiadbench") and find_spec("math_verify") is None:
        raise UsageError(
            f"--suite {options.suite} needs Math-Verify, which is not installed: pip install '.[quality]'."
        )
    asked = list(items(options.suite, options.data, options.first, options.limit))
    if not asked:
        raise UsageError(f"--suite {options.suite}: there are no questions in it.")
    return until_interrupted(measure(
        target_of(options), options.suite, asked, body, options.users, options.out, options.argv,
        not options.quiet and sys.stderr.isatty(),
    ))  # fmt: skip


def run_report(options: argparse.Namespace) -> int:
    from qvq_bench import report, result

    results = [(path, result.read(path)) for path in options.results]
    if options.users is not None and options.users < 1:
        raise UsageError(f"--users {options.users}: must be 1 or more.")
    out = options.out or options.results[0].with_suffix(".html")
    print(report.write(results, out, options.users))
    print(f"qvq-bench: {out}", file=sys.stderr)
    return 0


def run_compare(options: argparse.Namespace) -> int:
    from qvq_bench import compare, result

    found = compare.compare(result.read(options.a), result.read(options.b), anyway=options.anyway)
    print(compare.as_table(found), file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
