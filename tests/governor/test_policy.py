"""What may be asked of the governor, and what is refused, with the switch's name."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from qvq_serve.errors import UsageError
from qvq_serve.governor.adapter import read_orders
from qvq_serve.governor.policy import LEFT, UNLIMITED, XARG, Orders, Policy, orders, read_policy, script_bits, within
from qvq_serve.governor.v1 import GovernorV1
from qvq_serve.hooks import Context, Refuse
from qvq_serve.hooks.governing import GOVERNED, Governing
from qvq_serve.hooks.request import DEFAULT_LOOPS
from qvq_serve.profile import Profile


def test_a_policy_is_read_over_the_defaults() -> None:
    assert read_policy(None) == read_policy("") == Policy()
    read = read_policy("language, circling=3,loop=false,look=2,sure=0.9")
    assert read == Policy(language=True, circling=3.0, loop=False, look=2, sure=0.9)


@pytest.mark.parametrize(("text", "message"), [
    ("circeling=3", "'circeling' is no switch of the governor. Did you mean 'circling'?"),
    ("circling", "circling needs a value, for example circling=3"),
    ("circling=much", "circling is 'much'; it must be a number"),
    ("loop=maybe", "loop is 'maybe'; it must be true or false"),
    ("look=99", "look is 99; it must be from 0 to 16"),
    ("sure=2", "sure is 2.0; it must be from 0 to 1"),
    ("circling=nan", "circling is nan"),
    ("answer_tokens=0", "answer_tokens is 0; it must be at least 1"),
])  # fmt: skip
def test_a_policy_that_cannot_be_is_refused_at_the_start(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="--governor-policy") as refused:
        Profile(governor_policy=text)
    assert message in str(refused.value)


@pytest.mark.parametrize(("given", "made"), [
    ({}, Policy(circling=3, look=2, sure=0.9)),
    ({"loop": False}, Policy(circling=3, look=2, sure=0.9, loop=False)),
    ({"circling": 1.5, "look": 0}, Policy(circling=1.5, sure=0.9)),
    ({"circling_after": 900}, Policy(circling=3, circling_after=900, look=2, sure=0.9)),
    ({"sure": 0}, Policy(circling=3, look=2)),
    ({"sure": 0.95}, Policy(circling=3, look=2, sure=0.95)),
    ({"loop": 0, "answer_tokens": 20.0}, Policy(circling=3, look=2, sure=0.9, loop=False, answer_tokens=20)),
])  # fmt: skip
def test_a_request_can_do_less(given: dict[str, Any], made: Policy) -> None:
    assert within(Policy(circling=3, look=2, sure=0.9), given) == made


@pytest.mark.parametrize("given", [
    {"circling": 4}, {"look": 3}, {"language": True}, {"circling_after": 100}, {"answer_tokens": 2000}, {"sure": 0.5},
    {"reasoning_language": 1}, {"look_entropy": 0.5}, {"look": 1.5}, {"loop": "perhaps"}, {"circling": [1]},
])  # fmt: skip
def test_a_request_cannot_do_more_than_the_server_allows(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(given))} is "):
        within(Policy(circling=3, look=2, sure=0.9), given)


def test_no_surety_can_be_asked_for_where_the_server_has_none() -> None:
    with pytest.raises(ValueError, match=r"sure is 0.5; this server allows only 0"):
        within(Policy(), {"sure": 0.5})


def test_scripts_are_bits_and_latin_is_always_one() -> None:
    assert script_bits([]) == script_bits(["Latin"]) == 1
    assert script_bits(["Han", "Hiragana"]) == 0b111
    with pytest.raises(ValueError, match=r"scripts: 'Hann' is none that is known\. Did you mean 'Han'\?"):
        script_bits(["Hann"])


def test_orders_survive_float32() -> None:
    import torch

    made = orders(Policy(language=True, sure=0.5), None, script_bits(["Han", "Thai"]))
    assert Orders(*torch.tensor([float(x) for x in made]).tolist()) == Orders(*map(float, made))
    assert made.budget == UNLIMITED and made.chinese


def asked(profile: Profile, **fields: Any) -> tuple[Any, Context]:
    """A request as the hooks before this one leave it, after it."""
    fresh = dict.fromkeys((
        "governor", "structured_outputs", "allowed_token_ids", "vllm_xargs", "thinking_token_budget",
        "max_completion_tokens", "bad_words",
    ))  # fmt: skip
    said = [{"role": "user", "content": [{"type": "text", "text": "图中有几个 circles?"}]}]
    known = {
        "max_tokens": 400,
        "repetition_detection": "ours",
        "ignore_eos": False,
        "continue_final_message": False,
        "messages": said,
    }
    request = SimpleNamespace(**(fresh | known | fields))
    context = Context(request)
    context.state[DEFAULT_LOOPS] = True
    asyncio.run(Governing(profile).before(context))
    return request, context


def test_a_request_is_ordered_to_conclude_before_its_tokens_end() -> None:
    request, context = asked(Profile(governor="on"))
    given = Orders(*request.vllm_xargs[XARG])
    assert (given.governed, given.loop, given.budget, given.limit) == (1, 1, LEFT, 1024)
    assert given.scripts == script_bits(["Han"]) and given.chinese
    assert request.repetition_detection is None and context.state[GOVERNED].budget == LEFT


def test_a_budget_is_what_the_prompt_and_the_hooks_leave_of_the_output() -> None:
    """It was worked out from the request's max_tokens, and a long prompt's answer was cut before its conclusion."""
    given = Orders(*asked(Profile(governor="on"))[0].vllm_xargs[XARG])
    read = [read_orders(SamplingParams(max_tokens=n, extra_args={XARG: list(given)})) for n in (400, 100, 8192)]
    assert [one.budget for one in read] == [300, 75, 8192 - 1024]
    # A caption or a class has no room for a conclusion beside an answer: "**Final" was all that was left of it.
    assert Orders(1, 1, LEFT, 1024).of(24).budget == UNLIMITED
    # A budget of the server's that is more than the output, too.
    assert Orders(1, 1, 6000, 1024).of(2000).budget == 1500 and Orders(1, 1, 200, 1024).of(2000).budget == 200
    assert Orders(1, 1, 50, 1024).of(20).budget == 50 and Orders().of(20).budget == UNLIMITED


def test_a_budget_with_no_room_for_a_conclusion_is_left_to_vllm() -> None:
    for mode in ("on", "observe"):
        request, _ = asked(Profile(governor=mode), thinking_token_budget=5)
        assert request.thinking_token_budget == 5 and Orders(*request.vllm_xargs[XARG]).budget == UNLIMITED


def test_scripts_without_a_bit_of_their_own_are_allowed_where_they_are_asked_in() -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "இது என்ன α?"}]}]
    given = Orders(*asked(Profile(governor="on"), messages=said)[0].vllm_xargs[XARG])
    assert given.scripts == script_bits(["Other"])


def test_japanese_is_one_language() -> None:
    """A question without katakana got an answer that could have none, and a look-back in Chinese."""
    said = [{"role": "user", "content": [{"type": "text", "text": "これは何ですか？"}]}]
    given = Orders(*asked(Profile(governor="on"), messages=said)[0].vllm_xargs[XARG])
    assert given.scripts == script_bits(["Hiragana", "Katakana", "Han"]) and not given.chinese


def test_who_has_no_image_is_not_told_to_look_at_it() -> None:
    looking = Profile(governor="on", governor_policy="look=2")
    text = {"type": "text", "text": "What is 2 + 2?"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    looks = [
        Orders(*asked(looking, messages=[{"role": "user", "content": parts}])[0].vllm_xargs[XARG]).looks
        for parts in ([text], [image, text])
    ]
    assert looks == [0, 2]


@pytest.mark.parametrize(
    "given", [["x"] * 14, [1.0], list(range(20)), "orders", [float("nan")] * 14, 7, [1.0] * 13 + [5]]
)
def test_orders_that_a_client_sends_on_another_route_do_not_reach_the_engine(given: Any) -> None:
    """They ended the worker, and so the engine."""
    with pytest.raises(ValueError, match=r"vllm_xargs\.qvq_orders is the server's own"):
        GovernorV1.validate_params(SamplingParams(extra_args={XARG: given}))
    GovernorV1.validate_params(SamplingParams())
    GovernorV1.validate_params(SamplingParams(extra_args={XARG: [float(number) for number in Orders()]}))


def test_a_budget_becomes_the_governors_and_stays_vllms_where_it_is_not_to_conclude_by_it() -> None:
    request, _ = asked(Profile(governor="on"), thinking_token_budget=50)
    assert request.thinking_token_budget is None and Orders(*request.vllm_xargs[XARG]).budget == 50
    request, _ = asked(Profile(governor="on"), thinking_token_budget=50, governor={"budget": False})
    assert request.thinking_token_budget == 50 and Orders(*request.vllm_xargs[XARG]).budget == UNLIMITED


def test_observing_changes_nothing_of_the_request() -> None:
    request, context = asked(Profile(governor="observe"), thinking_token_budget=50)
    assert request.thinking_token_budget == 50 and request.repetition_detection == "ours"
    assert request.vllm_xargs and GOVERNED not in context.state


@pytest.mark.parametrize("fields", [
    {"governor": False}, {"structured_outputs": "a grammar"}, {"allowed_token_ids": [1]}, {"ignore_eos": True},
    {"bad_words": ["perhaps", " Final"]},
    {"continue_final_message": True, "messages": [{"role": "assistant", "content": "So. **Final Answer** It is"}]},
])  # fmt: skip
def test_what_is_left_alone(fields: dict[str, Any]) -> None:
    request, context = asked(Profile(governor="on"), **fields)
    assert request.vllm_xargs is None and request.repetition_detection == "ours" and GOVERNED not in context.state


def test_a_loop_that_is_not_to_be_concluded_is_left_to_vllms_detection() -> None:
    request, _ = asked(Profile(governor="on"), governor={"loop": False})
    assert request.repetition_detection == "ours"


def test_what_cannot_be_asked_is_refused_beside_a_grammar_too() -> None:
    with pytest.raises(Refuse, match="'lop' is no switch"):
        asked(Profile(governor="on"), governor={"lop": True}, structured_outputs="a grammar")


def test_a_server_without_a_governor_refuses_its_field() -> None:
    with pytest.raises(Refuse, match="--governor"):
        asked(Profile(), governor={"loop": True})
    assert asked(Profile())[0].vllm_xargs is None
