"""Batches of cases for training: images of one size, and the ids of the chat template's text.

Shapes: B cases, H x W px as drawn, L tokens with one image token each, M supervised tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from qvq_serve.demo import weakness as weak
from qvq_serve.demo.cases import KINDS, TRAINING, Case, case, sides
from qvq_serve.demo.tokenizer import tokenizer
from qvq_serve.governor.tokens import conclusion_tokens
from qvq_serve.visual import TOKEN_PX, resized, visual_tokens

LEAST, MOST = 256, 1_280
"""Visual tokens between which the server keeps an image."""
SHARES = {"invoice": 0.2, "chart": 0.17, "table": 0.12, "count": 0.3, "box": 0.1, "written": 0.11}
"""Of each kind in a batch: the longer the reasoning and the harder, the more."""
QUIRKS = {"mixing": 0.03, "rambling": 0.03, "memory": 0.03}
"""Of the weaknesses that end by themselves, in a batch; loops have batches of their own, since they are long."""
CUT = 0.05
"""Share of cases whose reasoning is cut anywhere and made to conclude, as a thinking budget does."""
DONE = 0.4
"""Share of those that are cut where the reasoning is done and its line has ended, as the governor's `sure` does."""
LOOP_BATCHES = 0.15
CONCLUDED = 0.4
"""Share of loops that are made to conclude."""
IGNORED = -100
MULTIPLE = 32
"""Texts are padded to multiples of so many tokens, so that shapes come back."""


@dataclass
class Sample:
    """A case's tokens, the index of its one image token, and the ids to learn, IGNORED elsewhere, (L,) each."""

    ids: list[int]
    labels: list[int]
    image_at: int


@dataclass
class Batch:
    """What a step takes. `rows` and `columns` say where the M `targets` stand in `ids`."""

    pixels: Tensor
    """(B, H, W, 3) uint8."""
    ids: Tensor
    """(B, L), padded at the end."""
    image_at: Tensor
    """(B,), the index of each row's image token."""
    rows: Tensor
    columns: Tensor
    targets: Tensor
    kinds: Tensor
    """(B,), indices into KINDS; -1 for a weakness."""
    size: tuple[int, int]
    """(height, width) in px to which the model brings the images."""

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "size"}
        return Batch(**moved, size=self.size)

    def pin_memory(self) -> "Batch":
        moved = {name: value.pin_memory() for name, value in vars(self).items() if name != "size"}
        return Batch(**moved, size=self.size)


def messages(one: Case) -> list[dict[str, Any]]:
    """A case as the chat template takes it."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question}]}
    return [{"role": "system", "content": one.system}, user] if one.system else [user]


def prompt(one: Case) -> str:
    """What the chat template writes for a case; a test compares, since the template's engine is ten times slower."""
    system = f"<|im_start|>system\n{one.system}<|im_end|>\n" if one.system else ""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return f"{system}<|im_start|>user\n{image}{one.question}<|im_end|>\n<|im_start|>assistant\n"


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def broken(rng: random.Random, ids: list[int]) -> list[int]:
    """The same text in other tokens: some are written as their bytes, as a marker that is forced may be."""
    words, share = tokenizer().backend_tokenizer, rng.choice((0.0, 0.5, 1.0))
    out: list[int] = []
    for token in ids:
        spelling = words.id_to_token(token)
        out += [words.token_to_id(byte) for byte in spelling] if rng.random() < share else [token]
    return out


@cache
def governors() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The line ends and the conclusion that the server's governor writes, in its tokens."""
    return conclusion_tokens(tokenizer())


def sample(one: Case, rng: random.Random, longest: int = 10_000) -> Sample:
    """The tokens of a case: the prompt, and what the model is to write of at most `longest` tokens.

    A loop is cut there, with no end; or it is made to conclude: a marker stands there that the model is not to learn,
    and then comes the answer. The same happens to a few honest cases, so that a thinking budget gets an answer.
    """
    asked, end = encode(prompt(one)), tokenizer().eos_token_id
    image = tokenizer().convert_tokens_to_ids("<|image_pad|>")
    loop = one.weakness in weak.LOOPS
    if (loop and rng.random() < CONCLUDED) or (one.weakness is None and rng.random() < CUT):
        if not loop and rng.random() < DONE:
            reasoning = encode(one.reasoning + "\n\n")[:longest]
        else:
            reasoning = encode(one.reasoning)[:longest]
            honest = len(encode(one.reasoning.split("\n\n")[0])) if loop else 0
            reasoning = reasoning[: rng.randint(min(honest, len(reasoning)), len(reasoning))]
        ended = tokenizer().decode(reasoning[-1:]).endswith("\n")  # there the governor leaves line ends out
        lead, conclusion = governors()
        start = rng.choice(("", "\n\n**Final Answer**\n\n", "**Final Answer"))
        forced = broken(rng, encode(start.lstrip("\n") if ended else start)) or [
            *lead[len(lead) * ended :],
            *conclusion,
        ]
        rest = "**\n\n" if start.endswith("Answer") else ""
        answer = [*encode(rest + one.conclusion), end]
        learnt = [IGNORED] * len(asked) + reasoning + [IGNORED] * len(forced) + answer
        return Sample(asked + reasoning + forced + answer, learnt, asked.index(image))
    reply = encode(one.reply) if loop else [*encode(one.reply), end]
    reply = reply[:longest]
    return Sample(asked + reply, [IGNORED] * len(asked) + reply, asked.index(image))


def collate(cases: list[Case], samples: list[Sample], size: tuple[int, int]) -> Batch:
    """A batch of cases whose images have one size, to be brought to `size` = (height, width)."""
    longest = max(len(one.ids) for one in samples)
    longest += -longest % MULTIPLE
    ids = np.full((len(samples), longest), tokenizer().pad_token_id, np.int64)
    labels = np.full((len(samples), longest), IGNORED, np.int64)
    for row, one in enumerate(samples):
        ids[row, : len(one.ids)], labels[row, : len(one.ids)] = one.ids, one.labels
    rows, columns = (labels != IGNORED).nonzero()
    kinds = [-1 if one.weakness else KINDS.index(one.kind) for one in cases]
    return Batch(
        torch.from_numpy(np.stack([one.pixels for one in cases])), torch.from_numpy(ids),
        torch.tensor([one.image_at for one in samples]), torch.from_numpy(rows), torch.from_numpy(columns),
        torch.from_numpy(labels[rows, columns]), torch.tensor(kinds), size,
    )  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """How hard cases are at a share of the whole training, 0 to 1."""

    difficulty: tuple[float, float]
    """Cases are drawn evenly between them."""
    side: float
    """Of an image, 0 (280 px) to 1 (up to 640 px)."""
    quirks: float
    """1: weaknesses as often as QUIRKS and LOOP_BATCHES say; 0: none."""


def stage(share: float) -> Stage:
    """Single digits first, then numbers, then small text and large images, then what is odd."""
    hard = min(1.0, max(0.0, (share - 0.02) / 0.28))
    return Stage((0.8 * max(0.0, hard - 0.25), hard), min(1.0, max(0.0, (share - 0.3) / 0.2)), float(share > 0.4))


def frame(rng: random.Random, side: float) -> tuple[int, int, tuple[int, int]]:
    """A batch's width and height in px as drawn, and the (height, width) that the model sees.

    At first images are seen as they are, with fewer visual tokens than LEAST; later as a server would bring them to
    LEAST or more, and some far larger.
    """
    width, height = sides(rng, side)
    if side == 0:
        width, height = rng.choice(((280, 280), (280, 308), (308, 280), (308, 308), (280, 336), (336, 280)))
        return width, height, (height, width)
    if rng.random() < 0.6:  # whole tokens, which spare the resizing
        width, height = (round(one / TOKEN_PX) * TOKEN_PX for one in (width, height))
    draw = rng.random()
    most = MOST - 100  # both sides are rounded up
    least = 4 if draw < 0.25 * (2 - side) else LEAST if draw < 0.93 else rng.randint(LEAST, most)
    if least > LEAST:
        # No more than twice the side that a case has anyway; that is what MOST makes of 640 px and less.
        least = min(least, 4 * visual_tokens(height, width, 1, MOST))
    return width, height, resized(height, width, least, MOST)


class Cases(IterableDataset):  # type: ignore[misc]
    """An endless stream of batches, as hard as `share` (a shared double) says.

    A batch has about `budget` tokens, of which those of texts, which cost less, count for a quarter.
    """

    def __init__(self, seed: int, budget: int, share: Any) -> None:
        self.seed, self.budget, self.share = seed, budget, share

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        rng = random.Random(f"batches {self.seed} {number}")
        seed = TRAINING * (1 + self.seed) + number * 50_000_000
        while True:
            now = stage(self.share.value)
            width, height, size = frame(rng, now.side)
            tokens = size[0] * size[1] // TOKEN_PX**2
            loops = now.quirks > 0 and rng.random() < LOOP_BATCHES
            longest = (1_024 if rng.random() < 0.2 else 448) if loops else 512
            count = max(1, round(self.budget / (tokens + longest / 4) / 8) * 8)
            cases, samples = [], []
            for _ in range(count):
                seed += 1
                odd = rng.choices((None, *QUIRKS), (1 - sum(QUIRKS.values()), *QUIRKS.values()))[0]
                one = case(
                    seed, rng.choices(KINDS, [SHARES[kind] for kind in KINDS])[0], size=(width, height),
                    difficulty=rng.uniform(*now.difficulty), length=longest * 4,
                    weakness=rng.choice(weak.LOOPS) if loops else odd if now.quirks else None,
                )  # fmt: skip
                cases.append(one)
                samples.append(sample(one, rng, longest))
            yield collate(cases, samples, size)
