"""A worker killed under load: what its clients are told, how the server ends, what is left on the cards.

    bash benchmarks/versus_vllm.sh start ours DIR --tp 4 …
    python -m tests.gpu.dead_worker RESULT.json DIR http://127.0.0.1:8099

The case of tests/engine/test_faults.py, which has two workers on a CPU. Exit code 1 where it does not hold.
"""

import datetime
import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from qvq_serve.gpu import GIB, used_bytes, visible_gpus
from tests.engine.test_faults import started

STREAMS = 32


def main() -> int:
    out, directory, url = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    process = psutil.Process(int((directory / "pid").read_text()))
    processes = [process, *process.children(recursive=True)]
    workers = [one for one in processes if "VLLM::Worker" in " ".join(one.cmdline())]
    gpus = visible_gpus()
    streams = started(SimpleNamespace(url=url, headers={}), STREAMS, 7_000)  # type: ignore[arg-type]
    before = used_bytes(gpus)
    workers[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for stream in streams:
        stream.join(20)
    errors = [json.loads(one.events[-2]).get("error", {}).get("code") for one in streams if len(one.events) > 1]
    psutil.wait_procs([process], timeout=20)
    ended_s = time.monotonic() - killed
    _, alive = psutil.wait_procs(processes, timeout=10)
    time.sleep(1)
    row: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "workers": len(workers), "streams": STREAMS,
        "told_500": errors.count(500), "ended_by_done": sum(one.events[-1:] == ["[DONE]"] for one in streams),
        "ended_s": round(ended_s, 1), "exit_code": int((directory / "exit").read_text()), "alive": len(alive),
        "cards": [gpu.name for gpu in gpus], "used_gib_before": [round(used / GIB, 1) for used in before],
        "used_gib_after": [round(used / GIB, 1) for used in used_bytes(gpus)],
    }  # fmt: skip
    out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))
    told = row["told_500"] == row["ended_by_done"] == STREAMS
    return int(
        not (
            told and row["exit_code"] == 5 and ended_s < 10 and not alive and max(row["used_gib_after"], default=0) < 1
        )
    )


if __name__ == "__main__":
    sys.exit(main())
