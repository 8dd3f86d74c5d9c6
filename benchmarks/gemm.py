"""Milliseconds of a layer's four GEMMs by batch, FP8 by token and channel: vLLM's CUTLASS kernel and torch's own.

    python -m benchmarks.gemm RESULT.json [BATCH...]

The shapes are those of the 72B geometry on one card; `model_…` is all 80 layers', without attention. Weights take
turns, so that none stays in the L2 cache, and 20 calls go into one CUDA graph.
"""

import datetime
import json
import shlex
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from vllm import _custom_ops as ops

SHAPES = {"qkv": (10_240, 8_192), "o": (8_192, 8_192), "gate_up": (59_136, 8_192), "down": (8_192, 29_568)}
KERNELS = ("cutlass", "torch")
LAYERS, CALLS = 80, 20
BATCHES = [1, *range(16, 257, 16), *range(288, 769, 32), 1024, 1536, 2048, 4096, 8192]


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, from CUDA events round a graph of CALLS."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / CALLS


def one(kernel: str, batch: int, weights: list[torch.Tensor]) -> float:
    """Milliseconds of one GEMM; `weights` are its shape several times, (in, out)."""
    width, out = weights[0].shape
    x = torch.randn(batch, width, device="cuda").to(torch.float8_e4m3fn)
    rows, columns = torch.rand(batch, 1, device="cuda"), torch.rand(1, out, device="cuda")
    turns = cycle(weights)
    if kernel == "cutlass":
        return milliseconds(lambda: ops.cutlass_scaled_mm(x, next(turns), rows, columns, torch.bfloat16))
    return milliseconds(lambda: torch._scaled_mm(x, next(turns), rows, columns, out_dtype=torch.bfloat16))


def save(module: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows with the card, the date and the command to the command line's first argument."""
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "card": torch.cuda.get_device_name(),
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    batches = [int(word) for word in sys.argv[2:]] or BATCHES
    weights = {
        name: [torch.randn(shape, device="cuda").to(torch.float8_e4m3fn).t() for _ in range(3)]
        for name, shape in SHAPES.items()
    }
    rows = []
    for batch in batches:
        times = {
            f"{name}_{kernel}_ms": one(kernel, batch, shaped) for kernel in KERNELS for name, shaped in weights.items()
        }
        whole = {
            f"model_{kernel}_ms": LAYERS * sum(times[f"{name}_{kernel}_ms"] for name in SHAPES) for kernel in KERNELS
        }
        rows.append({"batch": batch} | {name: round(value, 4) for name, value in (times | whole).items()})
        print({name: value for name, value in rows[-1].items() if name.startswith(("batch", "model"))}, flush=True)
    save("gemm", rows)


if __name__ == "__main__":
    main()
