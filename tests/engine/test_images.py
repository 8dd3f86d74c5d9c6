"""What becomes of an image before the model sees it: size, orientation, background, and the bounds of a request."""

import io

import httpx
import numpy as np
import pytest
from PIL import Image

from qvq_serve.visual import visual_tokens
from tests.engine.conftest import Server, data_url, photo, user
from tests.engine.test_bad_requests import inline


def asked(server: Server, image: dict[str, str], **body: object) -> tuple[str, int]:
    """(answer, visual tokens) of a question about an image."""
    answer = server.chat(user(image, "What is this?"), max_tokens=24, **body).json()
    return answer["choices"][0]["message"]["reasoning"], answer["qvq"]["visual_tokens"]


def encoded(image: Image.Image, kind: str, **options: object) -> dict[str, str]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return inline(buffer.getvalue(), f"image/{kind.lower()}")


@pytest.mark.parametrize(
    "bounds", [{"max_visual_tokens": 300}, {"min_visual_tokens": 900}, {"max_visual_tokens": 1279}]
)
@pytest.mark.parametrize("size", [(476, 476), (1600, 900), (30, 40)])
def test_a_request_bounds_its_images_and_the_engine_counts_the_same(
    server: Server, size: tuple[int, int], bounds: dict[str, int]
) -> None:
    image = photo(*size)
    expected = visual_tokens(
        size[1], size[0], bounds.get("min_visual_tokens", 256), bounds.get("max_visual_tokens", 1280)
    )
    text = server.chat(user("What is this?"), max_tokens=1).json()["usage"]["prompt_tokens"]
    answer = server.chat(user({"url": data_url(image)}, "What is this?"), max_tokens=1, **bounds).json()
    pads = answer["usage"]["prompt_tokens"] - text
    one = server.chat(user({"url": data_url(photo(448, 448))}, "What is this?"), max_tokens=1).json()
    around = one["usage"]["prompt_tokens"] - text - 256  # <|vision_start|> and <|vision_end|>
    assert answer["qvq"]["visual_tokens"] == pads - around == expected


def test_the_same_image_in_two_sizes_is_not_served_from_one_cache(server: Server) -> None:
    image = {"url": data_url(photo(980, 980, 5))}
    large, small = asked(server, image), asked(server, image, max_visual_tokens=300)
    assert (large[1], small[1]) == (1225, 289)
    assert (asked(server, image), asked(server, image, max_visual_tokens=300)) == (large, small)


def test_low_detail_is_a_small_image_and_the_others_are_the_servers(server: Server) -> None:
    image = {"url": data_url(photo(980, 980))}
    tokens = {detail: asked(server, image | {"detail": detail})[1] for detail in ("low", "high", "auto")}
    assert tokens == {"low": 256, "high": 1225, "auto": 1225}


def test_an_image_is_turned_as_its_camera_was_held(server: Server) -> None:
    upright = photo(448, 672)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    lying = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert asked(server, lying) == asked(server, encoded(upright, "PNG"))


def test_an_image_with_a_clear_colour_is_turned_too(server: Server) -> None:
    """Its orientation was lost as the colour was made white."""
    image, held = photo(672, 448), Image.Exif()
    held[274] = 6
    options = {"transparency": (1, 2, 3), "exif": held}
    turned, plain = (asked(server, encoded(image, "PNG", **more)) for more in (options, {"exif": held}))
    assert turned == plain


def test_what_is_transparent_is_white(server: Server) -> None:
    clear = photo(448, 448).convert("RGBA")
    alpha = np.zeros((448, 448), dtype=np.uint8)
    alpha[:, 224:] = 255
    clear.putalpha(Image.fromarray(alpha))
    white = Image.new("RGB", (448, 448), (255, 255, 255))
    white.paste(clear, mask=clear.getchannel("A"))
    assert asked(server, encoded(clear, "PNG")) == asked(server, encoded(white, "PNG"))
    key = (1, 254, 1)  # a colour that stands for nothing, as programs that make files smaller write it
    keyed = Image.new("RGB", (448, 448), key)
    keyed.paste(clear, mask=clear.getchannel("A"))
    assert asked(server, encoded(keyed, "PNG", transparency=key)) == asked(server, encoded(white, "PNG"))


def test_other_modes_become_rgb(server: Server) -> None:
    grey = photo(448, 448).convert("L")
    expected = asked(server, encoded(grey.convert("RGB"), "PNG"))
    assert asked(server, encoded(grey, "PNG")) == expected


def test_images_are_counted_by_what_became_of_them(server: Server) -> None:
    def counted() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("qvq_images_total")}

    before = counted()
    asked(server, {"url": data_url(photo(448, 448))})
    asked(server, {"url": data_url(photo(448, 448))}, max_visual_tokens=300)
    server.chat(user(inline(b"no image"), "What?"))
    after = counted()
    for outcome in ("taken", "resized", "refused"):
        name = f'qvq_images_total{{outcome="{outcome}"}}'
        assert after[name] - before.get(name, 0) == 1, outcome
