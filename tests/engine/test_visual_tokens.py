"""visual.py against the rule's other two homes: the running server and the Hugging Face processor."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize as qwen_vl_utils_resize
from transformers import Qwen2VLImageProcessor

from qvq_serve.visual import pixels, visual_tokens
from tests.engine.conftest import Server, data_url, user

SIZES = [  # height, width
    (1, 1), (1, 2), (2, 1), (1, 100), (1, 200), (200, 1), (14, 14), (27, 27), (28, 28), (29, 29), (27, 5000),
    (5000, 27), (56, 56), (28, 2800), (100, 100), (100, 1000), (1000, 100), (223, 225), (224, 224), (240, 320),
    (320, 240), (336, 336), (448, 448), (447, 449), (450, 450), (462, 462), (476, 476), (480, 640), (640, 480),
    (490, 490), (512, 512), (600, 800), (720, 1280), (1280, 720), (768, 1024), (800, 600), (980, 980), (994, 994),
    (1000, 1000), (1008, 996), (1024, 1024), (1080, 1920), (1092, 1456), (1200, 627), (1234, 5678), (1500, 500),
    (2000, 2000), (2160, 3840), (333, 3000), (3000, 333), (3024, 4032), (4032, 3024), (4000, 30), (30, 4000),
    (4096, 4096), (50, 5000), (6000, 8000), (8000, 6000), (9000, 60), (60, 9000),
]  # fmt: skip
LEAST, MOST = 256, 1280


def test_there_are_sixty_sizes() -> None:
    assert len(set(SIZES)) == 60


def test_the_server_counts_what_visual_counts(server: Server) -> None:
    image_free = server.chat(user("What?"), max_tokens=1).json()["usage"]["prompt_tokens"]
    around_an_image = 2  # <|vision_start|> and <|vision_end|>

    def counted(size: tuple[int, int]) -> int:
        height, width = size
        image = Image.new("RGB", (width, height), (200, 30, 90))
        answer = server.chat(user({"url": data_url(image)}, "What?"), max_tokens=1)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"] - image_free - around_an_image

    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(SIZES, pool.map(counted, SIZES), strict=True)) == {
            (height, width): visual_tokens(height, width, LEAST, MOST) for height, width in SIZES
        }


@pytest.mark.parametrize(("least", "most"), [(LEAST, MOST), (4, 16384), (4, 256)])
def test_hugging_face_counts_what_visual_counts(least: int, most: int) -> None:
    processor = Qwen2VLImageProcessor(size={"shortest_edge": pixels(least), "longest_edge": pixels(most)})
    for height, width in SIZES:
        patches = processor.get_number_of_image_patches(height, width, {})
        try:
            expected = visual_tokens(height, width, least, most)
        except ValueError:
            assert patches // 4 > most
        else:
            assert patches // 4 == expected, (height, width)


def test_hugging_face_refuses_the_shape_that_we_refuse() -> None:
    processor = Qwen2VLImageProcessor()
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        processor(Image.new("RGB", (201, 1)))


def differing(least: int, most: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(height, width) -> (our visual tokens, qwen_vl_utils'), where the two differ; None of ours: refused."""
    found = {}
    for height, width in [*SIZES, (1, 134)]:
        theirs = math.prod(qwen_vl_utils_resize(height, width, 28, pixels(least), pixels(most))) // 784
        ours = visual_tokens(height, width, least, most)
        if ours != theirs:
            found[height, width] = (ours, theirs)
    return found


def test_qwen_vl_utils_differs_on_thin_images_under_small_minima_only() -> None:
    """The README lists these cases."""
    assert differing(LEAST, MOST) == {}
    assert differing(4, 16384) == {(1, 100): (20, 4), (1, 134): (24, 5), (1, 200): (29, 7), (200, 1): (29, 7)}
