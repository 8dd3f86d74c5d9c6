"""Loads on a virtual clock: who sends when, what counts in the window, what a summary says of it."""

import asyncio
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qvq_bench.arrivals import due_times
from qvq_bench.load import Load, Measured, run_load
from qvq_bench.summary import BINS_PER_DECADE, LOWEST_S, grown, histogram, known_before, summarise, unsettled
from qvq_bench.sweep import Objective
from qvq_bench.workload import Request, Workload, load_workload

from tests.bench.fake import Plan
from tests.bench.virtual import Simulated, empty_request, run, sender


def measured(load: Load, plan: str = "", watch: Any = None, **more: Any) -> Measured:
    parsed = Plan.parse(plan)
    return run(run_load(sender(lambda _: parsed), empty_request, load, "model", watch, **more))


def texts(tmp_path: Path, tokens: str) -> Workload:
    """Prompts of five words, and answers of set lengths."""
    path = tmp_path / "mine.toml"
    path.write_text(f"[images]\ncount = 0\n[text]\ntokens = 5\n[output]\ntokens = {tokens}\nignore_eos = true")
    return load_workload(str(path))


def asked(mine: Workload, load: Load, gap: float, first: float = 0.0) -> Measured:
    """The load of a workload on a server that writes a token each `gap` seconds."""

    async def request(index: int) -> Request:
        return mine.request(index, load.share(index))

    def plan(body: dict[str, Any]) -> Plan:
        return Plan(first=first, gap=gap, chunks=body["max_tokens"])

    return run(run_load(sender(plan), request, load, "model"))


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-6, abs=1e-6)


def test_a_closed_loop_has_as_many_requests_at_once_as_users() -> None:
    made = measured(Load(4, requests=20), "first=0.5,gap=0.1,chunks=6")
    assert [row.outcome for row in made.rows] == ["ok"] * 20
    assert sorted({round(row.sent or 0, 6) for row in made.rows}) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert (made.start, made.stop) == (0.0, near(5.0))


def test_tokens_a_second_and_requests_a_second_are_exact() -> None:
    summary = summarise(measured(Load(4, requests=20), "first=0.5,gap=0.1,chunks=6,tokens=3"), 4, judged=True)
    assert summary["throughput"]["output_tokens_per_second"] == near(20 * 18 / 5)
    assert summary["throughput"]["requests_per_second"] == near(4)
    assert summary["latency"]["time_to_first_token"]["p95"] == near(0.5)
    assert summary["latency"]["time_per_output_token"]["p50"] == near(0.5 / 17)
    assert summary["latency"]["chunk_gap"]["p99.9"] == near(0.1)
    assert summary["ok_share"] == 1.0


def test_think_time_is_kept_between_a_users_requests() -> None:
    made = measured(Load(1, requests=3, think=2.0), "first=0.5,gap=0.1,chunks=6")
    assert [row.sent for row in made.rows] == [near(0), near(3), near(6)]


def test_what_runs_at_the_end_is_waited_for_or_cut_off() -> None:
    plan = "first=0.5,gap=0.1,chunks=20"  # 2.4 s each
    waited = measured(Load(2, seconds=3.0), plan)
    assert [row.outcome for row in waited.rows] == ["ok"] * 4
    assert waited.stop == near(3.0)
    cut = measured(Load(2, seconds=3.0, drain=False), plan)
    assert sorted(row.outcome for row in cut.rows) == ["ok", "ok", "unfinished", "unfinished"]
    summary = summarise(cut, 2, judged=True)
    assert (summary["outcomes"]["unfinished"], summary["ok_share"]) == (2, 1.0)
    # 20 tokens of each first request; the second ones began at 2.4 and had a token at 2.9 and at 3.0
    assert summary["throughput"]["output_tokens_per_second"] == pytest.approx((40 + 2) / 3, abs=2 / 3)


def test_the_warm_up_is_not_measured() -> None:
    load = Load(1, seconds=2.0, warmup=4.0)
    summary = summarise(measured(load, "first=0.5,gap=0.1,chunks=6"), 1, judged=True)
    assert summary["window_s"] == near(2.0)
    assert summary["throughput"]["output_tokens_per_second"] == near(6.0)
    assert summary["outcomes"]["ok"] == 3  # two sent in the window, and the one that ended as it began


def test_a_window_that_begins_before_the_first_answers_end_is_said_to_be_unsettled() -> None:
    plan = "first=0.5,gap=0.5,chunks=6"  # an answer takes 3 s
    short = summarise(measured(Load(2, seconds=9.0, warmup=2.0), plan), 2, judged=True)
    assert "an answer takes 3 s at the median and the warm-up 2 s" in (unsettled(short, 2.0, "closed") or "")
    assert unsettled(short, 4.0, "closed") is None and unsettled(short, 2.0, "poisson") is None
    set_length = summarise(measured(Load(2, seconds=9.0, warmup=2.0), plan), 2, judged=False)
    assert unsettled(set_length, 2.0, "closed") is None


@pytest.mark.parametrize("warmup", [8.0, 10.0, 11.0, 12.0, 13.0])
def test_users_whose_answers_are_of_one_length_do_not_end_them_together(warmup: float, tmp_path: Path) -> None:
    """Of an answer's 4 s, 2 are its prompt's: in half of that, a window sees all users' tokens or none, or a mean."""
    made = asked(texts(tmp_path, "20"), Load(32, seconds=2.0, warmup=warmup), gap=0.1, first=2.0)
    summary = summarise(made, 32, judged=False)
    assert summary["throughput"]["output_tokens_per_second"] == pytest.approx(32 * 20 / 4, rel=0.1)
    assert summary["latency"]["end_to_end"]["max"] == near(3.9)
    assert sum(row.share < 1 for row in made.rows) == 32
    assert all(row.end_to_end is None for row in made.rows if row.share < 1)


def test_users_hold_as_many_tokens_after_a_short_warm_up_as_they_would_in_hours(tmp_path: Path) -> None:
    """The longest answer takes 40 s. In hours, a user is met behind E[n^2] / 2 E[n] tokens of an answer."""
    mine, load = texts(tmp_path, "{median = 60, p95 = 240, max = 400}"), Load(1200, seconds=10.0, warmup=8.0)
    made = asked(mine, load, gap=0.1)
    lengths = [mine.request(index).body["max_tokens"] for index in range(10_000, 20_000)]
    expected = statistics.mean(n * n for n in lengths) / statistics.mean(lengths) / 2
    for at in (8.0, 13.0, 17.9):
        running = [row for row in made.rows if row.sent is not None and row.sent <= at < (row.end or 1e9)]
        written = sum(int(np.searchsorted(np.frombuffer(row.times), at)) for row in running)
        words = [mine.request(row.index, load.share(row.index)).body["messages"][0]["content"][-1]["text"].split()
                 for row in running]  # fmt: skip
        held = written + sum(len(text) - 5 for text in words)
        assert held / len(running) == pytest.approx(expected, rel=0.1), at


def test_an_answer_that_ends_by_itself_keeps_its_limit_in_the_warm_up() -> None:
    made = measured(Load(4, seconds=2.0, warmup=4.0), "first=0.5,gap=0.1,chunks=6")
    assert {row.share for row in made.rows} == {1.0}


def test_arrivals_are_what_they_say() -> None:
    def first(count: int, kind: str, load: float, **more: Any) -> list[float]:
        return list(itertools.islice(due_times({"kind": kind, **more}, load, 1), count))

    assert first(4, "constant", 2) == [0, 0.5, 1, 1.5]
    assert first(5, "bursts", 4, burst=2) == [0, 0, 0.5, 0.5, 1]
    assert first(9, "trace", 2, trace_at=(0.0, 1.0, 5.0)) == [0, 0.5, 2.5]
    poisson = first(20_000, "poisson", 5)
    gaps = [b - a for a, b in itertools.pairwise(poisson)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.03)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.015)  # 1/e
    assert poisson == first(20_000, "poisson", 5)
    ramp = first(400, "ramp", 9, ramp_from=1, ramp_seconds=10)
    assert sum(at < 5 for at in ramp) == pytest.approx(15, abs=1)  # the integral of 1 + 0.8 t
    assert sum(10 <= at < 20 for at in ramp) == pytest.approx(90, abs=1)


def test_an_open_loop_sends_when_due_however_slow_the_server_is() -> None:
    load = Load(10, due=due_times({"kind": "constant"}, 10, 1), requests=30)
    made = measured(load, "first=60")
    assert [row.sent for row in made.rows] == [near(i / 10) for i in range(30)]


def test_2000_streams_at_once() -> None:
    made = measured(Load(2000, requests=2000), "first=1,gap=1,chunks=5")
    assert {row.outcome for row in made.rows} == {"ok"} and made.stop == near(5.0)


def test_samples_come_at_even_times_and_a_failed_one_is_left_out() -> None:
    calls = itertools.count()

    async def watch() -> dict[str, Any]:
        if next(calls) == 2:
            raise ConnectionError("restarting")
        return {"kv_usage": 0.25, "preemptions": 3.0}

    made = measured(Load(1, requests=2), "first=0.5,gap=0.1,chunks=11", watch, sample_every=0.5)
    assert [sample["at"] for sample in made.samples[:4]] == [near(0), near(0.5), near(1.5), near(2.0)]


def test_memory_peaks_and_the_three_headrooms() -> None:
    server = Simulated(tpot=lambda n: 0.1, kv_tokens=2_000)

    async def one() -> Measured:
        return await run_load(server.send, empty_request, Load(5, requests=25), "m", server.watch, 0.25)

    memory = summarise(run(one()), 5, judged=True)["memory"]
    assert (memory["running_peak"], memory["kv_usage_peak"]) == (5, near(0.3))
    assert memory["headroom"] == {"kv_tokens": near(1_400), "bytes": None, "requests": near(1_400 / 120)}
    assert memory["preemptions"] == 0


def test_useful_tokens_leave_out_loops_and_cuts() -> None:
    plans = itertools.cycle([Plan(qvq="answered"), Plan(qvq="looped", ending="repetition"), Plan(ending="length"),
                             Plan(ending="refuse")])  # fmt: skip
    made = run(run_load(sender(lambda _: next(plans)), empty_request, Load(1, requests=8), "m"))
    useful = summarise(made, 1, judged=True)["useful"]
    assert useful["ended"] == {"answered": 2, "looped": 2, "length": 2, "refused": 2}
    assert useful["share"] == near(1 / 3)
    assert useful["lost"] == {"looped": near(1 / 3), "length": near(1 / 3), "refused": 0.0}
    assert summarise(made, 1, judged=False)["useful"] is None


def test_a_slow_client_is_no_valid_result() -> None:
    made = Measured(stop=1.0)
    made.lag.extend([0.001] * 90 + [0.2] * 10)
    client = summarise(made, 1, judged=True)["client"]
    assert not client["valid"] and "0.200 s late" in client["why"]
    made.lag.extend([0.001] * 900)  # behind the window
    assert not summarise(made, 1, judged=True)["client"]["valid"]


def test_a_client_that_stands_still_for_a_tenth_of_the_time_is_not_valid() -> None:
    """Such stalls were one late waking each, among hundreds in time."""

    async def stall() -> dict[str, Any]:
        asyncio.get_running_loop().now += 0.2  # type: ignore[attr-defined]
        return {}

    made = measured(Load(1, seconds=20.0), "first=0.5,gap=0.1,chunks=6", stall, sample_every=2.0)
    client = summarise(made, 1, judged=True)["client"]
    assert not client["valid"] and client["lag"]["max"] == pytest.approx(0.2, abs=0.011)


def test_an_open_loops_window_has_its_whole_time() -> None:
    """It ended with the last answer: a request a second for 10 s was 1.09 a second."""
    load = Load(1, due_times({"kind": "constant"}, 1, 0), seconds=10.0)
    summary = summarise(measured(load, "first=0.1,gap=0.01,chunks=10"), 1, judged=True)
    assert summary["window_s"] == near(10.0)
    assert summary["throughput"]["requests_per_second"] == pytest.approx(1.0, abs=0.11)
    ended = measured(Load(1, due_times({"kind": "constant"}, 1, 0), requests=5), "first=0.1,gap=0.01,chunks=10")
    assert ended.stop < 6


def test_a_typical_request_is_no_less_than_what_those_that_ran_held() -> None:
    """Without a drain the long ones were cut off, and the headroom counted in short ones."""

    async def watch() -> dict[str, Any]:
        return {"kv_usage": 0.5, "running": 10.0, "kv_capacity_tokens": 10_000}

    made = measured(Load(2, seconds=5.0), "first=0.5,gap=0.1,chunks=6", watch)
    memory = summarise(made, 2, judged=True)["memory"]
    assert memory["typical_request_tokens"] == near(500) and memory["headroom"]["requests"] == near(10)


def test_metrics_that_stand_still_are_sampled_once() -> None:
    """All times that had passed were sampled at once, so that a stall counted twenty times; an odd page ended it."""
    asked = iter(range(1000))

    async def watch() -> dict[str, Any]:
        number = next(asked)
        await asyncio.sleep(2.0 if number == 1 else 0.0)
        if number == 3:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text")
        return {"running": number}

    made = measured(Load(1, requests=1), "first=1.0,gap=0.5,chunks=6", watch)
    at = [round(sample["at"], 3) for sample in made.samples]
    assert at.count(2.5) == 1 and made.missed == 4


def test_another_jobs_card_is_not_the_servers_fullest() -> None:
    cards = {"0": {"total": 100, "used": 60}, "1": {"total": 100, "used": 99}}

    async def watch() -> dict[str, Any]:
        return {"cards": cards, "headroom": {"0": 41.0}}

    made = measured(Load(1, requests=2), "first=0.5,gap=0.1,chunks=6", watch)
    assert summarise(made, 1, judged=True)["memory"]["headroom"]["bytes"] == 40


@pytest.mark.parametrize("told", [[2.0, math.nan, 9.0], [math.nan, 2.0, 2.0]])
def test_a_driver_that_fails_for_a_while_hides_no_peak(told: list[float]) -> None:
    left = iter(told)

    async def watch() -> dict[str, Any]:
        return {"headroom": {"0": next(left, 9.0)}}

    made = measured(Load(1, requests=2), "first=0.5,gap=0.1,chunks=6", watch)
    assert summarise(made, 1, judged=True)["memory"]["headroom"]["bytes"] == 2


def test_an_interrupted_load_keeps_what_it_has() -> None:
    async def one() -> Measured:
        work = run_load(sender(lambda _: Plan(first=1, gap=1, chunks=2)), empty_request, Load(1, requests=1000), "m")
        task = asyncio.create_task(work)
        await asyncio.sleep(9.5)
        task.cancel()
        return await task

    made = run(one())
    assert made.interrupted
    assert [row.outcome for row in made.rows] == ["ok"] * 4 + ["unfinished"]


def test_a_fault_in_making_a_request_is_not_swallowed() -> None:
    async def broken(index: int) -> Any:
        raise ValueError("no such image")

    with pytest.raises(ValueError, match="no such image"):
        run(run_load(sender(lambda _: Plan()), broken, Load(2, requests=4), "m"))


def test_a_histogram_has_every_value_in_its_bin() -> None:
    bins = histogram([0.001, 0.001, 0.0299, 12.0])
    assert sum(bins.values()) == 4
    for value in (0.001, 0.0299, 12.0):
        low, high = (LOWEST_S * 10 ** (n / BINS_PER_DECADE) for n in (0, 1))
        assert any(
            low * 10 ** (int(n) / BINS_PER_DECADE) * 0.999 <= value <= high * 10 ** (int(n) / BINS_PER_DECADE) * 1.001
            for n in bins
        )


def test_a_closed_loop_that_waits_for_its_own_requests_is_not_valid() -> None:
    """16 users of whom three were on the server, and `valid`: the wait for an image that was drawn was nobody's."""

    async def slow(index: int) -> Request:
        await asyncio.sleep(0.4)
        return await empty_request(index)

    async def one() -> Measured:
        return await run_load(sender(lambda _: Plan()), slow, Load(2, requests=8), "m")

    client = summarise(run(one()), 2, judged=True)["client"]
    assert (client["valid"], client["queue"]["p50"]) == (False, near(0.4))


def test_an_answer_that_crosses_the_windows_edge_has_all_its_tokens() -> None:
    made = measured(Load(2, seconds=1.5), "first=0.2,gap=0.05,chunks=20")
    assert summarise(made, 2, judged=True)["useful"]["tokens_per_answer"] == near(20)


def test_tokens_of_chunks_that_nobody_counted_are_not_told() -> None:
    """Four tokens a chunk were told as one."""
    summary = summarise(measured(Load(2, seconds=1.0, drain=False), "first=0.1,gap=0.1,chunks=100"), 2, judged=True)
    assert (summary["outcomes"]["unfinished"], summary["throughput"]["output_tokens_per_second"]) == (2, None)


def test_a_request_that_never_begins_counts_by_its_wait() -> None:
    plans = iter([Plan(first=0.1), Plan(first=0.1), *[Plan(first=100.0)] * 2])
    made = run(run_load(sender(lambda _: next(plans)), empty_request, Load(2, seconds=3.0, drain=False), "m"))
    first = summarise(made, 2, judged=True)["latency"]["time_to_first_token"]
    assert (first["count"], first["max"] > 2.0) == (4, True)


def test_a_counter_that_began_again_has_not_fallen() -> None:
    samples = [{"preemptions": value} for value in (3.0, 7.0, 2.0, 5.0)]
    assert grown(samples, "preemptions") == 4 + 2 + 3


def test_a_user_that_is_refused_does_not_ask_again_at_once() -> None:
    """Eight users against a limit of four made 2,700 refusals in 5 s, and then the client was said to be slow."""
    made = run(run_load(sender(lambda _: Plan(ending="refuse")), empty_request, Load(1, seconds=3.5, drain=False), "m"))
    assert [round(row.sent or 0.0, 2) for row in made.rows] == [0, 1, 2, 3]


def test_an_open_loops_fault_in_making_a_request_is_not_swallowed_either() -> None:
    async def broken(index: int) -> Request:
        if index == 3:
            raise OSError("an image is gone")
        return await empty_request(index)

    load = Load(1.0, iter(range(100)), seconds=50.0)
    with pytest.raises(OSError, match="an image is gone"):
        run(run_load(sender(lambda _: Plan(first=0.1)), broken, load, "m"))


def test_an_open_loop_above_what_the_server_carries_is_unsettled() -> None:
    def step(seconds: float) -> dict[str, Any]:
        load = Load(10.0, (at / 10 for at in itertools.count()), seconds=60.0, warmup=20.0)
        made = run(run_load(sender(lambda _: Plan(first=next(waits) if seconds else 2.0)), empty_request, load, "m"))
        return summarise(made, 10, judged=True)

    waits = (2.0 + 0.05 * at for at in itertools.count())  # each waits longer than the last
    assert "requests were under way" in (unsettled(step(1), 20.0, "poisson") or "")
    assert unsettled(step(0), 20.0, "poisson") is None


def test_figures_of_the_server_are_not_told_from_after_the_window() -> None:
    """With a /metrics that is too slow under load, an idle server's KV cache was the peak."""
    calls = itertools.count()

    async def watch() -> dict[str, Any]:
        if next(calls) < 6:
            raise ConnectionError
        return {"kv_usage": 0.0, "kv_capacity_tokens": 100, "preemptions": 0.0}

    made = run(run_load(sender(lambda _: Plan(first=0.1)), empty_request, Load(1, seconds=2.9), "m", watch))
    memory = summarise(made, 1, judged=True)["memory"]
    assert (memory["kv_usage_peak"], memory["headroom"]["kv_tokens"], memory["samples_missed"]) == (None, None, 6)
    assert (
        Objective.parse("ok=0%", min_headroom=0.1).judge(summarise(made, 1, True)).failed[-1].endswith("not measured")
    )


def test_images_that_an_earlier_run_sent_are_said_to_be_known() -> None:
    """`first-image` was measured with all of its images in the server's cache."""

    def told(name: str, images: float | None, prompts: float, preempted: float = 0.0) -> str:
        memory = {"image_hit_ratio": images, "prefix_hit_ratio": prompts, "preemptions": preempted}
        return known_before({"memory": memory}, load_workload(name, 0).settings) or ""

    assert "the server knew 100% of the images" in told("first-image", 1.0, 0.1)
    assert "the server knew 90% of the prompts' tokens" in told("chat-short", None, 0.9)
    assert told("same-image", 0.9, 0.9) == told("chat-short", None, 0.1) == told("qvq-long", 0.0, 0.9, 4) == ""
