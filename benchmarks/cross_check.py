"""qvq-bench against `vllm bench serve` (as a library) and GuideLLM: the same load on the same server, in turns.

    python -m benchmarks.cross_check RESULT.json URL [--rounds 7] [--users 8] [--requests 64] [--tokens 64]
        [--workload chat-short] [--guidellm PATH]

Each turn asks texts of its own, drawn alike, so that no tool finds another's prefixes in the cache. The figures are
output tokens a second over the whole turn, and the medians of the time to the first token and of the time per output
token after it.
"""

import argparse
import asyncio
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvq_bench.bench import Bench, Plan, Target
from qvq_bench.result import commit
from qvq_bench.workload import load_workload

from benchmarks.startup import machine

FIGURES = ("output_tokens_per_second", "time_to_first_token_s", "time_per_output_token_s")


def texts(turn: int, options: argparse.Namespace) -> list[str]:
    """The questions of a turn."""
    workload = load_workload(options.workload, seed=turn)
    bodies = (workload.request(index).body for index in range(options.requests))
    return [body["messages"][0]["content"][-1]["text"] for body in bodies]


def ours(url: str, prompts: list[str], options: argparse.Namespace) -> dict[str, float]:
    """A turn of qvq-bench."""
    body = {"max_tokens": options.tokens, "ignore_eos": True, "temperature": 0.6}
    own = tuple(body | {"messages": [{"role": "user", "content": prompt}]} for prompt in prompts)
    workload = replace(load_workload("chat-short"), own=own)

    async def turn() -> dict[str, Any]:
        # The others sample no memory: with sampling, each look at /metrics takes the demo server 4 ms.
        plan = Plan(requests=len(prompts), sample_every=3600)
        async with Bench(Target(url), workload, plan, show=False) as bench:
            return (await bench.step(options.users))[0]

    found = asyncio.run(turn())
    assert found["outcomes"]["ok"] == len(prompts) and found["client"]["valid"], found["outcomes"]
    return {
        "output_tokens_per_second": found["throughput"]["output_tokens_per_second"],
        "time_to_first_token_s": found["latency"]["time_to_first_token"]["p50"],
        "time_per_output_token_s": found["latency"]["time_per_output_token"]["p50"],
    }


def vllm_bench(url: str, prompts: list[str], options: argparse.Namespace) -> dict[str, float]:
    """A turn of vLLM's own client."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    model = options.model
    asked = [SampleRequest(prompt, 1, options.tokens, request_id=str(at)) for at, prompt in enumerate(prompts)]
    found = asyncio.run(
        benchmark(
            task_type=TaskType.GENERATION, endpoint_type="openai-chat", api_url=f"{url}/v1/chat/completions",
            base_url=url, model_id=model, model_name=model, tokenizer=None, input_requests=asked, logprobs=None,
            request_rate=float("inf"), burstiness=1.0, disable_tqdm=True, num_warmups=0, profile=False,
            selected_percentile_metrics=["ttft", "tpot"], selected_percentiles=[50], ignore_eos=True,
            goodput_config_dict={}, max_concurrency=options.users, lora_modules=None, extra_headers=None,
            extra_body={"temperature": 0.6}, ready_check_timeout_sec=0,
        )
    )  # fmt: skip
    assert found["completed"] == len(prompts), found
    each = [
        (latency - first) / (tokens - 1)
        for latency, first, tokens in zip(found["latencies"], found["ttfts"], found["output_lens"], strict=True)
    ]
    return {
        "output_tokens_per_second": found["output_throughput"],
        "time_to_first_token_s": statistics.median(found["ttfts"]),
        "time_per_output_token_s": statistics.median(each),
    }


def guidellm(url: str, prompts: list[str], options: argparse.Namespace) -> dict[str, float]:
    """A turn of GuideLLM. Its `inter_token_latency` is what the others call the time per output token."""
    with tempfile.TemporaryDirectory() as directory:
        data, out = Path(directory, "data.jsonl"), Path(directory, "out.json")
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        backend = {
            "kind": "openai_http",
            "target": url,
            "max_tokens": options.tokens,
            "extras": {"body": {"ignore_eos": True, "temperature": 0.6}},
        }
        command = [options.guidellm, "run", "--disable-console", "--backend", json.dumps(backend),
                   "--profile", f"kind=concurrent,streams={options.users}",
                   "--constraint", f"kind=max_requests,count={len(prompts)}",
                   "--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={out}"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        found = json.loads(out.read_text())["benchmarks"][0]
    done = found["requests"]["successful"]
    assert len(done) == len(prompts), found["metrics"]["request_totals"]
    seconds = max(r["request_end_time"] for r in done) - min(r["request_start_time"] for r in done)
    return {
        "output_tokens_per_second": sum(request["output_tokens"] for request in done) / seconds,
        "time_to_first_token_s": statistics.median(request["time_to_first_token_ms"] for request in done) / 1e3,
        "time_per_output_token_s": statistics.median(request["inter_token_latency_ms"] for request in done) / 1e3,
        # From when a stream is free until the next request goes out; not in its time to the first token.
        "dispatch_delay_s": statistics.median(request["request_dispatch_delay"] for request in done),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("url")
    for name, default in (("rounds", 7), ("users", 8), ("requests", 64), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workload", default="chat-short", help="whose texts are asked; its images are left out")
    parser.add_argument("--guidellm", help="its program, in an environment of its own")
    options = parser.parse_args()
    tools = {"qvq-bench": ours, "vllm bench serve": vllm_bench} | ({"GuideLLM": guidellm} if options.guidellm else {})
    options.model = asyncio.run(model_of(options.url))
    rows: list[dict[str, Any]] = []
    turn = itertools.count(1 + int(time.time()) % 100_000 * 100)  # texts that no earlier run asked
    for number in range(-1, options.rounds):  # the first warms up
        order = list(tools)[number % len(tools) :] + list(tools)[: number % len(tools)]
        row = {name: tools[name](options.url, texts(next(turn), options), options) for name in order}
        print(
            number, {name: {k: round(v, 4) for k, v in found.items()} for name, found in row.items()}, file=sys.stderr
        )
        if number >= 0:
            rows.append(row)
    ratios = {
        name: {
            figure: round(statistics.median(r["qvq-bench"][figure] / r[name][figure] for r in rows), 4)
            for figure in FIGURES
        }
        for name in tools
        if name != "qvq-bench"
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.cross_check RESULT.json URL " + " ".join(
            f"--{name} {getattr(options, name)}" for name in ("rounds", "users", "requests", "tokens", "workload")
        ),
        "commit": commit(),
        "machine": machine(),
        "median_ratio_ours_to": ratios,
        "rounds": rows,
    }  # fmt: skip
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios))


async def model_of(url: str) -> str:
    async with Bench(Target(url), load_workload("chat-short"), Plan(requests=1), show=False) as bench:
        return bench.model


if __name__ == "__main__":
    main()
