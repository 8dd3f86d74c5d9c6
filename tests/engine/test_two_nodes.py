"""One replica on two nodes, by vLLM's multi-node executor, each started again by a supervisor, as systemd would.

Node 1 is in a network namespace of its own, and shares no /dev/shm with node 0, as on another machine; where none can
be made, both are on loopback, and a warning says so. `-s` shows how long each end took.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.engine.conftest import KEY, START_TIMEOUT_S, Server, greedy_tokens, up
from tests.engine.test_faults import started
from tests.network import Network, free_port, two_machines

SUPERVISOR = ["bash", "-c", r'while :; do "$@"; printf "\nexit %d\n" $?; sleep 1; done', "supervisor"]
"""Restart=always."""
DEAD_AFTER_S = 30
STREAMS = 8


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with two_machines() as found:
        yield found


class Node:
    """A supervisor, and the node that it starts again and again."""

    def __init__(self, log: Path, core: int, command: list[str], cache: Path) -> None:
        self.log = log
        environ = {"QVQ_CACHE": str(cache), "QVQ_API_KEY": KEY, "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        with log.open("wb") as out:
            self.supervisor = subprocess.Popen(
                [*SUPERVISOR, *command], stdout=out, stderr=subprocess.STDOUT, env=os.environ | environ
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def exits(self) -> list[int]:
        """Exit codes so far."""
        return [int(code) for code in re.findall(r"^exit (\d+)$", self.said, re.MULTILINE)]

    def tree(self) -> list[psutil.Process]:
        """The node's processes, itself first; not the supervisor."""
        return psutil.Process(self.supervisor.pid).children(recursive=True)

    def signal_all(self, number: int) -> None:
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):  # it went with its parent
                process.send_signal(number)


@dataclass
class Replica:
    """Two nodes, and the API of the first."""

    nodes: list[Node]
    server: Server

    def wait_until(self, true: Callable[[], bool], seconds: float) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        while not true():
            if time.monotonic() > began + seconds:
                pytest.fail("\n".join(node.said[-3000:] for node in self.nodes))
            time.sleep(0.2)
        return time.monotonic() - began

    def wait_until_up(self) -> None:
        self.wait_until(lambda: len({len(node.exits) for node in self.nodes}) == 1 and up(self.server), START_TIMEOUT_S)


@pytest.fixture(scope="module")
def running(network: Network, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """The replica under its supervisors."""
    logs = tmp_path_factory.mktemp("nodes")
    port, heartbeat, master = (free_port("0.0.0.0") for _ in range(3))
    cores = sorted(os.sched_getaffinity(0))
    nodes = []
    for rank, prefix, core in ((0, [], cores[0]), (1, network.prefix, cores[-1])):
        command = [sys.executable, "-m", "qvq_serve", "node", "--heartbeat-port", str(heartbeat), str(rank), "2"]
        command += [network.here, "--demo", "--tp", "2", "--port", str(port), "--", "--master-port", str(master)]
        nodes.append(Node(logs / f"node-{rank}.log", core, [*prefix, *command], cache))
    api = Server(f"http://127.0.0.1:{port}", nodes[0].supervisor, nodes[0].log)
    yield Replica(nodes, api)
    for node in nodes:
        processes = node.tree()
        node.supervisor.kill()
        node.supervisor.wait()
        for process in processes:
            process.kill()


def test_two_nodes_answer_as_one_does(running: Replica, server: Server) -> None:
    alone = [greedy_tokens(server, seed) for seed in (1, 2)]
    running.wait_until_up()
    assert [greedy_tokens(running.server, seed) for seed in (1, 2)] == alone
    names = [" ".join(" ".join(process.cmdline()) for process in node.tree()) for node in running.nodes]
    assert ["VLLM::Worker_TP0" in name for name in names] == [True, False]
    assert ["VLLM::Worker_TP1" in name for name in names] == [False, True]


def test_sigterm_to_node_0_lets_every_answer_finish_and_ends_both_well(running: Replica) -> None:
    running.wait_until_up()
    before = [(len(node.exits), len(node.said)) for node in running.nodes]
    streams = started(running.server, STREAMS, 150)
    running.nodes[0].tree()[0].send_signal(signal.SIGTERM)
    for stream in streams:
        stream.join(120)
    assert [stream.whole for stream in streams] == [True] * STREAMS
    for node, (ends, length) in zip(running.nodes, before, strict=True):
        running.wait_until(lambda node=node, ends=ends: len(node.exits) > ends, DEAD_AFTER_S)  # type: ignore[misc]
        assert node.exits[ends] == 0
        assert "node 0 is told to stop: node 0 drains, then all end" in node.said[length:]
        assert "this replica ends" not in node.said[length:]


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGKILL, "closed its connection without a word"), (signal.SIGSTOP, "was not heard of for 15 s")],
)
def test_a_lost_node_ends_the_other_within_30_s_and_both_start_again(
    running: Replica, network: Network, number: int, how: str
) -> None:
    running.wait_until_up()
    leader, victim = running.nodes
    before = [len(node.exits) for node in running.nodes]
    streams = started(running.server, 2, 7_000)
    stopped = victim.tree()
    victim.signal_all(number)
    took = running.wait_until(lambda: len(leader.exits) > before[0], DEAD_AFTER_S)
    print(f"node 1 gets {signal.Signals(number).name}: node 0 has ended after {took:.1f} s")
    assert leader.exits[before[0]] == 6
    assert f"qvq-serve: node 1 ({network.there}) {how}: this replica ends" in leader.said
    for stream in streams:
        stream.join(10)
        assert '"code": 500' in stream.events[-2] and stream.events[-1] == "[DONE]"
    if number == signal.SIGSTOP:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    running.wait_until(lambda: len(victim.exits) > before[1], DEAD_AFTER_S)
    if number == signal.SIGKILL:  # the other case's start is the same, and takes a while
        running.wait_until_up()
        assert greedy_tokens(running.server, 1)
