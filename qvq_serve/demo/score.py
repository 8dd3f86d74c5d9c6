"""How many answers are right, by kind: greedy generation through transformers itself, from images of any size."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qvq_serve.demo.batch import LEAST, MOST, encode, prompt
from qvq_serve.demo.cases import KINDS, Case
from qvq_serve.demo.forward import MERGE, PATCH, patches
from qvq_serve.demo.tokenizer import tokenizer
from qvq_serve.hooks.answer import boxed_answer
from qvq_serve.visual import resized


def inputs(cases: Sequence[Case], device: torch.device, least: int = LEAST, most: int = MOST) -> dict[str, Tensor]:
    """What transformers' `generate` takes for cases: prompts padded in front, and patches as the processor makes them.

    Images have between `least` and `most` visual tokens.
    """
    image = tokenizer().convert_tokens_to_ids("<|image_pad|>")
    rows, flat, grids = [], [], []
    for one in cases:
        height, width = resized(one.pixels.shape[0], one.pixels.shape[1], least, most)
        grids.append((1, height // PATCH, width // PATCH))
        pixels = torch.from_numpy(one.pixels)[None].to(device)
        once = patches(pixels, (height, width))[0].view(-1, 3, 1, PATCH * PATCH)
        flat.append(once.expand(-1, 3, 2, -1).reshape(once.shape[0], -1))
        ids, visual = encode(prompt(one)), height * width // (PATCH * MERGE) ** 2
        at = ids.index(image)
        rows.append(ids[:at] + [image] * visual + ids[at + 1 :])
    longest = max(map(len, rows))
    ids = torch.tensor([[tokenizer().pad_token_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image).int(),
        "pixel_values": torch.cat(flat), "image_grid_thw": torch.tensor(grids, device=device),
    }  # fmt: skip


@torch.no_grad()  # type: ignore[untyped-decorator]
def replies(model: Any, cases: Sequence[Case], tokens: int, many: int = 0, **bounds: int) -> list[str]:
    """What the model writes to each case, at most `tokens` tokens; `many` cases at a time (512 on a GPU, 32 if not)."""
    device, out = next(model.parameters()).device, list[str]()
    many = many or (512 if device.type == "cuda" else 32)
    for i in range(0, len(cases), many):
        given: dict[str, Any] = inputs(cases[i : i + many], device, **bounds)
        given["pixel_values"] = given["pixel_values"].to(model.dtype)
        if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
            del given["mm_token_type_ids"]
        found = model.generate(**given, max_new_tokens=tokens, do_sample=False)
        out += tokenizer().batch_decode(found[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def accuracy(cases: Sequence[Case], texts: Sequence[str]) -> dict[str, float]:
    """The share of right answers, in all and by kind."""
    right = [boxed_answer(text) == one.answer for one, text in zip(cases, texts, strict=True)]
    by_kind = {kind: [ok for one, ok in zip(cases, right, strict=True) if one.kind == kind] for kind in KINDS}
    shares = {kind: sum(oks) / len(oks) for kind, oks in by_kind.items() if oks}
    return {"all": sum(right) / len(right)} | shares
