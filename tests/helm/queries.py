"""The queries of the chart: alerts, panels and KEDA's, and the names in them."""

import json
import re
from typing import Any

from tests.helm.chart import manifests, one

NAME = re.compile(r"\b(?:vllm:|qvq_)[a-z0-9_]+")


def rules(scenario: str = "h100x4-bf16") -> list[dict[str, Any]]:
    (group,) = one(scenario, "PrometheusRule")["spec"]["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels(scenario: str = "h100x4-bf16") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(one(scenario, "ConfigMap", "qvq-dashboard")["data"]["qvq.json"])["panels"]
    return found


def expressions() -> dict[str, str]:
    """Every query, by where it stands."""
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in panels():
        found |= {f"{panel['title']}, {target['legendFormat']}": target["expr"] for target in panel["targets"]}
    (scaled,) = [m for m in manifests("autoscaled") if m["kind"] == "ScaledObject"]
    return found | {f"KEDA, {trigger['name']}": trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]}
