"""Visual tokens of an image: known values here; the server and the Hugging Face processor agree in tests/engine."""

import pytest

from qvq_serve.visual import pixels, resized, visual_tokens


@pytest.mark.parametrize(
    ("height", "width", "least", "most", "tokens"),
    [
        (1092, 1456, 4, 16384, 39 * 52),  # multiples of 28: as they are
        (980, 980, 256, 1280, 35 * 35),
        (28, 28, 4, 16384, 4),  # enlarged to the minimum
        (1, 1, 256, 1280, 256),
        (6000, 8000, 256, 1280, 30 * 41),  # reduced to the maximum: 30.98 x 41.3, rounded down
        (5000, 27, 256, 1280, 218 * 2),
        (1, 134, 4, 16384, 24),  # where qwen_vl_utils says 5
    ],
)
def test_known_values(height: int, width: int, least: int, most: int, tokens: int) -> None:
    assert visual_tokens(height, width, least, most) == tokens


def test_sides_are_multiples_of_28_within_the_bounds() -> None:
    for height in (1, 27, 28, 29, 480, 999, 4000):
        for width in (1, 30, 640, 1333):
            if max(height, width) / min(height, width) > 200:
                continue
            new_height, new_width = resized(height, width, 256, 1280)
            assert new_height % 28 == new_width % 28 == 0
            assert pixels(256) <= new_height * new_width <= pixels(1280)


def test_a_shape_that_hugging_face_refuses_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"201x1 px is more than 200 times as long as it is wide"):
        visual_tokens(1, 201, 256, 1280)


def test_an_image_that_no_resize_brings_under_the_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="would take 24 visual tokens, above the maximum of 16"):
        visual_tokens(1, 134, 4, 16)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0x5 px has no pixels"):
        visual_tokens(5, 0, 4, 16)
