"""launch/slurm: the scripts themselves, with stand-ins for srun (tests/launch/srun.py), scontrol and the server."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from qvq_serve import node
from qvq_serve.kubernetes import END_S
from tests.helm.chart import CHART

ROOT = Path(__file__).parents[2]
SCRIPTS = ("one-node.sbatch", "nodes.sbatch")
PROGRAMS = {
    "srun": f'exec {sys.executable} {Path(__file__).with_name("srun.py")} "$@"',
    "scontrol": '[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"',
    "sleep": "exit 0",
}
ENVIRONMENT = 'fail() { echo "$*" >&2; exit 3; }\nmake_environment() { :; }\n'
"""In place of launch/env.sh, which would make a .venv in the copy of the checkout."""
SERVER = """
import os, pathlib, signal, sys, time
rank = os.environ["SLURM_NODEID"]
def say(text):
    os.write(1, f"{text}\\n".encode())
"""
DRAINS = """
def drain(*_):
    time.sleep(0.3)
    say(f"drained {rank}")
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
say(f"serving {rank}")
time.sleep(60)
"""
ONCE = """
seen = pathlib.Path("seen" + rank)
if seen.exists():
    say(f"serving again {rank}")
    sys.exit()
seen.touch()
"""
DIES_ONCE = ONCE + 'sys.exit(int(os.environ["CODE"]))'
HELD = """
seen = pathlib.Path("seen" + rank)
tried = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (tried + 1))
say(f"try {tried}")
sys.exit([5, 3, 3, 0][tried] if os.environ["HELD"] == "a while" else [5, 3][min(tried, 1)])
"""
"""A card whose memory the driver has not yet given back."""
NODE_1_DIES_ONCE = f"""{ONCE}
while not (pathlib.Path("seen0").exists() and pathlib.Path("seen1").exists()):
    time.sleep(0.01)
if rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(float(os.environ["TELLING"]))
say("told the clients")
sys.exit(6)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script in a copy of the checkout's launchers; `server` is Python, or "" for the real qvq-serve."""

    started = []

    def run(name: str, *flags: str, server: str = "", **variables: str) -> subprocess.Popen[str]:
        for part in ("slurm", "multinode", "serve.sh"):
            copy = shutil.copytree if (ROOT / "launch" / part).is_dir() else shutil.copy
            (tmp_path / "launch").mkdir(exist_ok=True)
            copy(ROOT / "launch" / part, tmp_path / "launch" / part)
        (tmp_path / "launch" / "env.sh").write_text(ENVIRONMENT)
        programs = {key: f"#!/bin/sh\n{text}\n" for key, text in PROGRAMS.items()}
        if server:
            programs["qvq-serve"] = f"#!{sys.executable}\n{SERVER}{server}\n"
        for program_name, text in programs.items():
            program = tmp_path / "bin" / program_name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("QVQ_", "SLURM_"))}
        environ |= {
            "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{environ['PATH']}",
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "12",
            "SRUN_PID": str(tmp_path / "srun.pid"),
        }  # fmt: skip
        # Slurm runs a copy of the script, in the directory that it was submitted from.
        spooled = shutil.copy(tmp_path / "launch" / "slurm" / name, tmp_path / "slurm_script")
        process = subprocess.Popen(
            ["bash", spooled, *flags], cwd=tmp_path, env=environ | variables, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=30)
    return process.returncode, said


def options(name: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH (.*)$", (ROOT / "launch" / "slurm" / name).read_text(), re.M)
    words = [word for line in lines for word in shlex.split(line)]
    assert all(word.startswith("--") for word in words)
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


@pytest.mark.parametrize(
    ("name", "profile", "nodes"), [(SCRIPTS[0], "qvq72b_h100x4_bf16", 1), (SCRIPTS[1], "qvq72b_h100x8_bf16", 2)]
)
def test_what_is_asked_of_slurm_is_the_plans(name: str, profile: str, nodes: int) -> None:
    plan = yaml.safe_load((CHART / "plan.yaml").read_text())[profile]
    asked = options(name)
    assert asked["nodes"] == str(nodes) and asked["ntasks-per-node"] == "1"
    assert int(asked["gpus-per-node"]) * nodes == plan["gpus"]
    assert asked["cpus-per-task"] == str(plan["cpus"])
    assert asked["mem"] == f"{plan['memoryGiB']}G"
    # With B: the script alone would get it.
    assert asked["signal"] == f"TERM@{plan['drainSeconds'] + END_S}"
    assert (
        f"QVQ_DRAIN_TIMEOUT=${{QVQ_DRAIN_TIMEOUT:-{plan['drainSeconds']}}}"
        in (ROOT / "launch" / "slurm" / name).read_text()
    )
    assert {"requeue", "open-mode"} <= asked.keys()


def test_slurm_waits_longer_for_the_others_than_they_need() -> None:
    wait = re.search(r"--wait=(\d+)", (ROOT / "launch" / "slurm" / "nodes.sbatch").read_text())
    assert wait and int(wait[1]) > node.SILENCE_S + node.BEAT_S + node.END_S


def test_one_machine_runs_one_server_with_the_flags(start: Callable[..., subprocess.Popen[str]]) -> None:
    """By the real qvq-serve."""
    code, said = end(start("one-node.sbatch", "--profile", "demo", "--dry-run", "--system-prompt", "two words"))
    assert code == 0
    assert said.count("vllm serve ") == 1
    assert "two words" in said


def test_each_machine_gets_its_rank_the_leader_and_the_flags(start: Callable[..., subprocess.Popen[str]]) -> None:
    """By the real qvq-serve."""
    code, said = end(start("nodes.sbatch", "--profile", "demo", "--tp", "2", "--dry-run", "--", "--max-num-seqs", "7"))
    assert code == 0
    lines = [line for line in said.splitlines() if "vllm serve " in line]
    assert len(lines) == 2
    assert all("--nnodes 2" in line and "--master-addr n1" in line and "--max-num-seqs 7" in line for line in lines)
    assert sorted("--headless" in line for line in lines) == [False, True]
    assert sorted(re.findall(r"--node-rank (\d)", said)) == ["0", "1"]


@pytest.mark.parametrize(("given", "profile"), [({}, "qvq72b_h100x8_bf16"), ({"QVQ_PROFILE": "demo"}, "demo")])
def test_the_machines_share_a_profile_made_for_all_of_them(
    start: Callable[..., subprocess.Popen[str]], given: dict[str, str], profile: str
) -> None:
    show = 'say(" ".join([os.environ["QVQ_PROFILE"], os.environ["QVQ_DRAIN_TIMEOUT"], *sys.argv[1:]]))'
    code, said = end(start("nodes.sbatch", "a b", server=show, **given))
    assert code == 0
    assert sorted(said.splitlines()) == [f"{profile} 830 node {rank} 2 n1 a b" for rank in (0, 1)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_slurms_sigterm_reaches_each_server_which_drains(
    start: Callable[..., subprocess.Popen[str]], name: str, tmp_path: Path
) -> None:
    process = start(name, server=DRAINS)
    ranks = [0, 1] if name == "nodes.sbatch" else [0]
    assert process.stdout
    assert sorted(process.stdout.readline() for _ in ranks) == [f"serving {rank}\n" for rank in ranks]
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    code, said = end(process)
    assert (code, sorted(said.splitlines())) == (0, [f"drained {rank}" for rank in ranks])


@pytest.mark.parametrize(
    ("name", "code", "again"),
    [(name, code, again) for name in SCRIPTS for code, again in ((2, False), (3, False), (4, False), (5, True))]
    + [("nodes.sbatch", 6, True), ("nodes.sbatch", 137, True), ("one-node.sbatch", 137, True)],
)
def test_a_dead_server_is_started_again_and_a_refused_start_is_not(
    start: Callable[..., subprocess.Popen[str]], name: str, code: int, again: bool
) -> None:
    variables = {"CODE": str(code), "SLURM_NNODES": "1"}
    ended, said = end(start(name, server=DIES_ONCE, **variables))
    assert (ended, "serving again" in said) == ((0, True) if again else (code, False))
    assert (f"ended with exit code {code}, and is started again" in said) == again


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dead_servers_card_is_waited_for_a_while(start: Callable[..., subprocess.Popen[str]], name: str) -> None:
    """Its workers' memory was still on the card 10 s later, and the job ended."""
    code, said = end(start(name, server=HELD, HELD="a while", SLURM_NNODES="1"))
    assert (code, said.count("try ")) == (0, 4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_card_that_stays_in_use_ends_the_job(start: Callable[..., subprocess.Popen[str]], name: str) -> None:
    code, said = end(start(name, server=HELD, HELD="for ever", SLURM_NNODES="1"))
    assert (code, said.count("try ")) == (3, 7)


@pytest.mark.parametrize(("telling", "told"), [("0.3", True), ("25", False)], ids=["lives", "hangs"])
def test_a_node_that_dies_ends_the_others_which_first_tell_their_clients_if_they_can(
    start: Callable[..., subprocess.Popen[str]], telling: str, told: bool
) -> None:
    """The kill's 137 is the highest exit code, so all are started again."""
    began = time.monotonic()
    code, said = end(start("nodes.sbatch", server=NODE_1_DIES_ONCE, TELLING=telling))
    assert (code, "told the clients" in said) == (0, told)
    assert "ended with exit code 137, and is started again" in said
    assert {"serving again 0", "serving again 1"} <= {*said.splitlines()}
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_is_submitted_from_elsewhere_says_so(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "launch" / "slurm" / name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"in {tmp_path}; submit it from the checkout." in done.stderr
