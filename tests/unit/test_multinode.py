"""The launchers of several machines, as far as one machine without GPUs shows them; tests/engine/test_two_nodes.py runs
what node.sh starts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.network import free_port
from tests.unit.test_launch import ROOT, checkout

__all__ = ["checkout"]
MULTINODE = Path("launch/multinode")


@pytest.fixture
def made(checkout: Path) -> Path:
    """A checkout whose environment is this one: its Python says yes to all that making it asks."""
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python", "exit 0"), ("qvq-serve", f'exec {sys.executable} -m qvq_serve "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return checkout


def shell(checkout: Path, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    line = ["bash", checkout / MULTINODE / script, *arguments]
    environ |= {"QVQ_PYTHON": sys.executable, "QVQ_EXTRA": "cpu"}
    return subprocess.run(line, capture_output=True, text=True, timeout=60, env=os.environ | environ, check=False)


def test_the_same_flags_on_each_machine_give_vllm_each_its_part(made: Path) -> None:
    flags = ["2", "10.0.0.1", "--demo", "--tp", "2", "--dry-run", "--", "--master-port", "29700"]
    for rank, headless in (("0", []), ("1", ["--headless"])):
        done = shell(made, "node.sh", rank, *flags)
        assert done.returncode == 0, done.stderr
        line = done.stdout.splitlines()[-1].split()
        own = ["--nnodes", "2", "--node-rank", rank, "--master-addr", "10.0.0.1", *headless]
        assert line[-len(own) - 2 :] == ["--master-port", "29700", *own]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2", "2", "h", "--demo"], "RANK 2 of NODES 2: machines are numbered from 0 to 1."),
        (["x", "2", "h", "--demo"], "argument RANK: invalid int value: 'x'"),
        (["0", "2", "h", "--demo"], "--tp 1 x --pp 1 is 1, which 2 machines cannot share."),
        (["0", "2", "h", "--demo", "--dry-run"], "--tp 1 x --pp 1 is 1, which 2 machines cannot share."),
        (["0", "2"], "the following arguments are required: LEADER."),
        (
            ["--dry-run", "0", "2", "h"],
            "unknown argument '--dry-run'. `qvq-serve node --help` lists them; the server's come after LEADER.",
        ),
        (["0", "2", "h", "--demo", "--tq", "2"], "unknown argument '--tq'. Did you mean '--tp'?"),
        (
            ["0", "2", "h", "--tp", "2", "--", "-r", "1"],
            "--node-rank after -- is set by `qvq-serve node` itself;",
        ),
    ],
)
def test_a_mistake_is_told_before_any_other_machine_is_waited_for(
    made: Path, arguments: list[str], message: str
) -> None:
    done = shell(made, "node.sh", *arguments)
    assert (done.returncode, done.stderr.splitlines()[-1].startswith(f"qvq-serve: {message}")) == (2, True), done.stderr


def test_ctrl_c_ends_node_sh_at_once_with_one_line_and_130(made: Path) -> None:
    port = str(free_port())
    line = [
        "bash",
        made / MULTINODE / "node.sh",
        "--heartbeat-port",
        port,
        "1",
        "2",
        "127.0.0.1",
        "--demo",
        "--tp",
        "2",
    ]
    environ = os.environ | {"QVQ_PYTHON": sys.executable, "QVQ_EXTRA": "cpu"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr
    while "looks for node 0" not in process.stderr.readline():
        assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == "qvq-serve: interrupted\n"
    assert (process.returncode, time.monotonic() - began < 5) == (130, True)


def test_ray_sh_says_what_it_would_do_on_each_machine(checkout: Path) -> None:
    flags = ["2", "127.0.0.1", "--tp", "16", "--", "--max-num-seqs", "64"]
    head = shell(checkout, "ray.sh", "--dry-run", "0", *flags).stdout.splitlines()
    assert head[0] == "ray start --head --node-ip-address=127.0.0.1 --port=6379 "
    assert head[1] == "export VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY=QVQ_LAUNCHED_ "
    assert head[-1] == ("exec qvq-serve --force --tp 16 -- --max-num-seqs 64 --distributed-executor-backend ray ")
    other = shell(checkout, "ray.sh", "--dry-run", "1", *flags, VLLM_HOST_IP="10.0.0.2").stdout
    assert other == "exec ray start --address=127.0.0.1:6379 --node-ip-address=10.0.0.2 --block \n"
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("arguments", [[], ["2", "2", "10.0.0.1"], ["one", "2", "10.0.0.1"], ["0", "2"]])
def test_ray_sh_refuses_what_is_no_rank(checkout: Path, arguments: list[str]) -> None:
    done = shell(checkout, "ray.sh", *arguments)
    assert done.returncode == 2
    assert "expected [--dry-run] RANK NODES LEADER [FLAGS…], with RANK from 0 to NODES - 1; got:" in done.stderr


def test_what_ray_sh_gives_vllm_is_what_vllm_knows() -> None:
    """Its own parser takes the flag, and its Ray workers get the variable that our plugin reads there."""
    pytest.importorskip("vllm")
    program = (
        "import os; os.environ['VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY'] = 'QVQ_LAUNCHED_'\n"
        "from qvq_serve.engine import PROFILE_VARIABLE, parse\nos.environ[PROFILE_VARIABLE] = '{}'\n"
        "from vllm.ray.ray_env import get_env_vars_to_copy\nassert PROFILE_VARIABLE in get_env_vars_to_copy()\n"
        "assert parse(['m', '--distributed-executor-backend', 'ray']).distributed_executor_backend == 'ray'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_node_has_the_time_to_end_that_one_machine_has_and_stays_down_where_that_does() -> None:
    units = [ROOT / "launch" / "qvq-serve.service", ROOT / MULTINODE / "qvq-node@.service"]
    kept = ("QVQ_DRAIN_TIMEOUT", "TimeoutStopSec", "RestartPreventExitStatus")
    one, node = (
        [line for line in unit.read_text().splitlines() if any(f"{k}=" in line for k in kept)] for unit in units
    )
    assert len(node) == 3 and set(node) == set(one)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here (Debian: systemd)")
def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    text = (ROOT / MULTINODE / "qvq-node@.service").read_text()
    assert "Restart=always" in text and "KillMode=mixed" in text
    unit = tmp_path / "qvq-node@0.service"
    unit.write_text(text.replace("/opt/qvq-serve", str(ROOT)))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
