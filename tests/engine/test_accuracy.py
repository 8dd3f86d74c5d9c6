"""Whether the stack keeps an image intact: the trained demo's answers through the server, against transformers'; and
whether two workers are as one.

60 cases that were never in training, half of them with fonts and layouts that no training saw. With the same images
hardly an answer may be another one (OTHER). With other sizes, or two workers, answers change now and then, and how many
are right is compared: NOISE of all and KIND_NOISE of a kind are allowed.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import Qwen2VLForConditionalGeneration

from qvq_serve.demo import DIRECTORY
from qvq_serve.demo.batch import messages
from qvq_serve.demo.cases import KINDS, Case, case
from qvq_serve.demo.score import accuracy, replies
from qvq_serve.hooks.answer import boxed_answer
from tests.engine.conftest import MOST_TOKENS, Server, data_url, greedy_tokens, serving, user
from tests.engine.test_faults import named

NOISE, KIND_NOISE, OTHER, CHANCE = 0.1, 0.3, 0.05, 0.12
CASES = [case(20_000 + i, KINDS[i % len(KINDS)], held_out=i // len(KINDS) % 2 == 1) for i in range(60)]

Url = Callable[[Image.Image], str]
Change = Callable[[Image.Image], Image.Image]


def asked(one: Case, url: str) -> list[dict[str, Any]]:
    """A case as a request's messages."""
    *system, user = messages(one)
    parts = [{"type": "image_url", "image_url": {"url": url}}, *user["content"][1:]]
    return [*system, {"role": "user", "content": parts}]


def text_of(answer: httpx.Response, stream: bool) -> str:
    """Reasoning and answer, of a stream put together."""
    if not stream:
        message = answer.json()["choices"][0]["message"]
        return f"{message.get('reasoning') or ''}\n\n{message.get('content') or ''}"
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "\n\n".join("".join(delta.get(part) or "" for delta in deltas) for part in ("reasoning", "content"))


def served(server: Server, cases: Sequence[Case], url: Url = data_url, **body: Any) -> list[str]:
    """What the server writes to each case."""

    def one(given: Case) -> str:
        request = {"messages": asked(given, url(given.image)), "temperature": 0, "max_tokens": MOST_TOKENS} | body
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=request, headers=server.headers, timeout=300)
        assert answer.status_code == 200, answer.text
        return text_of(answer, bool(body.get("stream")))

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, cases))


def lost(texts: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """By kind and in all, how much less is right than in the reference, where it is more than noise.

    `texts` are of the first cases, as many as there are.
    """
    cases = CASES[: len(texts)]
    found, expected = accuracy(cases, texts), accuracy(cases, reference[: len(texts)])
    less = {kind: expected[kind] - found[kind] for kind in found}
    return {kind: by for kind, by in less.items() if by > (NOISE if kind == "all" else KIND_NOISE) + 1e-9}


def spoiled(texts: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """What is lost, and the share of other answers, right or wrong, where it is more than OTHER."""
    other = [boxed_answer(a) != boxed_answer(b) for a, b in zip(texts, reference, strict=False)]
    share = sum(other) / len(texts)
    return lost(texts, reference) | ({"other answers": share} if share > OTHER else {})


@pytest.fixture(scope="module")
def reference() -> list[str]:
    """What transformers' own model writes."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(DIRECTORY, dtype=torch.float32)
    return replies(model, CASES, MOST_TOKENS)


def test_the_demo_sees(reference: list[str]) -> None:
    found = accuracy(CASES, reference)
    assert found["all"] >= 0.9, found


def test_the_server_answers_as_transformers_does(server: Server, reference: list[str]) -> None:
    texts = served(server, CASES)
    assert spoiled(texts, reference) == {}
    assert spoiled(served(server, CASES, stream=True), texts) == {}


@pytest.mark.parametrize("bounds", [(256, 320), (1_024, 1_280)], ids=["few", "many"])
def test_accuracy_holds_with_few_and_with_many_visual_tokens(
    server: Server, reference: list[str], bounds: tuple[int, int]
) -> None:
    least, most = bounds
    texts = served(server, CASES, min_visual_tokens=least, max_visual_tokens=most)
    assert lost(texts, reference) == {}


def turned(image: Image.Image) -> str:
    """As a camera that is held upright stores it: on its side, with a tag that says so."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_an_image_that_lies_on_its_side_is_set_upright(server: Server, reference: list[str]) -> None:
    assert spoiled(served(server, CASES[:36], turned), reference) == {}


BREAKAGES: dict[str, Change] = {
    "channels in wrong order": lambda image: Image.merge("RGB", image.split()[::-1]),
    "no orientation": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "squeezed": lambda image: image.resize((image.width, max(28, image.height // 3))),
    "clamped to 64 visual tokens": lambda image: ImageOps.contain(image, (224, 224)),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_stack_that_spoils_images_is_found_out(server: Server, reference: list[str], breakage: str) -> None:
    texts = served(server, CASES[:36], lambda image: data_url(BREAKAGES[breakage](image)))
    found = spoiled(texts, reference)
    print(breakage, found)
    assert found


@pytest.mark.parametrize("shown", ["nothing", "another case's image"])
def test_without_its_image_the_demo_is_at_chance(server: Server, shown: str) -> None:
    """Nine of ten answers are wrong: small counts are guessed now and then."""
    asked = CASES[:36]
    others = [CASES[(i + 2 * len(KINDS)) % 36] for i in range(36)]  # of the same kind, with fonts as new as its own
    images = [np.full_like(one.pixels, 255) if shown == "nothing" else one.pixels for one in others]
    texts = served(server, [replace(one, pixels=pixels) for one, pixels in zip(asked, images, strict=True)])
    assert accuracy(asked, texts)["all"] <= CHANCE


@pytest.fixture(scope="module")
def two_workers(cache: Path) -> Iterator[Server]:
    with serving(cache, "--demo", "--tp", "2", "--governor", "on") as running:
        yield running


def test_two_workers_see_as_one_does(two_workers: Server, reference: list[str]) -> None:
    assert lost(served(two_workers, CASES), reference) == {}


def test_two_workers_write_the_greedy_tokens_of_one_under_a_governor(server: Server, two_workers: Server) -> None:
    assert len(named(two_workers, "VLLM::Worker")) == 2
    alone = [greedy_tokens(server, seed) for seed in (1, 2, 3)]
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert min(len(set(tokens)) for tokens in alone) > 12
    assert [greedy_tokens(two_workers, seed) for seed in (1, 2, 3)] == alone
    looped = two_workers.chat(user("How much?"), max_tokens=400, logit_bias={"66": 100}).json()["qvq"]
    assert looped["ended"] == "looped" and looped["governor"] == {"found": "loop", "period": 1}
