"""A canvas of numpy arrays: text, bars and shapes in tens of microseconds, since training draws thousands a second.

Masks of words and shapes are kept. Coordinates are pixels, x to the right and y down; colours are (R, G, B), 0 to 255.
"""

import importlib.util
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Mask = NDArray[np.int16]
"""(height, width, 1), 0 to 128: how much of each pixel is covered."""

PILLOW = "pillow"
"""Pillow's own font, which is there wherever Pillow is."""
FONTS = (
    PILLOW, "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "cmr10", "cmb10", "cmtt10",
)  # fmt: skip
HELD_OUT_FONTS = ("cmss10", "DejaVuSansMono")
"""Never drawn in training. All but Pillow's are files of Matplotlib's."""
MORE_FONTS = (
    *(f"font_roboto/Roboto-{style}.ttf" for style in ("Light", "Regular", "Medium", "Bold", "Italic")),
    *(f"font_lato/Lato-{style}.ttf" for style in ("Light", "Regular", "Bold", "Black")),
    *(f"font_manrope/Manrope-{style}.ttf" for style in ("Light", "Regular", "Bold")),
    *(f"font_hanken_grotesk/HankenGrotesk-{style}.otf" for style in ("Light", "Regular", "Medium", "Bold")),
    *(f"font_source_sans_pro/SourceSansPro-{style}.ttf" for style in ("Light", "Regular", "Semibold", "It")),
    *(f"font_source_serif_pro/SourceSerifPro-{style}.ttf" for style in ("Regular", "Bold")),
    *(f"font_caladea/Caladea-{style}.ttf" for style in ("Regular", "Bold")),
)
"""Drawn in training alone, beside FONTS: package and file."""


@cache
def font_file(name: str) -> Path:
    """The file of a font. Raises FileNotFoundError where the package that has it is not installed."""
    package, _, file = name.rpartition("/")
    spec = importlib.util.find_spec(package or "matplotlib")
    if spec is None or not spec.origin:
        if package:
            raise FileNotFoundError(f"the font {file} is in the package {package}; pip install qvq-serve[train]")
        raise FileNotFoundError(f"the font {name} is one of Matplotlib's; pip install matplotlib, or qvq-serve[bench]")
    where = Path(spec.origin).parent
    return where / "files" / file if package else where / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"


@cache
def face(font: str, size: int) -> tuple[Any, float]:
    """A font at `size` px, without kerning so that it is the same everywhere, and the height of a digit's middle."""
    if font == PILLOW:
        found: Any = ImageFont.load_default(size)
    else:
        found = ImageFont.truetype(str(font_file(font)), size, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = found.getbbox("0")
    return found, (top + bottom) / 2


@lru_cache(maxsize=200_000)
def word(font: str, size: int, text: str) -> tuple[Mask, int, int, int]:
    """A word's mask, the offsets of its left and of its top from its origin on a digit's middle, and its width."""
    letters, middle = face(font, size)
    mask, (left, top) = letters.getmask2(text, "L")
    width, height = mask.size
    covered = np.frombuffer(bytes(mask), np.uint8).reshape(height, width, 1).astype(np.int16)
    return (covered + 1) >> 1, int(left), round(top - middle), round(letters.getlength(text))


@lru_cache(maxsize=2_000)
def shape_mask(shape: str, radius: int) -> Mask:
    """A shape within a circle of `radius` px, drawn four times as large and brought down."""
    side = 8 * radius
    image = Image.new("L", (side, side))
    pen, middle = ImageDraw.Draw(image), side / 2
    if shape == "circle":
        pen.ellipse((0, 0, side - 1, side - 1), 255)
    else:
        count, turn, inner = {
            "square": (4, 45, 0.0), "diamond": (4, 0, 0.0), "triangle": (3, -90, 0.0), "hexagon": (6, 0, 0.0),
            "star": (5, -90, 0.45),
        }[shape]  # fmt: skip
        steps = count * 2 if inner else count
        points = [
            (
                middle + middle * (inner if inner and i % 2 else 1) * math.cos(math.radians(turn + 360 * i / steps)),
                middle + middle * (inner if inner and i % 2 else 1) * math.sin(math.radians(turn + 360 * i / steps)),
            )
            for i in range(steps)
        ]
        pen.polygon(points, 255)
    small = image.resize((2 * radius, 2 * radius), Image.Resampling.BOX)
    return (np.asarray(small)[..., None].astype(np.int16) + 1) >> 1


def left_edge(x: float, width: float, align: str) -> float:
    """Where a word begins whose left, middle or right (l, m, r) is at `x`."""
    return x if align == "l" else x - width / 2 if align == "m" else x - width


class Canvas:
    """An image of `width` x `height` px, filled with a colour."""

    def __init__(self, width: int, height: int, paper: Colour) -> None:
        self.width, self.height = width, height
        self.pixels: NDArray[np.uint8] = np.empty((height, width, 3), np.uint8)
        row = np.empty((width, 3), np.uint8)
        row[:] = paper
        self.pixels[:] = row

    def fill(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """A rectangle from (x0, y0) up to, without, (x1, y1)."""
        self.pixels[max(0, int(y0)) : max(0, int(y1)), max(0, int(x0)) : max(0, int(x1))] = colour

    def frame(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, stroke: int = 1) -> None:
        """The outline of a rectangle, inside it."""
        self.fill(x0, y0, x1, y0 + stroke, colour)
        self.fill(x0, y1 - stroke, x1, y1, colour)
        self.fill(x0, y0, x0 + stroke, y1, colour)
        self.fill(x1 - stroke, y0, x1, y1, colour)

    def paste(self, mask: Mask, x: int, y: int, colour: Colour) -> None:
        """A mask whose upper left corner lies on (x, y); what lies outside is cut."""
        left, top = max(0, -x), max(0, -y)
        right, bottom = min(mask.shape[1], self.width - x), min(mask.shape[0], self.height - y)
        if right <= left or bottom <= top:
            return
        if left or top or right < mask.shape[1] or bottom < mask.shape[0]:
            mask = mask[top:bottom, left:right]
        area = self.pixels[y + top : y + bottom, x + left : x + right]
        change = np.array(colour, np.int16) - area
        change *= mask
        change >>= 7
        change += area
        area[:] = change

    def text(self, x: float, y: float, text: str, font: str, size: int, colour: Colour, align: str = "l") -> int:
        """A word whose digits' middle is at `y`, with its left, middle or right (l, m, r) at `x`; returns its width."""
        mask, left, top, width = word(font, size, text)
        self.paste(mask, round(left_edge(x, width, align)) + left, round(y) + top, colour)
        return width

    def shape(self, shape: str, x: int, y: int, radius: int, colour: Colour) -> None:
        """A shape round (x, y)."""
        self.paste(shape_mask(shape, radius), x - radius, y - radius, colour)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, stroke: int = 2, dash: int = 0) -> None:
        """A straight line of `stroke` px; dashes of `dash` px, or none."""
        count = int(max(abs(x1 - x0), abs(y1 - y0))) + 1
        steps = np.linspace(0, 1, count)
        if dash:
            steps = steps[(np.arange(count) // dash) % 2 == 0]
        xs, ys = (x0 + (x1 - x0) * steps).astype(np.intp), (y0 + (y1 - y0) * steps).astype(np.intp)
        for dx in range(stroke):
            for dy in range(stroke):
                inside = (xs + dx >= 0) & (xs + dx < self.width) & (ys + dy >= 0) & (ys + dy < self.height)
                self.pixels[ys[inside] + dy, xs[inside] + dx] = colour

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """A filled polygon."""
        left, top = int(min(x for x, _ in points)), int(min(y for _, y in points))
        size = int(max(x for x, _ in points)) - left + 1, int(max(y for _, y in points)) - top + 1
        image = Image.new("L", size)
        ImageDraw.Draw(image).polygon([(x - left, y - top) for x, y in points], 128)
        self.paste(np.asarray(image)[..., None].astype(np.int16), left, top, colour)
