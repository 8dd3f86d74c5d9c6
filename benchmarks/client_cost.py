"""What qvq-bench's client costs, and whether it keeps up: 1,000 streams at 20,000 chunks/s from a fake server.

    python -m benchmarks.client_cost RESULT.json [STREAMS] [CHUNKS_A_SECOND]

The server (tests/bench/fake.py) has one core and the client another. Each stream's chunks come at a rate that is known,
so what the client adds can be read off.
"""

import asyncio
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from qvq_bench import client
from qvq_bench.load import Load, Measured, run_load
from qvq_bench.result import commit
from qvq_bench.summary import quantiles, summarise
from qvq_bench.workload import Request

from benchmarks.startup import machine

PORT, SECONDS = 8799, 20.0


async def request(index: int) -> Request:
    return Request(index, {"messages": []}, 0, "", False)


async def measure(streams: int, rate: float) -> Measured:
    gap = streams / rate
    plan = f"first=2,gap={gap},chunks={int(SECONDS / gap)}"
    async with client.session(300) as session:
        send = client.http(session, f"http://127.0.0.1:{PORT}", None)
        return await run_load(send, request, Load(streams, requests=streams), plan)


def main() -> None:
    streams = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000
    rate = float(sys.argv[3]) if len(sys.argv) > 3 else 20_000.0
    server = subprocess.Popen(["taskset", "-c", "0", sys.executable, "-m", "tests.bench.fake", str(PORT)])
    os.sched_setaffinity(0, {1})
    try:
        time.sleep(1)
        before = resource.getrusage(resource.RUSAGE_SELF)
        made = asyncio.run(measure(streams, rate))
        after = resource.getrusage(resource.RUSAGE_SELF)
    finally:
        server.terminate()
        server.wait(30)
    summary = summarise(made, streams, judged=False)
    chunks = sum(row.chunks for row in made.rows)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # The lag while all streams run: the first two seconds open the connections.
    ends = min(row.first or 0.0 for row in made.rows), max(row.last or 0.0 for row in made.rows)
    running = quantiles(made.lag[len(made.lag) // 8 :])
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.client_cost RESULT.json {streams} {rate:g}",
        "commit": commit(),
        "machine": machine(),
        "streams": streams,
        "ok": summary["outcomes"]["ok"],
        "chunks_per_second": round(chunks / (ends[1] - ends[0])),
        "chunk_gap_sent_s": streams / rate,
        "chunk_gap_s": summary["latency"]["chunk_gap"],
        "lag_s": running,
        "cpu_us_per_chunk": round(cpu / chunks * 1e6, 1),
    }  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
