"""Our metrics by Prometheus' own rules."""

import asyncio
import math
import shutil
import socket
import subprocess

import httpx
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from qvq_serve import metrics
from qvq_serve.api import memory, scrape
from qvq_serve.api.memory import export_governor
from qvq_serve.errors import StartError
from qvq_serve.gpu import Gpu
from qvq_serve.profile import Profile

OURS = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]


def exposition() -> bytes:
    """All our metrics, each with a sample, as /metrics has them."""
    registry = CollectorRegistry()
    for metric in OURS:
        if metric._labelnames:
            metric.labels(*metric._labelnames)
        registry.register(metric)
    return generate_latest(registry)


def test_each_metric_is_ours_by_name_and_says_what_it_is() -> None:
    assert len(OURS) > 10
    lines = exposition().decode().splitlines()
    named = [line.split()[2] for line in lines if line.startswith("# HELP")]
    assert named and all(name.startswith("qvq_") for name in named)


def test_metrics_are_served_at_an_address_of_ipv6() -> None:
    """The server loaded its weights, and then ended: `Address family for hostname not supported`."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = scrape.serve(0, "::1")
    try:
        assert "qvq_ready" in httpx.get(f"http://[::1]:{server.server_port}/metrics").text
    finally:
        server.shutdown()
        server.server_close()


def test_what_the_governor_did_is_told_by_the_stage_that_samples() -> None:
    """A pipeline's first stage has a governor too, which does nothing: it was the one that was read."""
    before = metrics.GOVERNOR.labels("found")._value.get()
    known = export_governor({}, [{"found": 0, "loop": 0}, {"found": 3, "loop": 2}])
    assert known == export_governor(known, [{}, {}]) == {"found": 3, "loop": 2}
    assert metrics.GOVERNOR.labels("found")._value.get() - before == 3


def test_a_driver_that_fails_for_a_while_does_not_end_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One error ended them, and the headroom stayed at its last, healthy value."""

    class Workers:
        errored, asked = False, 0

        async def collective_rpc(self, what: str) -> list[dict[str, int]]:
            self.asked += 1
            self.errored = self.asked == 4
            return [{}]

    left: list[float] = []

    def export(*_: object) -> None:
        left.append(metrics.HEADROOM.labels("7")._value.get())
        if len(left) == 2:
            raise StartError("the NVIDIA driver fails: Unknown Error")
        metrics.HEADROOM.labels("7").set(50)

    monkeypatch.setattr(memory, "visible_gpus", lambda: [Gpu(7, "NVIDIA H200", 2**37)])
    monkeypatch.setattr(memory, "planned_uses", lambda *_: {})
    monkeypatch.setattr(memory, "export", export)
    monkeypatch.setattr(memory, "POLL_S", 0)
    asyncio.run(memory.watch(Workers(), Profile()))
    assert left[1] == 50 and math.isnan(left[2]) and metrics.HEADROOM.labels("7")._value.get() == 50


def test_a_prometheus_of_version_2_finds_vllms_names_as_they_are() -> None:
    """It asks for OpenMetrics, in which prometheus_client 0.26 wrote vllm_num_requests_waiting."""
    waiting = Gauge("vllm:a_test", "Of this test", registry=None)
    REGISTRY.register(waiting)
    server = scrape.serve(0, "127.0.0.1")
    try:
        answer = httpx.get(
            f"http://127.0.0.1:{server.server_port}/metrics",
            headers={"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"},
        )
    finally:
        server.shutdown()
        REGISTRY.unregister(waiting)
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "\nvllm:a_test 0.0\n" in answer.text


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian's package prometheus)")
def test_promtool_finds_nothing_wrong() -> None:
    lines = [line for line in exposition().splitlines() if b"_created" not in line]
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=b"\n".join(lines) + b"\n", capture_output=True, check=False
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
