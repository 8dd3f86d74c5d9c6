"""Shell scripts, by shellcheck."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is missing: pip install -e .[test]")


def scripts() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if name.endswith((".sh", ".sbatch")) or name == ".ci/run"]


def check(*names: str | Path) -> str:
    command = ["shellcheck", "-x", "-P", "SCRIPTDIR", "--exclude=SC2119", *names]  # SC2119: arguments that are optional
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_shellcheck_finds_nothing_and_would_find_something(tmp_path: Path) -> None:
    assert len(scripts()) >= 7
    assert check(*scripts()) == ""
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm $1/*\n")
    assert "SC2086" in check(tmp_path / "bad.sh")


def test_every_launcher_becomes_the_server() -> None:
    """A shell between would keep a signal from it."""
    for name in ("launch/serve.sh", "launch/bench.sh", "launch/test.sh", ".ci/run"):
        assert (ROOT / name).read_text().rstrip().splitlines()[-1].startswith("exec ")
