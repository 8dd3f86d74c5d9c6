"""How each kind of case is laid out on its image. A layout draws values that it is given, and invents only looks."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qvq_serve.demo import clutter
from qvq_serve.demo.draw import Canvas, Colour, left_edge

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40), "green": (44, 150, 66), "blue": (42, 84, 214), "orange": (242, 146, 28),
    "purple": (142, 62, 174), "grey": (128, 128, 132),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "hexagon", "star")


@dataclass
class Page:
    """What a layout draws on and with: the canvas, one font, the size of text in px, and colours."""

    rng: random.Random
    canvas: Canvas
    font: str
    size: int
    ink: Colour
    paper: Colour
    accent: Colour
    soft: Colour
    around: Callable[[float, float, float, int], None] | None = None
    """Draws marks round a word, given its left, its middle's y, its width and its size; in training alone."""

    def text(self, x: float, y: float, text: str, align: str = "l", colour: Colour | None = None) -> int:
        width = self.canvas.text(x, y, text, self.font, self.size, colour or self.ink, align)
        if self.around:
            self.around(left_edge(x, width, align), y, width, self.size)
        return width

    def clutter(self, rng: random.Random) -> None:
        """Marks that mean nothing, behind what is drawn and round its words."""
        strong = rng.choice(((self.ink, self.accent), (mixed(self.paper, self.ink, 0.4), self.accent)))
        if rng.random() < 0.4:
            clutter.behind(rng, self.canvas, strong, self.soft)
        if rng.random() < 0.4:
            self.around = clutter.rounder(rng, self.canvas, strong)

    def fit(self, columns: float, rows: float) -> float:
        """Lowers the text's size until `columns` characters and `rows` lines have room, and returns a line's height."""
        width, height = self.canvas.width, self.canvas.height
        self.size = max(12, min(self.size, int(width / columns / 0.62), int(height / rows / 1.25)))
        return min(height / rows, self.size * self.rng.uniform(1.5, 2.4))


def mixed(one: Colour, two: Colour, share: float) -> Colour:
    """A colour between two, with `share` of the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, two, strict=True))
    return red, green, blue


def page(rng: random.Random, width: int, height: int, font: str, size: int) -> Page:
    """An empty page, most often dark ink on light paper."""
    light = (rng.randint(228, 255), rng.randint(228, 255), rng.randint(222, 255))
    dark = (rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 70))
    ink, paper = (light, dark) if rng.random() < 0.12 else (dark, light)
    accent = rng.choice([(40, 70, 130), (120, 40, 50), (30, 100, 80), (90, 60, 120), (70, 70, 76)])
    return Page(rng, Canvas(width, height, paper), font, size, ink, paper, accent, mixed(paper, ink, 0.14))


# Invoices: (article, price) a line, and an empty place for the total.


def invoice(at: Page, layout: str, lines: Sequence[tuple[str, int]]) -> None:
    rng, canvas = at.rng, at.canvas
    longest = max(len(name) for name, _ in lines)
    row = at.fit(longest + 9, len(lines) + 2.6)
    narrow = layout == "receipt"
    room = min(canvas.width - 16, int(at.size * 0.62 * (longest + (7 if narrow else rng.uniform(8, 22)))))
    left = (canvas.width - room) // 2 if narrow else rng.randint(8, max(8, canvas.width - room - 8))
    right = left + room
    y = rng.uniform(0.6, max(0.6, canvas.height / row - len(lines) - 1.6)) * row
    title = rng.choice(("INVOICE", "Invoice", "BILL", "Receipt", "Order"))
    if narrow or rng.random() < 0.3:
        at.text((left + right) / 2, y, title, "m")
    else:
        at.text(left, y, title)
    if layout == "ruled":
        canvas.fill(left, y + row / 2, right, y + row / 2 + 2, at.ink)
    if layout == "boxed":
        canvas.frame(left - 6, y + row / 2, right + 6, y + (len(lines) + 0.5) * row, at.ink, 2)
        canvas.fill(right - at.size * 2.6, y + row / 2, right - at.size * 2.6 + 1, y + (len(lines) + 0.5) * row, at.ink)
    for i, (name, price) in enumerate(lines):
        y += row
        if layout == "striped" and i % 2 == 0:
            canvas.fill(left - 6, y - row / 2, right + 6, y + row / 2, at.soft)
        width = at.text(left, y, name)
        at.text(right, y, str(price), "r")
        if layout == "dotted":
            for x in range(left + width + 8, right - at.size * 2 - 4, max(5, at.size // 3)):
                canvas.fill(x, y + at.size / 4, x + 2, y + at.size / 4 + 2, at.ink)
        elif layout == "ruled" or (layout == "boxed" and i):
            canvas.fill(left - 6, y + (row / 2 if layout == "ruled" else -row / 2), right + 6,
                        y + (row / 2 if layout == "ruled" else -row / 2) + 1, mixed(at.paper, at.ink, 0.4))  # fmt: skip
    if rng.random() < 0.7:
        at.text(left, y + row * 1.1, "Total", "l", at.ink)
        canvas.fill(right - at.size * 2, y + row * 1.1 + at.size / 3, right, y + row * 1.1 + at.size / 3 + 1, at.ink)


# Charts: (name, value) a bar, the value written at it.


def chart(at: Page, layout: str, bars: Sequence[tuple[str, int]]) -> None:
    rng, canvas = at.rng, at.canvas
    most = max(value for _, value in bars) * rng.uniform(1.02, 1.3)
    longest = max(3, *(len(name) for name, _ in bars))
    colours = rng.sample(list(COLOURS.values()), len(COLOURS))
    same = rng.random() < 0.4
    thin = 1.0 if rng.random() < 0.5 else rng.uniform(0.08, 1.0)
    if layout in ("flat", "flat_right", "flat_middle", "flat_inside"):
        at.fit(longest + 10, len(bars) * 1.25 + 0.6)
        left = 8 + int(longest * at.size * 0.74)
        digits = max(len(str(value)) for _, value in bars)
        room = canvas.width - left - (at.size * 0.72 * digits + 10 if layout in ("flat", "flat_right") else 6)
        row = (canvas.height - 12) / len(bars)
        inside = layout in ("flat_middle", "flat_inside")
        for i, (name, value) in enumerate(bars):
            y, colour = 6 + row * (i + 0.5), colours[0 if same else i % len(colours)]
            end = left + max(at.size * 2.2 if inside else 3, room * value / most)
            thick = max(row * 0.34, at.size * 0.62) if inside else min(row * 0.36, at.size * 1.2) * thin
            canvas.fill(left, y - thick, end, y + thick, colour)
            at.text(left - 5, y, name, "r")
            if layout == "flat":
                at.text(end + 5, y, str(value))
            elif layout == "flat_right":
                at.text(canvas.width - 6, y, str(value), "r")
            elif layout == "flat_middle":
                at.text((left + end) / 2, y, str(value), "m", (255, 255, 255))
            else:
                at.text(end - 4, y, str(value), "r", (255, 255, 255))
        canvas.fill(left - 1, 4, left + 1, canvas.height - 4, at.ink)
        return
    at.fit((longest + 0.7) * len(bars) + 1, 9)
    top, bottom = at.size * rng.uniform(1.4, 2.6), canvas.height - at.size * 1.6
    column, before = (canvas.width - 12) / len(bars), (0.0, 0.0)
    if layout == "gridded":
        for i in range(1, 5):
            y = bottom - (bottom - top) * i / 4
            canvas.fill(6, y, canvas.width - 6, y + 1, mixed(at.paper, at.ink, 0.25))
    for i, (name, value) in enumerate(bars):
        x, colour = 6 + column * (i + 0.5), colours[0 if same else i % len(colours)]
        y = bottom - max(at.size * 1.4 if layout == "inside" else 2, (bottom - top) * value / most)
        half = column * 0.45 if layout == "inside" else max(1.0, column * rng.uniform(0.3, 0.44) * thin)
        if layout == "marks":  # a mark, and a line to the next one
            if i:
                canvas.line(*before, x, y, mixed(at.paper, at.ink, 0.5), 2)
            canvas.fill(x - 5, y - 5, x + 5, y + 5, colour)
            before, y = (x, y), y - 5
        elif layout == "lollipop":
            canvas.fill(x - 2, y, x + 2, bottom, colour)
            canvas.shape("circle", int(x), int(y), 7, colour)
            y -= 7
        else:
            canvas.fill(x - half, y, x + half, bottom, colour)
        if layout == "inside":
            at.text(x, y + at.size * 0.7, str(value), "m", (255, 255, 255))
        else:
            if layout in ("gridded", "marks"):
                canvas.fill(x - column * 0.4, y - at.size * 1.1, x + column * 0.4, y - 1, at.paper)
            at.text(x, y - at.size * 0.65, str(value), "m")
        at.text(x, bottom + at.size * 0.8, name, "m")
    canvas.fill(4, bottom, canvas.width - 4, bottom + 2, at.ink)


# Tables: a row of headings, and rows of a name and numbers.


def table(at: Page, layout: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[int]]]) -> None:
    rng, canvas = at.rng, at.canvas
    first = max(len(name) for name, _ in rows) + 1
    others = max(4, *(len(name) + 1 for name in columns))
    row = at.fit(first + others * len(columns) + 2, len(rows) + 1.6)
    unit = min((canvas.width - 16) / (first + others * len(columns)), at.size * rng.uniform(0.66, 0.95))
    width = unit * (first + others * len(columns))
    left = rng.uniform(8, max(8, canvas.width - width - 8))
    height = row * (len(rows) + 1)
    top = rng.uniform(6, max(6, canvas.height - height - 6))
    align = rng.choice("rm")
    edges = [left, *(left + unit * (first + others * i) for i in range(len(columns) + 1))]
    rule = mixed(at.paper, at.ink, 0.5)
    if layout in ("band", "striped"):
        canvas.fill(left, top, left + width, top + row, at.accent)
    for r in range(len(rows) + 1):
        y = top + row * (r + 0.5)
        if layout == "striped" and r % 2:
            canvas.fill(left, y - row / 2, left + width, y + row / 2, at.soft)
        if layout == "grid" or (layout == "rules" and r):
            canvas.fill(left, y - row / 2, left + width, y - row / 2 + 1, rule)
        if layout == "tiles":
            for a, b in pairwise(edges):
                canvas.fill(a + 2, y - row / 2 + 2, b - 2, y + row / 2 - 2, at.soft)
        colour = (255, 255, 255) if layout in ("band", "striped") and not r else at.ink
        cells = [("" if r == 0 else rows[r - 1][0]), *(columns if r == 0 else map(str, rows[r - 1][1]))]
        at.text(left + 5, y, cells[0], "l", colour)
        for i, cell in enumerate(cells[1:]):
            a, b = edges[i + 1], edges[i + 2]
            at.text(b - 5 if align == "r" else (a + b) / 2, y, cell, align, colour)
    if layout in ("grid", "rules"):
        canvas.fill(left, top + height, left + width, top + height + 1, rule)
    if layout == "grid":
        for x in (*edges, left + width):
            canvas.fill(x, top, x + 1, top + height, rule)


# Counting: shapes (shape, colour), each in a place of its own.


def places(at: Page, layout: str, count: int, radius: int) -> list[tuple[float, float]]:
    """Middles of `count` places that are at least 2 `radius` apart."""
    rng, width, height = at.rng, at.canvas.width, at.canvas.height
    pitch = radius * 2.4
    if layout == "ring":
        around, turn = max(pitch * count / 6.2, radius * 2.0), rng.uniform(0, 6.28)
        around = min(around * rng.uniform(1, 1.25), min(width, height) / 2 - radius - 2)
        return [
            (width / 2 + around * math.cos(turn + 6.2832 * i / count),
             height / 2 + around * math.sin(turn + 6.2832 * i / count))
            for i in range(count)
        ]  # fmt: skip
    columns, rows = int(width / pitch), int(height / pitch)
    if layout in ("grid", "panel"):
        columns = max(math.ceil(count / rows), min(columns, math.ceil(math.sqrt(count * width / height))))
        rows = math.ceil(count / columns)
        cells = [(x, y) for y in range(rows) for x in range(columns)][:count]
    elif layout == "rows":
        columns = min(columns, max(rng.randint(2, 4), math.ceil(count / rows)))
        rows = math.ceil(count / columns)
        cells = [(x, y) for y in range(rows) for x in range(columns)][:count]
    elif layout == "columns":
        rows = min(rows, max(rng.randint(2, 4), math.ceil(count / columns)))
        columns = math.ceil(count / rows)
        cells = [(x, y) for x in range(columns) for y in range(rows)][:count]
    else:
        cells = rng.sample([(x, y) for y in range(rows) for x in range(columns)], count)
    wide, high = width / columns, height / rows
    if layout == "rows":
        high = min(high, pitch * 1.3)
    shift = 0.0 if layout in ("grid", "panel", "columns") else 1.0
    dx, dy = (min(12, max(0, (room - 2 * radius) / 2 - 1)) * shift for room in (wide, high))
    return [(wide * (x + 0.5) + rng.uniform(-dx, dx), high * (y + 0.5) + rng.uniform(-dy, dy)) for x, y in cells]


def count(at: Page, layout: str, shapes: Sequence[tuple[str, str]]) -> list[tuple[float, float]]:
    """Draws the shapes and returns the middle of each, (x, y) in px."""
    canvas, rng = at.canvas, at.rng
    if sum(at.paper) < 300:  # a dark page would hide the dark colours
        canvas.fill(0, 0, canvas.width, canvas.height, (245, 245, 245))
    side = min(canvas.width, canvas.height)
    most = int(side / 2.4 / (math.isqrt(len(shapes) - 1) + 2))
    if layout == "ring":
        most = min(most, int(side / 2 / (1 + len(shapes) * 0.42)))
    radius = max(11, min(most, round(at.size * rng.uniform(0.8, 1.5))))
    if layout == "panel":
        canvas.frame(3, 3, canvas.width - 3, canvas.height - 3, at.accent, 3)
    middles = places(at, layout, len(shapes), radius)
    if layout == "strips":
        for i in range(0, canvas.height, 60):
            canvas.fill(0, i, canvas.width, i + 30, (222, 227, 233))
    for (shape, colour), (x, y) in zip(shapes, middles, strict=True):
        lighter = rng.randint(-12, 12)
        red, green, blue = (max(0, min(255, part + lighter + rng.randint(-3, 3))) for part in COLOURS[colour])
        canvas.shape(shape, round(x), round(y), radius, (red, green, blue))
    return middles


# Boxes: three edges that meet in a corner, each with its length.

SLANTS = {
    "right": (1.0, 0.0, 0.5, -0.4), "left": (1.0, 0.0, -0.5, -0.4), "corner": (0.86, -0.34, -0.72, -0.4),
    "shaded": (1.0, 0.0, 0.55, -0.42), "dashed": (1.0, 0.0, 0.42, -0.5), "steep": (0.9, 0.24, 0.62, -0.42),
    "glass": (1.0, 0.0, 0.46, -0.34),
}  # fmt: skip
"""Of each layout, where its width and its depth point, (x, y) each; the height points up."""


def box(at: Page, layout: str, edges: Sequence[int]) -> None:
    rng, canvas = at.rng, at.canvas
    ax, ay, bx, by = SLANTS[layout]
    bx, by = bx * rng.uniform(0.8, 1.2), by * rng.uniform(0.8, 1.2)
    # Drawn edges are between 1 and 2.2 long, as the numbers order them, whatever their ratio.
    most = max(edges)
    a, b, c = (1 + 1.2 * edge / most for edge in edges)
    at.size = min(at.size, canvas.width // 9)
    wide = abs(a * ax) + abs(b * bx)
    high = c + abs(a * ay) + abs(b * by)
    margin = at.size * 2.0
    unit = min((canvas.width - 2.6 * margin) / wide, (canvas.height - 2 * margin) / high) * rng.uniform(0.75, 1.0)
    across, deep, tall = (a * ax * unit, a * ay * unit), (b * bx * unit, b * by * unit), (0.0, -c * unit)
    reach = [
        [p * across[i] + q * deep[i] + r * tall[i] for p in (0, 1) for q in (0, 1) for r in (0, 1)] for i in (0, 1)
    ]
    lows, highs = [min(one) for one in reach], [max(one) for one in reach]
    x = rng.uniform(margin * 1.3 - lows[0], max(margin * 1.3 - lows[0], canvas.width - margin * 1.3 - highs[0]))
    y = rng.uniform(margin - lows[1], max(margin - lows[1], canvas.height - margin - highs[1]))

    def corner(i: int, j: int, k: int) -> tuple[float, float]:
        return (x + i * across[0] + j * deep[0] + k * tall[0], y + i * across[1] + j * deep[1] + k * tall[1])

    if layout in ("shaded", "steep"):
        for share, points in (
            (0.10, [corner(0, 0, 0), corner(1, 0, 0), corner(1, 0, 1), corner(0, 0, 1)]),
            (0.18, [corner(0, 0, 1), corner(1, 0, 1), corner(1, 1, 1), corner(0, 1, 1)]),
            (0.26, [corner(1, 0, 0), corner(1, 1, 0), corner(1, 1, 1), corner(1, 0, 1)] if bx > 0
             else [corner(0, 0, 0), corner(0, 1, 0), corner(0, 1, 1), corner(0, 0, 1)]),
        ):  # fmt: skip
            canvas.polygon(points, mixed(at.paper, at.accent, share))
    side = 1 if bx > 0 else 0  # the side face that is seen
    hidden = (1 - side, 1, 0)
    stroke = rng.choice((1, 2, 2, 3))
    for one in ((i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)):
        for axis in range(3):
            if one[axis] == 0:
                two = (*one[:axis], 1, *one[axis + 1 :])
                behind = hidden in (one, two)
                if behind and layout not in ("dashed", "glass"):
                    continue
                faint = mixed(at.paper, at.ink, 0.4) if behind and layout == "glass" else at.ink
                canvas.line(*corner(*one), *corner(*two), faint, stroke, 6 if behind and layout == "dashed" else 0)
    gap = at.size * 0.85
    # Of each edge, its ends, and where its label lies from its middle.
    ends = [
        (corner(0, 0, 0), corner(1, 0, 0), (0.0, 1.0)),
        (corner(side, 0, 0), corner(side, 1, 0), (1.25 if side else -1.25, 0.75)),
        (corner(1 - side, 0, 0), corner(1 - side, 0, 1), (-1.35 if side else 1.35, 0.0)),
    ]
    if layout == "corner":
        ends = [
            (corner(0, 0, 0), corner(1, 0, 0), (0.5, 1.0)),
            (corner(0, 0, 0), corner(0, 1, 0), (-0.7, 1.0)),
            (corner(1, 0, 0), corner(1, 0, 1), (1.35, 0.0)),
        ]
    for edge, (start, end, (right, down)) in zip(edges, ends, strict=True):
        at.text((start[0] + end[0]) / 2 + right * gap, (start[1] + end[1]) / 2 + down * gap, str(edge), "m")


# A sum or a product, as it is written: two numbers and a sign.


def written(at: Page, layout: str, left: int, sign: str, right: int) -> None:
    rng, canvas = at.rng, at.canvas
    if sign == "×" and at.font.startswith("cm"):
        sign = "x"  # Computer Modern's text fonts have no times sign
    line = f"{left} {sign} {right}"
    at.size = max(14, min(round(at.size * rng.uniform(1, 1.6)), int(canvas.width / (len(line) + 4) / 0.7)))
    width, middle = at.size * 0.68 * (len(line) + 3), canvas.width / 2
    x = rng.uniform(width / 2 + 4, max(width / 2 + 4, canvas.width - width / 2 - 4))
    y = rng.uniform(at.size * 1.4, max(at.size * 1.4, canvas.height - at.size * 3.2))
    if layout in ("line", "board", "tape", "card"):
        if layout == "board":
            canvas.fill(0, 0, canvas.width, canvas.height, (24 + rng.randrange(30), 50 + rng.randrange(30), 44))
            canvas.frame(0, 0, canvas.width, canvas.height, (150, 110, 60), max(4, at.size // 3))
        if layout == "tape":
            canvas.fill(0, y - at.size, canvas.width, y + at.size, at.soft)
        if layout == "card":
            canvas.fill(x - width / 2 - 4, y - at.size, x + width / 2 + 4, y + at.size, at.soft)
            canvas.frame(x - width / 2 - 4, y - at.size, x + width / 2 + 4, y + at.size, at.accent, 3)
        at.text(x, y, line + rng.choice((" =", " = ?", "")), "m", (240, 240, 230) if layout == "board" else at.ink)
    elif layout == "apart":
        for part, at_x in ((str(left), -0.3), (sign, rng.uniform(-0.05, 0.05)), (str(right), 0.3)):
            at.text(middle + at_x * canvas.width, y, part, "m")
    elif layout == "boxes":
        cell = at.size * 0.62 * (len(str(max(left, right))) + 1.4)
        for part, at_x in ((str(left), -cell * 0.85), (sign, 0), (str(right), cell * 0.85)):
            if part != sign:
                canvas.frame(middle + at_x - cell / 2, y - at.size * 0.9, middle + at_x + cell / 2, y + at.size * 0.9,
                             at.accent, 2)  # fmt: skip
            at.text(middle + at_x, y, part, "m")
    else:  # one number below the other: "column", and "stack" with the sign on the right
        row = at.size * 1.35
        at.text(x + width / 4, y, str(left), "r")
        at.text(x + width / 4, y + row, str(right), "r")
        if layout == "column":
            at.text(x - width / 3, y + row, sign, "m")
        else:
            at.text(x + width / 4 + at.size, y + row / 2, sign, "m")
        canvas.fill(x - width / 2.4, y + row * 1.55, x + width / 3.4, y + row * 1.55 + 2, at.ink)


@dataclass(frozen=True)
class Layouts:
    """A kind's drawing, the layouts that training sees, and those that it never does."""

    draw: Callable[..., Any]
    """Of counting, it returns the places of the shapes."""
    seen: tuple[str, ...]
    held_out: tuple[str, str]


LAYOUTS = {
    "invoice": Layouts(invoice, ("plain", "ruled", "dotted", "striped"), ("boxed", "receipt")),
    "chart": Layouts(
        chart,
        ("upright", "flat", "inside", "gridded", "flat_right", "flat_middle", "marks"),
        ("lollipop", "flat_inside"),
    ),
    "table": Layouts(table, ("grid", "striped", "band", "plain"), ("rules", "tiles")),
    "count": Layouts(count, ("scatter", "grid", "rows", "ring", "strips"), ("columns", "panel")),
    "box": Layouts(box, ("right", "left", "corner", "shaded", "glass"), ("dashed", "steep")),
    "written": Layouts(written, ("line", "column", "board", "stack", "tape", "apart"), ("card", "boxes")),
}
