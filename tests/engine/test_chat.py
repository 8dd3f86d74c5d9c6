"""What a client of the OpenAI API gets from the real server."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from qvq_serve.demo.cases import case
from qvq_serve.profile import TUTORIAL_SYSTEM_PROMPT
from tests.engine.conftest import KEY, MOST_TOKENS, Server, data_url, photo, user
from tests.engine.test_faults import named


def test_an_image_is_answered_streamed_and_not_with_the_same_text(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    request = {
        "model": client.models.list().data[0].id,
        "messages": [user({"url": data_url(photo(476, 476))}, "What is this?")],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert streamed
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens > 17 * 17


def test_the_answer_depends_on_the_image(server: Server) -> None:
    question = "What is the total of this invoice?"
    images = [data_url(case(seed, "invoice", size=(476, 476)).image) for seed in (1, 2)]
    answers = [server.chat(user({"url": image}, question), max_tokens=256).json() for image in images]
    first, second = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert first != second


def test_several_images_are_taken_in_order(server: Server) -> None:
    one, two = (data_url(case(seed, "invoice", size=(476, 476)).image) for seed in (1, 2))
    body = {"max_tokens": 64, "return_token_ids": True}
    one_way = server.chat(user({"url": one}, {"url": two}, "What is the total of this invoice?"), **body).json()
    other = server.chat(user({"url": two}, {"url": one}, "What is the total of this invoice?"), **body).json()
    assert one_way["prompt_token_ids"] == other["prompt_token_ids"]
    assert one_way["choices"][0]["token_ids"] != other["choices"][0]["token_ids"]


def test_images_come_by_https_data_and_file(server: Server, web: str, image_dir: Path) -> None:
    urls = [f"{web}/photo.png", data_url(photo(476, 476)), (image_dir / "photo.png").as_uri()]
    answers = [server.chat(user({"url": url}, "What is this?")) for url in urls]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_sampling_and_the_length_of_an_answer_are_the_servers_where_a_request_does_not_say(server: Server) -> None:
    def answer(**body: object) -> dict[str, Any]:
        request = {"messages": [user("Hi")], "ignore_eos": True, "repetition_detection": {"max_pattern_size": 0}}
        request |= body
        return httpx.post(f"{server.url}/v1/chat/completions", json=request, headers=server.headers, timeout=120).json()

    assert answer()["usage"]["completion_tokens"] == MOST_TOKENS
    assert answer(max_tokens=10)["usage"]["completion_tokens"] == 10
    assert answer(max_tokens=2000)["usage"]["completion_tokens"] == MOST_TOKENS
    texts = {answer(seed=seed, max_tokens=40)["choices"][0]["message"]["content"] for seed in range(4)}
    assert len(texts) > 1  # sampled, not greedy
    assert len({answer(seed=1, max_tokens=40)["choices"][0]["message"]["content"] for _ in range(2)}) == 1

    def first_tokens(**body: object) -> int:
        same = {"temperature": 2, "n": 8, "max_tokens": 1, "return_token_ids": True}
        found = [answer(seed=seed, **same, **body) for seed in range(30)]
        return len({choice["token_ids"][0] for part in found for choice in part["choices"]})

    assert 1 < first_tokens() <= 20  # the server's top_k
    assert first_tokens(top_k=-1, top_p=1) > 20


def prompt_of(server: Server, *messages: dict[str, object]) -> str:
    answer = server.chat(*messages, max_tokens=1, return_token_ids=True).json()
    tokens = {"tokens": answer["prompt_token_ids"]}
    return httpx.post(f"{server.url}/detokenize", json=tokens, headers=server.headers).json()["prompt"]


def test_the_tutorials_system_prompt_is_added_only_where_a_request_brings_none(server: Server) -> None:
    question = {"role": "user", "content": "Hi"}
    assert prompt_of(server, question) == (
        f"<|im_start|>system\n{TUTORIAL_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_of(server, {"role": "system", "content": "Mine."}, question).startswith(
        "<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user\n"
    )


def test_models_health_and_metrics_answer(server: Server) -> None:
    models = httpx.get(f"{server.url}/v1/models", headers=server.headers).json()
    assert [model["id"] for model in models["data"]] == ["qvq-demo"]
    assert server.alive()
    assert "vllm:num_requests_running" in httpx.get(f"{server.url}/metrics").text


def test_memory_is_planned_and_measured_in_the_log_and_in_the_metrics(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    figures = dict(re.findall(r"^(qvq_memory_\w+\{.*\}) (\S+)$", text, re.MULTILINE))
    cache = 'qvq_memory_bytes{{gpu="cpu",source="{}",use="kv_cache"}}'
    assert float(figures[cache.format("planned")]) == float(figures[cache.format("measured")]) == 2**29
    resident = float(figures['qvq_memory_bytes{gpu="cpu",source="measured",use="resident"}'])
    [worker] = named(server, "VLLM::Worker")
    assert resident == pytest.approx(worker.memory_info().rss, rel=0.25)
    assert float(figures['qvq_memory_headroom_bytes{gpu="cpu"}']) > 2**30
    assert "memory of cpu, kv_cache: planned 0.500 GiB, measured 0.500, difference +0.000" in server.log.read_text()


def test_memory_is_read_again_and_the_engine_answers_meanwhile(server: Server) -> None:
    """What is told is what the worker has now: images took it far from what it had at the start."""
    [worker] = named(server, "VLLM::Worker")

    def told() -> float:
        return float(re.search(r'use="resident"\} (\S+)', httpx.get(f"{server.url}/metrics").text)[1])

    for seed in range(2):
        assert server.chat(user({"url": data_url(photo(980, 980, 1000 + seed))}, "What?")).status_code == 200
    deadline = time.monotonic() + 60
    while told() != pytest.approx(worker.memory_info().rss, rel=0.01) and time.monotonic() < deadline:
        time.sleep(1)  # idle, it stays as it is
    assert told() == pytest.approx(worker.memory_info().rss, rel=0.01)


def test_without_the_key_nothing_is_answered_and_the_key_is_nowhere_to_be_seen(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert KEY not in server.log.read_text()
    titles = [path.read_bytes().decode() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert any(f"--port\0{server.url.rsplit(':', 1)[1]}" in title for title in titles)
    assert not any(KEY in title for title in titles)


def test_ask_prints_the_answer_and_how_it_ended(server: Server, image_dir: Path) -> None:
    command = [Path(sys.executable).parent / "qvq-serve", "ask", image_dir / "photo.png", "What is this?"]
    options = ["--url", server.url, "--max-tokens", "8"]
    environ = os.environ | {"QVQ_API_KEY": KEY}
    done = subprocess.run([*command, *options], capture_output=True, timeout=60, env=environ, check=True)
    assert done.stdout.strip()
    assert b" tokens in, 8 out, " in done.stderr
    refused = subprocess.run([*command, "--url", server.url], capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, "refused: " in refused.stderr) == (2, True)
    assert "Traceback" not in refused.stderr
