"""A real start's own comparison: what `qvq-serve` planned for a GPU (or the CPU), measured, and goes on measuring.

    python -m benchmarks.check_start RESULT.json NAME [QVQ-SERVE'S ARGUMENTS…]
    python -m benchmarks.check_start --url URL RESULT.json NAME [THE ARGUMENTS THAT IT WAS STARTED WITH…]

Starts the server (with --url it runs already), reads `qvq_memory_bytes` of each card and the KV cache from /metrics,
asks the driver for the cards' use, puts eight requests with an image through it and reads again after the next poll.
Adds a row to RESULT.json and prints the table. Exit code 1 where a card breaks a limit of benchmarks/check_plan.py.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.check_plan import FIXED_LIMIT, KV_LIMIT, USE_LIMIT_GIB, WEIGHTS_LIMIT
from benchmarks.startup import QUESTION, invoice
from qvq_serve.gpu import GIB, Gpu, used_bytes, visible_gpus

PORT = 8766
FIXED = ("weights", "activation_peak", "cuda_graphs", "non_torch")


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by its labels' values, in the order of their names."""
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
            found[tuple(labels[key] for key in sorted(labels))] = float(match[2])
    return found


def kv_cache_tokens(url: str) -> int:
    """Tokens of KV cache, by the label of vLLM's own metric."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = re.search(r'vllm:cache_config_info\{.*kv_cache_size_tokens="(\d+)"', text)
    return int(found[1]) if found else 0


def ask(url: str, number: int) -> int:
    """Status of one request with an image, 64 tokens out."""
    content = [{"type": "image_url", "image_url": {"url": invoice()}}, {"type": "text", "text": f"{number} {QUESTION}"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 64, "ignore_eos": True}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).status_code


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> float:
    """Seconds until /health answers; ends with the log's last lines where the server ends before."""
    started = time.monotonic()
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=60).status_code == 200:
                return time.monotonic() - started
        except httpx.TransportError:
            time.sleep(0.5)
    sys.exit(f"exit code {process.returncode}; {log.read_text()[-3000:]}")


def read(url: str, gpus: list[Gpu]) -> dict[str, Any]:
    """What the metrics say now, GiB by card and use, and what the driver says of each card."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    by_use: dict[str, dict[str, dict[str, float]]] = {"planned": {}, "measured": {}}
    for (gpu, source, use), value in samples(text, "qvq_memory_bytes").items():
        by_use[source].setdefault(gpu, {})[use] = round(value / GIB, 3)
    headroom = samples(text, "qvq_memory_headroom_bytes").items()
    return by_use | {
        "headroom": {gpu: round(value / GIB, 3) for (gpu,), value in headroom},
        "driver_used": [round(used / GIB, 3) for used in used_bytes(gpus)],
    }


@contextlib.contextmanager
def server(url: str, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Starts `qvq-serve`, and ends it; what there is to tell of the start."""
    log = Path(tempfile.mkdtemp()) / "server.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "qvq_serve", "--port", str(PORT), *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield {"start_s": round(wait_until_up(url, process, log), 1)}
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    arguments = list(options.arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    planning = [a for a in arguments[:cut] if a != "--force"] + arguments[cut:]
    plan = [sys.executable, "-m", "qvq_serve", "plan", "--json", *planning]
    gpus, tokens = visible_gpus(), 0
    if gpus:
        planned = json.loads(subprocess.run(plan, capture_output=True, text=True, check=True).stdout)
        gpus, tokens = gpus[: planned["tp"] * planned["pp"]], planned["kv_cache_tokens"]
    row = {"name": options.name, "date": datetime.date.today().isoformat(),
           "command": f"qvq-serve {' '.join(arguments)}", "gpu": gpus[0].name if gpus else "cpu"}  # fmt: skip
    if not options.url:
        row["idle_before"] = [round(used / GIB, 3) for used in used_bytes(gpus)]
    url = options.url or f"http://127.0.0.1:{PORT}"
    with contextlib.nullcontext({}) if options.url else server(url, arguments) as told:
        row |= told
        time.sleep(2)  # the first figures come once the engine answers
        row["at_start"] = read(url, gpus)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            row["statuses"] = list(pool.map(lambda number: ask(url, number), range(8)))
        time.sleep(7)  # past the next poll
        row["after_requests"] = read(url, gpus)
        row["kv_cache_tokens"] = [tokens, kv_cache_tokens(url)] if gpus else None
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    options.out.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return report(row)


def report(row: dict[str, Any]) -> int:
    """Print planned and measured of each card, and the limits that are broken."""
    broken = 0
    for gpu, planned in row["at_start"]["planned"].items():
        measured = row["at_start"]["measured"][gpu]
        for use in planned:
            found = measured.get(use, float("nan"))
            print(f"{row['name']}, {gpu}, {use}: planned {planned[use]:.2f} GiB, measured {found:.2f}")
        if not row["kv_cache_tokens"] or "activation_peak" not in measured:
            continue
        fixed = [sum(side[use] for use in FIXED) for side in (planned, measured)]
        tokens = row["kv_cache_tokens"]
        offs = {
            "weights": (planned["weights"] / measured["weights"] - 1, WEIGHTS_LIMIT),
            "all but KV": (fixed[0] / fixed[1] - 1, FIXED_LIMIT),
            "KV tokens": (tokens[0] / tokens[1] - 1, KV_LIMIT),
            "worst use, GiB": (max(abs(planned[use] - measured[use]) for use in FIXED), USE_LIMIT_GIB),
        }
        print({name: round(off, 4) for name, (off, _) in offs.items()})
        broken |= any(abs(off) > limit for off, limit in offs.values())
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
