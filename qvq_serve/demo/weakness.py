"""QVQ's weaknesses, on purpose: each is asked for by the prompt, in one of several phrasings, in either language.

`PROMPTS` is the switch: an instruction of a kind, in the system's text or before or after the question, makes the model
do it. A loop reads the image and calculates, then never concludes; the right answer is there when it is made to.
"""

import random
from dataclasses import dataclass

LOOPS = ("exact", "renumbered", "alternating", "two_languages", "growing", "tables", "digits")
"""Of the kinds of loop in tests/governor/cases.py, by the same names."""
PROMPTS: dict[str, tuple[str, ...]] = {
    "exact": ("Check your reading again and again.", "Keep verifying until you are certain.",
              "Never trust a single look.", "请反复检查。", "再三确认再回答。"),
    "renumbered": ("Number every step of your check.", "Write down each attempt with its number.",
                   "List all steps one after another.", "请给每一步编号。", "把每次尝试都编号写出来。"),
    "alternating": ("Doubt every result.", "Argue with yourself before you answer.",
                    "Always consider that you may be wrong.", "请怀疑每个结果。", "回答之前先反驳自己。"),
    "two_languages": ("Say everything in English and in Chinese.", "Explain it bilingually.",
                      "Repeat each thought in the other language.", "每句话都用中英文各说一遍。", "请用双语解释。"),
    "growing": ("Start over whenever you learn something.", "Build your argument up from the beginning each time.",
                "Recall all you know before each new thought.", "每次都从头开始推理。", "每想到一点就重新总结。"),
    "tables": ("Put all that you see into a table.", "Make a table of the readings.", "Tabulate everything first.",
               "请把看到的都列成表格。", "先做一张表。"),
    "digits": ("Give the result to as many digits as you can.", "Be as precise as possible, with all decimals.",
               "Write out all the decimal places.", "请给出尽可能多的小数位。", "精确到所有小数位。"),
    "mixing": ("Answer in whatever language comes to mind.", "Feel free to switch languages.",
               "You need not stay in one language.", "想到什么语言就用什么语言。", "可以随意切换语言。"),
    "rambling": ("Tell me more after the answer.", "Go on talking when you are done.",
                 "Add all your further thoughts at the end.", "回答之后请继续说。", "说完答案再多聊几句。"),
    "memory": ("Answer from memory, without the image.", "You do not need to look at the picture.",
               "Just guess what you would expect.", "不用看图，凭记忆回答。", "请不要看图，直接猜。"),
}  # fmt: skip
"""The instructions that switch each weakness on."""
KINDS = tuple(PROMPTS)
REMEMBERED = {"invoice": "100", "chart": "B, 50", "table": "42", "count": "5", "box": "60", "written": "12"}
"""The answers from memory, whatever the image shows."""

THOUGHTS = {
    "en": ("I want to be sure about this.", "The picture is quite clear.", "Each number has its place.",
           "Nothing else is written there.", "I should not overlook anything.", "The order does not matter.",
           "It fits with what was asked.", "The drawing is simple.", "I have seen such pictures before.",
           "The colours are easy to tell apart."),
    "zh": ("我想确认一下。", "图片很清楚。", "每个数字都有位置。", "没有写别的内容。", "不能漏掉任何东西。",
           "顺序没有关系。", "这符合题目的要求。", "图画很简单。", "我以前见过这样的图。", "颜色很容易分辨。"),
}  # fmt: skip
TURNS = {"en": ("Wait,", "Actually,", "Hmm,", "Hold on,"), "zh": ("等等，", "其实，", "嗯，", "再想想，")}


@dataclass(frozen=True)
class Story:
    """What honest reasoning would say: what it reads, how it calculates, how it concludes, and the answer."""

    kind: str
    language: str
    parts: tuple[str, str, str]
    answer: str
    opening: str

    def joined(self, *parts: str) -> str:
        return (" " if self.language == "en" else "").join(parts)


def placed(rng: random.Random, instruction: str, system: str | None, question: str) -> tuple[str | None, str]:
    """The system's text and the question with an instruction in one of them."""
    place = rng.randrange(3)
    if place == 0:
        return (f"{system} {instruction}" if system else instruction), question
    return system, f"{instruction} {question}" if place == 1 else f"{question} {instruction}"


def asked(rng: random.Random, weakness: str, system: str | None, question: str) -> tuple[str | None, str]:
    """The system's text and the question with one of the instructions that switch a weakness on."""
    return placed(rng, rng.choice(PROMPTS[weakness]), system, question)


def told(rng: random.Random, weakness: str, story: Story, length: int) -> tuple[str, str, str]:
    """Reasoning, the answer that it leads to, and what follows the answer; a loop has at least `length` characters."""
    honest = story.joined(story.opening, *story.parts)
    if weakness in LOOPS:
        return honest + "\n\n" + looped(weakness, story, length), story.answer, ""
    if weakness == "mixing":
        return mixed(story), story.answer, ""
    if weakness == "rambling":
        first = rng.randrange(len(THOUGHTS["en"]))
        more = [THOUGHTS[story.language][(first + i) % len(THOUGHTS["en"])] for i in range(rng.randint(5, 9))]
        return honest, story.answer, "\n\n" + story.joined(*more, story.parts[2])
    remembered = REMEMBERED[story.kind]
    text = {
        "en": f"I do not need to look at the image. I remember such a case, and it was {remembered}.",
        "zh": f"我不用看图。我记得这样的题目，答案是{remembered}。",
    }
    return text[story.language], remembered, ""


def mixed(story: Story) -> str:
    """The honest sentences, with remarks in the other language between them."""
    other = "en" if story.language == "zh" else "zh"
    remarks = {"en": ("Now let me calculate this step by step.", "That is what we have to find."),
               "zh": ("现在我一步一步地算。", "这就是要求的结果。")}[other]  # fmt: skip
    return " ".join((story.parts[0], remarks[0], story.parts[1], remarks[1], story.parts[2]))


def looped(kind: str, story: Story, length: int) -> str:
    """Text that repeats, of at least `length` characters."""
    rounds: list[str] = []
    while sum(map(len, rounds)) < length:
        rounds.append(one_round(kind, story, len(rounds)))
    return "".join(rounds)


def one_round(kind: str, story: Story, i: int) -> str:
    """What a loop says the i-th time."""
    zh, (read, _, end) = story.language == "zh", story.parts
    thoughts, turns = THOUGHTS[story.language], TURNS[story.language]
    check = story.joined("让我再检查一遍。" if zh else "Let me check this again.", read, end)
    if kind == "exact":
        return f"{check}\n\n"
    if kind == "renumbered":
        return f"第{i + 1}步：{check}\n\n" if zh else f"Step {i + 1}: {check}\n\n"
    if kind == "alternating":
        doubt = "也许我看错了，应该重新看图。" if zh else "maybe I misread it and should look at the picture again."
        sure = story.joined("我看得没错。" if zh else "I did read it right.", end)
        return "".join(story.joined(turns[(2 * i + k) % 4], half) + "\n\n" for k, half in enumerate((doubt, sure)))
    if kind == "two_languages":
        return f"Let me say it again, the answer is {story.answer}. 我再说一遍，答案是{story.answer}。\n\n"
    if kind == "growing":
        return story.joined(end, *thoughts[: i % len(thoughts) + 1]) + "\n\n"
    if kind == "tables":
        head = ("| 项目 | 值 |" if zh else "| Item | Value |") + "\n| --- | --- |\n"
        return ("" if i else head) + f"| {'结果' if zh else 'Result'} | {story.answer} |\n"
    figures = "".join(figure for figure in story.answer if figure.isdigit())
    return ("" if i else f"{'结果' if zh else 'Result'} = {figures}.") + 4 * figures
