"""The chart's plan is what the profiles give. `python -m tests.helm.test_plan` writes helm/qvq-serve/plan.yaml."""

import re
from pathlib import Path

import pytest
import yaml
from qvq_bench import cli as bench

from qvq_serve import cli, kubernetes
from qvq_serve.errors import UsageError
from qvq_serve.profile import read_profile, resolve, shipped_profiles
from tests.helm.chart import CHART, SCENARIOS, needs_helm, pods

HEADER = "# What Kubernetes must know of each profile of launch/profiles: `python -m tests.helm.test_plan` writes it.\n"


def written() -> str:
    plans = []
    for name, file in shipped_profiles().items():
        values = kubernetes.as_values(kubernetes.figures(resolve(environ={}, profile_files=(file,))))
        plans.append(f"{name}:\n" + values.partition("\n")[2])
    return HEADER + "\n".join(plans) + "\n"


def test_the_charts_plan_is_that_of_the_profiles() -> None:
    assert (CHART / "plan.yaml").read_text() == written(), "python -m tests.helm.test_plan writes it"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, int]:
    assert cli.main(["plan", "--values", *arguments]) == 0
    plan: dict[str, int] = yaml.safe_load(capsys.readouterr().out)["plan"]
    return plan


def test_plan_prints_the_values_of_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--profile", "qvq72b_h100x4_bf16") == yaml.safe_load(written())["qvq72b_h100x4_bf16"]


def test_a_longer_answer_takes_a_longer_drain_and_grace(capsys: pytest.CaptureFixture[str]) -> None:
    """The scenario of one H200 has these two numbers by hand."""
    plan = printed(capsys, "--profile", "qvq72b_h200x1_fp8", "--max-output-tokens", "16384")
    assert (plan["drainSeconds"], plan["graceSeconds"]) == (1649, 1694)
    assert yaml.safe_load((CHART / "ci" / "h200x1-fp8-values.yaml").read_text())["plan"].items() <= plan.items()


def test_a_drain_that_is_given_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    plan = printed(capsys, "--profile", "demo", "--drain-timeout", "20")
    assert (plan["drainSeconds"], plan["graceSeconds"]) == (20, 65)


def test_an_answer_takes_at_most_what_a_request_may(capsys: pytest.CaptureFixture[str]) -> None:
    plan = printed(capsys, "--profile", "demo", "--request-timeout", "100")
    assert (plan["drainSeconds"], plan["requestSeconds"]) == (100, 100)


def test_the_slowest_token_is_that_of_the_benchs_objective() -> None:
    ttft, tpot = re.match(r"ttft_p95=(\d+)s,tpot_p95=(\d+)ms", bench.SLO).groups()
    assert (int(ttft), int(tpot)) == (kubernetes.FIRST_TOKEN_S, kubernetes.TOKEN_S * 1000)


def test_the_starts_are_those_that_were_measured() -> None:
    import json

    results = CHART.parents[1] / "benchmarks" / "results"
    starts = {r["name"]: r["start_s"] for r in json.loads((results / "starts_2026-11-24.json").read_text())}
    others = [r["start_s"] for r in json.loads((results / "memory_2026-11-24.json").read_text())]
    assert starts["demo"] <= kubernetes.START_DEMO_S
    assert max(starts["72b-fp8-channel-graphs-192"], *others) <= kubernetes.START_COMPILED_S
    assert max(s for name, s in starts.items() if "eager" in name) <= kubernetes.START_EAGER_S


def test_a_profile_without_hardware_needs_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("tp = 8\n")
    assert read_profile(mine).hardware.gpus == 0
    with pytest.raises(UsageError, match="--values needs a card: --gpu h100"):
        cli.dispatch(["plan", "--values", "--config", str(mine)], ())
    assert printed(capsys, "--config", str(mine), "--gpu", "h100")["gpus"] == 8


@needs_helm
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_rendered_is_the_plan(scenario: str) -> None:
    values = yaml.safe_load((CHART / "ci" / f"{scenario}-values.yaml").read_text()) or {}
    plan = yaml.safe_load(written())[values.get("profile", "qvq72b_h100x4_bf16")] | values.get("plan", {})
    servers = [pod["spec"] for pod in pods(scenario) if "qvq-serve/role" in pod["metadata"]["labels"]]
    gpus = 0
    for spec in servers:
        server = spec["containers"][0]
        gpus += int(server["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert server["resources"]["limits"]["memory"] == f"{plan['memoryGiB']}Gi"
        assert spec["terminationGracePeriodSeconds"] == plan["graceSeconds"]
        (shm,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
        assert shm == {"medium": "Memory", "sizeLimit": f"{plan['shmGiB']}Gi"}
        if "startupProbe" in server:
            allowed = server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"]
            assert 0 <= allowed - plan["startupSeconds"] < 10
    assert gpus == plan["gpus"]


if __name__ == "__main__":
    (CHART / "plan.yaml").write_text(written())
