"""How good a served model's answers are: right by kind, tokens an answer, loops, languages, and how requests ended."""

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvq_bench import EXIT_INTERRUPTED, EXIT_NOT_OK, result
from qvq_bench.bench import Target, first_model, no_server
from qvq_bench.client import Send, http, lines, said, session
from qvq_bench.suites import PUBLISHED, Item
from qvq_serve.hooks.answer import boxed_answer
from qvq_serve.hooks.language import switches

Z = 1.96
"""Of a 95 % interval."""


@dataclass
class Judged:
    """One answer."""

    id: str
    kind: str
    expected: str
    answer: str | None
    right: bool
    ended: str
    """As the server says it in `qvq`, else its finish reason; `error` where there is no answer."""
    output_tokens: int = 0
    reasoning_tokens: int = 0
    language_switches: int = 0
    seconds: float = 0.0
    governor: str | None = None
    """What the governor found."""
    message: str = ""


async def ask(send: Send, body: dict[str, Any], item: Item) -> Judged:
    """Asks one item; an error is a wrong answer, and says what it was."""
    began = time.monotonic()
    judged = Judged(item.id, item.kind, item.expected, None, False, "error")
    try:
        async with send(body | {"messages": item.messages}) as reply:
            whole = b"".join([line async for line in lines(reply)])
        if reply.status != 200:
            judged.message = said(whole)
            return judged
        made = json.loads(whole)
        choice, qvq = made["choices"][0], made.get("qvq") or {}
        message = choice["message"]
        judged.output_tokens = (made.get("usage") or {}).get("completion_tokens", 0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        judged.message = f"{type(error).__name__}: {error}"
        return judged
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    content = message.get("content") or ""
    judged.answer = boxed_answer(content, reasoning)
    judged.ended = qvq.get("ended") or str(choice.get("finish_reason"))
    judged.reasoning_tokens = qvq.get("reasoning_tokens") or 0
    judged.language_switches = qvq.get("language_switches", switches(f"{reasoning}\n{content}"))
    judged.governor = (qvq.get("governor") or {}).get("found")
    judged.seconds = time.monotonic() - began
    return judged


async def ask_all(target: Target, items: list[Item], body: dict[str, Any], users: int, show: bool) -> dict[int, Judged]:
    """All items, so many at a time, by their places and in that order; what was answered until a cancellation."""
    done: dict[int, Judged] = {}
    queue = iter(enumerate(items))

    async with session(target.timeout) as pool:
        send = http(pool, target.url, target.key)
        try:
            body = body | {"model": target.model or await first_model(pool, target)}
        except ConnectionError as error:
            raise no_server(target, error) from None

        async def user() -> None:
            for at, item in queue:
                done[at] = await ask(send, body, item)
                if show:
                    print(f"\r{len(done)} of {len(items)}", end="", file=sys.stderr, flush=True)

        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*(user() for _ in range(min(users, len(items)))))
    if show:
        print(file=sys.stderr)
    return {at: done[at] for at in sorted(done)}


def judge(judged: dict[int, Judged], items: list[Item]) -> None:
    """Tells of each answer, by its item's place, whether it is right."""
    for at, each in judged.items():
        try:
            each.right = each.answer is not None and items[at].right(each.answer)
        except Exception as error:  # a rule that met what it does not know shall not lose the other answers
            each.message = f"item {each.id} could not be judged: {type(error).__name__}: {error}"


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, n = right / count, count
    middle, half = share + Z * Z / (2 * n), Z * ((share * (1 - share) + Z * Z / (4 * n)) / n) ** 0.5
    low, high = (middle - half) / (1 + Z * Z / n), (middle + half) / (1 + Z * Z / n)
    return max(0.0, low), min(1.0, high)


def accuracy(judged: list[Judged]) -> dict[str, Any]:
    """Right answers of some, with the interval that so many leave."""
    right = sum(each.right for each in judged)
    low, high = interval(right, len(judged))
    return {"count": len(judged), "right": right, "accuracy": right / len(judged), "low": low, "high": high}


def summarise(judged: list[Judged], seconds: float) -> dict[str, Any]:
    """The figures of a suite. Tokens and seconds are means over all that were asked."""
    count = len(judged)
    kinds = dict.fromkeys(each.kind for each in judged)
    return {
        **accuracy(judged),
        "by_kind": {kind: accuracy([each for each in judged if each.kind == kind]) for kind in kinds},
        "answered": sum(each.answer is not None for each in judged) / count,
        "ended": dict(Counter(each.ended for each in judged).most_common()),
        "governor": dict(Counter(each.governor for each in judged if each.governor).most_common()),
        "output_tokens": sum(each.output_tokens for each in judged) / count,
        "reasoning_tokens": sum(each.reasoning_tokens for each in judged) / count,
        "language_switches": sum(each.language_switches for each in judged) / count,
        "answers_per_second": count / seconds,
        "right_per_second": sum(each.right for each in judged) / seconds,
        "errors": dict(Counter(each.message for each in judged if each.message).most_common(5)),
    }


def table(suite: str, found: dict[str, Any]) -> str:
    """The figures for a person."""
    rows = [("all", found), *sorted(found["by_kind"].items())]
    told = []
    for name, row in rows:
        span = f"({row['low']:.0%} to {row['high']:.0%}, {row['right']} of {row['count']})"
        told.append(f"{name:24} {row['accuracy']:6.1%}  {span}")
    if suite in PUBLISHED:
        told.append(f"{'card, of the whole set':24} {PUBLISHED[suite]:.1f} %")
    ended = ", ".join(f"{name} {number}" for name, number in found["ended"].items())
    switched = found["language_switches"]
    told.append(f"{found['output_tokens']:.0f} tokens an answer, {switched:.1f} changes of language; ended: {ended}")
    return "\n".join(told)


async def measure(
    target: Target, suite: str, items: list[Item], body: dict[str, Any], users: int, out: Path | None,
    argv: list[str], show: bool,
) -> int:  # fmt: skip
    """Asks a suite and prints what came of it. Exit code 1 where a request failed, 130 after Ctrl-C."""
    if out:
        result.check_writable(out)
    began = time.monotonic()
    answers = await ask_all(target, items, body, users, show)
    seconds = time.monotonic() - began
    if not answers:
        return EXIT_INTERRUPTED
    judge(answers, items)
    judged = list(answers.values())
    found = summarise(judged, seconds)
    print(table(suite, found), file=sys.stderr)
    for message, number in found["errors"].items():
        print(f"  {number} x {message}", file=sys.stderr)
    print(json.dumps({"suite": suite, **found}))
    if out:
        whole = result.header("quality", argv) | {
            "suite": suite, "url": target.url, "body": body, "users": users, "seconds": seconds, "summary": found,
            "answers": [asdict(each) for each in judged],
        }  # fmt: skip
        result.write(out, whole)
    if len(judged) < len(items):
        return EXIT_INTERRUPTED
    return EXIT_NOT_OK if found["errors"] else 0
