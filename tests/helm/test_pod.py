"""The CPU scenario's pod, run on this machine as a kubelet would, scraped by a real Prometheus, ended under load."""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml

from tests.engine.conftest import data_url, photo, user
from tests.helm import kubelet
from tests.helm.chart import CHART, needs_helm, template
from tests.helm.queries import expressions
from tests.network import free_port

pytestmark = [
    needs_helm,
    pytest.mark.skipif(not kubelet.can(), reason="mount namespaces need root"),
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is missing; launch/tools.sh brings it"),
]
CLIENTS = 8
NEED_MORE = {
    "Time in hooks, {{hook}} failed": "a hook that fails",
}
"""Queries that a sound server has no data for; none of them needs a GPU."""


@dataclass
class Clients:
    """Users that ask one question after another, as long as a proxy sends them here."""

    url: str
    statuses: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    admitted: threading.Event = field(default_factory=threading.Event)

    def ask(self, tokens: int, *parts: object) -> None:
        body = {"messages": [user(*(parts or ("Hi",)))], "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body |= {"repetition_detection": {"max_pattern_size": 0}} if tokens > 100 else {}
        try:
            with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=300) as answer:
                self.statuses.append(answer.status_code)
                text = "".join(answer.iter_text())
                if answer.status_code != 200 or not text.rstrip().endswith("data: [DONE]") or '"error"' in text:
                    self.lost.append(text[-300:])
        except httpx.TransportError as error:
            self.lost.append(repr(error))

    def go_on(self) -> None:
        while self.admitted.is_set():
            self.ask(30)


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubelet.Kubelet]:
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
    values = CHART / "ci" / "cpu-demo-values.yaml"
    done = template("--values", str(values), "--set", f"service.port={free[0]},service.metricsPort={free[1]}")
    assert done.returncode == 0, done.stderr
    made = [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]
    (deployment,) = [m for m in made if m["kind"] == "Deployment"]
    files = {m["metadata"]["name"]: m["data"] for m in made if m["kind"] == "ConfigMap"}
    running = kubelet.Kubelet.start(deployment["spec"]["template"], files, tmp_path_factory.mktemp("pod"))
    try:
        running.wait("startupProbe")
        running.wait("readinessProbe")
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="module")
def prometheus(pod: kubelet.Kubelet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that scrapes the pod every second, as its PodMonitor's job."""
    directory = tmp_path_factory.mktemp("prometheus")
    target = {"targets": [pod.url("metrics").removeprefix("http://")], "labels": {"pod": "qvq-0"}}
    job = {"job_name": "serving/qvq", "scrape_interval": "1s", "static_configs": [target]}
    (directory / "config.yaml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    address = f"127.0.0.1:{free_port()}"
    with (directory / "log").open("wb") as out:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={directory}/config.yaml", f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address={address}"], stdout=out, stderr=out)  # fmt: skip
    try:
        for _ in range(60):
            time.sleep(0.5)
            try:
                if httpx.get(f"http://{address}/-/ready").status_code == 200:
                    break
            except httpx.TransportError:
                continue
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def operands(expr: str) -> list[str]:
    """The parts of an expression without their comparisons: `a > 1 and (b == 0 unless c == 1)` -> a, b, c."""
    found = []
    for part in re.split(r"\b(?:and|or|unless)\b", expr):
        part = re.sub(r"\s(?:==|>|<)\s[^{}]*$", "", part.strip()).strip()
        while part.count("(") > part.count(")"):
            part = part[part.index("(") + 1 :]  # a function's too: of `absent(a == 1)` a
        found.append(part)
    return found


def test_operands_are_what_is_compared() -> None:
    assert operands('a{x="1"} > 2 * 3 and (b{x="1"} == 0 unless c{x="1"} == 1)') == ['a{x="1"}', 'b{x="1"}', 'c{x="1"}']
    assert operands('absent(a{x="1"} == 1)') == ['a{x="1"}']


def value(prometheus: str, query: str) -> list[dict[str, object]]:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    found: list[dict[str, object]] = answer["data"]["result"]
    return found


def test_the_pod_runs_as_its_user_on_a_read_only_root(pod: kubelet.Kubelet) -> None:
    status = Path(f"/proc/{pod.process.pid}/status").read_text()
    assert re.search(r"^Uid:\s+1000\s+1000\s+1000\s+1000$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    mounts = Path(f"/proc/{pod.process.pid}/mounts").read_text().splitlines()
    writable = {line.split()[1] for line in mounts if "rw" in line.split()[3].split(",")}
    own = {at for at in writable if not at.startswith(("/proc", "/dev", "/sys"))}
    assert own == {"/cache", "/tmp"}


def test_each_query_of_the_chart_has_data_while_the_server_is_under_load(pod: kubelet.Kubelet, prometheus: str) -> None:
    clients = Clients(pod.url("http"))
    for _ in range(8):
        clients.ask(40, {"url": data_url(photo(224, 224))}, "What is this?")
        clients.ask(400)
    assert clients.lost == []
    assert httpx.post(f"{clients.url}/v1/completions", json={}).status_code == 404  # turned away, and counted
    time.sleep(12)  # the workers' figures are read every 5 s
    assert pod.probe("livenessProbe")
    empty = {
        where: part for where, expr in expressions().items() for part in operands(expr) if not value(prometheus, part)
    }
    assert set(empty) <= set(NEED_MORE), json.dumps(empty, indent=1)


def test_no_request_is_lost_when_the_pod_is_ended_under_load(pod: kubelet.Kubelet) -> None:
    clients = Clients(pod.url("http"))
    clients.admitted.set()
    threads = [threading.Thread(target=clients.go_on) for _ in range(CLIENTS)]
    # preStop takes 15 s: until its twelfth second a proxy that is slow to hear still sends requests here.
    slow_proxy = threading.Timer(12, clients.admitted.clear)
    # And long answers begin shortly before SIGTERM, which has to wait for them.
    long_ones = [threading.Timer(11, clients.ask, (3000,)) for _ in range(CLIENTS)]
    for thread in [*threads, slow_proxy, *long_ones]:
        thread.start()
    took = pod.end()
    for thread in [*threads, *long_ones]:
        thread.join(60)
    assert clients.lost == []
    assert len(clients.statuses) > 2 * CLIENTS
    assert set(clients.statuses) == {200}
    assert took > 2, "no answer was running at SIGTERM, so nothing was shown"
    assert '"draining' in pod.log.read_text() or "draining: " in pod.log.read_text()
