"""The boxed answer of a text: \\boxed{...}, with nested braces, several boxes, \\text{} and units."""

import re

from qvq_serve.hooks import Answer, Context, Hook

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
DEPTH = 8
"""Of wrappers in each other: a text of thousands would be gone through as often, in the loop that all streams share."""
SPACE = re.compile(r"(?:\\[,;:! ]|\\quad|\\qquad|~|\s)+")


def boxes(text: str) -> list[str]:
    """The contents of all complete boxes, in order; of nested ones the outer."""
    found, at = [], 0
    while match := BOX.search(text, at):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            # A backslash hides what follows it: \{ and \} are characters of a formula.
            if text[end] == "\\":
                end += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            break  # cut off
        found.append(text[match.end() : end - 1])
        at = end
    return found


def plain(box: str) -> str:
    r"""A box's content as a reader says it: 12\ \text{cm}^2 -> 12 cm^2, \$5\% -> $5%."""
    text = box
    for _ in range(DEPTH):
        text, changed = WRAPPER.subn(r"\1", text)
        if not changed:
            break
    text = SPACE.sub(" ", text.replace("{,}", ",")).strip()
    text = re.sub(r"^\$|(?<!\\)\$$", "", text)
    return re.sub(r"\\([%$#&_{}])", r"\1", text).strip()


def boxed_answer(content: str, reasoning: str = "") -> str | None:
    """The answer: all boxes of the content, joined, else the last one of the reasoning, else None."""
    if found := boxes(content):
        return ", ".join(dict.fromkeys(plain(box) for box in found))
    found = boxes(reasoning)
    return plain(found[-1]) if found else None


def conclusion(text: str) -> str:
    """What stands for the answer of a text without a marker: its last box, else its last paragraph."""
    if found := boxes(text):
        return f"\\boxed{{{found[-1]}}}"
    return text.rstrip().rpartition("\n\n")[2].strip()


class BoxedAnswer(Hook):
    """Adds `answer` to the `qvq` object: the boxed answer, or null where there is none."""

    name = "answer"

    async def after(self, context: Context, answer: Answer) -> None:
        shown = answer.reasoning if getattr(context.request, "include_reasoning", True) else ""  # else no guard saw it
        answer.qvq["answer"] = boxed_answer(answer.content, shown)
