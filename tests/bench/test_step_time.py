"""A profiler's trace, summed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step_time import summed


def event(category: str, name: str, start_us: float, duration_us: float) -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": start_us, "dur": duration_us}


def written(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_gaps_are_where_no_kernel_runs_and_kernels_that_overlap_count_once(tmp_path: Path) -> None:
    step = "execute_context_0(0)_generation_64(64)"
    found = summed(written(tmp_path / "rank0.json.gz", [
        {"name": "an instant, without a duration", "ts": 0},
        event("cpu_op", "the host's, which is not the card's", 0, 90_000),
        event("kernel", "gemm", 10_000, 4_000),
        event("kernel", "copy", 12_000, 1_000),  # within the first
        event("gpu_memcpy", "copy", 13_000, 3_000),  # 2 ms beyond it
        event("kernel", "gemm", 19_000, 1_000),  # 3 ms later
        *(event("gpu_user_annotation", step, 10_000, took) for took in (4_000, 5_000, 9_000)),
    ]))  # fmt: skip
    assert (found["span_ms"], found["idle_ms"]) == (10.0, 3.0)
    assert found["kernels"] == [["gemm", 2, 5.0], ["copy", 2, 4.0]]
    assert found["steps"] == [[step, 3, 5.0]]


def test_a_trace_of_a_process_without_a_gpu_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"api\.json\.gz has no work of a GPU"):
        summed(written(tmp_path / "api.json.gz", [event("cpu_op", "x", 0, 1)]))
