"""What a step of the governor costs by itself, on a GPU or a CPU: all of it, and part by part.

    python -m benchmarks.governor_cost RESULT.json [--device cuda] [--vocabulary 152064] [--batches 1 16 64 128 256]

TORCH_COMPILE_DISABLE=1 before it measures the CUDA graphs of what torch.compile has not touched.

Made-up logits and tokens, slots and rows as in a batch of that size. `device_us` is the device's time a step, looks
for loops included; `host_us` the host's time to launch it, which the model's forward pass hides where the host runs
ahead; `look_ms` one look, of which there are LOOKS in EVERY steps.
"""

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.startup import machine
from qvq_serve.governor.core import LOOKS, Governor, Text
from qvq_serve.governor.detect import EVERY
from qvq_serve.governor.policy import Orders
from qvq_serve.governor.tokens import Vocabulary

BATCHES = (1, 16, 64, 128, 256)
BASE = Orders(governed=1, loop=1, budget=100_000, limit=1024)
PARTS = {
    "loop and budget": BASE,
    "with language": BASE._replace(hold=1, scripts=1, bias=1.0),
    "everything": BASE._replace(
        hold=1, scripts=1, bias=1.0, circling=3, circling_after=1, looks=2, look_after=10**6, look_entropy=1, sure=1
    ),
}


def made_up(size: int) -> Vocabulary:
    """A vocabulary of random tables."""
    draw = torch.Generator().manual_seed(0)
    scripts = torch.randint(0, 3, (size,), generator=draw, dtype=torch.int16)
    none = torch.zeros(size, dtype=torch.int8)
    flags = [torch.rand(size, generator=draw) < share for share in (0.8, 0.02, 0.001)]
    return Vocabulary(scripts, none, none, *flags, circling=torch.arange(100, 120))


def measure(device: torch.device, vocabulary: int, rows: int, orders: Orders) -> dict[str, float]:
    """Microseconds a step of a batch of so many rows."""
    text = Text((334, 19357, 21806, 334, 271), 5, (271,), tuple((334, 19357, at) for at in range(20)), ((6,), (7,)))
    governor = Governor(rows, device, text, made_up(vocabulary), acts=True)
    governor.begin(list(range(rows)), [orders] * rows, [[]] * rows)
    slots = torch.arange(rows, device=device)
    tokens = torch.randint(1000, vocabulary, (EVERY * 5, rows), device=device)
    logits = torch.randn(rows, vocabulary, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def steps(first: int, number: int) -> float:
        began = time.perf_counter()
        for at in range(first, first + number):
            seen = torch.full((rows,), at + 1, device=device)
            governor.apply(logits, slots, tokens[at], seen, orders)
        return time.perf_counter() - began

    steps(0, EVERY)
    wait()
    found = {"host_us": min(steps(EVERY * at, EVERY // LOOKS) for at in range(1, 5)) * 1e6 / (EVERY // LOOKS)}
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        took = []
        for at in range(1, 5):
            wait()
            torch.cuda._sleep(100_000_000)  # 50 ms: the device is kept busy until all is launched
            begin.record()
            steps(EVERY * at, EVERY // LOOKS)
            end.record()
            wait()
            took.append(begin.elapsed_time(end) * 1e3 / (EVERY // LOOKS))
        found["device_us"] = min(took)
    wait()
    began = time.perf_counter()
    for _ in range(8):
        governor.graphs[1].replay() if governor.graphs else governor.look(governor.shares[0])
    wait()
    found["look_ms"] = (time.perf_counter() - began) * 1e3 / 8
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    for size in options.batches:
        for part, orders in PARTS.items():
            torch.compiler.reset()  # a server has one governor: the next one must not be its second compilation
            rows.append({"batch": size, "part": part} | measure(device, options.vocabulary, size, orders))
            print(json.dumps(rows[-1]), flush=True)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    compiled = device.type == "cuda" and os.environ.get("TORCH_COMPILE_DISABLE") != "1"
    found = {"command": "python -m benchmarks.governor_cost", "machine": machine(), "card": card,
             "torch": torch.__version__, "compiled": compiled, "date": datetime.date.today().isoformat(),
             "vocabulary": options.vocabulary, "rows": rows}  # fmt: skip
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
