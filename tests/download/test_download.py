"""`qvq-serve download` with the hubs' real libraries against a hub on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvq_serve.model import UNFINISHED, missing_files
from tests.download.hub import MODEL, WEIGHTS, Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def hubs(hub: Hub, home: Path) -> dict[str, str]:
    """The environment in which this machine's hub stands for both hubs."""
    return {"MODELSCOPE_ENDPOINT": hub.url, "HF_ENDPOINT": hub.url, "HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "MODELSCOPE_CACHE": str(home), "HF_HOME": str(home)}  # fmt: skip


def qvq_serve(hub: Hub, home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command that finds this machine's hub in place of both hubs."""
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "qvq_serve", *arguments]
    environ = hubs(hub, home) | environ
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environ, check=False)


def download(hub: Hub, to: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return qvq_serve(hub, to.parent / "home", "download", "--to", str(to), *arguments, **environ)


def assert_whole(to: Path) -> None:
    assert {path: (to / path).read_bytes() for path in MODEL} == MODEL


def assert_failed(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 3 and, last on stderr, an error with these words and no traceback."""
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr[done.stderr.rindex("qvq-serve: ") :]
    assert all(word in last for word in words), last


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_a_download_is_whole_shows_progress_and_names_its_directory(hub: Hub, tmp_path: Path, source: str) -> None:
    done = download(hub, tmp_path / "model", "--source", source)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [str(tmp_path / "model")]), done.stderr
    assert_whole(tmp_path / "model")
    assert "100%" in done.stderr
    assert "MB" in done.stderr


def test_a_cut_connection_is_resumed_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = 1
    done = download(hub, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path / "model")
    assert hub.ranges[0] is None
    assert hub.ranges[-1] == "bytes=300000-"


def test_a_broken_download_says_so_and_the_same_command_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = 1
    done = download(hub, tmp_path / "model", MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert_failed(done, WEIGHTS, "What has come is kept; the same command goes on from there.")
    assert download(hub, tmp_path / "model").returncode == 0
    assert_whole(tmp_path / "model")
    assert hub.ranges == [None, "bytes=300000-"]


def test_a_corrupt_file_is_refused_and_not_left_behind(hub: Hub, tmp_path: Path) -> None:
    hub.files[WEIGHTS] = b"\0" * len(MODEL[WEIGHTS])
    assert_failed(download(hub, tmp_path / "model"), WEIGHTS, "Hash mismatch")
    assert not (tmp_path / "model" / WEIGHTS).exists()


def test_a_corrupt_file_from_hugging_face_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.files[WEIGHTS] = b"\0" * len(MODEL[WEIGHTS])
    assert_failed(download(hub, tmp_path / "model", "--source", "huggingface"), WEIGHTS, "another hash")
    assert not (tmp_path / "model" / WEIGHTS).exists()


def test_a_file_that_went_bad_on_this_disk_is_brought_again(hub: Hub, tmp_path: Path) -> None:
    assert download(hub, tmp_path / "model").returncode == 0
    (tmp_path / "model" / WEIGHTS).write_bytes(b"\0" * len(MODEL[WEIGHTS]))
    assert download(hub, tmp_path / "model").returncode == 0
    assert_whole(tmp_path / "model")


def test_too_small_a_disk_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.listed_sizes[WEIGHTS] = 10**16
    assert_failed(download(hub, tmp_path / "model"), "GiB for 4 files", "GiB free; make room")
    assert hub.ranges == []


def test_a_disk_that_fills_up_is_named(hub: Hub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for the weights once: what has come of them is room that the same command does not need again.
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk to fill")
    try:
        hub.before_weights = lambda: fill(disk / "other")
        assert_failed(download(hub, disk / "model"), WEIGHTS, "No space left on device", "What has come is kept")
        hub.before_weights = None
        (disk / "other").unlink()
        assert download(hub, disk / "model").returncode == 0
        assert_whole(disk / "model")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(path: Path) -> None:
    """Write to a file until its disk has 300 KB left."""
    free = shutil.disk_usage(path.parent).free
    path.write_bytes(b"\0" * max(0, free - 300_000))


def test_a_hub_that_does_not_answer_is_named(hub: Hub, tmp_path: Path) -> None:
    done = download(hub, tmp_path / "model", MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert_failed(done, "Qwen/QVQ-72B-Preview from modelscope")


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(hub: Hub, tmp_path: Path, source: str) -> None:
    began, over = threading.Event(), threading.Event()
    hub.before_weights = lambda: (began.set(), over.wait(60))
    arguments = ["download", "--source", source, "--to", str(tmp_path / "model")]
    with subprocess.Popen(
        [sys.executable, "-m", "qvq_serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | hubs(hub, tmp_path),
        start_new_session=True,
    ) as process:
        assert began.wait(60)
        os.killpg(process.pid, signal.SIGINT)
        try:
            said = process.communicate(timeout=5)[1]
        finally:
            process.kill()
            over.set()
    assert process.returncode == 130
    assert said.endswith("qvq-serve: interrupted\n") and "Traceback" not in said
    hub.before_weights = None
    done = qvq_serve(hub, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path / "model")


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_two_machines_that_share_a_directory_bring_its_files_once(hub: Hub, tmp_path: Path, source: str) -> None:
    """Each had the hub's lock in its own home, cut the other's file short, and found it whole."""
    began, go_on = threading.Event(), threading.Event()
    hub.before_weights = lambda: (began.set(), go_on.wait(60))
    command = [sys.executable, "-m", "qvq_serve", "download", "--source", source, "--to", str(tmp_path / "model")]
    homes = [tmp_path / "a", tmp_path / "b"]
    running = []
    for home in homes:
        home.mkdir()
        environ = os.environ | hubs(hub, home)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, **pipes, text=True, env=environ))
        assert began.wait(60)
    second = running[1]
    assert second.stderr and "another process downloads to" in second.stderr.readline()
    go_on.set()
    ends = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], ends
    assert_whole(tmp_path / "model")
    assert len(hub.ranges) == 1


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_a_download_that_was_killed_before_its_hashes_were_checked_is_not_done(
    hub: Hub, tmp_path: Path, source: str
) -> None:
    """All files had their names and sizes by then."""
    assert download(hub, tmp_path / "model", "--source", source).returncode == 0
    assert missing_files(tmp_path / "model") == []
    (tmp_path / "model" / UNFINISHED).touch()
    assert len(missing_files(tmp_path / "model")) == 1
    assert download(hub, tmp_path / "model", "--source", source).returncode == 0
    assert missing_files(tmp_path / "model") == []
    hub.files[WEIGHTS] = bytes(len(hub.files[WEIGHTS]))  # of the right size
    shutil.rmtree(tmp_path / "model")
    assert_failed(download(hub, tmp_path / "model", "--source", source))
    assert any(UNFINISHED in lacking for lacking in missing_files(tmp_path / "model"))


def test_made_up_weights_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    start = ["--model", "qvq-72b", "--force", "--port", "18996", "--", "--load-format", "dummy"]
    done = qvq_serve(hub, tmp_path, *start, QVQ_CACHE=str(tmp_path))
    assert_failed(done, "has no config.json, which --load-format dummy")
    assert hub.ranges == []


def test_a_repository_without_weights_cannot_be_served(hub: Hub, tmp_path: Path) -> None:
    del hub.files[WEIGHTS]
    assert_failed(download(hub, tmp_path / "model"), "has no *.safetensors")


def test_a_start_brings_weights_that_are_not_there_first(hub: Hub, tmp_path: Path) -> None:
    """--force, since no GPU is here; vLLM then refuses the hub's empty config.json."""
    done = qvq_serve(hub, tmp_path, "--model", "qvq-72b", "--force", "--port", "18996", QVQ_CACHE=str(tmp_path))
    assert_whole(tmp_path / "models" / "Qwen" / "QVQ-72B-Preview")
    assert "--force goes on against this: no NVIDIA GPU is visible" in done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode, "qvq-serve: vLLM stopped" in done.stderr) == (3, True), done.stderr[-2000:]


def test_a_slip_is_said_before_the_weights_come(hub: Hub, tmp_path: Path) -> None:
    for arguments, message in (
        (["--", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--hook", "nosuch:Mod"], "--hook nosuch:Mod"),
    ):
        start = ["--model", "qvq-72b", "--force", "--port", "18996", *arguments]
        done = qvq_serve(hub, tmp_path, *start, QVQ_CACHE=str(tmp_path))
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr[-2000:]
        assert "Traceback" not in done.stderr
    assert hub.ranges == []


def test_who_waits_for_the_weights_goes_on_when_another_has_brought_them(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvq_serve", "download", "--wait", "--to", str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr and waiting.stdout
        assert "lacks config.json and" in waiting.stderr.readline()
        assert download(hub, tmp_path / "model").returncode == 0
        assert waiting.wait(30) == 0
        assert waiting.stdout.read().strip() == str(tmp_path / "model")
