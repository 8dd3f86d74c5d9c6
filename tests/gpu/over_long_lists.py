"""Lists that are longer than vLLM 0.32's V2 runner holds, against a server on a GPU: what it answers, and if it lives.

    python tests/gpu/over_long_lists.py RESULT.json NAME PORT COMMAND…

The runner's limits (v1/worker/gpu/sample/logit_bias.py): 1024 of `logit_bias` and `allowed_token_ids`, 128 stop ids
where there are `min_tokens`. A server that died is started again for the next attack.
"""

import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

ATTACKS: dict[str, dict[str, Any]] = {
    "logit_bias of 1100": {"logit_bias": {str(i): 1 for i in range(1100)}},
    "allowed_token_ids of 1100": {"allowed_token_ids": list(range(1100))},
    "stop_token_ids of 200 with min_tokens": {"stop_token_ids": list(range(200)), "min_tokens": 4},
}


def answer(url: str, body: dict[str, Any]) -> str:
    """Status and message of one request."""
    full = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8} | body
    try:
        got = httpx.post(f"{url}/v1/chat/completions", json=full, timeout=60)
    except httpx.TransportError as error:
        return type(error).__name__
    return f"{got.status_code} {got.text[:200]}"


def start(command: list[str], url: str, log: Path, environ: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A server that answers /health."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environ)
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit(log.read_text()[-2000:])


def main() -> None:
    out, name, port, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    url, log = f"http://127.0.0.1:{port}", Path(tempfile.mkdtemp()) / "server.log"
    rows = json.loads(out.read_text()) if out.exists() else []
    process = start(command, url, log)
    for what, body in ATTACKS.items():
        if process.poll() is not None:
            process = start(command, url, log)
        row = {"server": name, "attack": what, "date": datetime.date.today().isoformat(), "before": answer(url, {})[:3]}
        at = len(log.read_text())
        row["attack_answer"] = answer(url, body)
        time.sleep(8)
        row |= {"after": answer(url, {})[:40], "exit_code": process.poll()}
        row["log"] = [line[-200:] for line in log.read_text()[at:].splitlines() if "ValueError: " in line][:2]
        rows.append(row)
        out.write_text(json.dumps(rows, indent=1) + "\n")
        print(row, flush=True)
    process.terminate()
    process.wait(60)


if __name__ == "__main__":
    main()
