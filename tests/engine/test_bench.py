"""qvq-bench against the real server, and beside vLLM's own client where that misjudges."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from qvq_bench.client import Row, ask, http, session

from tests.bench import fake
from tests.engine.conftest import KEY, Server


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qvq_bench.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_run_reads_tokens_memory_and_the_launch_from_our_server(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = bench("run", "--url", server.url, "--key", KEY, "--workload", "demo", "--load", "4", "--requests", "16",
                 "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    step = found["steps"][0]
    assert step["outcomes"]["ok"] == 16 and step["throughput"]["images_per_second"] > 0
    memory = step["memory"]
    assert memory["kv_capacity_tokens"] > 80_000
    assert 0 < memory["kv_usage_peak"] < 1 and memory["preemptions"] == 0 and memory["running_peak"] >= 2
    assert memory["headroom"]["kv_tokens"] == pytest.approx(
        memory["kv_capacity_tokens"] * (1 - memory["kv_usage_peak"])
    )
    assert memory["headroom"]["bytes"] > 0 and memory["headroom"]["requests"] > 1
    assert memory["by_use"]["cpu"]["measured"]["resident"] > 0 and memory["by_use"]["cpu"]["planned"]["kv_cache"] > 0
    assert memory["image_hit_ratio"] == 0.0  # each request has an image of its own
    assert found["server"]["argv"].startswith("qvq-serve ") and found["server"]["vllm"] == "0.32.0"
    assert KEY not in out.read_text()


def test_repeated_images_are_found_in_the_cache(server: Server) -> None:
    done = bench("run", "--url", server.url, "--key", KEY, "--workload", "same-image", "--load", "1", "--requests", "9",
                 "--seed", "5")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["memory"]["image_hit_ratio"] > 0.5


def test_how_requests_end_is_taken_from_the_qvq_object(server: Server, tmp_path: Path) -> None:
    workload = tmp_path / "answers.toml"
    sections = ("[images]\ncount = 0", "[text]\ntokens = 20", "[output]\ntokens = 60\nignore_eos = false",
                "[sampling]\nthinking_token_budget = 20")  # fmt: skip
    workload.write_text("\n".join(sections))
    done = bench("run", "--url", server.url, "--key", KEY, "--workload", workload, "--load", "4", "--requests", "8")
    useful = json.loads(done.stdout.splitlines()[-1])["useful"]
    assert sum(useful["ended"].values()) == 8
    assert set(useful["ended"]) <= {"answered", "concluded", "looped", "length", "unmarked"}
    assert useful["share"] + sum(useful["lost"].values()) == pytest.approx(1.0)


def test_a_wrong_key_is_said(server: Server) -> None:
    done = bench("run", "--url", server.url, "--key", "wrong", "--requests", "2")
    assert done.returncode == 2 and "the server wants a key: --key or QVQ_API_KEY" in done.stderr


def test_serve_and_sweep_starts_each_setting_and_goes_on_after_one_that_cannot_start(tmp_path: Path) -> None:
    done = bench("serve-and-sweep", "--serve", "--demo --max-images 0", "--serve", "--demo --max-images 1",
                 "--workload", "demo-fixed", "--requests", "6", "--max-load", "2", "--repeats", "1",
                 "--slo", "ttft_p95=60s",
                 "--port", "8797", "--out", tmp_path, "--quiet")  # fmt: skip
    assert done.returncode == 1
    assert "--serve '--demo --max-images 0': ended at its start: qvq-serve: --max-images 0" in done.stderr
    assert "| demo-max-images-1 | - | " in done.stdout
    assert "--max-images 1" in json.loads((tmp_path / "demo-max-images-1.json").read_text())["server"]["argv"]
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_where_vllms_own_client_differs() -> None:
    """Why the cross-check's figures may differ: vLLM 0.32's client takes the chunk with nothing but the role for the
    first token, calls a stream with an error a success, and reads nothing of one that has a keep-alive comment."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_chat_completions

    async def both(plan: str) -> tuple[Any, Row]:
        made = await fake.serve(0)
        url = f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}"
        asked = RequestFuncInput(
            prompt="x", api_url=f"{url}/v1/chat/completions", prompt_len=1, output_len=8, model=plan
        )
        row = Row(0, 0.0)
        async with aiohttp.ClientSession() as theirs, session(30) as ours:
            told = await async_request_openai_chat_completions(asked, theirs)
            await ask(http(ours, url, None), {"model": plan, "messages": []}, row)
        made.close()
        return told, row

    # Which chunk each takes; times are tested on a virtual clock. A busy machine is late, never early.
    told, row = asyncio.run(both("accept=0.05,first=1.0,gap=0.01,chunks=4,comment=0"))
    assert told.success and 0.04 < told.ttft < 0.95
    assert row.outcome == "ok" and row.time_to_first_token is not None and row.time_to_first_token > 0.95
    told, row = asyncio.run(both("chunks=4,ending=error,comment=0"))
    assert told.success and row.outcome == "error"
    told, row = asyncio.run(both("chunks=4"))
    assert not told.success and row.outcome == "ok"
