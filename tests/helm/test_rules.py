"""Alerts and panels by Prometheus' own tools: each alert in a case that fires and in one that does not."""

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from qvq_serve import metrics
from qvq_serve.kubernetes import FIRST_TOKEN_S
from tests.helm.chart import needs_helm, needs_promtool
from tests.helm.queries import NAME, expressions, panels, rules

pytestmark = [needs_helm, needs_promtool]
POD = 'job="serving/qvq", pod="qvq-0"'
MEMORY = f'qvq_memory_bytes{{{POD}, gpu="0", use="kv_cache", source='
FIRST = "vllm:time_to_first_token_seconds"
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """Series by name, a value a minute in promtool's notation; minute `at` is looked at."""

    series: dict[str, str]
    at: int
    summary: str | None = None
    """What the alert says; None where it must not fire."""


CASES: dict[str, list[Case]] = {
    "QvqEngineDown": [
        Case({f"up{{{POD}}}": "1x9 0x20"}, 14, "qvq-0 served in the last hour, and does not answer"),
        Case({f"up{{{POD}}}": "0x30"}, 14),  # it starts, for the first time
        Case({f"up{{{POD}}}": "1x9 0x0 1x20"}, 14),  # one scrape was lost
    ],
    "QvqNoServer": [
        Case({'up{job="another"}': "1x60"}, 25, "no server of serving/qvq answers, nor has for 1188s"),
        Case({f"up{{{POD}}}": "0x60"}, 25, "no server of serving/qvq answers, nor has for 1188s"),
        Case({f"up{{{POD}}}": "0x10 1x60"}, 25),
        Case({f"up{{{POD}}}": "1x9 _x10 1x60"}, 25),  # a rollout
    ],
    "QvqStartTooLong": [
        Case({f"up{{{POD}}}": "0x60"}, 25, "qvq-0 is not ready, 1188s after it began to start"),
        Case({f"up{{{POD}}}": "1x60", f"qvq_ready{{{POD}}}": "0x60", f"qvq_draining{{{POD}}}": "0x60"}, 25,
             "qvq-0 is not ready, 1188s after it began to start"),
        Case({f"up{{{POD}}}": "0x9 1x60", f"qvq_ready{{{POD}}}": "_x10 0x1 1x60"}, 25),
        Case({f"up{{{POD}}}": "1x60", f"qvq_ready{{{POD}}}": "0x60", f"qvq_draining{{{POD}}}": "1x60"}, 25),
    ],
    "QvqQueueGrowing": [
        Case({f"vllm:num_requests_waiting{{{POD}}}": "0+2x60"}, 25, "50 requests wait at qvq-0, and they become more"),
        Case({f"vllm:num_requests_waiting{{{POD}}}": "50x60"}, 25),  # many, and no more
        Case({f"vllm:num_requests_waiting{{{POD}}}": "0+0.2x60"}, 25),  # more, and few
    ],
    "QvqHeadroomLow": [
        Case({f'qvq_memory_headroom_bytes{{{POD}, gpu="3"}}': f"{GIB // 2}x60"}, 10, "GPU 3 of qvq-0 has 512MiB left"),
        Case({f'qvq_memory_headroom_bytes{{{POD}, gpu="3"}}': f"{GIB}x60"}, 10),  # the fullest profile's, nearly
    ],
    "QvqMemoryNotAsPlanned": [
        Case({f'{MEMORY}"measured"}}': f"{30 * GIB}x60", f'{MEMORY}"planned"}}': f"{32 * GIB}x60"}, 15,
             "kv_cache on GPU 0 of qvq-0 is 2GiB off its plan"),
        Case({f'{MEMORY}"measured"}}': f"{30 * GIB}x60", f'{MEMORY}"planned"}}': f"{30.5 * GIB:.0f}x60"}, 15),
    ],
    "QvqPreemptions": [
        Case({f"vllm:num_preemptions_total{{{POD}}}": "0+1x60"}, 25,
             "qvq-0 puts running requests back for want of KV cache"),
        Case({f"vllm:num_preemptions_total{{{POD}}}": "7x60"}, 25),
    ],
    "QvqErrorShare": [
        Case({f'qvq_answers_total{{{POD}, ended="error"}}': "0+1x60",
              f'qvq_answers_total{{{POD}, ended="answered"}}': "0+9x60"}, 20,
             "10% of the answers of serving/qvq end by an error"),
        Case({f'qvq_answers_total{{{POD}, ended="error"}}': "0+1x60",
              f'qvq_answers_total{{{POD}, ended="answered"}}': "0+99x60"}, 20),
    ],
    "QvqLoopShare": [
        Case({f'qvq_answers_total{{{POD}, ended="looped"}}': "0+2x60",
              f'qvq_answers_total{{{POD}, ended="answered"}}': "0+8x60"}, 50,
             "20% of the answers of serving/qvq end in a loop"),
        Case({f'qvq_answers_total{{{POD}, ended="looped"}}': "0+1x60",
              f'qvq_answers_total{{{POD}, ended="answered"}}': "0+19x60"}, 50),
    ],
    "QvqLatencyObjectiveBurnt": [
        Case({f'{FIRST}_bucket{{{POD}, le="10.0"}}': "0+5x120", f"{FIRST}_count{{{POD}}}": "0+10x120"}, 70,
             "50% of the first tokens of serving/qvq came after 10 s"),
        Case({f'{FIRST}_bucket{{{POD}, le="10.0"}}': "0+8x120", f"{FIRST}_count{{{POD}}}": "0+10x120"}, 70),
        # It was bad for most of an hour, and has been well for ten minutes.
        Case({f'{FIRST}_bucket{{{POD}, le="10.0"}}': "0+5x60 310+10x60", f"{FIRST}_count{{{POD}}}": "0+10x120"}, 72),
    ],
}  # fmt: skip


def labels_of(case: Case, rule: dict[str, Any]) -> dict[str, str]:
    """The labels of an alert: those of its first series that its expression keeps, and the rule's own."""
    kept = dict(re.findall(r'(\w+)="([^"]*)"', next(iter(case.series))))
    kept.pop("source", None)
    if rule["expr"].startswith("absent("):
        return dict(rule["labels"])
    return ({"job": kept["job"]} if "sum by (job)" in rule["expr"] else kept) | rule["labels"]


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "qvq-serve", "rules": rules()}]}))
    return path


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong(rule_file: Path) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", rule_file)


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    assert list(CASES) == [rule["alert"] for rule in rules()]
    assert all({case.summary is None for case in cases} == {True, False} for cases in CASES.values())


EACH = [(name, number) for name, cases in CASES.items() for number in range(len(cases))]


@pytest.mark.parametrize(("alert", "number"), EACH)
def test_an_alert_fires_when_it_should(alert: str, number: int, rule_file: Path) -> None:
    case = CASES[alert][number]
    (rule,) = [rule for rule in rules() if rule["alert"] == alert]
    fired = {
        "exp_labels": labels_of(case, rule),
        "exp_annotations": rule["annotations"] | {"summary": case.summary},
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": f"{case.at}m", "alertname": alert, "exp_alerts": [fired] if case.summary else []}
        ],
    }
    test_file = rule_file.parent / "test.yaml"
    test_file.write_text(yaml.safe_dump({"rule_files": [rule_file.name], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", test_file)


def exported() -> set[str]:
    """The series that the server exports: ours, and vLLM's as its source registers them (importing it takes 10 s)."""
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.origin
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    kinds = re.findall(r'self\._(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    ours = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    kinds += [(metric._type, metric._name) for metric in ours]
    ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + end for kind, name in kinds for end in ends[kind]}


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_every_metric_in_a_rule_or_panel_is_one_that_the_server_exports() -> None:
    known = exported()
    assert len(known) > 60
    used = {name for expr in expressions().values() for name in NAME.findall(expr)}
    assert len(used) > 15
    assert used <= known


def test_the_latency_objective_is_the_benchs() -> None:
    (rule,) = [rule for rule in rules() if rule["alert"] == "QvqLatencyObjectiveBurnt"]
    assert rule["expr"].count(f'le="{FIRST_TOKEN_S}"') == 2


def test_panels_do_not_overlap_and_every_query_is_of_this_release() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len(set(places)) == len(places) == 12
    assert all('job="serving/qvq"' in expr for expr in expressions().values())
