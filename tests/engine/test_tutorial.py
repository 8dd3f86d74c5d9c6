"""The tutorial's own program, on the same checkpoint in float32, and our server: the same prompt, the same answer."""

from typing import Any

import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
from vllm.transformers_utils.processor import get_processor

from qvq_serve.demo import DIRECTORY
from qvq_serve.profile import TUTORIAL_SYSTEM_PROMPT
from qvq_serve.visual import pixels
from tests.engine.conftest import Server, data_url, photo, user

QUESTION = "What value should be filled in the blank space?"
LEAST, MOST = pixels(256), pixels(1280)


@pytest.fixture(scope="module")
def tutorial() -> tuple[Any, Any]:
    """The tutorial's model and processor, from the checkpoint that the server serves."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(DIRECTORY, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(DIRECTORY, min_pixels=LEAST, max_pixels=MOST)


def prepare(processor: Any, image: Image.Image) -> Any:
    """The tutorial's steps from messages to tensors."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": TUTORIAL_SYSTEM_PROMPT}]},
        {"role": "user", "content": [{"type": "image", "image": image, "min_pixels": LEAST, "max_pixels": MOST},
                                     {"type": "text", "text": QUESTION}]},
    ]  # fmt: skip
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = process_vision_info(messages)
    return processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")


@pytest.mark.parametrize("size", [(476, 476), (980, 980), (1036, 560), (448, 588)])
def test_an_image_that_needs_no_resize_gets_the_same_64_greedy_tokens(
    server: Server, tutorial: tuple[Any, Any], size: tuple[int, int]
) -> None:
    model, processor = tutorial
    image = photo(*size, seed=sum(size))
    inputs = prepare(processor, image)
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None)
    prompt = inputs["input_ids"][0].tolist()
    answer = server.chat(
        user({"url": data_url(image)}, QUESTION), max_tokens=64, ignore_eos=True, return_token_ids=True
    ).json()
    assert answer["prompt_token_ids"] == prompt
    expected = generated[0, len(prompt) :].tolist()
    assert len(set(expected)) > 16  # a model that repeats itself would agree whatever it saw
    assert answer["choices"][0]["token_ids"] == expected


@pytest.mark.parametrize("size", [(640, 480), (333, 777), (1920, 1080), (30, 31)])
def test_an_image_that_is_resized_gets_the_same_prompt_and_nearly_the_same_pixels(
    server: Server, tutorial: tuple[Any, Any], size: tuple[int, int]
) -> None:
    """qwen_vl_utils resizes with PILLOW on 8-bit values, Hugging Face's processor with torchvision: after CLIP's
    normalisation (a deviation of 0.27) the mean difference is under 1 of 255 steps, no pixel's over 16."""
    _, processor = tutorial
    image = photo(*size, seed=sum(size))
    inputs = prepare(processor, image)
    answer = server.chat(user({"url": data_url(image)}, QUESTION), max_tokens=1, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == inputs["input_ids"][0].tolist()
    bounds = {"shortest_edge": LEAST, "longest_edge": MOST}
    ours = get_processor(str(DIRECTORY)).image_processor(image, size=bounds, return_tensors="pt")
    assert ours["image_grid_thw"].tolist() == inputs["image_grid_thw"].tolist()
    difference = (ours["pixel_values"] - inputs["pixel_values"]).abs() * 0.27 * 255
    assert difference.mean() < 1
    assert difference.max() < 16
