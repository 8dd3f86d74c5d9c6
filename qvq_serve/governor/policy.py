"""What is asked of the governor: by the server's flag, within it by a request, and the numbers that the sampler gets.

Pure: no torch, no vLLM. A policy's names are those of `--governor-policy`, of the request's field `governor`, and of
`vllm_xargs`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from qvq_serve.errors import UsageError, nearest

SCRIPTS = (
    "Latin", "Han", "Hiragana", "Katakana", "Hangul", "Cyrillic", "Arabic", "Hebrew", "Devanagari", "Thai", "Other",
)  # fmt: skip
"""Bit i of a set of scripts; Greek is a symbol, as formulas are full of it."""
ALL_SCRIPTS = 2 ** len(SCRIPTS) - 1
STRAY = 2 ** len(SCRIPTS)
"""The bit of a token that begins within a character: no set of scripts has it."""
UNLIMITED = 2**24
"""A number of tokens that is never reached; float32 holds it exactly."""
LEFT = -1
"""A budget that is what the output leaves beside an answer."""
KEPT_FOR_ANSWER = 4
"""A quarter of the output is kept for the answer, or `answer_tokens` if that is less."""
LEAST_KEPT = 16
"""Tokens of a conclusion and of a short answer: where fewer would be kept, as of a caption, nothing is concluded."""
KANA = ("Hiragana", "Katakana")
"""Of Japanese, which needs both, and Han."""


def switch(default: Any, help: str, within: str = "at most", most: float = UNLIMITED) -> Any:
    """A field of Policy; a request may give what is `at most` or `at least` the server's value."""
    return field(default=default, metadata={"help": help, "within": within, "most": most})


@dataclass(frozen=True)
class Policy:
    """What the governor may do. Raises ValueError, naming the switch, for a value that cannot be."""

    loop: bool = switch(True, "a loop is made to conclude; a second one ends the turn")
    budget: bool = switch(True, "reasoning over its budget is made to conclude, and so in time before max_tokens")
    answer_tokens: int = switch(1024, "tokens that may follow a conclusion that was not the model's own")
    language: bool = switch(False, "the answer keeps to the scripts of the question, and Latin")
    reasoning_language: float = switch(0.0, "taken off the logits of other scripts in the reasoning", most=100)
    circling: float = switch(0.0, "taken off the logits of Wait, Hmm, Alternatively, ... in the reasoning", most=100)
    circling_after: int = switch(512, "tokens of reasoning before that", "at least")
    look: int = switch(0, "times at most that the model is reminded to look at the image again", most=16)
    look_after: int = switch(512, "tokens since the image was last mentioned before that", "at least")
    look_entropy: float = switch(1.5, "nats of entropy, averaged over the last tokens, above which it is", "at least")
    sure: float = switch(0.0, "probability of a marker's beginning at which it concludes; 0: never", "at least")

    def __post_init__(self) -> None:
        for option in fields(self):
            value, most = getattr(self, option.name), 1.0 if option.name == "sure" else option.metadata["most"]
            if not 0 <= value <= most:
                raise ValueError(f"{option.name} is {value}; it must be from 0 to {most:g}")
        if not self.answer_tokens:
            raise ValueError("answer_tokens is 0; it must be at least 1")


NAMES = [option.name for option in fields(Policy)]


def value(name: str, given: Any) -> Any:
    """A switch's value: text from a flag, or JSON from a request. Raises ValueError, naming it."""
    if name not in NAMES:
        raise ValueError(f"'{name}' is no switch of the governor.{nearest(name, NAMES)} Known: {', '.join(NAMES)}")
    kind = type(getattr(Policy(), name))
    words = {"true": True, "false": False, "1": True, "0": False, "": True}
    if kind is bool:
        found = words.get(given.lower()) if isinstance(given, str) else given
        if found in (0, 1):  # vllm_xargs has no true and false
            return bool(found)
        raise ValueError(f"{name} is {given!r}; it must be true or false")
    try:
        if isinstance(given, bool) or not isinstance(given, (int, float, str)):
            raise ValueError
        return kind(given) if isinstance(given, str) or kind is float or given == int(given) else kind(str(given))
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is {given!r}; it must be {'an integer' if kind is int else 'a number'}") from None


def read_policy(text: str | None) -> Policy:
    """The server's policy: `language,circling=3,loop=false` over the defaults. Raises UsageError."""
    given = {}
    try:
        for item in filter(None, (part.strip() for part in (text or "").split(","))):
            name, equals, said = item.partition("=")
            if not equals and type(getattr(Policy(), name, True)) is not bool:
                raise ValueError(f"{name} needs a value, for example {name}={getattr(Policy(), name) or 3}")
            given[name] = value(name, said)
        return Policy(**given)
    except ValueError as error:
        raise UsageError(f"--governor-policy {text}: {error}.") from None


def within(server: Policy, given: Mapping[str, Any]) -> Policy:
    """The policy of a request, which can only do less than the server's. Raises ValueError, naming the switch."""
    asked = {name: value(name, said) for name, said in given.items()}
    for option in fields(Policy):
        name, rule = option.name, option.metadata["within"]
        if name not in asked or asked[name] == getattr(server, name) or (name == "sure" and not asked[name]):
            continue
        limit = getattr(server, name)
        if (asked[name] > limit) is (rule == "at most") or (name == "sure" and not limit):
            only = {"loop": "only false", "budget": "only false", "language": "only false", "sure": "only 0"}
            allowed = f"{rule} {limit}" if limit else only.get(name, "only 0")
            raise ValueError(f"{name} is {asked[name]}; this server allows {allowed}")
    return replace(server, **asked)


def script_bits(scripts: Any) -> int:
    """A set of scripts as bits, Latin always among them. Raises ValueError for a script that does not exist."""
    bits = 1
    for script in scripts:
        if script not in SCRIPTS:
            raise ValueError(f"scripts: '{script}' is none that is known.{nearest(str(script), SCRIPTS)} "
                             f"Known: {', '.join(SCRIPTS)}")  # fmt: skip
        bits |= 1 << SCRIPTS.index(script)
    return bits


class Orders(NamedTuple):
    """What the sampler gets of a request, each a number (or, in the sampler, a column of one number a row)."""

    governed: Any = 0
    loop: Any = 0
    budget: Any = UNLIMITED
    limit: Any = UNLIMITED
    scripts: Any = ALL_SCRIPTS
    hold: Any = 0
    bias: Any = 0
    circling: Any = 0
    circling_after: Any = 0
    looks: Any = 0
    look_after: Any = 0
    look_entropy: Any = 0
    sure: Any = 0
    chinese: Any = 0
    """Whether a look-back is written in Chinese."""

    def of(self, output: int) -> "Orders":
        """With a budget that leaves an answer its share of an output that may have so many tokens."""
        given = UNLIMITED if self.budget == LEFT else self.budget
        if self.budget >= UNLIMITED or output < KEPT_FOR_ANSWER * LEAST_KEPT:
            return self._replace(budget=given)
        return self._replace(budget=min(given, output - min(self.limit, output // KEPT_FOR_ANSWER)))


XARG = "qvq_orders"
"""Under which orders travel in vLLM's `vllm_xargs`, as a list of numbers."""


def orders(policy: Policy, budget: int | None, scripts: int) -> Orders:
    """The orders for a request whose answer may use these scripts (bits), concluding after `budget` tokens, or LEFT."""
    names = {name for at, name in enumerate(SCRIPTS) if scripts >> at & 1}
    return Orders(
        1, policy.loop, UNLIMITED if budget is None else budget, policy.answer_tokens, scripts, policy.language,
        policy.reasoning_language, policy.circling, policy.circling_after, policy.look, policy.look_after,
        policy.look_entropy, policy.sure, "Han" in names and not names & set(KANA),
    )  # fmt: skip
