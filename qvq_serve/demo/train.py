"""Trains the demo model, from cases that are drawn while it learns.

    python -m qvq_serve.demo.train --seconds 500 --out out                         the whole of it
    python -m qvq_serve.demo.train --seconds 500 --out out --span 0 0.5            the first half; later the second:
    python -m qvq_serve.demo.train --seconds 500 --out out2 --span 0.5 1 --resume out

`--span` is the part of the schedule (curriculum and learning rate) that a leg covers. The last line is JSON.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qvq_serve.demo import checkpoint
from qvq_serve.demo import weakness as weak
from qvq_serve.demo.batch import Batch, Cases, encode
from qvq_serve.demo.cases import KINDS, case
from qvq_serve.demo.forward import Forward
from qvq_serve.demo.score import accuracy, replies
from qvq_serve.demo.tokenizer import tokenizer
from qvq_serve.governor.detect import WINDOW, looping, words_of
from qvq_serve.hooks.answer import boxed_answer

TOKENS = 384
"""Of an image of 256 visual tokens and its text, as `Cases` counts them."""
COMPILING = 2
"""The first steps, which compile, take a minute at worst; the clock starts after them."""
NOISE = 6.0
"""Most grey levels of noise that are added to an image, as its standard deviation."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qvq_serve.demo.train", description="Trains the demo model.")
    parser.add_argument("--seconds", type=float, required=True, help="time of this leg, without the evaluation")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint that is written")
    parser.add_argument("--resume", type=Path, help="directory of a checkpoint to go on from")
    parser.add_argument("--span", type=float, nargs=2, default=(0.0, 1.0), help="the part of the schedule: 0 1 is all")
    parser.add_argument("--batch", type=int, default=256, help="images of 256 visual tokens in a step, or as much")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak of the learning rate")
    parser.add_argument("--warm-up", type=int, default=300, help="steps until the learning rate is at its peak")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that draw")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints of a leg")
    parser.add_argument("--seed", type=int, default=0, help="of the cases; another for each leg")
    parser.add_argument("--eval", type=int, default=384, help="cases of each evaluation at the end")
    parser.add_argument("--tokens", type=int, default=300, help="of a reply in an evaluation; of a loop 3.4 times that")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    return parser


def rate(peak: float, share: float, warm: float) -> float:
    """The learning rate: a warm-up (`warm` goes to 1), its peak for a third of the whole, then a cosine to 1 %."""
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, share - 0.33) / 0.67))
    return peak * min(1.0, warm) * (0.01 + 0.99 * fall)


def optimizer_of(model: Any) -> torch.optim.AdamW:
    """AdamW that leaves norms, biases and embeddings without decay."""
    named = list(model.named_parameters())
    plain = [weight for name, weight in named if weight.ndim < 2 or "embed_tokens" in name]
    matrices = [weight for name, weight in named if not (weight.ndim < 2 or "embed_tokens" in name)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=torch.cuda.is_available())


def learn(
    forward: Forward, optimizer: torch.optim.Optimizer, batch: Batch, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """One step: the loss, and which targets (M,) were foretold."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast("cuda", torch.bfloat16, enabled=batch.pixels.is_cuda):
        logits = forward.logits(batch, NOISE).float()
    loss = F.cross_entropy(logits, batch.targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(forward.model.parameters(), 1.0)
    for weight in forward.model.parameters():
        if weight.grad is not None:  # one step of infinite gradients (1 in 3,000 was seen) is left out, without a wait
            weight.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), logits.detach().argmax(-1) == batch.targets


def whole(batch: Batch, right: Tensor) -> dict[str, float]:
    """By kind, the share of honest cases of which every token was foretold."""
    wrong = torch.zeros(len(batch.kinds), device=right.device).index_add_(0, batch.rows, (~right).float()) > 0
    return {
        kind: round(1 - wrong[batch.kinds == i].float().mean().item(), 2)
        for i, kind in enumerate(KINDS)
        if (batch.kinds == i).any()
    }


def moved(loader: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, float]]:
    """Batches on the device, one ahead, and the seconds that each was waited for."""
    ahead: Batch | None = None
    while True:
        started = time.monotonic()
        batch = next(loader)
        waited = time.monotonic() - started
        batch = batch.to(device)
        if ahead is not None:
            yield ahead, waited
        ahead = batch


def evaluate(model: Any, count: int, tokens: int) -> dict[str, Any]:
    """Accuracies on cases that were never in training, with fonts and layouts that were and that were not, and blank.

    Also the share of prompts for a weakness that bring it about: loops that detection finds, wrong answers from memory.
    """
    seen = [case(i, KINDS[i % len(KINDS)]) for i in range(count)]
    new = [case(count + i, KINDS[i % len(KINDS)], held_out=True) for i in range(count)]
    blank = [case(2 * count + i, KINDS[i % len(KINDS)]) for i in range(count // 2)]
    for one in blank:
        one.pixels[:] = 255
    texts = replies(model, seen, tokens)
    out: dict[str, Any] = {"seen": accuracy(seen, texts), "held_out": accuracy(new, replies(model, new, tokens))}
    out["blank"] = accuracy(blank, replies(model, blank, tokens))
    for one, text in list(zip(seen, texts, strict=True))[: 2 * len(KINDS)]:
        print(f"{one.answer!r} is right: {text!r}", flush=True)
    odd = [case(3 * count + i, weakness=weak.KINDS[i % len(weak.KINDS)]) for i in range(count // 2)]
    texts, found = replies(model, odd, round(3.4 * tokens)), dict[str, list[bool]]()
    words = words_of(tokenizer().decode, len(tokenizer()))
    for one, text in zip(odd, texts, strict=True):
        ids = torch.tensor(encode(text))
        window = torch.full((1, WINDOW), -1)
        window[0, WINDOW - len(ids[-WINDOW:]) :] = ids[-WINDOW:]
        told = bool(looping(window, words)) if one.weakness in weak.LOOPS else boxed_answer(text) == one.answer
        found.setdefault(str(one.weakness), []).append(told)
    out["weakness"] = {kind: sum(oks) / len(oks) for kind, oks in found.items()}
    return out


def main() -> None:
    asked = arguments().parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    share = multiprocessing.get_context("fork").Value("d", asked.span[0])
    # A worker draws on one core; the workers start before CUDA does.
    loader = iter(DataLoader(
        Cases(asked.seed, asked.batch * TOKENS, share), batch_size=None, num_workers=asked.workers, prefetch_factor=2,
        multiprocessing_context="fork", pin_memory=torch.cuda.is_available(),
    ))  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    model = checkpoint.new_model().to(device).train()
    optimizer = optimizer_of(model)
    done = 0
    if asked.resume:
        kept = checkpoint.read(asked.resume)
        checkpoint.load(model, optimizer, kept)
        done = int(kept["state"]["steps"])
    forward = Forward(model, asked.fused)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {2 * parameters / 1e6:.1f} MB in BF16, {device}", flush=True)

    started = last = saved = time.monotonic()
    step, samples, waited, shown, curve = 0, 0, 0.0, (0, 0, 0.0), list[list[float]]()
    every = 2.0 if device.type == "cpu" else 5.0
    for batch, wait in moved(loader, device):
        now = time.monotonic()
        if step < COMPILING:
            started = last = saved = now
        if now - started >= asked.seconds:
            break
        share.value = asked.span[0] + (asked.span[1] - asked.span[0]) * (now - started) / asked.seconds
        # A leg that goes on warms up in a sixth of the steps: its first moments alone start anew.
        warm = (step + 1) * (6 if done else 1) / asked.warm_up
        loss, right = learn(forward, optimizer, batch, rate(asked.rate, share.value, warm))
        step, samples, waited = step + 1, samples + len(batch.kinds), waited + wait
        if now - last >= every:
            value, past = loss.item(), time.monotonic() - last
            if not math.isfinite(value):
                raise SystemExit(f"the loss is {value} at step {step}")
            curve.append([round(now - started, 1), step, round(value, 4)])
            print(
                f"{now - started:4.0f} s  step {step}  share {share.value:.2f}  loss {value:.4f}"
                f"  {(samples - shown[1]) / past:.0f} samples/s  {(step - shown[0]) / past:.1f} steps/s"
                f"  waiting {(waited - shown[2]) / past:.0%}"
                f"  {batch.size[1]}x{batch.size[0]} px  {whole(batch, right)}",
                flush=True,
            )
            last, shown = time.monotonic(), (step, samples, waited)
        if now - saved >= asked.save_every:
            checkpoint.write(asked.out, model, optimizer, {"steps": done + step, "share": share.value})
            saved = now
    seconds = time.monotonic() - started
    state = {"steps": done + step, "share": share.value}
    print(f"wrote {checkpoint.write(asked.out, model, optimizer, state).name}", flush=True)
    del loader
    result = {
        "steps": step, "samples": samples, "seconds": round(seconds, 1), "parameters": parameters,
        "samples_per_s": round(samples / seconds), "waiting": round(waited / seconds, 3), "curve": curve,
    }  # fmt: skip
    if asked.eval:
        result |= evaluate(model.eval().to(torch.bfloat16), asked.eval, asked.tokens)
    (asked.out / "result.json").write_text(json.dumps(result))
    del result["curve"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
