"""Each figure of a request against a stream of known times: exactly on a virtual clock, and once over a socket."""

import asyncio
from typing import Any

import pytest
from qvq_bench import client
from qvq_bench.client import Row, ask

from tests.bench import fake
from tests.bench.virtual import run, sender


def asked(text: str, **body: Any) -> Row:
    """The row of one request to a stream by plan; times since it was sent."""
    plan = fake.Plan.parse(text)

    async def one() -> Row:
        row = Row(0, due=asyncio.get_running_loop().time())
        await ask(sender(lambda _: plan), {"messages": []} | body, row)
        return row

    return run(one())


def near(seconds: float) -> Any:
    return pytest.approx(seconds, abs=1e-6)


def test_times_are_those_of_text_and_tokens_those_of_usage() -> None:
    row = asked("accept=0.2,first=0.5,gap=0.05,chunks=9,tokens=2,reasoning=4")
    assert (row.outcome, row.finish, row.prompt_tokens, row.output_tokens, row.chunks) == ("ok", "stop", 5, 18, 9)
    assert row.time_to_first_token == near(0.5)  # not 0.2, when the role and a comment came
    assert row.time_to_first_answer_token == near(0.5 + 4 * 0.05)
    assert row.time_per_output_token == near(8 * 0.05 / 17)
    assert row.end_to_end == near(0.5 + 8 * 0.05)
    assert row.client_queue == near(0.0)


def test_the_qvq_object_is_kept() -> None:
    row = asked("qvq=looped,ending=repetition,reasoning=6,tokens=3")
    assert (row.outcome, row.finish, row.ended) == ("ok", "repetition", "looped")
    assert (row.visual_tokens, row.reasoning_tokens) == (4, 18)


@pytest.mark.parametrize(
    ("plan", "outcome", "message"),
    [
        ("ending=cut", "incomplete", "ConnectionResetError"),
        ("ending=silent", "incomplete", "without a finish reason"),
        ("ending=abort", "incomplete", "the server ended it: abort"),
        ("ending=length,qvq=timeout", "incomplete", "the server ended it: timeout"),
        ("ending=error", "error", "EngineCore encountered an issue"),
        ("ending=refuse", "refused", "no room"),
        ("ending=busy", "refused", "no room"),
        ("ending=late", "refused", "no room"),
        ("ending=bad", "error", "no room"),
        ("ending=unreachable", "error", "nobody listens"),
    ],
)
def test_what_is_no_success_is_told_apart(plan: str, outcome: str, message: str) -> None:
    row = asked(plan)
    assert (row.outcome, message in (row.message or "")) == (outcome, True), row
    assert row.end is not None and row.end_to_end is None


def test_a_cut_stream_keeps_its_first_token_and_counts_no_tokens() -> None:
    row = asked("ending=cut,first=0.3,gap=0.1,chunks=4")
    assert row.time_to_first_token == near(0.3)
    assert (row.output_tokens, row.chunks, row.time_per_output_token) == (None, 4, None)


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    row = asked("chunks=1")
    assert (row.output_tokens, row.time_per_output_token, row.outcome) == (1, None, "ok")


def test_an_answer_without_text_has_no_first_token() -> None:
    row = asked("chunks=0")
    assert (row.outcome, row.time_to_first_token, row.output_tokens) == ("ok", None, 0)


def test_over_a_real_socket_the_same_within_50_ms() -> None:
    async def one() -> tuple[Row, Row]:
        server = await fake.serve(0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        whole, cut = Row(0, 0.0), Row(1, 0.0)
        async with client.session(30) as session:
            send = client.http(session, url, "key")
            plan = "accept=0.1,first=0.4,gap=0.05,chunks=9,tokens=2,reasoning=4"
            await ask(send, {"model": plan, "messages": []}, whole)
            await ask(send, {"model": plan + ",ending=cut", "messages": []}, cut)
        server.close()
        return whole, cut

    whole, cut = asyncio.run(one())
    assert (whole.outcome, whole.output_tokens, cut.outcome) == ("ok", 18, "incomplete")
    assert whole.time_to_first_token == pytest.approx(0.4, abs=0.05)
    assert whole.time_to_first_answer_token == pytest.approx(0.6, abs=0.05)
    assert whole.end_to_end == pytest.approx(0.8, abs=0.05)
    assert whole.time_per_output_token == pytest.approx(0.4 / 17, abs=0.05 / 17)
