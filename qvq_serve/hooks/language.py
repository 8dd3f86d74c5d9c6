"""Which scripts were written, and how often the language changed: QVQ mixes languages."""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from qvq_serve.hooks import Answer, Context, Hook

COMMAND = re.compile(r"\\[a-zA-Z]+")
"""LaTeX's commands are no language."""
SENTENCE = re.compile(r"[.!?。！？\n]+")
LEAST_LETTERS = 4
"""A sentence with fewer letters is a formula, or a name."""
NAMES = {"CJK": "Han", "IDEOGRAPHIC": "Han"}


@lru_cache(maxsize=65536)
def script(letter: str) -> str | None:
    """The script of a letter: Latin, Han, Cyrillic, Hangul, ...; None for what is no letter."""
    if not letter.isalpha():
        return None
    plain = next(filter(str.isalpha, unicodedata.normalize("NFKC", letter)), letter)  # a micro sign is Greek's mu
    name = unicodedata.name(plain, "").split(" ", 1)[0].split("-", 1)[0]
    return NAMES.get(name, name.capitalize()) or None


def scripts(text: str) -> Counter[str]:
    """Letters of a text by script."""
    counted: Counter[str] = Counter()
    for letter, number in Counter(text).items():
        if found := script(letter):
            counted[found] += number
    return counted


def languages(text: str) -> dict[str, float]:
    """The share of each script among a text's letters, the largest first: {"Latin": 0.99, "Han": 0.01}."""
    counted = scripts(COMMAND.sub(" ", text))
    total = counted.total()
    return {name: round(number / total, 3) for name, number in counted.most_common()}


def switches(text: str) -> int:
    """How often a sentence's main script differs from that of the sentence before."""
    changes, last = 0, None
    for sentence in SENTENCE.split(COMMAND.sub(" ", text)):
        counted = scripts(sentence)
        if counted.total() < LEAST_LETTERS:
            continue
        kana = counted["Hiragana"] + counted["Katakana"]  # Japanese writes Han too
        main = "Kana" if kana else counted.most_common(1)[0][0]
        changes += last is not None and main != last
        last = main
    return changes


class Languages(Hook):
    """Adds `languages` and `language_switches`, of reasoning and answer together, to the `qvq` object."""

    name = "language"

    async def after(self, context: Context, answer: Answer) -> None:
        text = f"{answer.reasoning}\n{answer.content}"
        answer.qvq["languages"] = languages(text)
        answer.qvq["language_switches"] = switches(text)
