"""The governor on vLLM's V2 runner, which only a GPU runs: the cases of tests/governor/served.py, and what it costs.

    python -m tests.gpu.governor CASES.json COST.json PORT MODEL [VLLM'S ARGUMENTS…]

The weights are made up, the vocabulary is Qwen's. The cost is the difference between governed requests and others on
the same server, in turns: everything on, but for loops and budgets, which would end them.
"""

import asyncio
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.startup import machine
from tests.governor.served import FLAGS, NO_ENDS, asking, cases
from tests.gpu.over_long_lists import start

SMALL = ["--kv-cache-memory-bytes", "600000000", "--max-num-batched-tokens", "512", "--max-num-seqs", "64"]
"""Of vLLM: so little that 40 requests are preempted and a prompt is read in chunks."""
HAN = 28029
"""图 in Qwen's vocabulary."""
BATCHES = (1, 64)
TOKENS, ROUNDS = 200, 4
OFF: dict[str, Any] = {"governor": False}
ON: dict[str, Any] = {"governor": NO_ENDS}


async def batch(url: str, size: int, turn: int, body: dict[str, Any]) -> float:
    """Seconds until so many requests, asked at once, have each written TOKENS tokens."""
    asked = {"temperature": 0.6, "max_tokens": TOKENS, "min_tokens": TOKENS,
             "repetition_detection": {"max_pattern_size": 0}} | body  # fmt: skip
    limits = httpx.Limits(max_connections=size)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        began = time.perf_counter()
        got = await asyncio.gather(*(
            client.post(f"{url}/v1/chat/completions", json=asked | {
                "messages": [{"role": "user", "content": f"{turn} {at}: how much?"}], "seed": at})
            for at in range(size)
        ))  # fmt: skip
        took = time.perf_counter() - began
    for each in got:
        assert each.status_code == 200 and each.json()["usage"]["completion_tokens"] == TOKENS, each.text[:300]
    return took


def cost(url: str) -> list[dict[str, Any]]:
    """Milliseconds a step with and without the governor, medians of rounds in turns."""
    rows = []
    for size in BATCHES:
        asyncio.run(batch(url, size, 0, OFF))
        asyncio.run(batch(url, size, 0, ON))
        off, on = [], []
        for turn in range(1, ROUNDS + 1):
            off.append(asyncio.run(batch(url, size, turn, OFF)) * 1e3 / TOKENS)
            on.append(asyncio.run(batch(url, size, turn, ON)) * 1e3 / TOKENS)
        added = [b - a for a, b in zip(off, on, strict=True)]
        rows.append({"batch": size, "step_ms_off": statistics.median(off),
                     "step_ms_on": statistics.median(on),
                     "added_ms": statistics.median(added), "added_ms_least": min(added),
                     "added_ms_most": max(added)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    out, cost_out, port, model, *more = sys.argv[1:]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "qvq_serve", "--model", model, "--port", port, "--max-model-len", "8192", *FLAGS]
    process = start([*command, "--", *SMALL, *more], url, Path(tempfile.mkdtemp()) / "server.log")
    rows: list[dict[str, Any]] = []
    for case, held, seen in cases(asking(url), url, None, HAN):
        rows.append({"case": case, "held": held, "seen": seen, "date": datetime.date.today().isoformat()})
        print(rows[-1], flush=True)
        Path(out).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    found = {"command": "python -m tests.gpu.governor", "machine": machine(), "tokens": TOKENS, "rounds": ROUNDS,
             "arguments": [*SMALL, *more], "rows": cost(url)}  # fmt: skip
    Path(cost_out).write_text(json.dumps(found, indent=1) + "\n")
    process.terminate()
    print("exit code after SIGTERM", process.wait(60))


if __name__ == "__main__":
    main()
