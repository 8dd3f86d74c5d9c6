"""The whole stack against bare vLLM with the same engine flags: the ratio of throughputs, with its 95 % interval.

    python -m benchmarks.stack_ratio RESULT.json [ROUNDS]

Both servers serve the demo on the CPU, one beside the other; in each round each takes its turn under the same load, in
changing order: 16 users at once, streams of 64 tokens about an image of 280 x 280, the image another one each time.
"""

import base64
import concurrent.futures
import datetime
import io
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from PIL import Image
from qvq_bench.compare import STUDENT_95

from benchmarks.startup import QVQ_SERVE, machine, wait_until_up

USERS, REQUESTS, TOKENS = 16, 96, 64
PORTS = {"ours": 8771, "bare": 8772}
OURS = ("--chat-template", "--default-chat-template-kwargs", "--reasoning-parser", "--middleware",
        "--structured-outputs-config", "--worker-extension-cls", "--max-num-queued-reqs", "--logging-config",
        "--sse-keep-alive-interval")  # fmt: skip
"""vLLM's flags that bring our parts in, each with a value; the rest are the engine's, the same for both."""
BARE = {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
"""Environment in which vLLM loads nothing of ours."""


def bare_command(arguments: Sequence[str] = ("--demo",), port: int = PORTS["bare"]) -> list[str]:
    """vLLM's own server with the engine flags of `qvq-serve ARGUMENTS`. It needs BARE in its environment."""
    dry_run = [sys.executable, "-m", "qvq_serve", "--port", str(port), "--dry-run", *arguments]
    shown = subprocess.run(dry_run, capture_output=True, text=True, check=True).stdout
    model, *flags = shlex.split(shown.splitlines()[-1])[2:]
    kept, skip = [], False
    for flag in flags:
        if not skip and flag not in OURS and flag != "--disable-uvicorn-access-log":
            kept.append(flag)
        skip = flag in OURS
    return [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model, *kept]


def picture(seed: int) -> str:
    """A seeded image as a data URL."""
    noise = Image.frombytes("RGB", (10, 10), random.Random(seed).randbytes(300)).resize((280, 280))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(side: str, seed: int) -> int:
    """Output tokens of one stream."""
    content = [{"type": "image_url", "image_url": {"url": picture(seed)}}, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    answer = httpx.post(f"http://127.0.0.1:{PORTS[side]}/v1/chat/completions", json=body, timeout=300)
    answer.raise_for_status()
    return int(json.loads(answer.text.split("data: ")[-2])["usage"]["completion_tokens"])


def throughput(side: str, first_seed: int) -> float:
    """Output tokens a second, over all requests of a turn."""
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(USERS) as pool:
        tokens = sum(pool.map(lambda seed: ask(side, seed), range(first_seed, first_seed + REQUESTS)))
    return tokens / (time.perf_counter() - started)


def main() -> None:
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    commands = {"ours": [str(QVQ_SERVE), "--demo", "--port", str(PORTS["ours"])], "bare": bare_command()}
    environ = {"ours": os.environ, "bare": os.environ | BARE}
    servers = {}
    rows = []
    try:
        for side, command in commands.items():
            with Path(f"/tmp/ratio-{side}.log").open("wb") as log:
                servers[side] = subprocess.Popen(command, stdout=log, stderr=log, env=environ[side])
            wait_until_up(servers[side], f"http://127.0.0.1:{PORTS[side]}")
        for number in range(-1, rounds):  # the first warms up
            sides = ("ours", "bare") if number % 2 else ("bare", "ours")
            row = {side: round(throughput(side, 1_000 * (number + 2)), 2) for side in sides}
            if number >= 0:
                rows.append(row)
                print(row, flush=True)
    finally:
        for server in servers.values():
            server.terminate()
        for server in servers.values():
            server.wait(60)
    logs = [math.log(row["ours"] / row["bare"]) for row in rows]
    t = STUDENT_95[min(len(logs) - 1, len(STUDENT_95)) - 1]
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.stack_ratio RESULT.json {rounds}",
        "machine": machine(),
        "bare": shlex.join(["vllm", "serve", "DEMO", *commands["bare"][5:]]),
        "ratio": round(math.exp(mean), 4),
        "interval_95": [round(math.exp(mean - half), 4), round(math.exp(mean + half), 4)],
        "output_tokens_a_second": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "output_tokens_a_second"})


if __name__ == "__main__":
    main()
