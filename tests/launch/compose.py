"""What launch/compose.yaml's Prometheus and Grafana read, from the chart; `python -m tests.launch.compose` writes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.helm.chart import CHART, helm

COMPOSE = Path(__file__).parents[2] / "launch" / "compose.yaml"
DIRECTORY = COMPOSE.parent / "compose"
SERVICE = "server"
"""The server's name in compose.yaml: what Prometheus calls, and what alerts say instead of a pod's name."""
NAMESPACE = "compose"
WRITTEN = "# From the chart; `python -m tests.launch.compose` writes it.\n"


@cache
def chart() -> dict[str, dict[str, Any]]:
    """The chart's manifests with all of its monitoring, by kind and name."""
    shown = [f"--set=monitoring.{name}=true" for name in ("podMonitor", "rules", "dashboard")]
    done = helm("template", "qvq", str(CHART), "--namespace", NAMESPACE, *shown)
    assert done.returncode == 0, done.stderr
    return {f"{made['kind']}/{made['metadata']['name']}": made for made in yaml.safe_load_all(done.stdout) if made}


def files() -> dict[str, str]:
    """Name and text of each."""
    monitor = chart()["PodMonitor/qvq"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (port,) = [
        port["containerPort"]
        for container in chart()["Deployment/qvq"]["spec"]["template"]["spec"]["containers"]
        for port in container["ports"]
        if port["name"] == endpoint["port"]
    ]
    job = {
        # The PodMonitor's job and label, which the rules and the dashboard select by.
        "job_name": f"{NAMESPACE}/{monitor['metadata']['name']}",
        "metrics_path": endpoint["path"],
        "static_configs": [{"targets": [f"{SERVICE}:{port}"], "labels": {"pod": SERVICE}}],
    }
    config = {
        "global": {"scrape_interval": endpoint["interval"], "evaluation_interval": endpoint["interval"]},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [job],
    }
    dashboard = json.loads(chart()["ConfigMap/qvq-dashboard"]["data"]["qvq.json"])
    return {
        "prometheus.yaml": WRITTEN + yaml.safe_dump(config, sort_keys=False),
        "rules.yaml": WRITTEN + yaml.safe_dump(chart()["PrometheusRule/qvq"]["spec"], sort_keys=False, width=120),
        "dashboard.json": json.dumps(dashboard, indent=1) + "\n",
    }


if __name__ == "__main__":
    for name, text in files().items():
        (DIRECTORY / name).write_text(text)
