"""What becomes of running requests when something ends: the server by SIGTERM, the engine, a worker, a client."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from qvq_serve.interrupt import title
from tests.engine.conftest import Server, serving, user

STREAMS = 100


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, server: Server, tokens: int) -> None:
        super().__init__(daemon=True)
        self.server, self.tokens = server, tokens
        self.events: list[str] = []
        self.broken: str | None = None
        self.status = 0
        self.first = threading.Event()

    def run(self) -> None:
        body = {"messages": [user("Hi")], "max_tokens": self.tokens, "ignore_eos": True, "stream": True,
                "repetition_detection": {"max_pattern_size": 0}}  # fmt: skip
        url = f"{self.server.url}/v1/chat/completions"
        try:
            with httpx.stream("POST", url, json=body, headers=self.server.headers, timeout=120) as answer:
                self.status = answer.status_code
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line[6:])
                        self.first.set()
        except httpx.TransportError as error:
            self.broken = repr(error)
        self.first.set()

    @property
    def whole(self) -> bool:
        return self.broken is None and self.events[-1:] == ["[DONE]"] and '"finish_reason":"length"' in self.events[-2]


def started(server: Server, number: int, tokens: int) -> list[Stream]:
    """Streams, each of which has its first piece."""
    streams = [Stream(server, tokens) for _ in range(number)]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.first.wait(60), (stream.status, stream.broken, server.log.read_text()[-4000:])
    return streams


def family(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def named(server: Server, name: str) -> list[psutil.Process]:
    return [process for process in family(server) if name in title(process)]


def test_sigterm_lets_every_stream_finish_and_turns_new_requests_away(cache: Path) -> None:
    with serving(cache, "--demo", "--drain-timeout", "90", "--", "--max-num-seqs", str(STREAMS), stop=False) as server:
        streams = started(server, STREAMS, 150)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = server.chat(user("Hi"))
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        for stream in streams:
            stream.join(120)
        assert [stream.whole for stream in streams] == [True] * STREAMS
        assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_drain_that_takes_too_long_cuts_what_is_left_and_ends(cache: Path) -> None:
    with serving(cache, "--demo", "--drain-timeout", "1", stop=False) as server:
        (stream,) = started(server, 1, 7_000)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        stream.join(10)
        assert not stream.whole
    assert "the drain timed out: 1 requests are cut" in server.log.read_text()


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_a_dead_engine_is_told_to_its_clients_and_ends_the_server_with_a_code_of_its_own(
    cache: Path, victim: str
) -> None:
    arguments = ["--demo"] if victim == "VLLM::EngineCore" else ["--demo", "--tp", "2"]
    with serving(cache, *arguments, stop=False) as server:
        processes = family(server)
        streams = started(server, 4, 7_000)
        named(server, victim)[0].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            stream.join(20)
            error = json.loads(stream.events[-2])["error"]
            assert (error["code"], stream.events[-1]) == (500, "[DONE]")
            assert "Traceback" not in error["message"]
        with contextlib.suppress(httpx.TransportError):  # it may have ended already
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 503
        assert server.process.wait(20) == 5
        assert time.monotonic() - killed < 10
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
    assert "vLLM's engine died" in server.log.read_text()


def test_no_process_outlives_the_main_one_by_ten_seconds(cache: Path) -> None:
    with serving(cache, "--demo", "--tp", "2", stop=False) as server:
        processes = family(server)
        assert len(processes) >= 3
        started(server, 2, 7_000)
        server.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive


def test_a_client_that_goes_away_frees_its_slot(server: Server) -> None:
    body = {"messages": [user("Hi")], "max_tokens": 7_000, "ignore_eos": True, "stream": True}
    code = f"""if True:
        import httpx
        url, headers = "{server.url}/v1/chat/completions", {server.headers!r}
        with httpx.stream("POST", url, json={body!r}, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                print(line, flush=True)
    """
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert client.stdout and client.stdout.readline().startswith(b"data: ")
    os.kill(client.pid, signal.SIGKILL)
    client.wait()

    def figure(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((name + " ", name + "{")))

    deadline = time.monotonic() + 10
    while figure("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert figure("vllm:num_requests_running") == 0
    assert figure("qvq_requests_in_flight") == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if '"status"' in line]
    assert [line["status"] for line in lines if line["path"] == "/v1/chat/completions"][-1] == 499
    assert figure("qvq_answers_total") >= 1
