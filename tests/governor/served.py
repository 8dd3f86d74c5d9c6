"""Cases of the governor on a running server: the same for the V1 runner (tests/engine) and the V2 runner (tests/gpu).

A bias on one token makes any model loop on it; a forced token outweighs it. Token 66 is `c` in the demo's vocabulary
and in Qwen's.
"""

import concurrent.futures
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx

Ask = Callable[..., dict[str, Any]]
LOOP = {"logit_bias": {"66": 100}}
POLICY = "language,look=1,sure=0.999,circling=3"
FLAGS = ["--max-queued-requests", "100", "--governor", "on", "--governor-policy", POLICY]
NO_DETECTION = {"repetition_detection": {"max_pattern_size": 0}}
NO_ENDS = {"loop": False, "budget": False, "sure": 0}
"""Made-up weights loop by themselves, and the demo is sure of its conclusions."""


def asking(url: str, key: str | None = None) -> Ask:
    """Asks a server, greedy; the response as it comes."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(text: str = "How much?", **body: Any) -> dict[str, Any]:
        request = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 600} | body
        got = httpx.post(f"{url}/v1/chat/completions", json=request, headers=headers, timeout=300)
        if body.get("stream"):
            return streamed(got.text)
        made: dict[str, Any] = got.json()
        return made

    return ask


def streamed(events: str) -> dict[str, Any]:
    """A stream put together."""
    text, qvq = {"reasoning": "", "content": ""}, None
    for line in events.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            qvq = chunk.get("qvq", qvq)
            for name in text:
                text[name] += "".join(choice["delta"].get(name) or "" for choice in chunk["choices"])
    return {"choices": [{"message": text}], "qvq": qvq}


def raw(made: dict[str, Any]) -> Any:
    """What a model sampled, with its logprobs to the bit."""
    return made["choices"][0]["message"], made["choices"][0]["logprobs"]


def preemptions(url: str, key: str | None = None) -> float:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found = re.search(r"^vllm:num_preemptions_total\S* (\S+)", httpx.get(f"{url}/metrics", headers=headers).text, re.M)
    return float(found[1]) if found else 0.0


def cases(ask: Ask, url: str, key: str | None, han: int) -> Iterator[tuple[str, bool, Any]]:
    """(case, whether it held, what was seen). `han` is a token that begins or is a Han character."""
    made = ask(**LOOP)
    seen = made["qvq"]
    held = seen["governor"] == {"found": "loop", "period": 1} and 48 <= seen["reasoning_tokens"] < 48 + 128
    yield "a loop is made to conclude, and a second one ends it", held and seen["ended"] == "looped", seen

    cut = ask(**LOOP, governor={"answer_tokens": 20})
    answer = cut["choices"][0]["message"]["content"]
    yield (
        "at most M tokens follow",
        cut["qvq"]["ended"] == "length" and len(answer) == 20,
        {**cut["qvq"], "answer": answer},
    )

    flowed = ask(**LOOP, stream=True)
    letters = flowed["choices"][0]["message"]["reasoning"].strip("c")  # where the loop is found depends on the step
    yield "the same in a stream", not letters and flowed["qvq"]["ended"] == "looped", flowed["qvq"]

    several = [choice["qvq"] for choice in ask(**LOOP, n=3, temperature=0.7)["choices"]]
    yield "each of n choices", all(seen.get("governor", {}).get("found") == "loop" for seen in several), several

    for budget in (8, 100):
        asked = LOOP | NO_DETECTION | {"max_tokens": 300, "governor": {"loop": False}}
        seen = ask(**asked, thinking_token_budget=budget)["qvq"]
        held = seen["governor"]["found"] == "budget" and budget <= seen["reasoning_tokens"] <= budget + 2
        yield f"a budget of {budget}", held, seen

    let_be = ask(**LOOP, governor=False, **NO_DETECTION, max_tokens=300)["qvq"]
    yield "not where the request says no", let_be["ended"] == "length" and "governor" not in let_be, let_be

    plain = NO_DETECTION | {"max_tokens": 60, "logprobs": True, "top_logprobs": 3}
    ask(**plain)  # the prompt's prefix comes from the cache for both
    with_it, without = ask(**plain, governor=NO_ENDS), ask(**plain, governor=False)
    yield "who triggers nothing is left alone to the bit", raw(with_it) == raw(without), raw(with_it)[0]

    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": {
        "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}}  # fmt: skip
    made = ask(**form, max_tokens=240)
    content = made["choices"][0]["message"]["content"]
    yield "a grammar is left alone", content.strip().startswith("{"), {**made["qvq"], "content": content}

    biased = {"logit_bias": {str(han): 100}, "max_tokens": 400}
    made = ask(**biased, governor={"answer_tokens": 40})
    message = made["choices"][0]["message"]
    latin = not re.search("[\u4e00-\u9fff\ufffd]", message["content"])
    yield "an answer keeps to the question's scripts", latin and len(message["content"]) >= 5, made["qvq"]
    made = ask(**biased, governor={"answer_tokens": 40, "scripts": ["Han"]})
    free = made["choices"][0]["message"]["content"]
    yield "or to those that are asked for", bool(re.search("[\u4e00-\u9fff\ufffd]", free)), made["qvq"]

    before = preemptions(url, key)
    bodies = [{"text": f"{at}: how much?", "seed": at, "max_tokens": 900} for at in range(40)]
    bodies = [
        body | (LOOP if at % 3 == 0 else {"governor": NO_ENDS, "min_tokens": 900}) for at, body in enumerate(bodies)
    ]
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: ask(**body), bodies))
    happened = preemptions(url, key) - before
    texts = ["".join(made["choices"][0]["message"][k] or "" for k in ("reasoning", "content")) for made in together]
    loops = all(made["qvq"]["ended"] == "looped" and made["qvq"]["governor"]["found"] == "loop"
                for made in together[::3])  # fmt: skip
    others = all(len(text) > 0 for text in texts)
    yield (
        f"40 at once, some of them preempted ({happened:.0f} times)",
        loops and others and happened > 0,
        [made["qvq"] for made in together[::3]],
    )

    long = ask("word " * 1500, **LOOP)["qvq"]
    yield "after a prefill in chunks", long["ended"] == "looped" and long["governor"]["found"] == "loop", long
