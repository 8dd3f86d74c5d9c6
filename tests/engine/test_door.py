"""What the door lets in: keys, routes, bounds, and what it says; on the shared server unless a start is needed."""

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from qvq_serve.profile import Profile
from tests.engine.conftest import KEY, Server, data_url, photo, serving, user
from tests.network import free_port

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def keyed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with a file of keys, small limits, its metrics on a port of their own, and vLLM's own chat opened."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# two of them\nkey-one\nkey-two\n")
    limits = ["--max-body-bytes", "100000", "--max-queued-requests", "4", "--request-timeout", "6"]
    routes = ["--open-routes", "/invocations", "--without-hooks", "answer,language,request"]
    port = str(free_port())
    apart = ["--api-key-file", str(keys), "--metrics-port", port]
    with serving(cache, "--demo", *apart, *limits, *routes, key=None) as running:
        running.metrics = f"http://127.0.0.1:{port}/metrics"
        yield running, keys


def post(server: Server, path: str = CHAT, key: str | None = KEY, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = {"messages": [user("Hi")], "max_tokens": 4, "temperature": 0} | body
    return httpx.post(f"{server.url}{path}", json=request, headers=headers, timeout=60)


@pytest.mark.parametrize("path", ["/v1/models", "/version", CHAT])
def test_every_open_route_but_the_probes_needs_a_key(server: Server, path: str) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        answer = httpx.get(f"{server.url}{path}", headers=header)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError"), header
    assert httpx.options(f"{server.url}{path}").status_code == 405  # no origin is allowed, and nothing was run
    for probe in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{server.url}{probe}").status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/messages", "/v1/responses", "/invocations", "/docs", "/openapi.json",
             "/v1/chat/completions/batch", "/load", "/ping", "/pooling", "/", "/v1/models/", "//v1/models", "/nothing"]
)  # fmt: skip
def test_routes_that_go_round_the_hooks_are_closed_and_say_how_to_open_them(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx.request(method, f"{server.url}{path}", headers=server.headers)
        assert answer.status_code == 404
        assert f"--open-routes {path} opens" in answer.json()["error"]["message"]


def test_keys_come_from_a_file_that_is_read_again(keyed: tuple[Server, Path]) -> None:
    server, keys = keyed
    assert [post(server, key=key).status_code for key in ("key-one", "key-two", "key-three", None)] == [
        200,
        200,
        401,
        401,
    ]
    keys.write_text("key-two\nkey-three\n")
    assert [post(server, key=key).status_code for key in ("key-one", "key-two", "key-three")] == [401, 200, 200]
    keys.write_text("")
    assert post(server, key="key-two").status_code == 200  # an empty file locks nobody out
    log = server.log.read_text()
    assert "the file of keys has no key" in log
    assert not re.search("key-one|key-two|key-three", log.replace(str(keys), ""))


def test_a_response_with_all_hooks_off_is_vllms_own_but_for_the_qvq_object(keyed: tuple[Server, Path]) -> None:
    """/invocations is vLLM's handler of the same request, on the same engine."""
    server, _ = keyed

    def apart(text: str) -> tuple[str, list[str]]:
        ids = re.compile(r'"(id|created|request_id)":("[^"]*"|\d+)')
        objects = re.findall(r',"qvq":\{[^}]*\}', text)
        return ids.sub("", re.sub(r',"qvq":\{[^}]*\}', "", text)), objects

    for stream in (False, True):
        body = {"messages": [user({"url": data_url(photo(90, 90))}, "What?")], "max_tokens": 20, "stream": stream}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        # Twice: each has a prefix cache of its own, and from it the same numbers to the last bit.
        ours, theirs = [[post(server, path, "key-two", **body) for path in (CHAT, "/invocations")] for _ in "ab"][1]
        assert (ours.status_code, theirs.status_code) == (200, 200)
        (text, objects), (expected, none) = apart(ours.text), apart(theirs.text)
        assert text == expected
        assert (len(objects), none) == (1, [])


BODIES: list[tuple[dict[str, Any], str]] = [
    ({"n": 10_000}, "n is 10000; this server takes at most 8"),
    ({"logit_bias": {str(i): 1 for i in range(1_025)}}, "the length of logit_bias is 1025"),
    ({"allowed_token_ids": list(range(1_025))}, "the length of allowed_token_ids is 1025"),
    ({"stop_token_ids": list(range(121)), "min_tokens": 1}, "the length of stop_token_ids is 121"),
    ({"bad_words": ["a"] * 65}, "the length of bad_words is 65"),
    ({"bad_words": ["1" * 250] * 3}, "the bytes of all bad_words is 1503"),
    ({"prompt_logprobs": 0}, "the field 'prompt_logprobs' is not taken"),
    ({"logprobs": True, "logprob_token_ids": list(range(21))}, "the length of logprob_token_ids is 21"),
    (
        {"logprobs": True, "top_logprobs": 20, "n": 8, "max_tokens": 320},
        "n x max_tokens x top_logprobs of a request that is not streamed",
    ),
    ({"stop": ["x"] * 17}, "List should have at most 4 items"),
    ({"stop": ["x" * 257]}, "the length of a stop string is 257"),
    ({"use_beam_search": True}, "the field 'use_beam_search' is not taken"),
    ({"prompt_logprobs": 1}, "the field 'prompt_logprobs' is not taken"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "the field 'tools' is not taken: QVQ was not made"),
    ({"structured_outputs": {"grammar": "x" * 50_001}}, "this server takes at most 50000"),
    ({"repetition_detection": {"max_pattern_size": 9_999, "min_count": 2}}, "max_pattern_size is 9999"),
    ({"max_token": 3}, "the field 'max_token' is not known here. Did you mean 'max_tokens'?"),
    ({"separate_reasoning": False}, "the field 'separate_reasoning' is false; here it can only be true"),
    ({"mm_processor_kwargs": {"max_pixels": 1}}, "the field 'mm_processor_kwargs' is not taken"),
    ({"messages": [{"role": "user", "content": "x"}] * 513}, "the number of messages is 513"),
]


@pytest.mark.parametrize(("body", "message"), BODIES, ids=lambda value: next(iter(value)) if value else None)
def test_what_could_stall_or_kill_the_engine_is_refused_by_name(
    server: Server, body: dict[str, Any], message: str
) -> None:
    answer = post(server, **body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text
    assert server.alive()


def test_fields_that_clients_send_by_themselves_and_those_that_are_not_theirs_do_no_harm(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(photo(64, 64))}, "uuid": "somebody-elses"}
    message = {"role": "user", "content": [image, {"type": "text", "text": "What?"}]}
    missing = {"type": "image_url", "image_url": None, "uuid": "somebody-elses"}
    again = {"role": "user", "content": [missing, {"type": "text", "text": "What?"}]}
    mine = {
        "user": "me",
        "audio": None,
        "best_of": None,
        "thinking": None,
        "metadata": {"a": "b"},
        "store": False,
        "priority": -100,
        "session_id": "s",
    }
    plain = post(server, messages=[message], **mine)
    assert plain.status_code == 200
    # pydantic takes such a message for another type, whose parts can be read once: all was seen, or nothing.
    odd = post(server, messages=[message | {"tool_call_id": 5}], **mine)
    assert odd.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]
    assert odd.json()["qvq"]["visual_tokens"] == plain.json()["qvq"]["visual_tokens"] > 0
    large = post(server, messages=[message | {"tool_call_id": 5}], min_visual_tokens=600, **mine)
    assert large.json()["qvq"]["visual_tokens"] >= 600
    assert post(server, messages=[again | {"tool_call_id": 5}], **mine).status_code == 400
    by_the_router = {"separate_reasoning": True, "stream_reasoning": True, "no_stop_trim": False}
    assert post(server, messages=[message], **by_the_router, return_hidden_states=False).status_code == 200
    assert post(server, messages=[again], **mine).status_code == 400


def test_a_body_that_is_too_large_is_refused_whether_it_says_its_length_or_not(keyed: tuple[Server, Path]) -> None:
    server, _ = keyed
    headers = {"Authorization": "Bearer key-two", "Content-Type": "application/json"}
    body = json.dumps({"messages": [user("x" * 100_000)]}).encode()
    pieces = (body[i : i + 1_000] for i in range(0, len(body), 1_000))
    for content in (body, pieces):
        answer = httpx.post(f"{server.url}{CHAT}", content=content, headers=headers, timeout=30)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body has more than 100000 bytes"
    assert server.alive()


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_again(keyed: tuple[Server, Path], stream: bool) -> None:
    """Of a burst of streams vLLM told most in a stream that had begun with 200."""
    server, _ = keyed
    statuses: list[httpx.Response] = []
    asked = {"max_tokens": 300, "ignore_eos": True, "stream": stream}
    threads = [
        threading.Thread(target=lambda: statuses.append(post(server, key="key-two", **asked))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in statuses if answer.status_code == 503]
    assert refused and len(refused) + sum(answer.status_code == 200 for answer in statuses) == 12
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert all(answer.json()["error"]["type"] == "ServiceUnavailableError" for answer in refused)
    assert not any('"code":503' in answer.text.replace(" ", "") for answer in statuses if answer.status_code == 200)
    assert post(server, key="key-two").status_code == 200  # every place is free again
    too_many = post(server, key="key-two", n=5)  # for which no place would ever be
    assert (too_many.status_code, too_many.json()["error"]["message"]) == (400, "n is 5; this server takes at most 4")
    assert 'qvq_rejections_total{reason="overload"}' in httpx.get(server.metrics).text


def test_metrics_can_have_a_port_of_their_own(keyed: tuple[Server, Path]) -> None:
    server, _ = keyed
    assert "vllm:num_requests_running" in httpx.get(server.metrics).text
    assert httpx.get(f"{server.url}/metrics").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_up_ends_with_what_there_is(keyed: tuple[Server, Path], stream: bool) -> None:
    server, _ = keyed
    started = time.monotonic()
    answer = post(server, key="key-two", max_tokens=8_000, ignore_eos=True, stream=stream)
    assert 5 < time.monotonic() - started < 12
    last = answer.json() if not stream else json.loads(answer.text.split("data: ")[-2])
    assert (last["choices"][0]["finish_reason"], last["qvq"]["ended"]) == ("length", "timeout")


def test_a_request_id_is_kept_and_may_come_twice_at_once(server: Server) -> None:
    headers = server.headers | {"X-Request-Id": "mine-1"}
    body = {"messages": [user("Hi")], "max_tokens": 100, "ignore_eos": True}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}{CHAT}", json=body, headers=headers, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert {answer.headers["x-request-id"] for answer in answers} == {"mine-1"}
    assert len({answer.json()["id"] for answer in answers}) == 4
    odd = httpx.get(f"{server.url}/health", headers={"X-Request-Id": 'a"b\\n'})
    assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])


def test_the_log_is_json_with_ids_and_without_prompts_images_or_keys(server: Server) -> None:
    image = data_url(photo(64, 64, 9))
    server.chat(user({"url": image}, "a-word-that-nobody-logs"), max_tokens=2)
    text = server.log.read_text()
    assert "a-word-that-nobody-logs" not in text
    assert image[30:90] not in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    mine = [line for line in lines if line.get("path") == CHAT]
    assert {"request_id", "status", "seconds", "body_bytes"} <= set(mine[-1])


def test_tenants_share_no_prefix_and_one_tenant_does(keyed: tuple[Server, Path]) -> None:
    server, keys = keyed
    keys.write_text("key-two\nkey-three\n")

    def hits() -> float:
        text = httpx.get(server.metrics).text
        return float(re.search(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text, re.MULTILINE)[1])

    messages = [user("A prefix that is long enough for some blocks of the cache. " * 10 + str(os.getpid()))]
    counts = []
    for key in ("key-two", "key-three", "key-three"):
        before = hits()
        assert post(server, key=key, messages=messages).status_code == 200
        counts.append(hits() - before)
    assert counts[:2] == [0, 0]
    assert counts[2] > 100


def test_what_vllm_raises_is_counted_as_the_servers_error_where_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 500 that is not streamed was in no counter, and QvqErrorShare quiet."""
    from fastapi import FastAPI
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.v1.engine.exceptions import EngineGenerateError

    from qvq_serve import metrics
    from qvq_serve.api import chat, lifecycle
    from qvq_serve.engine import PROFILE_VARIABLE, launched_profile
    from qvq_serve.hooks.chain import Chain, load

    monkeypatch.setenv(PROFILE_VARIABLE, json.dumps(asdict(Profile(model="demo"))))
    launched_profile.cache_clear()
    app = FastAPI()
    init_exception_handler(app)
    chat.attach(app)
    raised: list[Exception] = [EngineGenerateError(), ValueError("of the request")]

    async def create_chat_completion(*_: object) -> None:
        raise raised.pop(0)

    app.state.qvq_chain, app.state.args = Chain(load(Profile()), 10), SimpleNamespace(log_error_stack=False)
    monkeypatch.setattr(lifecycle.STATE, "running", 0)  # which the door counts down
    app.state.engine_client = SimpleNamespace(errored=False, is_running=True, dead_error=None)
    app.state.openai_serving_chat = SimpleNamespace(create_chat_completion=create_chat_completion)

    async def asked() -> list[tuple[int, float]]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [
                ((await client.post(CHAT, json={"messages": [user("Hi")]})).status_code, errors()) for _ in range(2)
            ]

    def errors() -> float:
        return float(metrics.ANSWERS.labels("error")._value.get())

    before = errors()
    try:
        assert asyncio.run(asked()) == [(500, before + 1), (400, before + 1)]
    finally:
        launched_profile.cache_clear()


def test_a_request_whose_time_is_up_before_the_engine_has_it_is_ended_later() -> None:
    """An image that came slowly, and the one abort was of a request that vLLM did not know: it ran to its length."""
    from qvq_serve.api import chat
    from qvq_serve.hooks import Context

    class Engine:
        aborts = 0

        async def abort(self, name: str) -> None:
            assert name == "chatcmpl-a"
            self.aborts += 1

    async def late() -> tuple[int, int]:
        engine, context = Engine(), Context(SimpleNamespace(request_id="a"))
        timer = asyncio.get_running_loop().call_later(0.0, chat.time_is_up, context, engine)
        await asyncio.sleep(3.5 * chat.ABORT_AGAIN_S)
        chat.stop_timer(context, timer)
        seen = engine.aborts
        await asyncio.sleep(2 * chat.ABORT_AGAIN_S)
        return seen, engine.aborts

    seen, then = asyncio.run(late())
    assert (seen >= 3, then) == (True, seen)
