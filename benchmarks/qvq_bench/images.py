"""Images that are drawn, not stored: each is a function of its kind, size and seed, so that no file need be shipped.

They are of the kinds that QVQ is asked about. Sizes are in pixels, from 56 x 56 to 4096 x 4096; 980 x 980 takes a few
tens of milliseconds to draw and encode.
"""

import io
import math
import random
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

WORDS = ("Paper", "Pencils", "Ink", "Lamp", "Desk", "Chair", "Cable", "Screen", "Folder", "Stapler", "Clock", "Bag")
INK, PAPER, LINE = (30, 30, 40), (255, 255, 255), (150, 150, 160)
FRESH_NOISE = (0.05, 0.08, 0.12, 0.2, 0.3, 0.4, 1.0)
"""Of a photo's octaves from the finest to the coarsest, the share that each takes of what has been drawn so far."""


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that an image does not depend on what the machine has installed."""
    return ImageFont.load_default(max(6, size))


def colour(rng: random.Random) -> tuple[int, int, int]:
    """A colour that is neither near white nor near black."""
    return rng.randrange(40, 210), rng.randrange(40, 210), rng.randrange(40, 210)


def chart(image: Image.Image, rng: random.Random) -> None:
    """A bar chart: a value above each bar, a letter below it, and an axis with numbers."""
    pen, (width, height) = ImageDraw.Draw(image), image.size
    size = max(6, min(width, height) // 28)
    left, top, right, bottom = 3 * size, 3 * size, width - size, height - 2 * size
    step = rng.choice((5, 10, 20, 25))
    pen.text((width / 2, size), f"Sales {rng.randrange(1990, 2030)}", INK, font(size), anchor="ma")
    for tick in range(0, 6, 1 if bottom - top > 8 * size else 5):
        y = bottom - (bottom - top - size) * tick // 5
        pen.line((left, y, right, y), INK if tick == 0 else LINE)
        pen.text((left - size // 3, y), str(tick * step), INK, font(size), anchor="rm")
    bars = min(rng.randint(5, 12), max(2, (right - left) // (3 * size)))
    room = (right - left) / bars
    for bar in range(bars):
        value, x = rng.randint(step // 2, 5 * step), left + room * bar
        y = bottom - (bottom - top - size) * value // (5 * step)
        pen.rectangle((x + room * 0.15, y, x + room * 0.85, bottom), colour(rng), INK)
        pen.text((x + room / 2, y - size // 3), str(value), INK, font(size), anchor="mb")
        pen.text((x + room / 2, bottom + size // 2), "ABCDEFGHIJKL"[bar], INK, font(size), anchor="ma")


def invoice(image: Image.Image, rng: random.Random) -> None:
    """An invoice: as many lines of number, article and price as there is room for, and their true total."""
    pen, (width, height) = ImageDraw.Draw(image), image.size
    size = max(6, min(width // 22, height // 18))
    row, edge = int(size * 1.7), size
    pen.text((edge, edge // 2), f"INVOICE {rng.randrange(1000, 10000)}", INK, font(size), anchor="la")
    rows = max(1, min(60, (height - edge) // row - 2))
    total = 0
    for line in range(1, rows + 1):
        count, cents, y = rng.randint(1, 9), rng.randrange(50, 9999), edge // 2 + line * row
        total += count * cents
        price = f"{count * cents / 100:.2f}"
        article = f"{count} x {rng.choice(WORDS)} at {cents / 100:.2f}"
        while font(size).getlength(article) > width - 3 * edge - font(size).getlength(price):
            article = article[:-1]
        pen.text((edge, y), article, INK, font(size), anchor="la")
        pen.text((width - edge, y), price, INK, font(size), anchor="ra")
    y = edge // 2 + (rows + 1) * row
    pen.line((edge, y - size // 4, width - edge, y - size // 4), INK, max(1, size // 10))
    pen.text((edge, y), "Total", INK, font(size), anchor="la")
    pen.text((width - edge, y), f"{total / 100:.2f}", INK, font(size), anchor="ra")


def table(image: Image.Image, rng: random.Random) -> None:
    """A grid of numbers below a row of headings."""
    pen, (width, height) = ImageDraw.Draw(image), image.size
    size = max(6, min(width, height) // 28)
    columns = max(1, min(rng.randint(4, 7), width // (4 * size)))
    rows = max(2, min(rng.randint(8, 14), height // (2 * size)))
    room, row = (width - 2 * size) / columns, (height - 2 * size) / rows
    pen.rectangle((size, size, width - size, size + row), colour(rng))
    for y in range(rows):
        for x in range(columns):
            box = (size + x * room, size + y * row, size + (x + 1) * room, size + (y + 1) * row)
            words = str(rng.randrange(10000)) if y else "ABCDEFG"[x]
            pen.rectangle(box, outline=LINE)
            pen.text((box[2] - size // 2, (box[1] + box[3]) / 2), words, INK if y else PAPER, font(size), anchor="rm")


def geometry(image: Image.Image, rng: random.Random) -> None:
    """A triangle ABC in its circumscribed circle round O, with the lengths of its edges to scale."""
    pen, (width, height) = ImageDraw.Draw(image), image.size
    radius = min(width, height) * rng.uniform(0.3, 0.4)
    size, stroke = max(6, int(radius / 10)), max(1, int(radius / 120))
    x, y = (rng.uniform(radius + 1.6 * size, side - radius - 1.6 * size) for side in (width, height))
    # Each arc takes 100 degrees and a share of the other 60, so that labels have room between edge, circle and O.
    one, two = sorted((rng.uniform(0, 60), rng.uniform(0, 60)))
    turn, unit = rng.uniform(0, 360), rng.uniform(4, 30)
    angles = [math.radians(turn + a) for a in (0, 100 + one, 200 + two)]
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), None, colour(rng), stroke)
    pen.ellipse((x - 2 * stroke, y - 2 * stroke, x + 2 * stroke, y + 2 * stroke), INK)
    pen.text((x + size / 2, y), "O", INK, font(size), anchor="lm")
    for corner, (a, b) in enumerate(zip(angles, [*angles[1:], angles[0] + 2 * math.pi], strict=True)):
        ends = [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in (a, b)]
        pen.line((*ends[0], *ends[1]), INK, stroke)
        outside = radius + size * 0.9
        pen.text((x + outside * math.cos(a), y + outside * math.sin(a)), "ABC"[corner], INK, font(size), "mm")
        middle, chord = (a + b) / 2, 2 * unit * math.sin((b - a) / 2)
        away = radius * math.cos((b - a) / 2) + size * (0.8 + 0.8 * abs(math.cos(middle)))  # a label is wider than high
        place = (x + away * math.cos(middle), y + away * math.sin(middle))
        pen.text(place, f"{chord:.1f}", INK, font(size), anchor="mm")


def photo(image: Image.Image, rng: random.Random) -> None:
    """Coloured noise of seven octaves, and a few shapes with edges: about as hard to encode as a photograph."""
    noise = np.random.default_rng(rng.getrandbits(64))
    width, height = image.size
    made = image.resize((2, 2))
    for octave in reversed(range(len(FRESH_NOISE))):
        size = (max(2, width >> octave), max(2, height >> octave))
        fresh = Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), np.uint8))
        made = Image.blend(made.resize(size, Image.Resampling.BICUBIC), fresh, FRESH_NOISE[octave])
        for _ in range(6 if octave == 2 else 0):  # the finer octaves still fall on the shapes
            points = [(rng.uniform(0, size[0]), rng.uniform(0, size[1])) for _ in range(4)]
            ImageDraw.Draw(made).circle(points.pop(), min(size) * rng.uniform(0.05, 0.15), colour(rng))
            ImageDraw.Draw(made).polygon(points, colour(rng))
    image.paste(ImageEnhance.Color(ImageOps.autocontrast(made, cutoff=1)).enhance(0.5))


DRAWN: dict[str, Callable[[Image.Image, random.Random], None]] = {
    "chart": chart, "invoice": invoice, "table": table, "geometry": geometry, "photo": photo,
}  # fmt: skip
KINDS = tuple(DRAWN)


def draw(kind: str, width: int, height: int, seed: int) -> Image.Image:
    """The RGB image of these four: the same again for the same, another for another seed."""
    image = Image.new("RGB", (width, height), PAPER)
    DRAWN[kind](image, random.Random(f"{kind} {width} {height} {seed}"))
    return image


def encode(image: Image.Image, kind: str) -> tuple[str, bytes]:
    """(mime type, bytes) of an image: JPEG for a photo, else PNG, as such images are mostly sent."""
    file = io.BytesIO()
    if kind == "photo":
        image.save(file, "JPEG", quality=85)
        return "image/jpeg", file.getvalue()
    image.save(file, "PNG")
    return "image/png", file.getvalue()
