"""One machine of a replica that runs on several: it meets the others, runs its command, and ends with them.

vLLM has no heartbeat between machines: when one is lost, the others wait for it, minutes long. So each node sends a
line every BEAT_S to node 0, and node 0 to each; node 0 alone decides when the replica ends, and with which exit code.
The lines are JSON: {} is a beat, and

    {"rank": 1, "settings": {...}}   to node 0, first; answered by {"refused": "why"}, or {"go": 1} once all are there
    {"stop": 1}                      to and from node 0: an orderly end was asked for, and node 0's command drains
    {"ended": 5}                     to node 0: that node's command ended, with this exit code
    {"end": 5, "why": "..."}         from node 0: end now, with this exit code
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvq_serve.cli import say
from qvq_serve.errors import EXIT_DOES_NOT_FIT, EXIT_ENGINE_DIED, EXIT_NODE_LOST, EXIT_START, EXIT_USAGE, StartError

BEAT_S = 2.0
SILENCE_S = 15.0
END_S = 8.0
"""For a command to end by itself, errors to its clients included; then it is killed: 15 + 2 + 8 s are within 30."""
HELLO_S = 5.0
MOST_LINE_BYTES = 1 << 16
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
MEANINGS = {
    EXIT_USAGE: "what was asked for cannot be",
    EXIT_START: "that machine cannot start it",
    EXIT_DOES_NOT_FIT: "its plan does not fit the cards",
    EXIT_ENGINE_DIED: "vLLM's engine died",
    130: "interrupted",
}


class Peer:
    """Another node, at the end of a connection."""

    def __init__(self, rank: int, writer: asyncio.StreamWriter) -> None:
        self.rank, self.writer, self.heard = rank, writer, time.monotonic()
        self.name = f"node {rank} ({(writer.get_extra_info('peername') or ['?'])[0]})"
        self.own_address: str = writer.get_extra_info("sockname")[0]

    def tell(self, **message: Any) -> None:
        """Never waits: what cannot be sent to a silent machine is not worth waiting for."""
        self.writer.write(json.dumps(message).encode() + b"\n")


@dataclass
class Node:
    """This node. Its peers are node 0 alone, or, on node 0, all the others."""

    rank: int
    nodes: int
    leader: str
    port: int
    command: list[str]
    settings: dict[str, str]
    """What must be the same on all nodes, by name."""
    join_timeout: float
    peers: dict[int, Peer] = field(default_factory=dict)
    greetings: set["asyncio.Task[None]"] = field(default_factory=set)
    process: subprocess.Popen[bytes] | None = None
    stopping: bool = False

    async def run(self) -> int:
        """Returns the replica's exit code. Raises StartError without node 0, or where it refuses this node."""
        loop = asyncio.get_running_loop()
        self.verdict: asyncio.Future[tuple[int, str]] = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self.stop, self.rank)
        loop.add_signal_handler(signal.SIGINT, self.end, 130, "interrupted")
        meeting = asyncio.create_task(self.follow() if self.rank else self.lead())
        meeting.add_done_callback(lambda task: None if task.cancelled() else self.fail(task.exception()))
        beating = asyncio.create_task(self.beat())
        code, why = await self.verdict
        beating.cancel()
        for peer in self.peers.values() if self.process or not self.rank else ():  # before the start it may come back
            peer.tell(**({"ended": code} if self.rank else {"end": code, "why": why}))
        await self.end_command(code)
        if why:
            say(why)
        return code

    def end(self, code: int, why: str = "") -> None:
        if not self.verdict.done():
            self.verdict.set_result((code, why))

    def fail(self, error: BaseException | None) -> None:
        if error and not self.verdict.done():
            self.verdict.set_exception(error)

    async def lead(self) -> None:
        """Node 0: wait until all others are there, and start."""
        try:
            server = await asyncio.start_server(self.connected, None, self.port, limit=MOST_LINE_BYTES)
        except OSError as error:
            raise StartError(f"--heartbeat-port {self.port} cannot be listened on: {error.strerror}.") from None
        say(f"node 0 of {self.nodes} waits for the others on port {self.port}")
        deadline = time.monotonic() + self.join_timeout
        while missing := sorted({*range(1, self.nodes)} - {*self.peers}):
            if time.monotonic() > deadline:
                raise StartError(
                    f"of {self.nodes} nodes, {', '.join(map(str, missing))} did not come within {self.join_timeout:g} "
                    f"s; start each with the same flags, and look whether it reaches port {self.port} of this machine."
                )
            await asyncio.sleep(0.1)
        server.close()  # nobody else has business here
        self.start()
        for peer in self.peers.values():
            peer.tell(go=1)

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Node 0: a task of ours, since at its end asyncio logs those of its own as faults."""
        task = asyncio.create_task(self.greet(reader, writer))
        self.greetings.add(task)
        task.add_done_callback(self.greetings.discard)

    async def greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Node 0: somebody is there. Whoever does not say hello as a node would is dropped without a word."""
        try:
            async with asyncio.timeout(HELLO_S):
                hello = json.loads(await reader.readline())
            peer = Peer(int(hello["rank"]), writer)
            refusal = self.refusal(peer.rank, dict(hello["settings"]))
        except (TimeoutError, OSError, ValueError, TypeError, KeyError, RecursionError):
            writer.close()
            return
        if refusal:
            say(f"{peer.name} is refused: {refusal}")
            peer.tell(refused=refusal)
            writer.close()
        elif self.process is None:
            say(f"{peer.name} is there")
            self.peers[peer.rank] = peer
            await self.listen(peer, reader)

    def refusal(self, rank: int, settings: dict[str, str]) -> str:
        """Why a node cannot take part, or an empty string."""
        for name in sorted({*self.settings, *settings}):
            if (ours := self.settings.get(name)) != (theirs := settings.get(name)):
                return (
                    f"{name} is {theirs} there, and {ours} on node 0; start all nodes with the same version and flags."
                )
        if rank not in range(1, self.nodes):
            return f"its rank is {rank}, and the others of {self.nodes} nodes are 1 to {self.nodes - 1}."
        return f"a node {rank} is there already; each machine has a rank of its own." if rank in self.peers else ""

    async def follow(self) -> None:
        """Another node: connect to node 0, as often as it takes, until it says go."""
        say(f"node {self.rank} of {self.nodes} looks for node 0 at {self.leader}, port {self.port}")
        deadline = time.monotonic() + self.join_timeout
        while self.process is None:
            with contextlib.suppress(OSError):  # not there yet, or not known by that name
                async with asyncio.timeout(SILENCE_S):
                    reader, writer = await asyncio.open_connection(self.leader, self.port, limit=MOST_LINE_BYTES)
                self.peers[0] = Peer(0, writer)
                self.peers[0].tell(rank=self.rank, settings=self.settings)
                await self.listen(self.peers[0], reader)
            if time.monotonic() > deadline:
                raise StartError(
                    f"node 0 did not answer at {self.leader}, port {self.port}, or not all nodes came, within "
                    f"{self.join_timeout:g} s; its log says whom it waits for."
                )
            await asyncio.sleep(1)

    async def listen(self, peer: Peer, reader: asyncio.StreamReader) -> None:
        """Hear a peer until its connection ends."""
        how = "closed its connection without a word"
        try:
            while line := await reader.readline():
                peer.heard = time.monotonic()
                self.hear(peer, json.loads(line))
        except ConnectionResetError:
            pass  # closed too, before it had read what was sent to it
        except (OSError, ValueError) as error:
            how = f"was lost: {error}"
        self.lose(peer, how)

    def hear(self, peer: Peer, message: dict[str, Any]) -> None:
        if "refused" in message:
            # No slip of this command alone: a supervisor starts it again while the other machine is brought up to date.
            self.fail(StartError(f"node 0 refuses this node: {message['refused']}"))
        if "go" in message:
            self.start()
        if "stop" in message:
            self.stop(peer.rank)
        if "ended" in message:
            self.ended(peer.rank, peer.name, int(message["ended"]))
        if "end" in message:
            self.end(message["end"], message["why"])

    def lose(self, peer: Peer, how: str) -> None:
        """A peer is gone: before the start it may come back, after it the replica is lost."""
        peer.writer.transport.abort()
        if self.process is not None:
            self.end(EXIT_NODE_LOST, f"{peer.name} {how}: this replica ends; look at that machine, or the network.")
        elif self.peers.get(peer.rank) is peer:
            del self.peers[peer.rank]

    async def beat(self) -> None:
        while True:
            for peer in list(self.peers.values()):
                peer.tell()
                if time.monotonic() - peer.heard > SILENCE_S:
                    self.lose(peer, f"was not heard of for {SILENCE_S:g} s")
            await asyncio.sleep(BEAT_S)

    def stop(self, rank: int) -> None:
        """An orderly end: node 0's command drains, and the others' go on until it has."""
        if self.stopping:
            return
        self.stopping = True
        if self.process is None:
            self.end(0)
            return
        say(f"node {rank} is told to stop: node 0 drains, then all end")
        for peer in self.peers.values():
            peer.tell(stop=1)
        if self.rank == 0 and catches(self.process.pid, signal.SIGUSR1):
            self.process.terminate()
        elif self.rank == 0:  # it loads, answers nobody, and vLLM may lose a SIGTERM
            self.end(0)

    def start(self) -> None:
        """Run the command, in a group of its own that does not outlive this process."""
        self.process = subprocess.Popen(
            self.command,
            env=os.environ | self.addresses(),
            start_new_session=True,
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        self.exit = asyncio.create_task(asyncio.to_thread(self.process.wait))
        self.exit.add_done_callback(lambda task: self.ended(self.rank, f"node {self.rank}", task.result()))

    def addresses(self) -> dict[str, str]:
        """By which address, and interface, vLLM is to be reached: those of the connection, unless set outside.

        vLLM and gloo would take that of the default route, and that of the host's name, which may be 127.0.1.1.
        """
        import psutil

        derived = {}
        for peer in self.peers.values():
            derived["VLLM_HOST_IP"] = peer.own_address
            for name, found in psutil.net_if_addrs().items():
                if peer.own_address in (each.address for each in found):
                    derived["GLOO_SOCKET_IFNAME"] = name
        return {name: value for name, value in derived.items() if name not in os.environ}

    def ended(self, rank: int, name: str, code: int) -> None:
        """A node's command ended by itself."""
        code = 128 - code if code < 0 else code
        if self.rank:
            self.peers[0].tell(ended=code)
        elif rank == 0 and (code == 0 or (self.stopping and code == 128 + signal.SIGTERM)):
            self.end(0)
        else:
            code = code or EXIT_ENGINE_DIED  # vLLM's headless node ends with 0 when a worker of it dies
            why = f"{name} ended with exit code {code} ({MEANINGS.get(code, 'its log says why')}): this replica ends."
            # After a drain the others may lose node 0's engine before its command has ended: it is given time to.
            asyncio.get_running_loop().call_later(END_S if self.stopping and rank else 0, self.end, code, why)

    async def end_command(self, code: int) -> None:
        """SIGUSR1: a server that serves tells its clients, and ends; all else dies of it. Ctrl-C waits for neither."""
        if self.process is None:
            return
        if not self.exit.done():
            self.process.send_signal(signal.SIGKILL if code == 130 else signal.SIGUSR1)
            await asyncio.wait([self.exit], timeout=END_S)
            self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            for _ in range(20):  # Python's resource tracker ignores that, and frees the shared memory of the others
                os.killpg(self.process.pid, 0)
                await asyncio.sleep(0.1)
            os.killpg(self.process.pid, signal.SIGKILL)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: for SIGUSR1, a server that serves (qvq_serve/api/lifecycle.py)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("SigCgt:") and int(line[7:], 16) >> (number - 1) & 1 for line in lines)
