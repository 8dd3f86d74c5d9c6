"""A real start's own comparison: what `qvq-serve` planned for a GPU (or the CPU), measured, and goes on measuring.

    python -m benchmarks.check_start RESULT.json NAME [QVQ-SERVE'S ARGUMENTS…]

Starts the server, reads `qvq_memory_bytes` and the KV cache from /metrics, asks the driver for the card's use, puts
eight requests with an image through it and reads again after the next poll. Adds a row to RESULT.json and prints the
table. Exit code 1 where a limit of benchmarks/check_plan.py is broken.
"""

import concurrent.futures
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.check_plan import FIXED_LIMIT, KV_LIMIT, USE_LIMIT_GIB, WEIGHTS_LIMIT
from benchmarks.startup import QUESTION, invoice
from qvq_serve.gpu import GIB, used_bytes, visible_gpus

PORT = 8766
URL = f"http://127.0.0.1:{PORT}"
FIXED = ("weights", "activation_peak", "cuda_graphs", "non_torch")


def samples(name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by its labels' values, in the order of their names."""
    found = {}
    for line in httpx.get(f"{URL}/metrics", timeout=60).text.splitlines():
        if match := re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
            found[tuple(labels[key] for key in sorted(labels))] = float(match[2])
    return found


def kv_cache_tokens() -> int:
    """Tokens of KV cache, by the label of vLLM's own metric."""
    text = httpx.get(f"{URL}/metrics", timeout=60).text
    found = re.search(r'vllm:cache_config_info\{.*kv_cache_size_tokens="(\d+)"', text)
    return int(found[1]) if found else 0


def ask(number: int) -> int:
    """Status of one request with an image, 64 tokens out."""
    content = [{"type": "image_url", "image_url": {"url": invoice()}}, {"type": "text", "text": f"{number} {QUESTION}"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 64, "ignore_eos": True}
    return httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=300).status_code


def wait_until_up(process: subprocess.Popen[bytes], log: Path) -> float:
    """Seconds until /health answers; ends with the log's last lines where the server ends before."""
    started = time.monotonic()
    while process.poll() is None:
        try:
            if httpx.get(f"{URL}/health", timeout=60).status_code == 200:
                return time.monotonic() - started
        except httpx.TransportError:
            time.sleep(0.5)
    sys.exit(f"exit code {process.returncode}; {log.read_text()[-3000:]}")


def read(gpus: list[Any]) -> dict[str, Any]:
    """What the metrics say now, GiB, and what the driver says."""
    by_use: dict[str, dict[str, float]] = {"planned": {}, "measured": {}}
    for (_, source, use), value in samples("qvq_memory_bytes").items():
        by_use[source][use] = round(value / GIB, 3)
    return by_use | {
        "headroom": round(next(iter(samples("qvq_memory_headroom_bytes").values())) / GIB, 3),
        "driver_used": round(used_bytes(gpus)[0] / GIB, 3) if gpus else None,
    }


def main() -> int:
    out, name, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    gpus = visible_gpus()[:1]
    log = Path(tempfile.mkdtemp()) / "server.log"
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    planning = [a for a in arguments[:cut] if a != "--force"] + arguments[cut:]
    qvq_serve = [sys.executable, "-m", "qvq_serve"]
    planned = subprocess.run([*qvq_serve, "plan", "--json", *planning], capture_output=True, text=True, check=False)
    idle = used_bytes(gpus)
    with log.open("wb") as file:
        process = subprocess.Popen([*qvq_serve, "--port", str(PORT), *arguments], stdout=file, stderr=file)
    try:
        row = {"name": name, "date": datetime.date.today().isoformat(), "command": f"qvq-serve {' '.join(arguments)}",
               "gpu": gpus[0].name if gpus else "cpu", "start_s": round(wait_until_up(process, log), 1)}  # fmt: skip
        time.sleep(2)  # the first figures come once the engine answers
        row |= {"idle_before": [round(b / GIB, 3) for b in idle], "at_start": read(gpus)}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            row["statuses"] = list(pool.map(ask, range(8)))
        time.sleep(7)  # past the next poll
        row["after_requests"] = read(gpus)
        row["kv_cache_tokens"] = [json.loads(planned.stdout)["kv_cache_tokens"], kv_cache_tokens()] if gpus else None
        row["log"] = [line.split("] ")[-1] for line in log.read_text().splitlines() if "memory of" in line]
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    rows = json.loads(out.read_text()) if out.exists() else []
    out.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return report(row)


def report(row: dict[str, Any]) -> int:
    """Print planned and measured, and the limits that are broken."""
    planned, measured = row["at_start"]["planned"], row["at_start"]["measured"]
    for use in planned:
        print(f"{row['name']} {use}: planned {planned[use]:.2f} GiB, measured {measured.get(use, float('nan')):.2f}")
    print({k: v for k, v in row.items() if k not in ("log",)})
    if not row["kv_cache_tokens"] or "activation_peak" not in measured:
        return 0
    fixed = [sum(side[use] for use in FIXED) for side in (planned, measured)]
    tokens = row["kv_cache_tokens"]
    offs = {
        "weights": (planned["weights"] / measured["weights"] - 1, WEIGHTS_LIMIT),
        "all but KV": (fixed[0] / fixed[1] - 1, FIXED_LIMIT),
        "KV tokens": (tokens[0] / tokens[1] - 1, KV_LIMIT),
        "worst use, GiB": (max(abs(planned[use] - measured[use]) for use in FIXED), USE_LIMIT_GIB),
    }
    print({name: round(off, 4) for name, (off, _) in offs.items()})
    return 1 if any(abs(off) > limit for off, limit in offs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
