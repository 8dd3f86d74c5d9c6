"""launch/qvq-serve.service, read by the real systemd-analyze."""

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from qvq_serve import errors
from qvq_serve.cli import main
from qvq_serve.kubernetes import END_S
from tests.helm.chart import CHART

UNIT = Path(__file__).parents[2] / "launch" / "qvq-serve.service"
MOST_EXPOSURE = 2.1
"""Of ten; it is 2.0 by systemd 252, the network being the largest part. A unit with nothing of it has above 9."""

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


def verify(text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """What systemd says of a unit whose checkout lies in `directory`: it looks whether the program is there."""
    program = directory / ".venv" / "bin" / "qvq-serve"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.touch(mode=0o755)
    unit = directory / UNIT.name
    unit.write_text(text.replace("/opt/qvq-serve", str(directory)))
    return analyze("verify", "--recursive-errors=no", unit)


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    done = verify(UNIT.read_text(), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize(
    ("line", "broken", "complaint"),
    [
        ("KillMode=mixed", "KillMode=gentle", "kill mode"),
        ("PrivateTmp=yes", "PrivatTmp=yes", "PrivatTmp"),
        ("ExecStart=/opt/qvq-serve/.venv/bin/qvq-serve", "ExecStart=/nonexistent", "not executable"),
        ("SystemCallFilter=@system-service", "SystemCallFilter=@sistem-service", "@sistem-service"),
    ],
)
def test_systemd_finds_what_is_wrong(line: str, broken: str, complaint: str, tmp_path: Path) -> None:
    assert line in UNIT.read_text()
    done = verify(UNIT.read_text().replace(line, broken), tmp_path)
    assert complaint in done.stderr


@needs_systemd
def test_its_exposure_is_low() -> None:
    security = ("security", "--offline=true", f"--threshold={MOST_EXPOSURE * 10:.0f}")
    done = analyze(*security, UNIT)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_systemd
def test_its_exposure_is_too_high_without_the_hardening(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("CapabilityBoundingSet=\n", "").replace("NoNewPrivileges=yes\n", ""))
    assert analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE * 10:.0f}", unit).returncode != 0


@pytest.fixture
def service() -> dict[str, str]:
    """The section [Service], the assignments of all Environment lines joined."""
    lines = UNIT.read_text().splitlines()
    environment = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string("\n".join(line for line in lines if not line.startswith("Environment=")))
    pairs = (pair.split("=", 1) for pair in " ".join(environment).split())
    return dict(parser["Unit"]) | dict(parser["Service"]) | dict(pairs)


def test_the_stop_waits_for_the_longest_answer(service: dict[str, str]) -> None:
    drain = yaml.safe_load((CHART / "plan.yaml").read_text())["qvq72b_h100x4_bf16"]["drainSeconds"]
    assert service["QVQ_DRAIN_TIMEOUT"] == str(drain)
    assert service["TimeoutStopSec"] == str(drain + END_S)
    assert service["KillMode"] == "mixed"


def test_a_mistake_is_not_tried_again_and_a_card_that_is_still_full_is_for_a_minute(service: dict[str, str]) -> None:
    mistakes = {errors.EXIT_USAGE, errors.EXIT_DOES_NOT_FIT}
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == mistakes
    assert service["Restart"] == "always"
    starts, pause, interval = (
        int(service[name]) for name in ("StartLimitBurst", "RestartSec", "StartLimitIntervalSec")
    )
    assert (starts - 1) * pause >= 50  # s in which refusals, each at once, are tried again
    assert starts * (pause + 80) <= interval  # a start that always fails comes to an end: vLLM's own errors take 80 s


def test_the_server_takes_the_units_environment(
    service: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("QVQ_")]:
        monkeypatch.delenv(name)
    for name in ("QVQ_DRAIN_TIMEOUT", "QVQ_CACHE"):
        monkeypatch.setenv(name, service[name])
    assert main(["--print-config", "--model", "demo"]) == 0
    printed = capsys.readouterr()
    assert "QVQ_DRAIN_TIMEOUT" in printed.out
    assert "not known" not in printed.err
