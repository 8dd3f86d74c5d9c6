"""The Dockerfile: what a linter says, what can be run of it here, and that it is what the chart and compose expect."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helm.chart import needs_helm, pods

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
CONSTRAINTS = ROOT / "launch" / "constraints-gpu.txt"
needs_hadolint = pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is missing: pip install -e .[test]")


def stages() -> dict[str, dict[str, list[str]]]:
    """Instructions of each stage by their name, continued lines joined."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in DOCKERFILE.read_text().splitlines() if line[:1] != "#"))
    found: dict[str, dict[str, list[str]]] = {}
    stage: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            stage = found.setdefault(rest.rpartition(" ")[2], {})
        stage.setdefault(name, []).append(rest)
    return found


def environment(stage: dict[str, list[str]]) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in stage["ENV"] for pair in line.split())


@needs_hadolint
def test_the_linter_finds_nothing_and_would_find_something(tmp_path: Path) -> None:
    assert subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True, check=False).stdout == ""
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("USER 1000:1000", "RUN cd /tmp"))
    assert subprocess.run(["hadolint", tmp_path / "Dockerfile"], capture_output=True, check=False).returncode == 1


def test_vllms_image_must_be_named_by_digest() -> None:
    (check,) = [run for run in stages()["gpu"]["RUN"] if "@sha256:" in run]
    for image, code in (("vllm/vllm-openai:v0.32.0", 1), ("vllm/vllm-openai:v0.32.0@sha256:" + "0" * 64, 0)):
        done = subprocess.run(
            ["bash", "-c", check], env={"VLLM_IMAGE": image}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, image in done.stderr) == (code, bool(code))


def test_bytecode_is_compiled_of_all_that_lies_beside_vllm(tmp_path: Path) -> None:
    for module, source in (("vllm/__init__.py", ""), ("torch/nn.py", "x = 1"), ("torch/old.py", "print 1")):
        (tmp_path / module).parent.mkdir(exist_ok=True)
        (tmp_path / module).write_text(source)
    (compiles,) = [run for run in stages()["gpu"]["RUN"] if "compileall" in run]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["bash", "-euc", compiles], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(file.name.partition(".")[0] for file in tmp_path.rglob("*.pyc")) == ["__init__", "nn"]


def constraints(image: str) -> set[str]:
    done = subprocess.run(
        ["bash", ROOT / "launch" / "image_constraints.sh", CONSTRAINTS],
        input=image, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.splitlines())


def test_what_an_image_has_is_kept_and_the_rest_is_ours() -> None:
    image = "torch==2.13.0+cu130\nNumPy==1.0\nflashinfer_python @ file:///flashinfer.whl\nopencv.python==1\n"
    ours = {line for line in CONSTRAINTS.read_text().splitlines() if line and line[0] != "#"}
    wanted = constraints(image)
    assert {"torch==2.13.0+cu130", "NumPy==1.0", "opencv.python==1"} <= wanted
    assert not [line for line in wanted if re.match(r"(torch==2.13.0|numpy==|flashinfer-python)(?!.*cu130)", line)]
    assert any(line.startswith("modelscope==") for line in wanted)
    assert wanted - set(image.splitlines()) < ours
    assert constraints("") == ours


def test_everything_that_is_used_of_the_source_is_sent_to_the_build() -> None:
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
    used = "pyproject.toml README.md LICENSE qvq_serve benchmarks/qvq_bench benchmarks/workloads launch/profiles"
    used += " launch/env.sh launch/image_constraints.sh launch/constraints-cpu.txt launch/constraints-gpu.txt"
    for path in used.split():
        assert (ROOT / path).exists()
        assert not any(path == entry or path.startswith(f"{entry}/") for entry in ignored)


@needs_helm
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_image_is_what_the_chart_runs(target: str) -> None:
    """Its user, the places that it writes to, its ports, and the programs of every pod."""
    stage = stages()[target]
    assert stage["USER"][-1] == "1000:1000"
    assert json.loads(stage["ENTRYPOINT"][0]) == ["qvq-serve"]
    assert "bench" in " ".join(stage["RUN"]) and "router" in " ".join(stage["RUN"])
    set_here = environment(stage)
    for scenario in ("minimal", "hardened", "cpu-demo"):
        for pod in pods(scenario):
            spec = pod["spec"]
            assert (
                f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}" == stage["USER"][-1]
            )
            for container in spec["containers"]:
                assert container["command"][0] in ("qvq-serve", "qvq-bench", "vllm-router", "sh")
                given = {e["name"]: e.get("value") for e in container["env"]}
                if container["name"] == "server":
                    kept = set_here.keys() - {"PATH"}
                    assert {name: given[name] for name in kept} == {name: set_here[name] for name in kept}
                    assert stage["EXPOSE"] == [str(container["ports"][0]["containerPort"])]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_health_check_asks_the_servers_health(target: str) -> None:
    (check,) = stages()[target]["HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", "QVQ_PORT": "1"}, capture_output=True, check=False)
    assert done.returncode == 1 and b"Connection refused" in done.stderr
