"""Our metrics by Prometheus' own rules."""

import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from qvq_serve import metrics

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


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian's package prometheus)")
def test_promtool_finds_nothing_wrong() -> None:
    lines = [line for line in exposition().splitlines() if b"_created" not in line]
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=b"\n".join(lines) + b"\n", capture_output=True, check=False
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
