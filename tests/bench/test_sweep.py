"""The search for a capacity, against simulated servers whose true capacity is known."""

import math
from pathlib import Path
from typing import Any

import pytest
from qvq_bench.load import Load, run_load
from qvq_bench.runs import median_step, resumed
from qvq_bench.summary import summarise
from qvq_bench.sweep import Capacity, Objective, Verdict, bound_by, find_capacity

from qvq_serve.errors import UsageError
from tests.bench.virtual import Simulated, empty_request, run

SLO = "ttft_p95=2s,tpot_p95=80ms,ok=99%"
P95 = math.exp(0.05 * 1.6449)  # of the noise

SHAPES: dict[str, tuple[dict[str, Any], float | None]] = {
    # name: the server, and its true capacity in users
    "a hard knee": ({"tpot": lambda n: 0.02 if n <= 137 else 0.5}, 137),
    "a soft knee in the time per token": ({"tpot": lambda n: 0.02 * (1 + (n / 100) ** 2)}, 100 * math.sqrt(3)),
    "a line": ({"tpot": lambda n: 0.01 + 0.001 * n}, 70),
    "a queue: the first token comes late": ({"ttft": lambda n: 0.1 + max(0, n - 48) * 0.25}, 55.6),
    "noise": ({"tpot": lambda n: 0.02 * (1 + (n / 100) ** 2), "noise": 0.05}, 100 * math.sqrt(4 / P95 - 1)),
    "refusals": ({"refuses_above": 90}, 90),
    "preemptions": ({"preempts_above": 211}, 211),
    "a KV cache that fills": ({"kv_tokens": 30_000}, 30_000 * 0.9 / 120),
    "no knee": ({}, None),
    "too slow for one": ({"tpot": lambda n: 0.2}, 0),
}


def found(server: dict[str, Any], highest: float = 512, start: float = 8) -> tuple[Capacity, list[float]]:
    """The capacity that a sweep finds, and the loads that it measured."""
    objective, asked = Objective.parse(SLO, min_headroom=0.1), []
    one = Simulated(**server)

    async def measure(load: float, repeat: int) -> Verdict:
        asked.append(load)
        made = await run_load(
            one.send, empty_request, Load(load, requests=int(max(load * 4, 200))), "m", one.watch, 0.05
        )
        return objective.judge(summarise(made, load, judged=True))

    return run(find_capacity(measure, start, highest, whole=True)), asked


def test_a_client_that_is_late_in_a_repeat_brackets_nothing() -> None:
    """The load above it failed as well, and was taken for the lowest that does."""

    async def measure(load: float, repeat: int) -> Verdict:
        return Verdict(load <= 16, 2.0 if load <= 16 else 0.5, [], valid=(load, repeat) != (17, 1))

    capacity = run(find_capacity(measure, 16, 64, whole=True))
    assert (capacity.load, capacity.next_load, capacity.why) == (16, 17, "client")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_true_capacity_is_found_within_5_percent(shape: str) -> None:
    server, true = SHAPES[shape]
    capacity, asked = found(server)
    if true is None:
        assert (capacity.load, capacity.next_load, capacity.why) == (512, None, "highest")
    elif true == 0:
        assert (capacity.load, capacity.why) == (None, "lowest")
    else:
        assert capacity.load == pytest.approx(true, rel=0.05)
        assert capacity.why == "bracketed" and capacity.next_load is not None and capacity.next_load > capacity.load
        assert capacity.confidence is not None and capacity.confidence > 0.5
    assert len(asked) <= 40


def test_a_start_above_the_capacity_goes_down() -> None:
    capacity, _ = found({"tpot": lambda n: 0.01 + 0.001 * n}, start=256)
    assert capacity.load == pytest.approx(70, rel=0.05)


def test_rates_are_no_whole_numbers() -> None:
    async def measure(load: float, repeat: int) -> Verdict:
        return Verdict(load <= 0.37, 0.37 / load, ["too much"])

    capacity = run(find_capacity(measure, 1.0, 100, whole=False))
    assert capacity.load == pytest.approx(0.37, rel=0.05) and capacity.load <= 0.37


def test_one_lucky_measurement_does_not_raise_the_capacity() -> None:
    async def measure(load: float, repeat: int) -> Verdict:
        lucky = load > 20 and repeat == 0 and load < 23
        holds = load <= 20 or lucky
        return Verdict(holds, 1.01 if holds else 0.5, [])

    capacity = run(find_capacity(measure, 1.0, 100, whole=True))
    assert capacity.load == 20


@pytest.mark.parametrize(("odd", "lucky", "true"), [(1.0, False, 100), (512.0, True, 480)])
def test_one_odd_measurement_at_either_end_does_not_end_the_search(odd: float, lucky: bool, true: int) -> None:
    """One slow first answer was "at least 1 users", and one lucky step at --max-load left 257 to 511 untried."""

    async def measure(load: float, repeat: int) -> Verdict:
        holds = lucky if load == odd and repeat == 0 else load <= true
        return Verdict(holds, 1.05 if holds else 0.95, [])

    capacity = run(find_capacity(measure, 1.0 if not lucky else 256.0, 512, whole=True))
    assert capacity.why == "bracketed" and capacity.load == pytest.approx(true, rel=0.05)


def test_a_client_that_does_not_keep_up_ends_the_search() -> None:
    async def measure(load: float, repeat: int) -> Verdict:
        return Verdict(True, 2.0, [], valid=load < 64)

    capacity = run(find_capacity(measure, 1.0, 4096, whole=True))
    assert (capacity.load, capacity.why) == (32, "client")


def test_objectives_are_read_with_their_units() -> None:
    objective = Objective.parse("ttft_p95=5s, tpot_p99.9=80ms,e2e_mean=1.5m,ok=95%")
    assert objective.limits == {
        ("time_to_first_token", "p95"): 5.0, ("time_per_output_token", "p99.9"): 0.08, ("end_to_end", "mean"): 90.0,
    }  # fmt: skip
    assert objective.ok == 0.95


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttf_p95=5s", "--slo ttf_p95=5s: unknown objective."),
        ("ttft_p96=5s", "--slo ttft_p96=5s: unknown objective. Did you mean 'ttft_p9"),
        ("ttft_p95=5", "--slo ttft_p95=5: '5' is no time. Give for example 80ms or 5s."),
        ("ttft_p95=-1s", "is no time"),
        ("ttft_p95=infs", "is no time"),
        ("ttft_p95", "unknown objective"),
        ("ok=101%", "--slo ok=101%: '101%' is no share"),
        ("ok=", "is no share"),
    ],
)
def test_a_bad_objective_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        Objective.parse(text)
    assert said in str(error.value)


def summary(**changes: Any) -> dict[str, Any]:
    """A step that holds, with changes to its memory or outcomes."""
    outcomes = {"ok": 100, "refused": changes.pop("refused", 0)}
    images = changes.pop("images", 1.0)
    memory = {"preemptions": 0, "kv_usage_peak": 0.4, "waiting_mean": 0.0} | changes
    return {"memory": memory, "outcomes": outcomes, "throughput": {"images_per_second": images}}


@pytest.mark.parametrize(
    ("bound", "changes", "failed", "valid"),
    [
        ("client", {}, [], False),
        ("KV cache", {"preemptions": 3}, ["3 preemptions"], True),
        ("KV cache", {"kv_usage_peak": 0.97, "waiting_mean": 4}, ["TTFT p95 9 s > 5 s"], True),
        ("KV cache", {}, ["KV headroom 4.0% < 10.0%"], True),
        ("queue", {"refused": 40}, ["ok 60% < 99%"], True),
        ("queue", {"waiting_mean": 20}, ["TTFT p95 9 s > 5 s"], True),
        ("encoder", {}, ["TTFT p95 9 s > 5 s"], True),
        ("unknown", {"waiting_mean": None, "kv_usage_peak": None}, ["TTFT p95 9 s > 5 s"], True),
        ("compute", {"images": 0.0}, ["TTFT p95 9 s > 5 s"], True),
        ("compute", {}, ["TPOT p95 200 ms > 80 ms"], True),
    ],
)
def test_the_limit_that_bound_is_named(bound: str, changes: dict[str, Any], failed: list[str], valid: bool) -> None:
    assert bound_by(summary(**changes), Verdict(False, 0.5, failed, valid)) == bound


def test_a_search_finer_than_its_loads_ends() -> None:
    """It measured the same load again for ever, which nothing but a kill -9 ended."""

    async def measure(load: float, repeat: int) -> Verdict:
        return Verdict(load <= 3.3, 3.3 / load, [])

    capacity = run(find_capacity(measure, 1.0, 100, whole=False, tolerance=0.0001))
    assert (capacity.load, capacity.next_load) == (pytest.approx(3.3, rel=1e-3), pytest.approx(3.3, rel=1e-3))


def test_a_load_that_the_client_did_not_make_bounds_no_server() -> None:
    """It was `32 requests/s, bound by client: at 64, `, and exit code 0."""

    async def measure(load: float, repeat: int) -> Verdict:
        return Verdict(True, 10.0, [], valid=load < 64)

    capacity = run(find_capacity(measure, 1.0, 4096, whole=False))
    assert (capacity.load, capacity.next_load, capacity.why) == (32.0, None, "client")


def test_the_step_that_is_shown_has_its_loads_verdict() -> None:
    """A load that failed in two of three was shown by the third, with no reason."""

    def step(speed: float, holds: bool) -> dict[str, Any]:
        return {
            "load": 22.0,
            "holds": holds,
            "throughput": {"output_tokens_per_second": speed},
            "client": {"valid": True},
        }

    assert median_step([step(1.0, False), step(2.0, True), step(3.0, False)], 22.0)["holds"] is False
    assert median_step([step(1.0, True), step(2.0, False), step(3.0, True)], 22.0)["holds"] is True
    run_alone = [{"load": 22.0, "throughput": {"output_tokens_per_second": 1.0}, "client": {"valid": True}}]
    assert median_step(run_alone, 22.0) == run_alone[0]


def test_what_an_invalid_or_interrupted_step_sent_is_not_sent_again() -> None:
    """The server's caches knew those images and texts."""
    same = {"kind": "sweep", "workload": {}, "plan": {}, "objective": {}, "server": None, "target": {"model": "m"}}
    steps = [{"next_index": 10, "client": {"valid": True}}, {"next_index": 30, "client": {"valid": False}}]
    again = resumed(same | {"steps": steps}, same | {"date": "today"}, Path("old.json"))
    assert (again["next_index"], again["steps"]) == (30, steps[:1])
    interrupted = same | {"steps": steps, "next_index": 50}
    assert resumed(interrupted, same | {"date": "today"}, Path("old.json"))["next_index"] == 50


def test_headroom_that_nobody_measured_does_not_hold() -> None:
    async def one() -> Any:
        return await run_load(Simulated().send, empty_request, Load(2, requests=8), "m")

    summary = summarise(run(one()), 2, judged=True)
    assert Objective.parse(SLO, min_headroom=0.1).judge(summary).failed == ["KV headroom was not measured"]
    assert Objective.parse(SLO, min_headroom=0.0).judge(summary).holds
