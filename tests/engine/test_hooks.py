"""Hooks and the guard on the way of a request, in the real server; the guard is a second real server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.conftest import Server, data_url, photo, serving, user


class Relay(BaseHTTPRequestHandler):
    """Hands the guard's requests on to a vLLM server, which can only say the verdict that a test wants."""

    upstream: Server
    verdicts: dict[str, str]
    """By the role whose turn is judged; "" hangs up."""
    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Relay.seen.append(body)
        verdict = Relay.verdicts[body["messages"][-1]["role"]]
        if not verdict:
            return
        forced = {"structured_outputs": {"choice": [verdict]}, "thinking_token_budget": 1, "max_tokens": 150}
        made = httpx.post(
            f"{Relay.upstream.url}{self.path}", json=body | forced, headers=Relay.upstream.headers, timeout=60
        )
        self.send_response(made.status_code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(made.content)))
        self.end_headers()
        self.wfile.write(made.content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def guarded(server: Server, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the tests' hook, and a guard that is the shared server, behind the relay."""
    Relay.upstream, Relay.seen = server, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Relay) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        guard = f"http://127.0.0.1:{relay.server_address[1]}"
        options = ["--guard-url", guard, "--guard-model", "qvq-demo", "--guard-window", "20", "--guard-timeout", "4"]
        hooks = ["--hook", "tests.engine.hooks:Obliging", "--hook-timeout", "9", "--keep-alive", "1"]
        with serving(cache, "--demo", *options, *hooks) as running:
            yield running
        relay.shutdown()


@pytest.fixture(autouse=True)
def everything_is_safe() -> None:
    Relay.verdicts = {"user": "safe", "assistant": "safe"}


def streamed(server: Server, text: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    answer = server.chat(user(text), stream=True, **body)
    assert answer.status_code == 200
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_hook_changes_refuses_and_adds(guarded: Server) -> None:
    assert guarded.chat(user("one token, please"), max_tokens=30).json()["usage"]["completion_tokens"] == 1
    refused = guarded.chat(user("refuse me"))
    assert (refused.status_code, refused.json()["error"]["message"]) == (403, "no such talk here")
    answer = guarded.chat(user({"url": data_url(photo(300, 200))}, "replace it")).json()
    assert answer["qvq"]["sizes"] == [[300, 200]]
    assert answer["choices"][0]["message"]["content"] == "Replaced."


def test_a_hook_sees_each_piece_of_a_stream_and_adds_to_its_end(guarded: Server) -> None:
    chunks = streamed(guarded, "Hi", max_tokens=12)
    assert [chunk for chunk in chunks if "qvq" in chunk] == chunks[-1:]
    pieces = sum(bool(chunk["choices"][0]["delta"].get(part)) for chunk in chunks for part in ("reasoning", "content"))
    assert chunks[-1]["qvq"]["pieces"] == pieces > 5


def test_a_hook_refuses_an_image_by_its_position(guarded: Server) -> None:
    images = [{"url": data_url(photo(*size))} for size in ((90, 90), (77, 77))]
    refused = guarded.chat(user(*images, "What?"))
    assert refused.status_code == 451  # the hook's own
    assert refused.json()["error"]["message"].startswith("image 2 of 2 (")
    assert refused.json()["error"]["message"].endswith("is 77 x 77 px, of which there were enough")


@pytest.mark.parametrize("stream", [False, True])
def test_a_hook_stops_a_request(guarded: Server, stream: bool) -> None:
    if stream:
        last = streamed(guarded, "stop at once", max_tokens=200)[-1]
        assert last["choices"][0]["finish_reason"] == "content_filter"
    else:
        told = {"logprobs": True, "return_token_ids": True}
        last = guarded.chat(user("stop at once"), max_tokens=20, **told).json()
        choice = last["choices"][0]
        assert (choice["logprobs"], choice["token_ids"]) == (None, None)
        assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", None)
        assert choice["message"]["reasoning"] is None
    assert (last["qvq"]["ended"], last["qvq"]["by"], last["qvq"]["part"]) == ("filtered", "obliging", "reasoning")


@pytest.mark.parametrize("stream", [False, True])
def test_a_hook_stops_a_finished_answer(guarded: Server, stream: bool) -> None:
    """A stream broke off; what was not streamed got a 403."""
    asked = "stop at the end"
    last = streamed(guarded, asked)[-1] if stream else guarded.chat(user(asked)).json()
    assert last["choices"][0]["finish_reason"] == "content_filter"
    assert (last["qvq"]["ended"], last["qvq"]["by"]) == ("filtered", "obliging")


def test_a_hook_stops_a_choice_of_a_stream_and_the_others_go_on(guarded: Server) -> None:
    """All of them were ended as filtered, and the usage was lost."""
    told = {"stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 1, "seed": 1}
    chunks = streamed(guarded, "stop the first", n=3, max_tokens=12, **told)
    ends = {one["index"]: one for chunk in chunks for one in chunk["choices"] if one.get("finish_reason")}
    assert [ends[index]["finish_reason"] for index in range(3)] == ["content_filter", "length", "length"]
    assert [ends[index]["qvq"]["ended"] for index in range(3)] == ["filtered", "length", "length"]
    assert not [
        one for chunk in chunks for one in chunk["choices"] if one["index"] == 0 and one["delta"].get("reasoning")
    ]
    assert chunks[-1]["usage"]["completion_tokens"] == 36


def test_a_part_without_its_type_is_known_by_its_keys(guarded: Server) -> None:
    """With a guard it was a 500."""
    answer = guarded.chat({"role": "user", "content": [{"text": "Hi"}]}, max_tokens=4)
    assert answer.status_code == 200, answer.text


def test_a_stopped_stream_frees_its_slot(guarded: Server) -> None:
    def running() -> str:
        lines = httpx.get(f"{guarded.url}/metrics").text.splitlines()
        return next(line.split()[-1] for line in lines if line.startswith("vllm:num_requests_running{"))

    streamed(guarded, "stop at once", max_tokens=4000, ignore_eos=True)
    for _ in range(50):
        if running() == "0.0":
            break
        guarded.chat(user("Hi"), max_tokens=1)
    assert running() == "0.0"


def failed(server: Server) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith('qvq_answers_total{ended="error"}'))


@pytest.mark.parametrize("where", ["before", "text"])
def test_a_hook_that_raises_fails_its_request_alone(guarded: Server, where: str) -> None:
    stage = {"before": "before", "text": "on_text"}[where]
    message = f"the server's hook obliging failed ({stage})"
    before = failed(guarded)
    if where == "text":
        assert streamed(guarded, f"raise in {where}", max_tokens=30)[-1]["error"]["message"] == message
    else:
        answer = guarded.chat(user(f"raise in {where}"))
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, message)
    assert guarded.chat(user("Hi")).status_code == 200
    assert f"hook obliging, {stage}: raised KeyError('a fault of the hook')" in guarded.log.read_text()
    metrics = httpx.get(f"{guarded.url}/metrics").text
    assert 'qvq_hook_failures_total{hook="obliging"}' in metrics
    assert failed(guarded) == before + 1  # the alert on errors goes by it


def test_a_slow_hook_is_timed_out(guarded: Server) -> None:
    answer = guarded.chat(user("sleep in before"))
    assert (answer.status_code, "obliging failed" in answer.json()["error"]["message"]) == (500, True)
    assert "hook obliging, before: took longer than 9 s" in guarded.log.read_text()


def test_a_silent_stream_gets_comments_and_stays_whole(guarded: Server) -> None:
    answer = guarded.chat(user("pause in text"), stream=True, max_tokens=12)
    assert answer.text.count(": keep-alive\n\n") >= 2  # in 2.5 s of silence; more on a busy machine
    assert answer.text.rstrip().endswith("data: [DONE]")
    last = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1]
    assert json.loads(last[6:])["qvq"]["reasoning_tokens"] == 12  # vLLM put together what came meanwhile


def test_the_guard_sees_the_conversation_and_lets_it_pass(guarded: Server) -> None:
    Relay.seen.clear()
    answer = guarded.chat(user("Is this safe?"), max_tokens=30).json()
    assert answer["qvq"]["ended"] == "length"
    prompt, *texts = [body["messages"] for body in Relay.seen]
    assert prompt == [{"role": "user", "content": "Is this safe?"}]
    assert texts and all(messages[0] == prompt[0] for messages in texts)
    message = answer["choices"][0]["message"]
    assert texts[0][1] == {"role": "assistant", "content": message["reasoning"]}
    assert texts[-1][1] == {"role": "assistant", "content": message["content"]}


def test_the_guard_refuses_a_prompt(guarded: Server) -> None:
    Relay.verdicts["user"] = "unsafe\nS1"
    refused = guarded.chat(user("How?"))
    assert refused.status_code == 403
    assert refused.json()["error"]["message"] == "the request was refused by the server's guard: unsafe (S1)"
    Relay.verdicts["user"] = "Safety: Controversial\nCategories: PII"
    assert guarded.chat(user("How?"), max_tokens=1).status_code == 200  # --guard-blocks is unsafe alone


@pytest.mark.parametrize("stream", [False, True])
def test_the_guard_stops_a_reasoning(guarded: Server, stream: bool) -> None:
    Relay.verdicts["assistant"] = "Safety: Unsafe\nCategories: Violent\nRefusal: No"
    if stream:
        told = {"stream_options": {"include_usage": True}}
        *chunks, last, used = streamed(guarded, "How?", max_tokens=4000, ignore_eos=True, **told)
        assert used["choices"] == [] and 0 < used["usage"]["completion_tokens"] < 4000  # the rest was not written
        sent = "".join(chunk["choices"][0]["delta"].get("reasoning", "") for chunk in chunks)
        assert len(sent) < 20  # less than one window
    else:
        last = guarded.chat(user("How?"), max_tokens=30).json()
    assert last["choices"][0]["finish_reason"] == "content_filter"
    assert last["qvq"]["ended"] == "filtered"
    assert last["qvq"]["guard"] == {"part": "reasoning", "verdict": "unsafe", "categories": ["Violent"]}


@pytest.mark.parametrize("output", ["", "I cannot say."])
def test_a_guard_without_a_verdict_refuses_where_failure_is_closed(guarded: Server, output: str) -> None:
    Relay.verdicts["user"] = output
    refused = guarded.chat(user("Hi"))
    assert refused.status_code == 403
    assert refused.json()["error"]["message"].endswith("the guard did not answer; try again later")
    assert "the guard gave no verdict on the prompt" in guarded.log.read_text()
