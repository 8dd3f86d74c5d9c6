"""Result files to one HTML page that needs no network, and a Markdown table. Nothing is measured here."""

import io
import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from qvq_bench.client import UNFINISHED
from qvq_bench.result import unpack
from qvq_bench.runs import load_unit, median_step, number, sentence
from qvq_bench.summary import known_before, unsettled
from qvq_bench.sweep import Objective
from qvq_serve.errors import UsageError
from qvq_serve.gpu import GIB

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
OUTCOME_COLOURS = {
    "ok": "#059669",
    "incomplete": "#d97706",
    "error": "#dc2626",
    "refused": "#9333ea",
    UNFINISHED: "#cbd5e1",
}
matplotlib.rcParams |= {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.grid": True,
    "axes.spines.right": False, "grid.color": "#e2e8f0", "axes.edgecolor": "#94a3b8", "legend.frameon": False,
    "svg.hashsalt": "qvq-bench",
}  # fmt: skip

Result = tuple[str, dict[str, Any]]
"""A result and the name under which it is shown."""


def write(results: list[tuple[Path, dict[str, Any]]], out: Path, users: int | None) -> str:
    """Writes the page; returns the Markdown table. Raises UsageError where there is nothing to show."""
    stems = [path.stem for path, _ in results]
    named = [
        (path.stem if stems.count(path.stem) == 1 else str(path.with_suffix("")), found) for path, found in results
    ]
    empty = [str(path) for path, found in results if not found["steps"]]
    if empty:
        raise UsageError(f"{empty[0]}: has no step; nothing was measured.")
    template = files("qvq_bench").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(
        title="Capacity of " + ", ".join(sorted({found["target"]["model"] for _, found in named})),
        sections=[section(name, found) for name, found in named],
        together=list(plots_over_load(named)),
        replicas=[replicas(name, found, users) for name, found in named] if users else [],
        several=len(named) > 1,
    )  # fmt: skip
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out}: the report cannot be written: {error.strerror}.") from None
    lines = [markdown(named)]
    lines += [replicas(name, found, users) for name, found in named] if users else []
    return "\n".join(lines)


def unit_of(found: dict[str, Any]) -> str:
    return load_unit(found["workload"]["settings"]["arrivals"]["kind"])


def replicas(name: str, found: dict[str, Any], users: int | None) -> str:
    """How many servers of the measured capacity so many users need."""
    capacity = (found.get("capacity") or {}).get("load")
    if not capacity or unit_of(found) != "users" or users is None:
        return f"{name}: no measured capacity in users, so nothing can be said of {users} users."
    needed = math.ceil(users / capacity)
    most = "at most " if found["capacity"]["next_load"] is None else ""  # nothing above was tried
    return f"{name}: {users} users need {most}{needed} replica{'s' if needed > 1 else ''}, at {capacity:g} users each."


def representative(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A step for each load, by rising load."""
    return [median_step(found["steps"], load) for load in sorted({step["load"] for step in found["steps"]})]


def at_capacity(found: dict[str, Any]) -> dict[str, Any]:
    """The step that shows the capacity; of a run, and where nothing held, the highest load."""
    steps = representative(found)
    load = (found.get("capacity") or {}).get("load")
    return next((step for step in steps if step["load"] == load), steps[-1])


def section(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one result."""
    here, capacity = at_capacity(found), found.get("capacity")
    early = "Ctrl-C ended this measurement early." if any(step.get("interrupted") for step in found["steps"]) else None
    latency, headroom, reached = here["latency"], here["memory"]["headroom"], here["ceiling"]
    free = headroom["bytes"]
    useful = here["useful"]
    usage = number(here["memory"]["kv_usage_peak"], ".0%")
    ceiling = f"{number(reached['mbu'], '.0%')} / {number(reached['mfu'], '.0%')}"
    cards = [
        ("output tokens/s", number(here["throughput"]["output_tokens_per_second"], ",.0f"), "of all streams together"),
        ("first token, p95", number(latency["time_to_first_token"]["p95"], ".2f") + " s", "after the request was sent"),
        ("each token, p95", number(latency["time_per_output_token"]["p95"], ".1f", 1e3) + " ms", "of one stream"),
        ("ok", number(here["ok_share"], ".1%"), "finish reason and usage arrived"),
        ("KV tokens never used", number(headroom["kv_tokens"], ",.0f"), f"peak use {usage}"),
        ("memory never used", number(free, ".2f", 1 / GIB) + " GiB", "of the fullest card, or of the host without one"),
        ("more such requests", number(headroom["requests"], ",.0f"), "would have fitted into the KV cache"),
        ("share of the ceiling", ceiling, "bandwidth / arithmetic"),
    ]  # fmt: skip
    if useful:
        cards.insert(1, ("useful tokens", number(useful["share"], ".0%"), "of requests that ended in an answer"))
    kind = found["workload"]["settings"]["arrivals"]["kind"]
    known = known_before(here, found["workload"]["settings"])
    return {
        "name": name,
        "headline": sentence(capacity, kind) if capacity else f"load {here['load']:g} {unit_of(found)}",
        "objective": found.get("objective", {}).get("text"),
        "cards": cards,
        "load": f"{here['load']:g} {unit_of(found)}",
        "plots": list(plots_over_time(here)),
        "steps": [row(step) for step in sorted(found["steps"], key=lambda s: (s["load"], s.get("repeat", 0)))],
        "uses": memory_by_use(here["memory"]["by_use"]),
        "facts": facts(found),
        "invalid": [f"load {s['load']:g}: {s['client']['why']}" for s in found["steps"] if not s["client"]["valid"]],
        "notes": [
            note for note in (early, unsettled(here, found["plan"]["warmup"], kind), known, found.get("note")) if note
        ],
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "load": lambda s: f"{s['load']:g}",
    "held": lambda s: "-" if "holds" not in s else "yes" if s["holds"] else "no: " + "; ".join(s["failed"]),
    "ok": lambda s: f"{s['outcomes']['ok']}",
    "incomplete": lambda s: f"{s['outcomes']['incomplete']}",
    "error": lambda s: f"{s['outcomes']['error']}",
    "refused": lambda s: f"{s['outcomes']['refused']}",
    UNFINISHED: lambda s: f"{s['outcomes'][UNFINISHED]}",
    "tok/s": lambda s: number(s["throughput"]["output_tokens_per_second"], ",.1f"),
    "TTFT p50, s": lambda s: number(s["latency"]["time_to_first_token"]["p50"], ".3f"),
    "p95": lambda s: number(s["latency"]["time_to_first_token"]["p95"], ".3f"),
    "TPOT p50, ms": lambda s: number(s["latency"]["time_per_output_token"]["p50"], ".1f", 1e3),
    "TPOT p95": lambda s: number(s["latency"]["time_per_output_token"]["p95"], ".1f", 1e3),
    "KV peak": lambda s: number(s["memory"]["kv_usage_peak"], ".1%"),
    "preempted": lambda s: number(s["memory"]["preemptions"], ".0f"),
    "waiting": lambda s: number(s["memory"]["waiting_peak"], ".0f"),
    "free GiB": lambda s: number(s["memory"]["headroom"]["bytes"], ".2f", 1 / GIB),
    "MBU": lambda s: number(s["ceiling"]["mbu"], ".0%"),
    "MFU": lambda s: number(s["ceiling"]["mfu"], ".0%"),
}
"""Of the table of steps; `-` where a figure is not known."""


def row(step: dict[str, Any]) -> dict[str, str]:
    return {name: shown(step) for name, shown in COLUMNS.items()}


def facts(found: dict[str, Any]) -> dict[str, str]:
    """How it was measured."""
    server, workload = found.get("server") or {}, found["workload"]
    known = {
        "date": found["date"],
        "measured by": shlex.join(found["command"]),
        "workload": f"{workload['name']} ({workload['hash']}), seed {workload['seed']}",
        "server": server.get("argv"),
        "settings": server.get("profile"),
        "card": f"{server.get('gpus')} x {server['card']}" if server.get("card") else "-",
        "driver": found.get("driver"),
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "commit": found.get("commit"),
        "client": f"{found['client']['cpu']}, {found['client']['cores']} cores",
        "caches": found["caches"],
    }
    return {name: text or "-" for name, text in known.items()}


def memory_by_use(by_gpu: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """Planned and measured memory of each card or CPU server; no rows where the server does not tell."""
    rows = []
    for gpu, sources in sorted(by_gpu.items()):
        planned, measured = sources.get("planned", {}), sources.get("measured", {})
        for use in dict.fromkeys([*planned, *measured]):
            rows.append({"card": gpu, "use": use.replace("_", " "), "planned, GiB": gib(planned.get(use)),
                         "measured, GiB": gib(measured.get(use))})  # fmt: skip
    return rows


def gib(value: float | None) -> str:
    return number(value, ",.2f", 1 / GIB)


MARKDOWN = ("result", "card", "capacity", "tok/s", "TTFT p95", "TPOT p95", "KV tokens free", "bytes free",
            "more requests", "bound by", "date")  # fmt: skip


def markdown(named: list[Result]) -> str:
    """One line a result, at its capacity."""
    lines = [
        f"| {' | '.join(MARKDOWN)} |",
        f"| {' | '.join(['---'] * len(MARKDOWN))} |",
    ]
    for name, found in named:
        here, capacity = at_capacity(found), found.get("capacity")
        latency, headroom = here["latency"], here["memory"]["headroom"]
        held = capacity and capacity["load"]
        cells = [
            name,
            (found.get("server") or {}).get("card") or "-",
            f"{here['load']:g} {unit_of(found)}" if held else "-" if capacity else f"load {here['load']:g}",
            number(here["throughput"]["output_tokens_per_second"], ",.1f"),
            number(latency["time_to_first_token"]["p95"], ".3f") + " s",
            number(latency["time_per_output_token"]["p95"], ".1f", 1e3) + " ms",
            number(headroom["kv_tokens"], ",.0f"),
            number(headroom["bytes"], ".2f", 1 / GIB) + " GiB",
            number(headroom["requests"], ",.0f"),
            (capacity or {}).get("bound_by") or "-",
            found["date"][:10],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@contextmanager
def plot(title: str, x: str, y: str) -> Iterator[tuple[Axes, dict[str, str]]]:
    """An axis to draw on; the picture is in the dictionary afterwards."""
    made = {"title": title, "svg": ""}
    figure = Figure(figsize=(4.5, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    yield axes, made
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    made["svg"] = buffer.getvalue().split("?>", 1)[1].split(">", 1)[1]  # without the XML and doctype lines


def known(pairs: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """The points whose value is known, as two lists."""
    kept = [(x, y) for x, y in pairs if y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def plots_over_load(named: list[Result]) -> Iterator[dict[str, str]]:
    """Throughput, latencies and outcomes over the load, and tokens a user over tokens a GPU; all results together."""
    unit = unit_of(named[0][1])

    def lines(axes: Axes, value: Callable[[dict[str, Any]], float | None], label: str = "", style: str = "o-") -> None:
        for (name, found), colour in zip(named, COLOURS * len(named), strict=False):
            xs, ys = known((step["load"], value(step)) for step in representative(found))
            if xs:
                shown = " ".join(filter(None, (name if len(named) > 1 else "", label)))
                axes.plot(xs, ys, style, color=colour, markersize=4, label=shown or None)

    def knees(axes: Axes) -> None:
        for (_, found), colour in zip(named, COLOURS * len(named), strict=False):
            if load := (found.get("capacity") or {}).get("load"):
                axes.axvline(load, color=colour, linestyle=":", label="capacity" if len(named) == 1 else None)

    with plot("Throughput", unit, "output tokens/s") as (axes, made):
        lines(axes, lambda s: s["throughput"]["output_tokens_per_second"], "all")
        lines(axes, lambda s: (s["useful"] or {}).get("output_tokens_per_second"), "useful", "s--")
        lines(axes, bandwidth_ceiling, "bandwidth's ceiling", "--")
        knees(axes)
        axes.set_ylim(bottom=0)
    yield made
    for title, name, factor, y in (
        ("Time to first token", "time_to_first_token", 1.0, "seconds"),
        ("Time per output token", "time_per_output_token", 1e3, "milliseconds"),
    ):
        with plot(title, unit, y) as (axes, made):
            for quantile, style in (("p50", "o--"), ("p95", "o-")):
                lines(axes, partial(latency_of, name, quantile, factor), quantile, style)
            for limit in limits(named, name):
                axes.axhline(limit * factor, color="#dc2626", linewidth=1, label="objective")
            knees(axes)
            axes.set_ylim(bottom=0)
        yield made
    with plot("What a user gets, for what a GPU gives", "output tokens/s of a GPU", "output tokens/s of a user") as (
        axes,
        made,
    ):
        for (name, found), colour in zip(named, COLOURS * len(named), strict=False):
            points = known(
                (
                    step["throughput"]["output_tokens_per_second_per_gpu"] or 0.0,
                    inverse(step["latency"]["time_per_output_token"]["p50"]),
                )
                for step in representative(found)
            )
            axes.plot(*points, "o-", color=colour, markersize=4, label=name if len(named) > 1 else None)
        for ceiling in {(found.get("alone") or {}).get("tokens_per_second_alone") for _, found in named} - {None}:
            axes.axhline(float(ceiling or 0), color="#94a3b8", linestyle="--", label="bandwidth's ceiling, one user")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    yield made
    for name, found in named:
        with plot("Outcomes" + (f": {name}" if len(named) > 1 else ""), unit, "share of requests") as (axes, made):
            outcomes(axes, found)
        yield made


def bandwidth_ceiling(step: dict[str, Any]) -> float | None:
    """Tokens a second if the step's weights and KV cache had been read at the card's whole bandwidth."""
    reached, found = step["ceiling"]["mbu"], step["throughput"]["output_tokens_per_second"]
    return found / reached if reached and found else None


def latency_of(name: str, quantile: str, factor: float, step: dict[str, Any]) -> float | None:
    value = step["latency"][name][quantile]
    return None if value is None else value * factor


def inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def limits(named: list[Result], latency: str) -> set[float]:
    """The objectives' limits of a latency."""
    found: set[float] = set()
    for _, result in named:
        objective = Objective.parse(result.get("objective", {}).get("text", ""))
        found |= {limit for (name, _), limit in objective.limits.items() if name == latency}
    return found


def outcomes(axes: Axes, found: dict[str, Any]) -> None:
    """Bars of how requests ended, a bar a load."""
    steps = representative(found)
    places, low = range(len(steps)), [0.0] * len(steps)
    for name, colour in OUTCOME_COLOURS.items():
        shares = [step["outcomes"][name] / max(sum(step["outcomes"].values()), 1) for step in steps]
        if any(shares):
            axes.bar(places, shares, bottom=low, color=colour, label=name, width=0.7)
        low = [below + share for below, share in zip(low, shares, strict=True)]
    axes.set_xticks(places, [f"{step['load']:g}" for step in steps], rotation=45 if len(steps) > 6 else 0)
    axes.set_ylim(0, 1)
    axes.grid(visible=False)


def plots_over_time(step: dict[str, Any]) -> Iterator[dict[str, str]]:
    """KV cache, queue and bytes through the step at the capacity, and the spread of its latencies."""
    samples = unpack(step["samples"])
    at = [sample["at"] for sample in samples]
    if any("kv_usage" in sample for sample in samples):
        with plot(f"KV cache in use at load {step['load']:g}", "seconds", "share") as (axes, made):
            axes.plot(*known(zip(at, (s.get("kv_usage") for s in samples), strict=True)), color=COLOURS[0])
            axes.set_ylim(0, 1)
        yield made
        with plot(f"Requests at load {step['load']:g}", "seconds", "requests") as (axes, made):
            for name, colour in (("running", COLOURS[2]), ("waiting", COLOURS[1])):
                axes.plot(*known(zip(at, (s.get(name) for s in samples), strict=True)), color=colour, label=name)
            axes.set_ylim(bottom=0)
        yield made
    free = {name for sample in samples for name in (sample.get("cards") or sample.get("headroom") or {})}
    if free:
        what = "each card" if any("cards" in s for s in samples) or free != {"cpu"} else "the host"
        with plot(f"Memory that nothing uses, of {what}", "seconds", "GiB") as (axes, made):
            for name, colour in zip(sorted(free), COLOURS * len(free), strict=False):
                axes.plot(
                    *known(zip(at, (left(s, name) for s in samples), strict=True)),
                    color=colour,
                    label=f"card {name}" if name.isdigit() else name,
                )
            axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
        yield made
    for title, name, unit, factor in (
        ("Time to first token", "time_to_first_token", "seconds", 1),
        ("Between two chunks", "chunk_gap", "milliseconds", 1e3),
    ):
        if step["histograms"][name]:
            with plot(f"{title}, load {step['load']:g}", unit, "share that is faster") as (axes, made):
                spread(axes, step["histograms"][name], factor)
            yield made


def left(sample: dict[str, Any], name: str) -> float | None:
    """GiB of a card, or of the host, that nothing uses."""
    if card := (sample.get("cards") or {}).get(name):
        return float(card["total"] - card["used"]) / GIB
    value = (sample.get("headroom") or {}).get(name)
    return None if value is None else float(value) / GIB


def spread(axes: Axes, bins: dict[str, int], factor: float) -> None:
    """The cumulative distribution of a histogram's values."""
    from qvq_bench.summary import BINS_PER_DECADE, LOWEST_S

    total, seen, xs, ys = sum(bins.values()), 0, [], []
    for number_, count in sorted((int(name), count) for name, count in bins.items()):
        seen += count
        xs.append(LOWEST_S * 10 ** ((number_ + 1) / BINS_PER_DECADE) * factor)
        ys.append(seen / total)
    axes.plot(xs, ys, color=COLOURS[3])
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    axes.set_ylim(0, 1)
