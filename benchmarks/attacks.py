"""Attacks and faults, on bare vLLM and on the whole stack, with the same engine flags: what comes back.

    python -m benchmarks.attacks RESULT.json

The demo on the CPU. Writes a row an attack, and prints them as a table.
"""

import base64
import concurrent.futures
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.stack_ratio import BARE, PORTS, bare_command, picture
from benchmarks.startup import QVQ_SERVE, machine, wait_until_up

KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SPELLINGS = ("127.0.0.1", "localhost", "127.1", "2130706433")
STREAMS = 16


class Inside(BaseHTTPRequestHandler):
    """A server that only this machine should reach."""

    seen = 0

    def do_GET(self) -> None:
        Inside.seen += 1
        body = base64.b64decode(picture(1).partition(",")[2])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def serving(side: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server of that side."""
    command = {"ours": [str(QVQ_SERVE), "--demo", "--port", str(PORTS["ours"])], "bare": bare_command()}[side]
    environ = os.environ | (BARE if side == "bare" else {})
    with (Path(tempfile.mkdtemp()) / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--api-key", KEY], stdout=log, stderr=log, env=environ)
    try:
        wait_until_up(process, f"http://127.0.0.1:{PORTS[side]}")
        time.sleep(2)  # the first request of ours is its own
        yield process
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if (
            process.poll() is None) else []  # fmt: skip
        for member in family:
            member.kill()
        process.wait()


def post(side: str, path: str = "/v1/chat/completions", headers: dict[str, str] = HEADERS, **body: Any) -> str:
    """Status of one request."""
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0} | body
    try:
        return str(
            httpx.post(f"http://127.0.0.1:{PORTS[side]}{path}", json=request, headers=headers, timeout=180).status_code
        )
    except httpx.TransportError as error:
        return type(error).__name__


def about(url: str) -> dict[str, Any]:
    """A request about an image."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}]}


def many_choices(side: str) -> str:
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        attack = pool.submit(post, side, n=10_000, temperature=1)
        time.sleep(1)
        bystander = post(side)
        waited = time.monotonic() - started - 1
        return f"{attack.result()}; a bystander: {bystander} after {waited:.1f} s"


def loopback(side: str) -> str:
    with ThreadingHTTPServer(("127.0.0.1", 0), Inside) as inside:
        threading.Thread(target=inside.serve_forever, daemon=True).start()
        Inside.seen = 0
        statuses = [post(side, **about(f"http://{host}:{inside.server_address[1]}/a.png")) for host in SPELLINGS]
        inside.shutdown()
    return f"{Inside.seen} of {len(SPELLINGS)} fetched ({', '.join(statuses)})"


def same_id(side: str) -> str:
    headers = HEADERS | {"X-Request-Id": "mine"}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return ", ".join(pool.map(lambda _: post(side, headers=headers, max_tokens=60, ignore_eos=True), range(4)))


ATTACKS: dict[str, Callable[[str], str]] = {
    "n of 10,000": many_choices,
    "an image of this machine's own network, in 4 spellings": loopback,
    "an image at file:///etc/passwd": lambda side: post(side, **about("file:///etc/passwd")),
    "/invocations without a key": lambda side: post(side, "/invocations", {}),
    "/tokenize without a key": lambda side: post(side, "/tokenize", {}, prompt="Hi"),
    "structured_outputs that is a string": lambda side: post(side, structured_outputs="x"),
    "a pattern of 10,000 tokens to look for in each step": lambda side: post(
        side, repetition_detection={"max_pattern_size": 10_000, "min_count": 2}
    ),
    "prompt_logprobs of 20": lambda side: post(side, prompt_logprobs=20),
    "a body of 130 MB": lambda side: post(side, messages=[{"role": "user", "content": "x" * 130_000_000}]),
    "the same X-Request-Id four times at once": same_id,
}


def stream(side: str) -> bool:
    """Whether a stream of 1,500 tokens came whole."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1_500, "ignore_eos": True, "stream": True,
            "repetition_detection": {"max_pattern_size": 0}}  # fmt: skip
    url = f"http://127.0.0.1:{PORTS[side]}/v1/chat/completions"
    try:
        return '"finish_reason":"length"' in httpx.post(url, json=body, headers=HEADERS, timeout=120).text
    except httpx.TransportError:
        return False


def end(side: str, victim: str, number: int) -> str:
    """What becomes of running streams, and of the server, when a signal goes to one of its processes."""
    with serving(side) as process, concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        family = psutil.Process(process.pid).children(recursive=True)
        streams = [pool.submit(stream, side) for _ in range(STREAMS)]
        time.sleep(1.5)
        target = process.pid if victim == "main" else next(
            member.pid for member in family if victim in " ".join(member.cmdline()))  # fmt: skip
        os.kill(target, number)
        started = time.monotonic()
        whole = sum(running.result() for running in streams)
        try:
            code = f"exit code {process.wait(40)} after {time.monotonic() - started:.0f} s"
        except subprocess.TimeoutExpired:
            code = "not ended after 40 s"
        _, alive = psutil.wait_procs(family, timeout=max(0, 10 - (time.monotonic() - started)))
        for member in alive:
            member.kill()
        return f"{whole} of {STREAMS} streams whole, {code}, {len(alive)} processes left after 10 s"


FAULTS = {
    "SIGTERM with 16 streams running": ("main", signal.SIGTERM),
    "SIGKILL of the engine with 16 streams running": ("VLLM::EngineCore", signal.SIGKILL),
    "SIGKILL of the main process with 16 streams running": ("main", signal.SIGKILL),
}


def main() -> None:
    rows: dict[str, dict[str, str]] = {name: {} for name in (*ATTACKS, *FAULTS)}
    for side in ("bare", "ours"):
        with serving(side):
            for name, attack in ATTACKS.items():
                rows[name][side] = attack(side)
                print(side, name, rows[name][side], flush=True)
        for name, (victim, number) in FAULTS.items():
            rows[name][side] = end(side, victim, number)
            print(side, name, rows[name][side], flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.attacks RESULT.json",
        "machine": machine(),
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"| {name} | {row['bare']} | {row['ours']} |")


if __name__ == "__main__":
    main()
