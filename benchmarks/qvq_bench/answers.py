r"""Whether an answer is right, by the rules of each data set; the answer is what \boxed{} holds.

MathVista's paper lets a language model extract the answer from the text; QVQ boxes it, so nothing is extracted here.
Mathematical equality is Math-Verify's, which parses LaTeX into SymPy.
"""

import difflib
import math
import re
from collections.abc import Sequence
from importlib.util import find_spec

LETTERS = "ABCDEFGHIJ"
LETTER = re.compile(r"\(?([A-J])\)?(?:[.:)]|$)")
"""Alone, or before a mark: not the article of "A square", nor the first of "A and C"."""


def exact(answer: str, expected: str) -> bool:
    """The same but for case and space: the demo's rule."""
    return "".join(answer.split()).lower() == "".join(expected.split()).lower()


def letter(answer: str, options: Sequence[str]) -> str | None:
    """The option that an answer names, by its letter, its text or both; None where it names none."""
    if (found := LETTER.match(answer.strip())) and LETTERS.index(found[1]) < len(options):
        return found[1]
    texts = [" ".join(option.lower().split()) for option in options]
    said = " ".join(answer.lower().split()).strip("$. ")
    named = zip(LETTERS, texts, strict=False)  # more options have no letter
    found_at = [at for at, (name, text) in enumerate(named) if said in (text, f"{name.lower()} {text}")]
    return LETTERS[found_at[0]] if len(found_at) == 1 else None


def mathematical(answer: str, expected: str, tolerance: float | None = None) -> bool:
    """Equal as expressions, sets and intervals, units aside; or the same text; numbers within a tolerance, as given."""
    from math_verify import parse, verify

    if exact(answer, expected):
        return True
    one, other = (number(text) if tolerance is None else value(text) for text in (answer, expected))
    if one is not None and other is not None:
        return abs(one - other) <= (1e-8 * max(1.0, abs(other)) if tolerance is None else 1.01 * tolerance)
    gold, found = (parse(f"\\boxed{{{text}}}") for text in (expected, answer))
    return bool(gold and found and verify(gold, found))


def number(text: str) -> float | None:
    """A plain number: 1,200, -3.5, 40%; None for anything else."""
    try:
        value = float(text.strip().strip("$").replace(",", "").replace("\\%", "").rstrip("%"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def value(text: str) -> float | None:
    r"""A number, also as an expression or with a unit: \frac{1}{3}, 45^\circ, x = 5, 12 cm; None for anything else."""
    if (plain := number(text)) is not None or not re.search(r"\d|\\pi", text) or find_spec("math_verify") is None:
        return plain
    from math_verify import parse

    try:
        found = parse(f"\\boxed{{{text}}}")[0]
        return number(str(float(getattr(found, "rhs", found))))
    except (TypeError, ValueError, IndexError, OverflowError, AttributeError):
        return None


def mmmu(answer: str, expected: Sequence[str], options: Sequence[str]) -> bool:
    """MMMU: the option's letter; an open answer has an expected text in it, or its number to 2 decimals."""
    if options:
        return letter(answer, options) in expected
    said = value(answer)
    for right in expected:
        wanted = number(right)
        if wanted is not None:
            if said is not None and round(said, 2) == round(wanted, 2):
                return True
        elif right.lower().strip() in answer.lower():
            return True
    return False


def mathvista(answer: str, expected: str, options: Sequence[str], kind: str, precision: float | None) -> bool:
    """MathVista: the nearest option; an integer without decimals, a float to its precision, a list as it is written."""
    if options:
        named = letter(answer, options)
        texts = list(options)
        near = texts[LETTERS.index(named)] if named else nearest(answer, texts)
        return near == expected
    said = value(answer)
    if kind == "integer":
        return said is not None and int(said) == int(float(expected))
    if kind == "float":
        return said is not None and f"{said:.{int(precision or 0)}f}" == f"{float(expected):.{int(precision or 0)}f}"
    return exact(answer, expected)


def nearest(answer: str, options: list[str]) -> str | None:
    """The option with the most in common with an answer."""
    return max(options, key=lambda option: difflib.SequenceMatcher(None, answer, option).ratio(), default=None)


def mathvision(answer: str, expected: str, options: Sequence[str]) -> bool:
    """MathVision: the option's letter or its text; otherwise mathematical equality."""
    if options and expected in LETTERS[: len(options)]:
        named = letter(answer, options)
        return named == expected or (named is None and mathematical(answer, options[LETTERS.index(expected)]))
    return mathematical(answer, expected)


def olympiadbench(answer: str, expected: Sequence[str], tolerances: Sequence[float | None] = ()) -> bool:
    """OlympiadBench: all of the answers, each mathematically equal, numbers within its tolerance, or all's."""
    given = list(tolerances) if len(tolerances) == len(expected) else [*tolerances, None][:1] * len(expected)
    left = list(zip((part.strip("$ ") for part in expected), given, strict=True))
    for part in re.split(r",(?![^({\[]*[)}\]])", answer) if len(expected) > 1 else [answer]:
        hit = next((each for each in left if mathematical(part.strip(), *each)), None)
        if hit is None:
            return False
        left.remove(hit)
    return not left
