"""Ctrl-C, as a terminal sends it: SIGINT to the whole group, at each moment; and SIGTERM before a server serves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.engine.conftest import KEY, START_TIMEOUT_S, Server, up
from tests.engine.test_faults import family, named, started
from tests.network import free_port

Moment = Callable[[Server], object]


def group(server: Server) -> list[psutil.Process]:
    """What still runs in the server's group; a supervisor's command has one of its own."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == server.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def starts(server: Server) -> bool:
    return "starting qvq-demo" in server.log.read_text()


def spawns(server: Server) -> bool:
    """vLLM's first process is there, and imports: it has set no handler of its own yet."""
    return bool(named(server, "spawn_main"))


def loads(server: Server) -> bool:
    return "Initializing a V1 LLM engine" in server.log.read_text()


def answers(server: Server) -> bool:
    return up(server) and not started(server, 1, 7_000)[0].broken


@pytest.fixture
def command(cache: Path) -> Iterator[Callable[..., Server]]:
    """Starts a qvq-serve in a process group of its own, whatever its stage.

    In pytest's session: Linux shares a CPU between sessions first (autogroup), the suspect where a client here did not
    run for 100 s, twice, while a server in a session of its own wrote.
    """
    made: list[Server] = []

    def start(*arguments: str) -> Server:
        port = free_port()
        log = cache / f"interrupted-{port}.log"
        line = [str(Path(sys.executable).parent / "qvq-serve"), *arguments, "--demo", "--port", str(port)]
        environ = os.environ | {"QVQ_CACHE": str(cache), "QVQ_API_KEY": KEY}
        with log.open("wb") as out:
            process = subprocess.Popen(line, stdout=out, stderr=out, env=environ, process_group=0)
        made.append(Server(f"http://127.0.0.1:{port}", process, log))
        return made[-1]

    yield start
    for server in made:
        for process in group(server):
            process.kill()
        server.process.wait()


def interrupt(server: Server, moment: Moment, times: int = 1) -> list[psutil.Process]:
    """Send SIGINT once the moment is there; returns the processes of that moment."""
    processes = reached(server, moment)
    for _ in range(times):
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGINT)
        time.sleep(0.02)
    return processes


def reached(server: Server, moment: Moment) -> list[psutil.Process]:
    """Wait for the moment; returns its processes."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not moment(server):
        assert server.process.poll() is None and time.monotonic() < deadline, server.log.read_text()[-4000:]
        time.sleep(0.05)
    return family(server)


def assert_interrupted(
    server: Server, processes: list[psutil.Process], code: int = 130, told: str = "interrupted"
) -> None:
    assert server.process.wait(10) == code
    said = server.log.read_text()
    assert said.count(told) == said.count(f"qvq-serve: {told}\n") == 1
    assert "Traceback" not in said and "leaked" not in said, said[-4000:]
    psutil.wait_procs(processes, timeout=3)  # Python's resource tracker ends last
    assert not group(server)
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("moment", "times"), [(starts, 5), (spawns, 1), (loads, 5), (up, 1), (answers, 5)])
def test_ctrl_c_ends_a_server_at_once_with_one_line_and_130(
    command: Callable[..., Server], moment: Moment, times: int
) -> None:
    server = command()
    assert_interrupted(server, interrupt(server, moment, times))


@pytest.mark.parametrize("moment", [starts, spawns, loads])
def test_a_server_that_loads_ends_at_sigterm_too(command: Callable[..., Server], moment: Moment) -> None:
    """vLLM lost it, and served, or hung; and a supervisor waited for the time of a drain to kill it."""
    server = command()
    processes = reached(server, moment)
    server.process.send_signal(signal.SIGTERM)
    assert_interrupted(server, processes, -signal.SIGTERM, "terminated before it was done, or served")


def test_ctrl_c_ends_the_workers_too(command: Callable[..., Server]) -> None:
    server = command("--tp", "2")
    assert_interrupted(server, interrupt(server, lambda server: len(named(server, "VLLM::Worker")) == 2))


def test_ctrl_c_ends_a_drain(command: Callable[..., Server]) -> None:
    server = command()
    processes = interrupt(server, answers, times=0)
    server.process.send_signal(signal.SIGTERM)  # to this process alone, as a supervisor does
    while "draining: 1 requests in flight" not in server.log.read_text():
        assert server.process.poll() is None
        time.sleep(0.05)
    os.killpg(server.process.pid, signal.SIGINT)
    assert_interrupted(server, processes)


@pytest.mark.parametrize("moment", [spawns, answers])
def test_ctrl_c_ends_a_node_and_its_command_alike(command: Callable[..., Server], moment: Moment) -> None:
    port = str(free_port())
    server = command("node", "--heartbeat-port", port, "0", "1", "127.0.0.1")
    assert_interrupted(server, interrupt(server, moment))
