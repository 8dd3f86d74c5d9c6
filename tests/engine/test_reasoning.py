"""Reasoning and answer told apart: the parser over any text and any cut, and what the server makes of it."""

import json
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvq_serve.hooks import CONTEXT, Context
from tests.engine.conftest import KEY, Server, data_url, photo, user

MARKERS = [
    "**Final Answer**\n\n",
    "**Final Answer:**",
    "### Final Answer\n",
    "**最终答案**",
    "最终答案：",
    "**Final answer**:",
]
SCHEMA = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"],
          "additionalProperties": False}  # fmt: skip

LATE = 2
"""Tokens by which vLLM's V1 runner misses a budget: those of the start string, but the first."""


@cache
def tokenizer() -> Any:
    """Qwen's own."""
    from vllm.tokenizers.hf import get_cached_tokenizer

    from benchmarks.geometry import qwen_bpe
    from qvq_serve.demo.build import build_tokenizer

    return get_cached_tokenizer(build_tokenizer(*qwen_bpe()))


def parser() -> Any:
    from qvq_serve.hooks.reasoning import QvqReasoningParser

    return QvqReasoningParser(tokenizer())


def apart(text: str) -> tuple[str | None, str | None]:
    return parser().extract_reasoning(text, None)


def streamed(pieces: list[str], ids: list[int]) -> tuple[str | None, str | None, int]:
    """(reasoning, content, reasoning tokens) of a text that comes in pieces; all ids come with the last one."""
    made = parser()
    deltas = [
        made.extract_reasoning_streaming("", "", piece, [], [], ids if last else [])
        for piece, last in [*((piece, False) for piece in pieces), ("", True)]
    ]
    deltas.append(made.finish_streaming())
    reasoning, content = (
        "".join(getattr(delta, part) or "" for delta in deltas if delta) for part in ("reasoning", "content")
    )
    return reasoning or None, content or None, made.parsed().reasoning_tokens


@pytest.mark.parametrize("marker", MARKERS)
def test_each_marker_ends_the_reasoning_and_is_dropped(marker: str) -> None:
    assert apart(f"Let me see.\n\n{marker} \\boxed{{4}}") == ("Let me see.", "\\boxed{4}")


@pytest.mark.parametrize(("text", "content"), [
    ("**Final Answers:**\n\n1. 4", "1. 4"), ("**Final Answer: \\(\\boxed{42}\\)**", "\\(\\boxed{42}\\)"),
    ("**Final Answer: 42** cm, not **43**", "42 cm, not **43**"), ("**Final Answer: 4*2 *or* 8**", "4*2 *or* 8"),
    ("**Final Answer\n\n**42** it is", "**42** it is"), ("**Final Answer: 42\n\n**So** it is", "42\n\n**So** it is"),
    ("### Final Answers: **42**", "**42**"), ("### Final Answer\n\nsix", "six"), ("最终答案：six", "six"),
    ("**Final Answer: 4*", "4*"), ("**Final Answer: **42**", "**42**"),
    ("**Final Answer: The **total** is 5", "The **total** is 5"),
])  # fmt: skip
def test_what_is_left_of_a_marker_is_cut_off_and_no_more(text: str, content: str) -> None:
    assert apart(f"A.\n\n{text}") == ("A.", content)


@pytest.mark.parametrize("answer", ['{"f": "2**3"}', "**yes**", "s: x", ":a", "    return x", "\n", "**", ""])
def test_an_answer_by_a_grammar_is_whole(answer: str) -> None:
    """What looked like the rest of a marker was cut off, and an empty one was made of the reasoning."""
    from qvq_serve.hooks.markers import GRAMMARS_LEAD
    from qvq_serve.hooks.request import BEHIND

    token = CONTEXT.set(Context(SimpleNamespace(n=1, continue_final_message=False), state={BEHIND: True}))
    try:
        made, text = parser(), f"A.\n\n{MARKERS[0].removesuffix(GRAMMARS_LEAD)}{GRAMMARS_LEAD}{answer}"
        assert made.extract_reasoning(text, None) == ("A.", answer or None)
        assert made.parsed([]).marked
        assert streamed([*text], [])[:2] == ("A.", answer or None)
    finally:
        CONTEXT.reset(token)


def test_tokens_beyond_the_tokenizer_are_reasoning() -> None:
    """The model has more rows than the tokenizer has tokens, and a bias can choose one; it broke the answer."""
    made, encode = parser(), tokenizer().encode
    text = "Let me see.\n\n"
    made.extract_reasoning(f"{text}**Final Answer**\n\n4", None)
    beyond = len(tokenizer()) + 100
    assert made.count_reasoning_tokens([beyond, *encode(text), *encode("**Final Answer**\n\n4")]) == 1 + len(
        encode(text)
    )


def test_the_first_marker_wins_and_an_answer_keeps_its_own_bold() -> None:
    assert apart("A.\n\n**Final Answer**\n\n**42** it is.\n\n**Final Answer**\n\n7") == (
        "A.", "**42** it is.\n\n**Final Answer**\n\n7"
    )  # fmt: skip
    assert apart("A.\n\n最终答案：**42** 度") == ("A.", "**42** 度")
    assert apart("A.\n\n**最终答案：** **42** 度") == ("A.", "**42** 度")
    assert apart("为了得到最终答案，我们先看图。\n\n**最终答案**\n\n五") == ("为了得到最终答案，我们先看图。", "五")


def test_without_a_marker_the_conclusion_is_repeated() -> None:
    assert apart("So \\boxed{3}.\n\nThat is it.") == ("So \\boxed{3}.\n\nThat is it.", "\\boxed{3}")
    assert apart("One.\n\nTwo.") == ("One.\n\nTwo.", "Two.")
    assert apart("") == (None, None)
    assert apart("I know.\n\n**Final Answer**") == ("I know.", "I know.")


def test_each_choice_knows_how_long_the_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM shows it to the first choice's parser; the others took a budget's end for a loop's."""
    from qvq_serve.governor.policy import LEFT, Orders
    from qvq_serve.hooks import reasoning
    from qvq_serve.profile import Profile

    profile, encode = Profile(max_model_len=2000, max_output_tokens=600), tokenizer().encode
    monkeypatch.setattr(reasoning, "launched_profile", lambda: profile)
    asked = {"max_tokens": 600, "max_completion_tokens": None, "structured_outputs": None}
    request = SimpleNamespace(**asked, continue_final_message=False)
    context = Context(request, state={reasoning.GOVERNED: Orders(1, 1, LEFT, 1024)})
    token = CONTEXT.set(context)
    try:
        first, second = parser(), parser()
    finally:
        CONTEXT.reset(token)
    first.is_reasoning_end([100] * 1600)  # leaves 400, and 300 of them for the reasoning
    forced = [id for piece in ("\n\n", "**", "Final", " Answer", "**", "\n\n") for id in encode(piece)]
    for one in (first, second):
        ids = [*encode("a " * 300)[:300], *forced, *encode("4")]
        one.extract_reasoning(tokenizer().decode(ids), None)
        assert one.parsed(ids).act.why == "budget"


texts = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *MARKERS,
                "**Final Answer: ",
                "*",
                "s",
                "**",
                "Final",
                " Answer",
                "\n\n",
                ":",
                "# ",
                "最终",
                "答案",
                "\\boxed{4}",
                "😀",
                "é",
            ]
        ),
        st.text(max_size=5),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(texts, st.data())
def test_any_text_cut_anywhere_gives_the_same_streamed_and_not(text: str, data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [*tokenizer().encode(text), tokenizer().eos_token_id]
    made = parser()
    whole = made.extract_reasoning(text, None)
    tokens = made.count_reasoning_tokens(ids)
    assert streamed(pieces, ids) == (*whole, tokens)
    assert 0 <= tokens < len(ids)


def test_reasoning_tokens_are_those_before_the_marker() -> None:
    encode = tokenizer().encode
    made = parser()
    made.extract_reasoning("Let me see: 2 + 2.\n\n**Final Answer**\n\n\\boxed{4}", None)
    ids = [*encode("Let me see: 2 + 2.\n\n"), *encode("**Final Answer**\n\n\\boxed{4}"), tokenizer().eos_token_id]
    assert made.count_reasoning_tokens(ids) == len(encode("Let me see: 2 + 2.\n\n"))


def test_a_stream_counts_its_reasoning_once_however_often_its_usage_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With continuous_usage_stats each chunk spelled all tokens again, in the loop that all streams share."""
    made, encode = parser(), tokenizer().encode
    made.streaming = True
    ids = encode("Let me see.\n\n**Final Answer**\n\n")
    made.extract_reasoning_streaming("", "", tokenizer().decode(ids), [], [], ids)
    counted = made.count_reasoning_tokens(ids)
    assert counted == len(encode("Let me see.\n\n"))
    monkeypatch.setattr(made, "model_tokenizer", None)
    assert made.count_reasoning_tokens([*ids, *encode("4, as 2 and 2 are.")]) == counted
    assert made.results == []  # those of answers that are whole


def test_an_answer_that_is_to_be_continued_is_known_by_the_marker_of_the_last_turn() -> None:
    encode, made = tokenizer().encode, parser()
    turn = encode("<|im_start|>assistant\n")
    earlier = encode("<|im_start|>assistant\n**Final Answer**\n\n4<|im_end|>\n<|im_start|>user\nAgain?<|im_end|>\n")
    assert not made.is_reasoning_end(earlier + turn)
    assert made.is_reasoning_end(earlier + turn + encode("So.\n\n**Final Answer**\n\n"))
    assert made.extract_reasoning("\\boxed{5}", None) == (None, "\\boxed{5}")


def test_the_server_tells_them_apart_and_the_openai_client_reads_it(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    request: dict[str, Any] = {
        "model": "qvq-demo",
        "messages": [user({"url": data_url(photo(476, 476))}, "What is this?")],
        "temperature": 0,
        "max_tokens": 60,
        "extra_body": {"thinking_token_budget": 10},
    }
    whole = client.chat.completions.create(**request)
    message = whole.choices[0].message
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == message.reasoning
    assert "".join(delta.content or "" for delta in deltas) == message.content
    last = next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    assert last.qvq == whole.qvq
    assert whole.qvq["visual_tokens"] == 17 * 17
    assert whole.qvq["reasoning_tokens"] == whole.usage.completion_tokens_details.reasoning_tokens
    assert whole.qvq["reasoning_tokens"] + whole.qvq["answer_tokens"] == whole.usage.completion_tokens
    assert "Final Answer" not in message.reasoning + message.content


def test_a_stream_that_continues_an_answer_is_counted_as_the_answer_without_it(server: Server) -> None:
    """vLLM sent it past its parser: no token of it was counted, and its answer was none."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    begun = "The total is 190.\n\n**Final Answer**\n\n\\boxed{"
    request: dict[str, Any] = {
        "model": "qvq-demo",
        "messages": [user("How much is the total?"), {"role": "assistant", "content": begun}],
        "temperature": 0,
        "max_tokens": 8,
        "extra_body": {"continue_final_message": True, "add_generation_prompt": False, "ignore_eos": True},
    }
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].qvq == whole.qvq
    assert (whole.qvq["reasoning_tokens"], whole.qvq["answer_tokens"]) == (0, 8)


def unmarked(server: Server) -> dict[str, Any]:
    """What keeps the demo from a conclusion of its own, so that it thinks until its budget ends."""
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "**"}, headers=server.headers).json()["tokens"]
    return {"logit_bias": {str(ids[-1]): -100}}


def test_a_thinking_budget_makes_the_model_conclude_once(server: Server) -> None:
    endless = unmarked(server) | {"max_tokens": 120, "ignore_eos": True}

    def reasoning_tokens(budget: int) -> int:
        answer = server.chat(user("Think."), thinking_token_budget=budget, **endless).json()
        assert "Final Answer" not in answer["choices"][0]["message"]["content"]
        return answer["qvq"]["reasoning_tokens"]

    assert [reasoning_tokens(budget) - budget for budget in (20, 40)] == [LATE, LATE]
    free = server.chat(user("Think."), **endless).json()
    assert (free["qvq"]["ended"], free["qvq"]["reasoning_tokens"]) == ("length", 120)


JSON_FORM = {"type": "json_schema", "json_schema": {"name": "total", "schema": SCHEMA}}
STRUCTURED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": JSON_FORM, "thinking_token_budget": 50}, r'\{\s*"total"\s*:\s*-?\d+\s*\}'),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
    ({"structured_outputs": {"grammar": 'root ::= "north" | "south"'}}, "north|south"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("form", "pattern"), STRUCTURED, ids=["json", "choice", "regex", "grammar"])
def test_a_grammar_holds_for_the_answer_and_leaves_the_reasoning_free(
    server: Server, form: dict[str, Any], pattern: str, stream: bool
) -> None:
    """The default budget is three quarters of max_tokens."""
    answer = server.chat(user("Total?"), max_tokens=200, stream=stream, **form, **unmarked(server))
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        reasoning, content = ("".join(d.get(part) or "" for d in deltas) for part in ("reasoning", "content"))
        qvq = chunks[-1]["qvq"]
    else:
        message, qvq = answer.json()["choices"][0]["message"], answer.json()["qvq"]
        reasoning, content = message["reasoning"], message["content"]
    assert re.fullmatch(pattern, content)
    assert not re.search(pattern, reasoning)
    assert (qvq["ended"], qvq["reasoning_tokens"]) == ("concluded", form.get("thinking_token_budget", 150) + LATE)


def test_a_grammar_knows_one_marker_as_vllms_budget_does() -> None:
    """Behind another one the budget wrote its own into the answer, which the grammar then refused: a 500."""
    from vllm.sampling_params import StructuredOutputsParams
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    from qvq_serve.hooks.request import behind_reasoning

    tag = Grammar.from_structural_tag(behind_reasoning(StructuredOutputsParams(json=SCHEMA)).structural_tag)
    accepted = {marker: _is_grammar_accept_string(tag, f'So, 最终.\n\n{marker}**\n\n{{"total": 1}}')
                for marker in ("**Final Answer", "**Final answer", "### Final Answer", "最终答案：")}  # fmt: skip
    assert [marker for marker, good in accepted.items() if good] == ["**Final Answer"]


def test_a_model_that_would_stop_before_its_answer_cannot(server: Server) -> None:
    """The end of the turn is made the likeliest token, so that without a grammar nothing is written."""
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "<|im_end|>"}, headers=server.headers).json()["tokens"]
    stopping = {"logit_bias": {str(ids[-1]): 100}, "max_tokens": 200}
    assert server.chat(user("Total?"), **stopping).json()["usage"]["completion_tokens"] == 1
    answer = server.chat(user("Total?"), response_format=JSON_FORM, thinking_token_budget=50, **stopping).json()
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["total"], int)
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_loop_that_vllm_finds_ends_as_stop_and_looped(server: Server) -> None:
    loop = {"max_pattern_size": 8, "min_pattern_size": 1, "min_count": 3}
    answer = server.chat(user("Hi"), max_tokens=200, repetition_detection=loop, ignore_eos=True).json()
    assert (answer["choices"][0]["finish_reason"], answer["qvq"]["ended"]) == ("stop", "looped")


def test_with_several_choices_each_has_its_object(server: Server) -> None:
    answer = server.chat(user("Hi"), n=3, temperature=1, max_tokens=5).json()
    assert [choice["qvq"]["reasoning_tokens"] for choice in answer["choices"]] == [5, 5, 5]
    assert "qvq" not in answer
    lines = server.chat(user("Hi"), n=3, temperature=1, max_tokens=5, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    ended = [choice["qvq"]["ended"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert ended == ["length"] * 3
