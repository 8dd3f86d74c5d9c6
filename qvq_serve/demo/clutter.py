"""Marks that mean nothing, behind and round what is read: rules, frames and bands, in training alone.

Layouts that no training saw have lines in places of their own. Without clutter a line beside a number was read as a 1,
and a frame round shapes as a shape.
"""

import random
from collections.abc import Callable

from qvq_serve.demo.draw import Canvas, Colour

STYLES = ("cell", "cell", "left", "right", "sides", "under", "over", "both")
"""What stands round each word of a page: a frame, or rules on some of its sides."""


def behind(rng: random.Random, canvas: Canvas, strong: tuple[Colour, Colour], soft: Colour) -> None:
    """Up to four marks on an empty page, in strong colours or, for bands and grids, a soft one."""
    width, height = canvas.width, canvas.height
    for _ in range(rng.randint(1, 4)):
        colour, stroke = rng.choice(strong), rng.choice((1, 1, 2, 2, 3))
        x0, x1 = sorted((rng.uniform(0, width), rng.uniform(0, width)))
        y0, y1 = sorted((rng.uniform(0, height), rng.uniform(0, height)))
        mark = rng.choice(("frame", "border", "column", "row", "band", "columns", "rows"))
        if mark == "frame":
            canvas.frame(x0, y0, x1 + 20, y1 + 20, colour, stroke)
        elif mark == "border":
            margin = rng.randint(0, 12)
            canvas.frame(margin, margin, width - margin, height - margin, colour, stroke)
        elif mark == "column":
            canvas.fill(x0, y0, x0 + stroke, y1 + 40, colour)
        elif mark == "row":
            canvas.fill(x0, y0, x1 + 40, y0 + stroke, colour)
        elif mark == "band":
            canvas.fill(x0, y0, x1, y1, soft)
        else:
            pitch, first = rng.randint(24, 90), rng.randint(0, 24)
            for at in range(first, width if mark == "columns" else height, pitch):
                if mark == "columns":
                    canvas.fill(at, 0, at + 1, height, soft)
                else:
                    canvas.fill(0, at, width, at + 1, soft)


def rounder(
    rng: random.Random, canvas: Canvas, strong: tuple[Colour, Colour]
) -> Callable[[float, float, float, int], None]:
    """What draws one style's marks round a word, given its left, its middle's y, its width and its size in px."""
    style, colour, stroke = rng.choice(STYLES), rng.choice(strong), rng.choice((1, 1, 2, 3))
    beside, above, share = rng.uniform(2, 9), rng.uniform(0.58, 0.95), rng.choice((0.4, 1.0))

    def around(left: float, y: float, width: float, size: int) -> None:
        if rng.random() > share:
            return
        x0, x1 = left - beside - stroke, left + width + beside
        y0, y1 = y - size * above, y + size * above
        if style == "cell":
            canvas.frame(x0, y0, x1 + stroke, y1, colour, stroke)
        if style in ("left", "sides"):
            canvas.fill(x0, y0, x0 + stroke, y1, colour)
        if style in ("right", "sides"):
            canvas.fill(x1, y0, x1 + stroke, y1, colour)
        if style in ("under", "both"):
            canvas.fill(x0, y1, x1, y1 + stroke, colour)
        if style in ("over", "both"):
            canvas.fill(x0, y0 - stroke, x1, y0, colour)

    return around
