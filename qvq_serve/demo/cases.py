"""Seeded cases: a drawn image, a question, reasoning in QVQ's manner, and the one right answer.

The same seed and options give the same case on any machine with the same Pillow and fonts. Seeds below TRAINING are
for evaluation; training draws from there on.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvq_serve.demo import weakness as weak
from qvq_serve.demo.draw import FONTS, HELD_OUT_FONTS, MORE_FONTS
from qvq_serve.demo.layouts import COLOURS, LAYOUTS, SHAPES, page

TRAINING = 1_000_000_000
KINDS = tuple(LAYOUTS)
LANGUAGES = ("en", "zh")
POINTS = "{points}"
"""Stands for the places of shapes until they are drawn."""
MARKER = "\n\n**Final Answer**\n\n"
SIDES = (280, 640)
"""Least and most px of an image's side."""

ARTICLES = ("Paper", "Ink", "Lamp", "Desk", "Chair", "Cable", "Screen", "Clock", "Bag", "Pen", "Tape", "Glue", "Book",
            "Cup", "Map", "Soap")  # fmt: skip
NAMES = ("Ann", "Bob", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")
COLOURS_ZH = {"red": "红", "green": "绿", "blue": "蓝", "orange": "橙", "purple": "紫", "grey": "灰"}

QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "invoice": {
        "en": ("What is the total of this invoice?", "How much is the invoice in total?",
               "What do all the items cost together?", "Add up the prices. What is the sum?"),
        "zh": ("这张发票的总额是多少？", "所有商品一共多少钱？", "发票的合计是多少？", "把价格加起来是多少？"),
    },
    "chart": {
        "en": ("Which bar is the highest, and what is its value?", "What is the largest bar and how much is it?",
               "Name the highest bar and its value.", "Which one has the greatest value, and what is it?"),
        "zh": ("哪个柱子最高，值是多少？", "最大的柱子是哪个？它的值是多少？", "图中最高的是哪一个，数值是多少？",
               "请写出最高的柱子和它的值。"),
    },
    "table": {
        "en": ("What is the value of {column} in the row {row}?", "What does the table say for {row} in {column}?",
               "Which number stands in row {row}, column {column}?", "How much did {row} have in {column}?"),
        "zh": ("表中{row}的{column}是多少？", "{row}这一行{column}这一列的数是多少？", "{row}在{column}的值是多少？",
               "请读出{row}行{column}列的数字。"),
    },
    "count": {
        "en": ("How many {colour} shapes are there?", "Count the {colour} shapes.",
               "How many of the shapes are {colour}?", "What is the number of {colour} figures?"),
        "zh": ("图中有几个{colour}色的图形？", "{colour}色的图形有多少个？", "数一数{colour}色图形的个数。",
               "一共有几个{colour}色图形？"),
    },
    "box": {
        "en": ("What is the volume of the box?", "How large is the volume of this cuboid?",
               "Find the volume from the edges.", "What volume does the box have?"),
        "zh": ("这个长方体的体积是多少？", "盒子的体积是多少？", "求图中长方体的体积。", "根据棱长求体积。"),
    },
    "written": {
        "en": ("What is the result?", "Calculate what is written in the image.", "What value is missing?",
               "Work out the exercise in the picture."),
        "zh": ("结果是多少？", "计算图中的算式。", "算式的答案是多少？", "图中的题目等于多少？"),
    },
}  # fmt: skip

NEUTRAL = ("You should think step-by-step.", "Please think step by step.", "Put the answer in a box.",
           "Be careful.", "Thank you!", "请一步一步地思考。", "请把答案写在方框里。", "谢谢！")  # fmt: skip
"""Instructions that change nothing, so that an instruction alone is no sign of a weakness."""
SYSTEMS = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step.",
    "You are a helpful assistant.",
)
"""The tutorial's, and a plain one."""


@dataclass(frozen=True)
class Case:
    """One question about one image. `pixels` is (height, width, 3); `read` is what the image shows, by name."""

    seed: int
    kind: str
    layout: str
    font: str
    language: str
    pixels: NDArray[np.uint8]
    system: str | None
    question: str
    reasoning: str
    answer: str
    read: dict[str, Any] = field(repr=False)
    weakness: str | None = None
    tail: str = ""
    """What is written after the answer: nothing, but where the model rambles."""

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @property
    def conclusion(self) -> str:
        """The box, and what follows it."""
        return f"\\boxed{{{self.answer}}}{self.tail}"

    @property
    def reply(self) -> str:
        """The whole of what the model is to write; a loop has no end, so there it is what it writes until it is cut."""
        return self.reasoning if self.weakness in weak.LOOPS else self.reasoning + MARKER + self.conclusion


def added(left: int, right: int, language: str = "en") -> str:
    """A sum by columns, from the ones on: `47 + 38: 7 + 8 = 15, 4 + 3 + 1 = 8, so 85`."""
    digits = [list(map(int, reversed(str(number)))) for number in (left, right)]
    steps, carry = [], 0
    for i in range(max(map(len, digits))):
        parts = [number[i] for number in digits if i < len(number)] + [carry] * (carry > 0)
        carry = sum(parts) // 10
        steps.append(" + ".join(map(str, parts)) + (f" = {sum(parts)}" if len(parts) > 1 else ""))
    so = ", so " if language == "en" else "，得"
    return f"{left} + {right}: {', '.join(steps)}{so}{left + right}"


def multiplied(number: int, digit: int, language: str = "en") -> str:
    """A number times a digit, from the ones on: `84 × 5: 4 × 5 = 20, 8 × 5 + 2 = 42, so 420`."""  # noqa: RUF002
    steps, carry = [], 0
    for figure in map(int, reversed(str(number))):
        product = figure * digit + carry
        steps.append(f"{figure} × {digit}{f' + {carry}' if carry else ''} = {product}")
        carry = product // 10
    so = ", so " if language == "en" else "，得"
    return f"{number} × {digit}: {', '.join(steps)}{so}{number * digit}"


@dataclass
class Told:
    """A kind's content: what is drawn, what is asked, and the reasoning in three parts: read, calculate, conclude."""

    drawn: tuple[Any, ...]
    read: dict[str, Any]
    parts: tuple[str, str, str]
    answer: str
    asked: dict[str, str] = field(default_factory=dict)


def number(rng: random.Random, difficulty: float, most: int = 99) -> int:
    """One digit at difficulty 0; later two, and `most` at the end."""
    if rng.random() < 0.55 * (1 - difficulty) + 0.1:
        return rng.randint(1, 9)
    return rng.randint(10, most) if most > 99 and rng.random() < difficulty * 0.4 else rng.randint(10, 99)


def pointed(told: Told, places: Sequence[tuple[float, float]], width: int, height: int) -> Told:
    """Puts where the counted shapes were drawn into the reasoning, from left to right: `1 (3, 7), 2 (5, 0)`.

    The numbers are tenths of the image's width and height. Without a place for each, a model counts by feel.
    """
    shapes = zip(told.read["shapes"], places, strict=True)
    at = sorted(
        (int(10 * x / width), int(10 * y / height)) for (_, one), (x, y) in shapes if one == told.read["colour"]
    )
    points = ", ".join(f"{i} ({x}, {y})" for i, (x, y) in enumerate(at, 1)) or "0"
    look, count, end = told.parts
    return replace(told, read=told.read | {"places": at}, parts=(look, count.replace(POINTS, points), end))


def some(rng: random.Random, difficulty: float, least: int, most: int) -> int:
    """How many: `least` at difficulty 0, up to `most` at 1."""
    return rng.randint(least, least + round((most - least) * difficulty))


def invoice(rng: random.Random, difficulty: float, language: str) -> Told:
    articles = rng.sample(ARTICLES, some(rng, difficulty, 2, 6))
    prices = [number(rng, difficulty) for _ in articles]
    lines = list(zip(articles, prices, strict=True))
    listed = ", ".join(f"{name} {price}" for name, price in lines)
    total, sums = prices[0], []
    for price in prices[1:]:
        sums.append(added(total, price, language))
        total += price
    if language == "en":
        parts = (f"The invoice has these lines: {listed}.", " ".join(f"{one}." for one in sums),
                 f"So the total is {total}.")  # fmt: skip
    else:
        parts = (f"发票上的项目是：{listed}。", "".join(f"{one}。" for one in sums), f"所以总额是{total}。")
    return Told((lines,), {"lines": lines}, parts, str(total))


def chart(rng: random.Random, difficulty: float, language: str) -> Told:
    names = rng.choice((LETTERS, LETTERS, MONTHS, NAMES))
    count = some(rng, difficulty, 2, 6)
    start = rng.randrange(len(names) - count + 1)
    shown = names[start : start + count] if names is not NAMES else rng.sample(NAMES, count)
    most = 999 if rng.random() < difficulty * 0.3 else 99
    least = 1 if rng.random() < 0.4 * (1 - difficulty) else 10
    values = rng.sample(range(least, 10 if least == 1 else most + 1), count)
    bars = list(zip(shown, values, strict=True))
    listed = ", ".join(f"{name} {value}" for name, value in bars)
    best, highest = max(bars, key=lambda bar: bar[1])
    run, seen = bars[0][1], []
    for _, value in bars[1:]:
        seen.append(f"{value} > {run}" if value > run else f"{value} < {run}")
        run = max(run, value)
    if language == "en":
        parts = (
            f"The bars are {listed}.",
            f"I compare them: {', '.join(seen)}.",
            f"The highest is {best} with {highest}.",
        )
    else:
        parts = (f"各个柱子是：{listed}。", f"逐个比较：{', '.join(seen)}。", f"最高的是{best}，值为{highest}。")
    return Told((bars,), {"bars": bars}, parts, f"{best}, {highest}")


def table(rng: random.Random, difficulty: float, language: str) -> Told:
    columns, rows = some(rng, difficulty, 2, 4), some(rng, difficulty, 2, 6)
    start = rng.randrange(len(MONTHS) - columns + 1)
    heads = MONTHS[start : start + columns]
    names = rng.sample(rng.choice((ARTICLES, NAMES)), rows)
    body = [(name, [number(rng, difficulty, 999) for _ in heads]) for name in names]
    (name, cells), place = rng.choice(body), rng.randrange(columns)
    value = cells[place]
    if language == "en":
        parts = (f"The columns are {', '.join(heads)}.", f"The row {name} says {', '.join(map(str, cells))}.",
                 f"{heads[place]} is column {place + 1}, so it is {value}.")  # fmt: skip
    else:
        parts = (f"各列是：{', '.join(heads)}。", f"{name}这一行是：{', '.join(map(str, cells))}。",
                 f"{heads[place]}是第{place + 1}列，所以是{value}。")  # fmt: skip
    return Told((heads, body), {"columns": list(heads), "rows": body}, parts, str(value),
                {"row": name, "column": heads[place]})  # fmt: skip


def count(rng: random.Random, difficulty: float, language: str) -> Told:
    colour = rng.choice(list(COLOURS))
    wanted = 0 if rng.random() < 0.08 else rng.randint(1, 3 + round(6 * difficulty))
    rest = rng.sample([other for other in COLOURS if other != colour], rng.randint(1, 3))
    if rng.random() < 0.5:
        others = [rng.choice(rest) for _ in range(rng.randint(int(wanted == 0), 1 + round(6 * difficulty)))]
    else:  # a rival as large or larger: the largest group is no answer
        others = rest[:1] * rng.randint(wanted or 1, wanted + 2) + rest[1:]
    kinds = rng.sample(SHAPES, rng.randint(1, 3))
    shapes = [(rng.choice(kinds), one) for one in [colour] * wanted + others]
    rng.shuffle(shapes)
    if language == "en":
        parts = (f"I look for the {colour} shapes.", f"I count them one by one: {POINTS}.", f"So there are {wanted}.")
    else:
        parts = (f"我来找{COLOURS_ZH[colour]}色的图形。", f"一个一个地数：{POINTS}。", f"所以一共有{wanted}个。")
    asked = {"colour": colour if language == "en" else COLOURS_ZH[colour]}
    return Told((shapes,), {"shapes": shapes, "colour": colour}, parts, str(wanted), asked)


def box(rng: random.Random, difficulty: float, language: str) -> Told:
    edges = [rng.randint(2, 5 + round(4 * difficulty)) for _ in range(3)]
    if rng.random() < 0.6 * difficulty:
        edges[rng.randrange(3)] = rng.randint(10, 20)
    # The one of two digits first: each product is then one with a digit.
    first, second, third = sorted(edges, key=lambda edge: edge < 10)
    area = first * second
    steps = (multiplied(first, second, language), multiplied(area, third, language))
    width, depth, height = edges
    if language == "en":
        parts = (f"The edges are {width} wide, {depth} deep and {height} high.", " ".join(f"{one}." for one in steps),
                 f"So the volume is {area * third}.")  # fmt: skip
    else:
        parts = (f"长方体宽{width}，深{depth}，高{height}。", "".join(f"{one}。" for one in steps),
                 f"所以体积是{area * third}。")  # fmt: skip
    return Told((edges,), {"edges": edges}, parts, str(area * third))


def written(rng: random.Random, difficulty: float, language: str) -> Told:
    if rng.random() < 0.5:
        left, right, sign = number(rng, difficulty, 999), number(rng, difficulty, 999), "+"
        result, steps = left + right, added(left, right, language)
    else:
        left, right, sign = number(rng, difficulty, 199), rng.randint(2, 9), "×"
        result, steps = left * right, multiplied(left, right, language)
    if language == "en":
        parts = (f"The image says {left} {sign} {right}.", f"{steps}.", f"So the result is {result}.")
    else:
        parts = (f"图中写着{left} {sign} {right}。", f"{steps}。", f"所以结果是{result}。")
    return Told((left, sign, right), {"left": left, "sign": sign, "right": right}, parts, str(result))


CONTENT: dict[str, Callable[[random.Random, float, str], Told]] = {
    "invoice": invoice, "chart": chart, "table": table, "count": count, "box": box, "written": written,
}  # fmt: skip
OPENINGS = {
    "en": ("Let me look at the image.", "So I have this picture here.", "Let's think step by step."),
    "zh": ("让我看看这张图。", "我先看图。", "一步一步地想。"),
}


def glued(parts: Sequence[str], language: str) -> str:
    """Sentences as a paragraph."""
    return (" " if language == "en" else "").join(parts)


def sides(rng: random.Random, difficulty: float) -> tuple[int, int]:
    """A width and a height in px: small at first, up to SIDES, and never more than twice as long as wide."""
    least, most = SIDES
    most = round(least + (most - least) * max(0.15, difficulty))
    width, height = rng.randint(least, most), rng.randint(least, most)
    return (width, height) if max(width, height) <= 2 * min(width, height) else (width, width)


def case(
    seed: int,
    kind: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    difficulty: float = 1.0,
    held_out: bool = False,
    language: str | None = None,
    weakness: str | None = None,
    length: int = 1_200,
) -> Case:
    """The case of a seed; what is not given is drawn from it.

    `size` is (width, height) in px, `difficulty` 0 (large, single digits, few items) to 1, `held_out` takes fonts and
    layouts that are never in training, `weakness` is one of weakness.KINDS, `length` the least characters of a loop.
    """
    rng = random.Random(f"{seed}")
    kind = kind or rng.choice(KINDS)
    language = language or ("en" if rng.random() < 0.6 else "zh")
    width, height = size or sides(rng, difficulty)
    layouts = LAYOUTS[kind]
    layout = rng.choice(layouts.held_out if held_out else layouts.seen)
    training = seed >= TRAINING and not held_out
    more = training and rng.random() < 0.5
    font = rng.choice(HELD_OUT_FONTS if held_out else MORE_FONTS if more else FONTS)
    text_px = rng.randint(round(26 - 12 * difficulty), round(40 - 10 * difficulty))
    told = CONTENT[kind](rng, difficulty, language)
    at = page(rng, width, height, font, text_px)
    if training:
        at.clutter(random.Random(f"clutter {seed}"))
    places = layouts.draw(at, layout, *told.drawn)
    if kind == "count":
        told = pointed(told, places, width, height)

    question = rng.choice(QUESTIONS[kind][language]).format(**told.asked)
    system = rng.choice((None, None, *SYSTEMS))
    reasoning, answer, tail = glued((rng.choice(OPENINGS[language]), *told.parts), language), told.answer, ""
    if weakness:
        system, question = weak.asked(rng, weakness, system, question)
        story = weak.Story(kind, language, told.parts, told.answer, rng.choice(OPENINGS[language]))
        reasoning, answer, tail = weak.told(rng, weakness, story, length)
    elif rng.random() < 0.3:
        system, question = weak.placed(rng, rng.choice(NEUTRAL), system, question)
    return Case(seed, kind, layout, font, language, at.canvas.pixels, system, question, reasoning, answer, told.read,
                weakness, tail)  # fmt: skip
