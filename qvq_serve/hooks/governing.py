"""What a request asks of the governor, written for the sampler; and what it did, read back from the tokens.

The sampler tells nothing but the tokens. A conclusion that it forced is tokenised as the tokenizer never would, and
what it had found is found again here, on the same tokens.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qvq_serve.governor.policy import KANA, LEFT, SCRIPTS, XARG, Orders, orders, read_policy, script_bits, within
from qvq_serve.hooks import Context, Hook, Refuse, content_parts
from qvq_serve.hooks.language import scripts
from qvq_serve.hooks.markers import MARKERS
from qvq_serve.hooks.request import DEFAULT_LOOPS, is_answering
from qvq_serve.profile import Profile

GOVERNED = "governor's orders"
"""Where a request's context keeps its orders."""
LEAST_BUDGET = 8
"""Tokens of the conclusion, and of what stands before it: smaller budgets are left to vLLM."""


class Governing(Hook):
    """Turns `governor`, `thinking_token_budget` and the server's policy into orders for the sampler."""

    name = "governor"

    def __init__(self, profile: Profile) -> None:
        self.profile, self.policy = profile, read_policy(profile.governor_policy)

    async def before(self, context: Context) -> None:
        request, given = context.request, context.request.governor
        if self.profile.governor == "off":
            if given:
                raise Refuse("governor is given, and this server runs without one (--governor)")
            return
        asked = dict(given) if isinstance(given, dict) else {}
        try:
            named = asked.pop("scripts", None)
            if named is not None and not isinstance(named, list):
                raise ValueError(f'scripts is {named!r}; it must be a list, for example ["Latin", "Han"]')
            policy = within(self.policy, asked)
            bits = script_bits(question_scripts(request) if named is None else named)
        except ValueError as error:
            raise Refuse(f"governor: {error}") from None
        if given is False or request.structured_outputs is not None or request.allowed_token_ids:
            return  # a grammar leaves no room for a conclusion; a budget of vLLM's own ends its reasoning
        if any(word.strip() in MARKERS[0] for word in request.bad_words or ()):
            return  # nor does what may not be written
        if is_answering(request) or (request.ignore_eos and self.profile.governor == "on"):
            return  # its conclusion is in the prompt; or it is to go on, whatever it writes
        if not any(part.get("type") == "image_url" for part in content_parts(request.messages)):
            policy = replace(policy, look=0)
        budget = request.thinking_token_budget
        if budget is None or budget < 0:
            budget = LEFT
        elif budget < LEAST_BUDGET:
            policy = replace(policy, budget=False)
        made = orders(policy, budget if policy.budget else None, bits)
        request.vllm_xargs = {XARG: [float(number) for number in made]}
        if self.profile.governor != "on":
            return
        context.state[GOVERNED] = made
        if policy.budget:
            request.thinking_token_budget = None
        if policy.loop and context.state.get(DEFAULT_LOOPS):
            request.repetition_detection = None  # it would end the turn before it can conclude


def question_scripts(request: Any) -> list[str]:
    """The scripts of what the user wrote, as the policy knows them."""
    users = [message for message in request.messages if message.get("role") == "user"]
    texts = [message["content"] for message in users if isinstance(message.get("content"), str)]
    texts += [part.get("text") or "" for part in content_parts(users)]
    found = [name if name in SCRIPTS else "Other" for name in scripts(" ".join(texts)) if name != "Greek"]
    return [*found, *KANA, "Han"] if set(found) & set(KANA) else found


@dataclass
class Act:
    """What the governor did to a choice."""

    ended: str
    why: str
    """loop, budget or sure."""
    period: int
    """Of the loop, in tokens; 0 where it has none, or where there was no loop."""


@lru_cache(maxsize=1)
def writing(tokenizer: Any) -> tuple[tuple[int, ...], Any]:
    """(a forced conclusion's tokens, which tokens are words and numbers)."""
    from qvq_serve.governor.tokens import conclusion_tokens, read_vocabulary

    return conclusion_tokens(tokenizer)[1], read_vocabulary(tokenizer, len(tokenizer)).words


def act(given: Orders, tokenizer: Any, ids: list[int], answer: int) -> Act | None:
    """What a choice's tokens tell of the governor, its answer beginning at one of them; None where it let it be."""
    from qvq_serve.governor.core import first_end

    conclusion, words = writing(tokenizer)

    def loop(end: list[int]) -> tuple[int, bool]:
        return loop_at_end(end, words) if given.loop else (0, False)

    at = first_end(ids, [conclusion])
    if at:
        before = ids[: at - len(conclusion)]
        at_budget = len(before) >= given.budget  # a loop that is found there now, the sampler had not yet looked for
        period, found = (0, False) if at_budget else loop(before)
        why = "budget" if at_budget else "loop" if found or not given.sure else "sure"
        rest = [token for token in ids[at:] if token not in tokenizer.all_special_ids]
        ended = "looped" if loop(rest)[1] else "length" if len(rest) >= given.limit else "concluded"
        return Act(ended, why, period)
    period, found = loop(ids[answer:]) if answer < len(ids) else (0, False)
    return Act("looped", "loop", period) if found else None


def loop_at_end(ids: list[int], words: Any) -> tuple[int, bool]:
    """(period, whether there is a loop) at the end of some tokens."""
    import torch

    from qvq_serve.governor.detect import WINDOW, repetition

    window = torch.full((1, WINDOW), -1, dtype=torch.int32)
    if tail := ids[-WINDOW:]:
        window[0, -len(tail) :] = torch.tensor(tail, dtype=torch.int32)
    found = repetition(window, words)
    return int(found.period), bool(found.looping)
