"""`serve-and-sweep`: a server for each of several settings, one after another, and one report."""

import argparse
import asyncio
import os
import re
import shlex
import signal
import socket
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from qvq_bench import report, result
from qvq_bench.bench import Plan, Target
from qvq_bench.runs import SweepSettings, say, sweep_server
from qvq_bench.workload import Workload
from qvq_serve.errors import QvqError, StartError, UsageError

STOP_TIMEOUT_S = 60.0


@asynccontextmanager
async def serving(arguments: str, port: int, log: Path, timeout: float) -> AsyncIterator[str]:
    """A `qvq-serve` with these arguments, once it is ready; its URL. Raises StartError where it does not come up."""
    words = shlex.split(arguments)
    ours = words.index("--") if "--" in words else len(words)
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        raise UsageError(f"--port {port}: something listens there already; stop it, or choose another.")
    command = [sys.executable, "-m", "qvq_serve", *words[:ours], "--port", str(port), *words[ours:]]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        await asyncio.wait_for(until_ready(process, url), timeout)
        yield url
    except TimeoutError:
        raise StartError(f"--serve '{arguments}': not ready after {timeout:g} s; its log is {log}.") from None
    except ChildProcessError:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise StartError(f"--serve '{arguments}': ended at its start: {' '.join(last)} (its log is {log})") from None
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def until_ready(process: asyncio.subprocess.Process, url: str) -> None:
    """Raises ChildProcessError where the server ends first."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while process.returncode is None:
            try:
                async with session.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            except (TimeoutError, aiohttp.ClientError):
                pass
            await asyncio.sleep(0.5)
    raise ChildProcessError


def name_of(arguments: str) -> str:
    """A file's name for a setting."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", arguments).strip("-") or "default"
    return name if len(name) <= 100 else f"{name[:90]}-{zlib.crc32(arguments.encode()):08x}"


async def serve_and_sweep(options: argparse.Namespace, workload: Workload, plan: Plan, settings: SweepSettings) -> int:
    """A sweep of each setting. One that does not start is said and passed over; the exit code is then 1."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {options.out}: no directory can be made there: {error.strerror}.") from None
    for arguments in options.serve:
        try:
            shlex.split(arguments)
        except ValueError as error:
            raise UsageError(f"--serve '{arguments}': {str(error).lower()}.") from None
    code, names = 0, [name_of(arguments) for arguments in options.serve]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"--serve: two settings would have the same file, {twice}.json; give each once.")
    made = []
    for arguments, name in zip(options.serve, names, strict=True):
        path = options.out / f"{name}.json"
        say(f"qvq-serve {arguments}")
        try:
            async with serving(arguments, options.port, path.with_suffix(".log"), options.start_timeout) as url:
                target = Target(url, os.environ.get("QVQ_API_KEY"), timeout=options.timeout)  # the server has it too
                made.append(path)
                code = max(
                    code, await sweep_server(target, workload, plan, settings, path, options.argv, not options.quiet)
                )
        except QvqError as error:
            say(f"qvq-bench: {error}")
            code = max(code, 1)
        if code > 1:  # interrupted
            break
    results: list[tuple[Path, dict[str, Any]]] = [(path, result.read(path)) for path in made if path.exists()]
    if results:
        print(report.write(results, options.out / "report.html", None))
        say(f"qvq-bench: {options.out / 'report.html'}")
    return code
