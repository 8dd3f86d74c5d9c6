"""What the server does when a part of it dies."""

from pathlib import Path

import psutil

from tests.engine.conftest import serving, user


def test_a_server_whose_engine_is_killed_ends_with_a_code_of_its_own_and_leaves_no_process(cache: Path) -> None:
    with serving(cache, "--demo") as server:
        assert server.chat(user("Hi")).status_code == 200
        below = psutil.Process(server.process.pid).children(recursive=True)
        engine = next(process for process in below if "EngineCore" in " ".join(process.cmdline()))
        engine.kill()
        assert server.process.wait(10) == 5
        assert "qvq-serve: vLLM's engine died" in server.log.read_text()
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []
