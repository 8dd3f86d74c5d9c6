"""The program as its users run it, against a fake server over a real socket: results, exit codes, messages."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from qvq_bench.result import unpack
from qvq_bench.serve import name_of

QUICK = "first=0.02,gap=0.005,chunks=6,tokens=2"


@contextmanager
def fake() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A fake server that says where it is."""
    code = """
import asyncio
from tests.bench import fake

async def main():
    server = await fake.serve(0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}", server
        server.terminate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with fake() as (url, _):
        yield url


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qvq_bench.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.strip().splitlines()[-1])


def sweep(url: str, out: Path, *more: str, plan: str = QUICK + ",limit=3") -> subprocess.CompletedProcess[str]:
    return bench("sweep", "--url", url, "--model", plan, "--workload", "chat-short", "--requests", "12", "--out", out,
                 "--slo", "ttft_p95=2s,ok=99%", *more)  # fmt: skip


def test_a_run_ends_with_its_summary_and_leaves_a_result_that_stands_alone(url: str, tmp_path: Path) -> None:
    out = tmp_path / "a" / "run.json"
    done = bench("run", "--url", url, "--key", "sk-secret", "--model", QUICK, "--workload", "chat-short",
                 "--load", "4", "--requests", "12", "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert last_line(done)["outcomes"] == {"ok": 12, "incomplete": 0, "error": 0, "refused": 0, "unfinished": 0}
    text = out.read_text()
    assert "sk-secret" not in text
    found = json.loads(text)
    for key in ("date", "command", "commit", "versions", "client", "workload", "plan", "target", "clock"):
        assert found[key], key
    assert found["workload"]["hash"] and found["workload"]["seed"] == 1
    rows = unpack(found["steps"][0]["requests"])
    assert len(rows["index"]) == 12 and set(rows["outcome"]) == {"ok"} and set(rows["output_tokens"]) == {12}
    # A server without our metrics: what needs them is not known, and not 0.
    assert found["steps"][0]["memory"]["kv_usage_peak"] is None
    assert found["steps"][0]["memory"]["preemptions"] is None
    assert found["steps"][0]["ceiling"]["mbu"] is None


def test_too_little_that_is_ok_is_an_exit_code(url: str) -> None:
    done = bench("run", "--url", url, "--model", QUICK + ",ending=cut", "--workload", "chat-short", "--requests", "4")
    assert done.returncode == 1
    assert last_line(done)["outcomes"]["incomplete"] == 4
    assert "ok 0.00% is below --min-ok 99.00%" in done.stderr
    allowed = bench("run", "--url", url, "--model", QUICK + ",ending=cut", "--workload", "chat-short",
                    "--requests", "4", "--min-ok", "0")  # fmt: skip
    assert allowed.returncode == 0


def test_an_open_loop_by_a_rate(url: str) -> None:
    done = bench("run", "--url", url, "--model", QUICK, "--workload", "chat-short", "--arrivals", "poisson",
                 "--load", "20", "--seconds", "2")  # fmt: skip
    found = last_line(done)
    assert done.returncode == 0 and found["outcomes"]["ok"] == pytest.approx(40, abs=25)


def test_a_sweep_finds_the_capacity_and_what_bound_it(url: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    done = sweep(url, out)
    assert done.returncode == 0, done.stderr
    found = last_line(done)
    assert (found["load"], found["next_load"], found["bound_by"], found["confidence"]) == (3.0, 4.0, "queue", 1.0)
    assert "capacity: 3 users" in done.stderr
    steps = json.loads(out.read_text())["steps"]
    again = sweep(url, out, "--resume")
    assert last_line(again)["load"] == 3.0
    assert [step["requests"] for step in json.loads(out.read_text())["steps"]] == [step["requests"] for step in steps]
    other = sweep(url, out, "--resume", "--seed", "7")
    assert other.returncode == 2 and f"--resume {out}: its workload is another one" in other.stderr


def test_no_capacity_is_an_exit_code(url: str, tmp_path: Path) -> None:
    done = sweep(url, tmp_path / "sweep.json", plan=QUICK + ",ending=refuse")
    assert done.returncode == 1 and last_line(done)["load"] is None
    assert "no capacity: not even the lowest load held (TTFT p95 was not measured; ok 0.0% < 99.0%)" in done.stderr


def test_ctrl_c_keeps_what_was_measured_and_a_sweep_goes_on_from_there(url: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    arguments = ["sweep", "--url", url, "--model", "first=0.1,gap=0.01,chunks=30,limit=3", "--workload", "qvq-long",
                 "--requests", "12", "--slo", "ttft_p95=2s,ok=99%", "--out", str(out)]  # fmt: skip
    command = [sys.executable, "-m", "qvq_bench.cli", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not out.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    kept = json.loads(out.read_text())
    assert kept["steps"] and kept["capacity"]["ended"] == "interrupted"
    assert json.loads(stdout.strip().splitlines()[-1])["ended"] == "interrupted"
    done = bench(*arguments, "--resume")
    assert done.returncode == 0 and last_line(done)["load"] == 3.0
    ended = json.loads(out.read_text())
    assert ended["steps"][0]["requests"] == kept["steps"][0]["requests"] and len(ended["resumed"]) == 1
    assert min(unpack(ended["steps"][len(kept["steps"])]["requests"])["index"]) >= kept["next_index"]


def test_a_server_that_dies_ends_a_sweep_and_bounds_no_load(tmp_path: Path) -> None:
    """Each further load was measured against nothing, "bound by compute", and --resume kept those steps."""
    out = tmp_path / "sweep.json"
    with fake() as (url, server):
        command = ["sweep", "--url", url, "--model", "first=0.1,gap=0.01,chunks=30", "--workload", "chat-short",
                   "--requests", "12", "--slo", "ttft_p95=2s,ok=99%", "--out", str(out), "--repeats", "1"]  # fmt: skip
        process = subprocess.Popen([sys.executable, "-m", "qvq_bench.cli", *command], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        until = time.monotonic() + 60
        while not out.exists() and time.monotonic() < until:
            time.sleep(0.05)
        server.kill()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and f"no server answers at {url} any more" in stderr, stderr
    assert "the server was gone before it was bracketed" in stderr and "bound by" not in stderr
    kept = json.loads(out.read_text())
    assert kept["steps"] and not any(step["errors"] for step in kept["steps"])
    assert json.loads(stdout.strip().splitlines()[-1])["ended"] == "server"


def test_what_a_cut_would_make_short_is_no_objective(url: str, tmp_path: Path) -> None:
    done = bench("sweep", "--url", url, "--workload", "chat-short", "--seconds", "5", "--no-drain",
                 "--slo", "e2e_p95=9s", "--out", tmp_path / "out.json")  # fmt: skip
    assert done.returncode == 2 and "with --no-drain E2E would be that of the short answers" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "how long a step is: give --requests N or --seconds S"),
        (["run", "--requests", "0"], "--requests 0: must be more than 0"),
        (["run", "--requests", "3", "--warmup", "5"], "--warmup 5: must be 0 or more, and needs --seconds"),
        (["run", "--requests", "3", "--no-drain"], "--no-drain: needs --seconds"),
        (["run", "--requests", "3", "--load", "1.5"], "--load 1.5: users of a closed loop are whole numbers"),
        (["run", "--requests", "3", "--load", "-1"], "--load -1: must be more than 0"),
        (["run", "--requests", "3", "--load", "nan"], "--load nan: must be more than 0, and at most 100000"),
        (["run", "--requests", "3", "--load", "1e18"], "--load 1e+18: must be more than 0, and at most 100000"),
        (["run", "--seconds", "nan"], "--seconds nan: must be more than 0, and finite"),
        (["run", "--requests", "3", "--url", "http://[bad"], "--url http://[bad: give a URL such as"),
        (["run", "--requests", "3", "--out", "/proc/nope/x.json"], "/proc/nope/x.json: the result cannot be written"),
        (["run", "--requests", "3", "--out", "/tmp"], "/tmp: the result cannot be written: Is a directory"),
        (["run", "--requests", "3", "--workload", "qvq-lang"], "Did you mean 'qvq-long'?"),
        (["run", "--requests", "3", "--arrivals", "poison"], "poisson"),
        (["run", "--requests", "3", "--url", "localhost"], "--url localhost: give a URL such as"),
        (
            ["run", "--requests", "3", "--url", "http://127.0.0.1:9"],
            "--url http://127.0.0.1:9: no server answers there",
        ),
        (["run", "--requests", "3", "--min-ok", "2"], "--min-ok 2: must be between 0 and 1"),
        (["run", "--request", "3"], "unknown argument '--request'. Did you mean '--requests'?"),
        (["sweep", "--requests", "3", "--out", "x", "--slo", "ttft=1s"], "--slo ttft=1s: unknown objective"),
        (["sweep", "--requests", "3", "--out", "x", "--repeats", "0"], "--repeats 0: must be 1 or more"),
        (["sweep", "--requests", "3", "--out", "x", "--start", "9", "--max-load", "3"], "--max-load 3: is less than"),
        (["run", "--requests", "3", "--out", "."], ".: the result needs a file's name"),
        (["run", "--seconds", "60", "--sample-every", "100"], "--sample-every 100: at most half of --seconds"),
        (
            ["serve-and-sweep", "--requests", "3", "--out", "/tmp/x", "--serve=--tp 4", "--serve=--tp=4"],
            "two settings would have the same file, tp-4.json",
        ),
        (["sweep", "--requests", "3", "--out", "x", "--min-headroom", "1"], "--min-headroom 1: must be 0 or more"),
        (["report", "nowhere.json"], "nowhere.json: cannot be read"),
        (["compare", "README.md", "README.md"], "README.md: is no JSON, so no result of qvq-bench"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.fixture(scope="module")
def swept(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "sweep.json"
    assert sweep(url, out).returncode == 0
    return out


def test_a_report_needs_no_network_and_says_the_capacity_first(swept: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = bench("report", swept, "--out", page, "--users", "10")
    assert done.returncode == 0, done.stderr
    assert "| sweep | - | 3 users |" in done.stdout
    assert "sweep: 10 users need 4 replicas, at 3 users each." in done.stdout
    text = page.read_text()
    assert not re.search(r"<script|<link|(src|href)=[\"']?(https?:)?//|url\(\s*[\"']?http", text)
    assert text.index("capacity: 3 users") < text.index("<svg")
    assert text.count("<svg") >= 6
    assert "<td>-</td>" in text  # a figure that is not known


def test_several_results_are_in_one_report(swept: Path, url: str, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    assert sweep(url, other, plan=QUICK + ",limit=5").returncode == 0
    page = tmp_path / "report.html"
    same_name = tmp_path / "b" / swept.name
    same_name.parent.mkdir()
    same_name.write_text(swept.read_text())
    assert f"| {same_name.with_suffix('')} |" in bench("report", swept, same_name, "--out", page).stdout
    done = bench("report", swept, other, "--out", page)
    assert "| sweep | - | 3 users |" in done.stdout and "| other | - | 5 users |" in done.stdout
    compared = bench("compare", swept, other)
    assert compared.returncode == 0 and last_line(compared)["capacity_ratio"] == pytest.approx(5 / 3)
    same = last_line(bench("compare", swept, swept))
    assert {row["ratio"] for row in same["rows"]} == {1.0}
    assert not any(row["told"] for row in same["rows"])


def test_what_did_not_measure_the_same_is_not_compared(swept: Path, url: str, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    assert sweep(url, other, "--seed", "9").returncode == 0
    done = bench("compare", swept, other)
    assert done.returncode == 2 and "the results cannot be compared: workload: " in done.stderr
    assert "seed: 1 and 9" in done.stderr
    assert last_line(bench("compare", swept, other, "--anyway"))["capacity_ratio"] == 1.0


def test_another_model_is_no_sweep_to_go_on_with(swept: Path, url: str, tmp_path: Path) -> None:
    out = tmp_path / "other.json"
    found = json.loads(swept.read_text())
    found["target"]["model"] = "another"
    out.write_text(json.dumps(found))
    done = sweep(url, out, "--resume")
    assert (done.returncode, "it measured the model another, not " in done.stderr) == (2, True), done.stderr


def test_a_file_that_is_no_whole_result_is_named(swept: Path, tmp_path: Path) -> None:
    found, broken = json.loads(swept.read_text()), tmp_path / "broken.json"
    for change in ({"kind": "quality"}, {"steps": [{"load": 1}]}, {"steps": None}):
        broken.write_text(json.dumps(found | change))
        for command in (("report", broken), ("compare", swept, broken)):
            done = bench(*command)
            assert (done.returncode, f"{broken}: is no result of" in done.stderr) == (2, True), done.stderr


def test_results_of_another_objective_or_of_no_common_load_are_not_compared(swept: Path, tmp_path: Path) -> None:
    found, other = json.loads(swept.read_text()), tmp_path / "other.json"
    other.write_text(json.dumps(found | {"objective": found["objective"] | {"text": "ok=50%"}}))
    done = bench("compare", swept, other)
    assert (done.returncode, "cannot be compared: objective: " in done.stderr) == (2, True), done.stderr
    other.write_text(json.dumps(found | {"steps": [step | {"load": step["load"] + 100} for step in found["steps"]]}))
    done = bench("compare", swept, other)
    assert (done.returncode, "no load in common" in done.stderr) == (2, True), done.stderr


def test_an_interrupted_measurement_is_not_compared_unasked_and_zeros_are_told(swept: Path, tmp_path: Path) -> None:
    found, other = json.loads(swept.read_text()), tmp_path / "other.json"
    steps = [step | {"interrupted": True, "ok_share": 0.0} for step in found["steps"]]
    other.write_text(json.dumps(found | {"steps": steps}))
    done = bench("compare", swept, other)
    assert (done.returncode, "Ctrl-C ended one of the measurements early" in done.stderr) == (2, True), done.stderr
    assert re.search(r"\| ok \| - \| - \| 0 of \d and (\d) of \1 repeats were 0 \|", bench(
        "compare", swept, other, "--anyway").stderr)  # fmt: skip
    page = tmp_path / "page.html"
    assert bench("report", other, "--out", page).returncode == 0
    assert "Ctrl-C ended this measurement early" in page.read_text()


def test_a_setting_too_long_for_a_files_name_has_one() -> None:
    long = "--profile x -- --compilation-config " + "a" * 300
    assert len(name_of(long)) < 110 and name_of(long) != name_of(long + "b")
    assert name_of("--demo") == "demo"


def test_a_server_that_listens_already_is_not_measured_for_another(url: str, tmp_path: Path) -> None:
    port = url.rsplit(":", 1)[1]
    done = bench("serve-and-sweep", "--serve=--demo", "--port", port, "--requests", "3", "--out", tmp_path / "out")
    assert (done.returncode > 0, f"--port {port}: something listens there already" in done.stderr) == (True, True)
    assert not list((tmp_path / "out").glob("*.json"))
