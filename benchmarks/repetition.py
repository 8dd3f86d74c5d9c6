"""What vLLM's `repetition_detection` costs: time in the engine's own loop, by the largest pattern that it looks for.

    python -m benchmarks.repetition RESULT.json

vLLM calls the check for each new token of each running request. Histories are of 4,096 random tokens, in which nothing
repeats, the usual case; the cost does not depend on a GPU. Seconds for 128 running requests, one step.
"""

import datetime
import json
import random
import statistics
import sys
import time
from pathlib import Path

from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.core.sched.utils import check_sequence_repetition

from benchmarks.startup import machine
from qvq_serve.hooks.request import LOOP_COUNT, LOOP_LEAST

REQUESTS = 128
SIZES = (16, 24, 32, 64, 128, 256)


def step(histories: list[list[int]], params: RepetitionDetectionParams) -> float:
    """Seconds of one step's checks."""
    started = time.perf_counter()
    for history in histories:
        check_sequence_repetition(history, params)
    return time.perf_counter() - started


def main() -> None:
    draw = random.Random(0)
    histories = [[draw.randrange(150_000) for _ in range(4_096)] for _ in range(REQUESTS)]
    rows = {}
    for size in SIZES:
        params = RepetitionDetectionParams(max_pattern_size=size, min_pattern_size=LOOP_LEAST, min_count=LOOP_COUNT)
        times = [step(histories, params) for _ in range(30)]
        rows[size] = {
            "step_s": round(statistics.median(times), 6),
            "spread_s": [round(min(times), 6), round(max(times), 6)],
        }
        print(size, rows[size])
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.repetition RESULT.json",
        "machine": machine(),
        "requests": REQUESTS,
        "by_max_pattern_size": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
