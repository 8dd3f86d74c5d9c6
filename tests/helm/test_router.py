"""The chart's router, run as a kubelet would: it finds the servers that Kubernetes names, and loses no request."""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import yaml

from tests.engine.conftest import KEY, Server, data_url, photo, serving, user
from tests.helm import kubelet
from tests.helm.chart import CHART, needs_helm, template
from tests.network import free_port

pytestmark = [
    needs_helm,
    pytest.mark.skipif(not kubelet.can(), reason="mount namespaces need root"),
    pytest.mark.skipif(not shutil.which("vllm-router"), reason="vllm-router is missing: pip install -e .[router]"),
]
LABELS = {
    "app.kubernetes.io/name": "qvq-serve",
    "app.kubernetes.io/instance": "qvq",
    "app.kubernetes.io/component": "server",
    "qvq-serve/role": "api",
}


class Answers(BaseHTTPRequestHandler):
    """A small HTTP server's handler."""

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(handler: type[Answers], address: tuple[str, int]) -> Iterator[tuple[str, int]]:
    with ThreadingHTTPServer(address, handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[0], server.server_address[1]  # type: ignore[misc]
        server.shutdown()


class Full(Answers):
    """A server that is ready and whose queue is full, counting what it refused."""

    refused = 0

    def do_GET(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).refused += 1
        self.answer(503, {"error": {"message": "the queue is full", "type": "ServiceUnavailableError", "code": 503}})


class Accepting(Answers):
    """A server with room."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, {})


class Kubernetes(Answers):
    """Kubernetes' API, as far as a list of pods goes; `pods` are (address, labels)."""

    pods: tuple[tuple[str, dict[str, str]], ...] = ()

    def do_GET(self) -> None:
        if not self.path.startswith("/api/v1/namespaces/serving/pods?"):
            return self.answer(403, {})
        if "watch=" in self.path:
            time.sleep(300)
        status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        items = [
            {
                "metadata": {"name": f"pod-{i}", "namespace": "serving", "uid": str(i), "labels": labels},
                "spec": {"containers": []},
                "status": status | {"podIP": address},
            }
            for i, (address, labels) in enumerate(self.pods)
        ]
        self.answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})


@contextmanager
def routing(directory: Path, servers: int, *pods: tuple[str, dict[str, str]]) -> Iterator[str]:
    """The URL of the chart's router over servers at port `servers` of the pods; SIGTERM must end it with code 0."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        free = one.getsockname()[1], two.getsockname()[1]
    values = CHART / "ci" / "cpu-demo-values.yaml"
    done = template("--values", str(values), "--set", f"router.enabled=true,service.port={servers}")
    assert done.returncode == 0, done.stderr
    made = [m for m in yaml.safe_load_all(done.stdout) if m and m["kind"] == "Deployment"]
    (pod,) = [m["spec"]["template"] for m in made if m["metadata"]["name"] == "qvq-router"]
    container = pod["spec"]["containers"][0]
    # All ports are this machine's here, so the router's own are moved; and Kubernetes is where this file says.
    container["args"] = [
        f"--port={free[0]}" if arg.startswith("--port=") else
        f"--prometheus-port={free[1]}" if arg.startswith("--prometheus-port=") else arg
        for arg in container["args"]
    ]  # fmt: skip
    container["ports"] = [{"name": "http", "containerPort": free[0]}]
    container["env"].append({"name": "KUBECONFIG", "value": "/kubernetes/config"})
    container["volumeMounts"].append({"name": "kubernetes", "mountPath": "/kubernetes"})
    pod["spec"]["volumes"].append({"name": "kubernetes", "configMap": {"name": "kubernetes"}})
    handler = type("Kubernetes", (Kubernetes,), {"pods": pods})
    with answering(handler, ("127.0.0.1", 0)) as (host, port):
        config = {
            "clusters": [{"name": "here", "cluster": {"server": f"http://{host}:{port}"}}],
            "users": [{"name": "me", "user": {"token": "any"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "current-context": "here",
        }
        files = {"kubernetes": {"config": yaml.safe_dump({"apiVersion": "v1", "kind": "Config"} | config)}}
        running = kubelet.Kubelet.start(pod, files, directory)
        try:
            deadline = time.monotonic() + 60
            while not running.probe("readinessProbe"):
                assert running.process.poll() is None and time.monotonic() < deadline, running.log.read_text()[-3000:]
                time.sleep(0.2)
            assert running.probe("livenessProbe")
            yield running.url("http")
            running.process.terminate()
            assert running.process.wait(30) == 0
        finally:
            running.process.kill()
            running.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("cache"), "--demo") as running:
        yield running


def ask(url: str, key: str | None = KEY, **body: Any) -> httpx.Response:
    request = {"messages": [user({"url": data_url(photo(90, 90))}, "What?")], "max_tokens": 8} | body
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "a-request"}
    return httpx.post(f"{url}/v1/chat/completions", json=request, headers=headers, timeout=120)


def test_no_request_is_lost_to_a_full_server_and_what_is_ours_passes_through(server: Server, tmp_path: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    stranger = ("127.0.0.3", LABELS | {"app.kubernetes.io/instance": "another"})
    full = type("Full", (Full,), {})
    with (
        answering(full, ("127.0.0.2", port)),
        routing(tmp_path, port, ("127.0.0.1", LABELS), ("127.0.0.2", LABELS), stranger) as url,
    ):
        assert httpx.get(f"{url}/readiness").json()["total_workers"] == 2
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda i: ask(url, seed=i, max_tokens=100, ignore_eos=True), range(64)))
        assert {answer.status_code for answer in answers} == {200}
        assert full.refused > 0, "nothing was refused, so nothing was shown"
        answer = ask(url, thinking_token_budget=4, temperature=0)
        assert answer.json()["qvq"]["visual_tokens"] == 256
        assert answer.headers["x-request-id"] == "a-request"
        streamed = ask(url, stream=True, temperature=0).text
        assert '"qvq":{' in streamed and streamed.rstrip().endswith("data: [DONE]")
        assert ask(url, key="another").status_code == 401
        refused = ask(url, max_token=3)
        assert refused.json()["error"]["message"].startswith("the field 'max_token' is not known here")


def test_where_every_server_is_full_the_client_is_told_so_and_gets_in_once_there_is_room(tmp_path: Path) -> None:
    port = free_port()
    full = type("Full", (Full,), {})
    with answering(full, ("127.0.0.1", port)), routing(tmp_path, port, ("127.0.0.1", LABELS)) as url:
        assert {ask(url).status_code for _ in range(6)} == {503}
        full.do_POST = Accepting.do_POST
        deadline = time.monotonic() + 20  # the breaker opens for 5 s
        while (status := ask(url).status_code) == 503 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert status == 200
