"""The nodes of a replica, as real processes around trivial commands: who ends when, with which code and which line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.network import Network, free_port, two_machines

PROGRAM = """
import asyncio, json, sys
from qvq_serve import cli, node
node.BEAT_S, node.SILENCE_S, node.END_S = 0.2, 2.0, 0.5
def run(arguments):
    made = node.Node(**json.loads(sys.argv[1]))
    return asyncio.run(made.run())
cli.dispatch = lambda *_: run(_)  # its errors, as the command line shows them
sys.exit(cli.main([]))
"""
SLEEP = ["sleep", "60"]
LOOPBACK = Network("127.0.0.1", "127.0.0.1", [], None)
SERVES = "trap 'exit 5' USR1; while :; do sleep 0.1; done"
DRAINS = ["bash", "-c", f"trap 'sleep 1; echo drained; exit 0' TERM; {SERVES}"]
"""A server: at SIGTERM it finishes what it does, and ends with 0."""
HANGS = ["bash", "-c", f"trap '' TERM; {SERVES}"]
"""A server whose drain never ends."""
IGNORES = ["bash", "-c", "trap '' TERM USR1; while :; do sleep 0.1; done"]
"""A process that hangs: only SIGKILL ends it."""


class Started:
    """A node, and what it has said so far."""

    def __init__(
        self,
        directory: Path,
        rank: int,
        port: int,
        command: list[str],
        nodes: int,
        leader: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        **settings: str,
    ) -> None:
        made = {"rank": rank, "nodes": nodes, "leader": leader, "port": port, "command": command,
                "settings": {"--tp": "2"} | settings, "join_timeout": 20}  # fmt: skip
        self.log = directory / f"node-{rank}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as out:
            line = [*prefix, sys.executable, "-c", PROGRAM, json.dumps(made)]
            self.process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=os.environ)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def tree(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def signal_all(self, number: int) -> None:
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):  # a command goes with its node
                process.send_signal(number)


def until(true: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def replica(directory: Path, *commands: list[str], network: Network = LOOPBACK) -> Iterator[list[Started]]:
    """Nodes that have all started their command; killed at the end, whatever is left of them."""
    port = free_port()
    nodes = [
        Started(directory, rank, port, command, len(commands), network.here, network.prefix if rank else ())
        for rank, command in enumerate(commands)
    ]
    processes = []
    try:
        until(lambda: all(len(node.tree()) > 1 for node in nodes))
        processes = [process for node in nodes for process in node.tree()]
        time.sleep(0.3)  # a shell's traps are in
        yield nodes
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    finally:
        for process in [*processes, *(node.process for node in nodes)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for node in nodes:
            node.process.wait()


def test_a_node_whose_processes_are_killed_ends_the_others_with_its_name(tmp_path: Path) -> None:
    with replica(tmp_path, SLEEP, SLEEP, SLEEP) as (leader, victim, other):
        victim.signal_all(signal.SIGKILL)
        for node in (leader, other):
            assert node.process.wait(5) == 6
            assert node.said.splitlines()[-1] == (
                "qvq-serve: node 1 (127.0.0.1) closed its connection without a word: this replica ends; look at that "
                "machine, or the network."
            )


def test_a_lost_leader_ends_the_others(tmp_path: Path) -> None:
    with replica(tmp_path, SLEEP, IGNORES) as (leader, other):
        leader.signal_all(signal.SIGKILL)
        assert other.process.wait(10) == 6
        assert "node 0 (127.0.0.1) closed its connection without a word: this replica ends" in other.said


@pytest.mark.parametrize("silent", [0, 1])
def test_a_node_that_is_silent_ends_the_other_and_itself_when_it_wakes(tmp_path: Path, silent: int) -> None:
    with replica(tmp_path, IGNORES, IGNORES) as nodes:
        nodes[silent].signal_all(signal.SIGSTOP)
        other = nodes[1 - silent]
        assert other.process.wait(10) == 6
        assert f"node {silent} (127.0.0.1) was not heard of for 2 s: this replica ends" in other.said
        nodes[silent].signal_all(signal.SIGCONT)
        assert nodes[silent].process.wait(10) == 6


def test_a_network_that_is_cut_ends_both_sides(tmp_path: Path) -> None:
    with two_machines() as network:
        if network.parts is None:
            pytest.skip("no network namespace can be made here")
        with replica(tmp_path, SLEEP, SLEEP, network=network) as nodes:
            subprocess.run(network.parts, check=True)
            assert [node.process.wait(10) for node in nodes] == [6, 6]
            assert f"node 1 ({network.there}) was not heard of for 2 s" in nodes[0].said
            assert f"node 0 ({network.here}) was not heard of for 2 s" in nodes[1].said


@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_any_node_lets_the_leader_drain_and_all_end_well(tmp_path: Path, asked: int) -> None:
    with replica(tmp_path, DRAINS, SLEEP) as nodes:
        nodes[asked].process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert [node.process.poll() for node in nodes] == [None, None]
        assert [node.process.wait(10) for node in nodes] == [0, 0]
        assert "drained" in nodes[0].said
        for node in nodes:
            assert f"node {asked} is told to stop: node 0 drains, then all end" in node.said
            assert "this replica ends" not in node.said


def test_sigterm_while_the_leader_loads_ends_all_well_and_at_once(tmp_path: Path) -> None:
    with replica(tmp_path, ["bash", "-c", "trap '' TERM; sleep 60"], SLEEP) as nodes:
        nodes[0].process.send_signal(signal.SIGTERM)
        assert [node.process.wait(5) for node in nodes] == [0, 0]


def test_a_node_that_ends_while_the_leader_drains_is_no_orderly_end(tmp_path: Path) -> None:
    with replica(tmp_path, HANGS, SLEEP) as (leader, other):
        leader.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        other.tree()[1].kill()
        assert [node.process.wait(15) for node in (leader, other)] == [137, 137]
        assert "node 1 (127.0.0.1) ended with exit code 137 (its log says why): this replica ends." in leader.said


@pytest.mark.parametrize(("code", "seen", "meaning"), [(3, 3, "that machine cannot start it"), (0, 5, "vLLM's engine")])
def test_a_command_that_ends_by_itself_ends_all_with_its_code(
    tmp_path: Path, code: int, seen: int, meaning: str
) -> None:
    with replica(tmp_path, IGNORES, ["bash", "-c", f"sleep 1; exit {code}"]) as (leader, other):
        assert [node.process.wait(10) for node in (leader, other)] == [seen, seen]
        assert f"node 1 (127.0.0.1) ended with exit code {seen} ({meaning}" in leader.said


def test_a_leader_that_cannot_start_ends_all_with_its_code(tmp_path: Path) -> None:
    with replica(tmp_path, ["bash", "-c", "sleep 1; exit 2"], SLEEP) as (leader, other):
        assert [node.process.wait(10) for node in (leader, other)] == [2, 2]
        assert "node 0 ended with exit code 2 (what was asked for cannot be): this replica ends." in other.said


@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_ends_at_once_with_one_line_and_130(tmp_path: Path, interrupted: int) -> None:
    with replica(tmp_path, SLEEP, SLEEP) as nodes:
        before = nodes[interrupted].said
        nodes[interrupted].process.send_signal(signal.SIGINT)
        assert [node.process.wait(5) for node in nodes] == [130, 130]
        assert nodes[interrupted].said.removeprefix(before) == "qvq-serve: interrupted\n"


def test_no_command_outlives_its_node(tmp_path: Path) -> None:
    with replica(tmp_path, SLEEP, SLEEP) as nodes:
        for node in nodes:
            node.process.kill()


def test_nodes_that_differ_are_told_in_what_and_the_leader_waits_on(tmp_path: Path) -> None:
    port = free_port()
    leader = Started(tmp_path, 0, port, SLEEP, 2)
    wrong = {"flags": (1, {"--tp": "4"}), "rank": (2, {})}
    says = {
        "flags": "--tp is 4 there, and 2 on node 0; start all nodes with the same version and flags.",
        "rank": "its rank is 2, and the others of 2 nodes are 1 to 1.",
    }
    for name, (rank, settings) in wrong.items():
        node = Started(tmp_path, rank, port, SLEEP, 2, **settings)
        assert node.process.wait(10) == 3
        assert node.said.splitlines()[-1] == f"qvq-serve: node 0 refuses this node: {says[name]}"
        assert says[name] in leader.said
    right = Started(tmp_path, 1, port, SLEEP, 2)
    until(lambda: len(right.tree()) > 1 and len(leader.tree()) > 1)
    right.process.send_signal(signal.SIGTERM)
    assert [node.process.wait(10) for node in (leader, right)] == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_node_may_come_first_go_away_and_come_again(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    other = Started(tmp_path, 1, port, SLEEP, 3)
    until(lambda: "looks for node 0 at 127.0.0.1" in other.said)
    leader = Started(tmp_path, 0, port, SLEEP, 3)
    until(lambda: "node 1 (127.0.0.1) is there" in leader.said)
    other.process.send_signal(number)
    other.process.wait()
    again = [Started(tmp_path, rank, port, SLEEP, 3) for rank in (1, 2)]
    until(lambda: all(len(node.tree()) > 1 for node in (leader, *again)))
    leader.process.send_signal(signal.SIGTERM)
    assert [node.process.wait(10) for node in (leader, *again)] == [0, 0, 0]


def test_strangers_are_dropped_and_harm_nobody(tmp_path: Path) -> None:
    port = free_port()
    leader = Started(tmp_path, 0, port, SLEEP, 2)
    until(lambda: "waits for the others" in leader.said)
    time.sleep(0.5)
    garbage = [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04\x95" * 100 + b"\n", b"[" * 60_000 + b"\n", b"x" * 200_000,
               b'{"rank": "one", "settings": 1}\n', b'{"rank": 1}\n', b"null\n", b'{"rank": 1, "settings": {}}\n',
               b'{"rank": 1, "settings": {"--tp": "2"}, "end": 0}\n']  # fmt: skip
    for text in garbage[:-1]:
        with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(ConnectionError):
            stranger.sendall(text)
            stranger.settimeout(10)
            while stranger.recv(1024):
                pass
    assert leader.process.poll() is None
    right = Started(tmp_path, 1, port, SLEEP, 2)
    until(lambda: len(right.tree()) > 1 and len(leader.tree()) > 1)
    with pytest.raises(ConnectionRefusedError):  # all are there: nobody else is listened to
        socket.create_connection(("127.0.0.1", port))
    leader.process.send_signal(signal.SIGTERM)
    assert [node.process.wait(10) for node in (leader, right)] == [0, 0]
    assert "Traceback" not in leader.said


def test_who_is_missing_is_said() -> None:
    program = "import asyncio; from qvq_serve.node import *; asyncio.run(Node(%d, 3, '127.0.0.1', %d, [], {}, 1).run())"
    port = free_port()
    says = [
        "StartError: of 3 nodes, 1, 2 did not come within 1 s; start each with the same flags, and look whether it",
        f"StartError: node 0 did not answer at 127.0.0.1, port {port}, or not all nodes came, within 1 s",
    ]
    for rank in (0, 1):
        line = [sys.executable, "-c", program % (rank, port)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)
        assert says[rank] in done.stderr


def test_the_command_is_told_the_address_by_which_the_others_reach_it(tmp_path: Path) -> None:
    tells = ["bash", "-c", "echo $VLLM_HOST_IP $GLOO_SOCKET_IFNAME; exec sleep 60"]
    with two_machines() as network, replica(tmp_path, tells, tells, network=network) as nodes:
        cards = ["lo", "lo"] if network.parts is None else [network.parts[3], "eth0"]
        for node, address, card in zip(nodes, (network.here, network.there), cards, strict=True):
            assert f"{address} {card}" in node.said.splitlines()
        nodes[0].process.send_signal(signal.SIGTERM)
        assert [node.process.wait(10) for node in nodes] == [0, 0]
