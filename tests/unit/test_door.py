"""The door before an application that stands for vLLM, in a real HTTP server of this process; no engine."""

import asyncio
import json
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from qvq_serve import metrics
from qvq_serve.api import door, lifecycle
from qvq_serve.engine import PROFILE_VARIABLE, launched_profile
from qvq_serve.profile import Profile

CHAT = "/v1/chat/completions"
PIECE = b"x" * 65536


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Reads a body, and answers with more than any buffer holds, while the client is there."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    gone = asyncio.create_task(receive())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(400):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        await asyncio.sleep(0)
        if gone.done():
            return
    await send({"type": "http.response.body", "body": b""})
    await gone


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server whose clients may stand still for half a second."""
    monkeypatch.setattr(door, "STALL_S", 0.5)
    monkeypatch.setattr(door, "LOOK_S", 0.05)
    monkeypatch.setattr(logging.getLogger("vllm.qvq_serve"), "propagate", True)
    monkeypatch.setenv(PROFILE_VARIABLE, json.dumps(asdict(Profile())))
    launched_profile.cache_clear()
    server = uvicorn.Server(uvicorn.Config(door.Door(application), port=0, lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join()
    launched_profile.cache_clear()


def connected(port: int, *lines: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall("\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: x", *lines, "", ""]).encode())
    return client


def until_nobody_is_in_flight() -> None:
    deadline = time.monotonic() + 20
    while lifecycle.STATE.in_flight and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lifecycle.STATE.in_flight == 0


def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """A request's line comes after its place is free."""
    deadline = time.monotonic() + 20
    while text not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)


def stalled() -> float:
    return float(metrics.REJECTED.labels("stalled")._value.get())


@pytest.mark.parametrize("length", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_body_that_stands_still_is_given_up(port: int, length: str) -> None:
    """It held a drain for as long as its client liked."""
    before = stalled()
    with connected(port, length) as client:
        client.sendall(b"1\r\n{\r\n")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body has stood still" in answer
    until_nobody_is_in_flight()
    assert stalled() == before + 1


def test_a_client_that_does_not_read_loses_its_place(port: int) -> None:
    """Four of them took all places of a server, past --request-timeout, while its engine did nothing."""
    before = stalled()
    with connected(port, "Content-Length: 0") as client:
        client.recv(1)
        assert lifecycle.STATE.in_flight == 1
        until_nobody_is_in_flight()
    assert stalled() == before + 1


def test_slow_clients_that_move_are_waited_for(port: int) -> None:
    before = stalled()
    with connected(port, "Content-Length: 8") as client:
        for _ in range(8):
            time.sleep(0.15)
            client.sendall(b" ")
        received, answer = 0, client.makefile("rb")
        while piece := answer.read(3_000_000):
            received += len(piece)
            time.sleep(0.15)
            if received > 400 * len(PIECE):
                break
    assert received > 400 * len(PIECE)
    until_nobody_is_in_flight()
    assert stalled() == before


@pytest.mark.parametrize(
    "connection",
    [["Connection: Upgrade, HTTP2-Settings"], ["Connection: Upgrade", "Connection: keep-alive"]],
    ids=len,
)
def test_a_body_that_an_upgrade_loses_is_told_so(port: int, connection: list[str]) -> None:
    """Java's client offers HTTP/2 with each request; the HTTP server drops the body, and vLLM missed it."""
    offer = [*connection, "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA", "Content-Length: 2"]
    with connected(port, *offer) as client:
        client.sendall(b"{}")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"Upgrade: h2c is not spoken here" in answer


def test_a_client_that_goes_away_is_logged_as_that(port: int, caplog: pytest.LogCaptureFixture) -> None:
    lifecycle.STATE.finished.clear()
    with caplog.at_level(logging.INFO, "vllm.qvq_serve"):
        with connected(port, "Content-Length: 1000", "X-Request-Id: began") as client:
            client.sendall(b"{")
        with connected(port, "Content-Length: 0", "X-Request-Id: stood") as client:
            client.recv(1)
            until_nobody_is_in_flight()
        with connected(port, "Content-Length: 0", "X-Request-Id: went") as client:
            client.recv(1)
        until_nobody_is_in_flight()
        with connected(port, "Content-Length: 0", "X-Request-Id: stayed", "Connection: close") as client:
            while client.recv(len(PIECE)):
                pass
        until_logged(caplog, "stayed")
    logged = {record.request_id: record.status for record in caplog.records if hasattr(record, "request_id")}
    assert logged == {"began": 499, "stood": 499, "went": 499, "stayed": 200}
    assert len(lifecycle.STATE.finished) == 1


def test_a_path_cannot_write_lines_of_the_log(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm.qvq_serve"):
        httpx.get(f"http://127.0.0.1:{port}/x%0AINFO%20forged%1b%5B2K")
        until_logged(caplog, "forged")
    [line] = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert line.startswith("GET /x%0AINFO%20forged%1B%5B2K 404 in ")


def test_a_child_that_nobody_buries_is_no_engine_and_no_fault() -> None:
    """One of a hook's ended the task that drains, and watches the engine."""
    with subprocess.Popen(["true"]) as child:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert child.pid not in [process.pid for process in lifecycle.engine_processes()]
