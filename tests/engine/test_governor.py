"""The governor in the real vLLM on the CPU (V1 runner): each case on one server; off, observed and on, side by side."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from qvq_bench.bench import Target

from benchmarks.governor_effect import POLICY, measure
from qvq_serve.api.memory import prove_governor
from qvq_serve.errors import StartError
from tests.engine.conftest import KEY, Server, serving
from tests.governor.served import FLAGS, LOOP, NO_DETECTION, asking, cases, raw

BYTE_E8 = 164
"""The demo's token of the byte E8, which begins Han characters."""


@pytest.fixture(scope="module")
def governed(cache: Path) -> Iterator[Server]:
    """A server with a cache so small that requests are preempted, and prompts that are filled in chunks."""
    engine = ["--", "--kv-cache-memory-bytes", "54000000", "--max-num-batched-tokens", "512"]
    with serving(cache, "--demo", *FLAGS, *engine) as running:
        yield running


def test_all_cases_hold(governed: Server) -> None:
    seen = list(cases(asking(governed.url, KEY), governed.url, KEY, BYTE_E8))
    assert [(case, told) for case, held, told in seen if not held] == [] and len(seen) == 13


def test_what_it_did_is_counted(governed: Server) -> None:
    asking(governed.url, KEY)(**LOOP)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = httpx.get(f"{governed.url}/metrics", headers=governed.headers).text.splitlines()
        told = {line.split('"')[1]: float(line.split()[-1]) for line in lines if line.startswith("qvq_governor_total{")}
        if told.get("second_loop"):
            break
        time.sleep(0.5)
    assert told["found"] >= 2 and told["loop"] >= 1 and told["second_loop"] >= 1
    saved = next(float(line.split()[-1]) for line in lines if line.startswith("qvq_governor_saved_tokens_total"))
    assert saved >= 200


@pytest.mark.parametrize("body", [
    {"governor": {"lop": True}}, {"governor": {"circling": 9}}, {"governor": {"scripts": ["Klingon"]}},
    {"governor": {"answer_tokens": 0}}, {"governor": {"look": "x"}}, {"governor": {"sure": 0.5}}, {"governor": [1]},
    {"vllm_xargs": {"qvq_orders": [1]}}, {"governor": {"loop": 7}},
    {"governor": {"answer_tokens": "1e400"}}, {"governor": {"circling": "nan"}},
    {"governor": {"circling": -1}}, {"governor": {"look_after": 5}},
])  # fmt: skip
def test_a_policy_that_cannot_be_is_refused_with_its_name(governed: Server, body: dict[str, Any]) -> None:
    refused = asking(governed.url, KEY)(**body)
    named = next(iter(body)) if not isinstance(body.get("governor"), dict) else next(iter(body["governor"]))
    message = refused["error"]["message"]
    assert refused["error"]["code"] == 400 and (named in message or "qvq_orders" in message), message


def test_xargs_are_another_name_for_the_field(governed: Server) -> None:
    seen = asking(governed.url, KEY)(**LOOP, vllm_xargs={"answer_tokens": 20})
    assert seen["qvq"]["ended"] == "length" and seen["qvq"]["governor"]["found"] == "loop"
    assert seen["choices"][0]["finish_reason"] == "length"  # to vLLM it stopped


def test_a_conclusion_comes_in_time_behind_a_long_prompt(governed: Server) -> None:
    """The prompt leaves some 350 tokens of the context; the budget was that of all that was asked for."""
    ask = asking(governed.url, KEY)
    seen = ask("How much? " + "word " * 2600, **LOOP, **NO_DETECTION, governor={"loop": False}, max_tokens=8000)
    assert seen["usage"]["prompt_tokens"] > 7_500
    assert seen["qvq"]["governor"]["found"] == "budget" and seen["qvq"]["answer_tokens"] > 50


def test_a_budget_that_leaves_no_room_for_a_conclusion_is_vllms(governed: Server) -> None:
    seen = asking(governed.url, KEY)(**LOOP, **NO_DETECTION, thinking_token_budget=5, max_tokens=60)["qvq"]
    assert seen["reasoning_tokens"] < 12 and seen["ended"] == "length" and "governor" not in seen


def test_what_may_not_be_written_is_not_concluded_with(governed: Server) -> None:
    """The marker lost its second word, and the rest of it stood in the text."""
    seen = asking(governed.url, KEY)(**LOOP, bad_words=["Answer"])
    assert seen["qvq"]["ended"] == "looped" and "**" not in seen["choices"][0]["message"]["reasoning"]


def test_a_conclusion_with_nothing_behind_it_is_told(server: Server, governed: Server) -> None:
    end = httpx.post(f"{server.url}/tokenize", json={"prompt": "<|im_end|>"}, headers=server.headers).json()["tokens"]
    ends = {"logit_bias": {str(end[-1]): 100}, "min_tokens": 14}
    seen = asking(governed.url, KEY)(**ends, thinking_token_budget=8)["qvq"]
    assert (seen["ended"], seen["governor"]["found"]) == ("concluded", "budget")


def test_off_observed_and_on_are_the_same_to_the_bit_for_who_triggers_nothing(
    server: Server, governed: Server, cache: Path
) -> None:
    body = {"max_tokens": 80, "logprobs": True, "top_logprobs": 3}
    off = asking(server.url, KEY)(**body)
    assert raw(asking(governed.url, KEY)(**body, governor={"budget": False, "sure": 0})) == raw(off)
    loop = LOOP | {"max_tokens": 200, "repetition_detection": {"max_pattern_size": 0}}
    with serving(cache, "--demo", "--governor", "observe") as observing:
        ask = asking(observing.url, KEY)
        assert raw(ask(**body)) == raw(off)
        seen = ask(**loop)
        assert seen["choices"][0]["message"]["reasoning"] == "c" * 200 and "governor" not in seen["qvq"]


async def measured(target: Target, names: list[str]) -> dict[str, Any]:
    """The effect of each variant on 30 prompts."""
    return [found async for found in measure(target, names, limit=30, users=30, max_tokens=1_200)][-1]


def test_a_model_that_loops_is_made_to_give_its_right_answer(cache: Path) -> None:
    """30 prompts of ten weaknesses; seven of them are loops, which know the answer and do not say it."""
    with serving(cache, "--demo", "--governor", "on", "--governor-policy", POLICY) as running:
        target, names = Target(running.url, KEY, timeout=600), ["off", "loop and budget", "everything"]
        off, on, everything = asyncio.run(measured(target, names)).values()
    assert off["right"] <= 9 and off["output_tokens"] > 400 and set(off["ended"]) >= {"length", "looped"}
    assert on["right"] >= 22 and on["output_tokens"] < 0.7 * off["output_tokens"]
    assert on["ended"]["concluded"] >= 18 and on["governor"]["loop"] >= 18
    assert everything["right"] >= 20 and everything["governor"].keys() >= {"loop", "sure"}


def test_a_server_without_it_says_so(server: Server) -> None:
    refused = asking(server.url, KEY)(governor={"loop": True})
    assert refused["error"]["code"] == 400 and "--governor" in refused["error"]["message"]


def test_a_start_without_the_processor_fails() -> None:
    class Engine:
        async def collective_rpc(self, name: str) -> list[dict[str, int]]:
            return [{}, {}] if name == "qvq_governor" else []

    with pytest.raises(StartError, match="without the governor"):
        asyncio.run(prove_governor(Engine()))
