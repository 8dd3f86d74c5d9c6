"""The chart by the real Helm: what the tests of this directory share. `python -m tests.helm.chart` writes rendered/."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "helm" / "qvq-serve"
RENDERED = Path(__file__).parent / "rendered"
SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
Manifest = dict[str, Any]

needs_helm = pytest.mark.skipif(not shutil.which("helm"), reason="Helm is missing; launch/tools.sh brings it")
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool") or not shutil.which("helm"),
    reason="promtool or Helm is missing; launch/tools.sh brings them",
)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Helm, with no look at a cluster or at the user's own settings."""
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "HELM_CACHE_HOME": "/tmp/helm-of-qvq-tests"}
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, check=False, env=environ, timeout=60)


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    return helm("template", "qvq", str(CHART), "--namespace", "serving", *arguments)


@cache
def rendered(scenario: str) -> str:
    """The manifests of a scenario, as Helm prints them."""
    done = template("--values", str(CHART / "ci" / f"{scenario}-values.yaml"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifests(scenario: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(rendered(scenario)) if manifest]


def one(scenario: str, kind: str, name: str = "qvq") -> Manifest:
    """The manifest of a kind and name."""
    (found,) = [m for m in manifests(scenario) if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def pods(scenario: str) -> list[Manifest]:
    """Every pod, or template of one, of a scenario."""
    found = []
    for manifest in manifests(scenario):
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Pod":
            found.append(manifest)
        elif manifest["kind"] == "LeaderWorkerSet":
            found += [spec["leaderWorkerTemplate"][key] for key in ("leaderTemplate", "workerTemplate")]
        elif "template" in spec:
            found.append(spec["template"])
    return found


if __name__ == "__main__":
    RENDERED.mkdir(exist_ok=True)
    for name in SCENARIOS:
        (RENDERED / f"{name}.yaml").write_text(rendered(name))
