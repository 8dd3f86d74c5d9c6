"""The built-in demo model: Qwen2-VL's architecture in a few megabytes, built once into the cache directory."""

import os
import shutil
import tempfile
from pathlib import Path

from qvq_serve.errors import StartError
from qvq_serve.model import cache_dir, missing_files

VERSION = 4
"""Raised whenever `build` would write other files, so that an old cache is not served."""


def directory() -> Path:
    """Where the demo model lies, or will once it is built."""
    return cache_dir() / f"demo-{VERSION}"


def ensure() -> Path:
    """The demo model's directory, built where it is missing. Raises StartError for a cache that cannot be written."""
    target = directory()
    if target.is_dir() and not missing_files(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    except OSError as error:
        raise StartError(
            f"the cache directory {target.parent} cannot be written: {error.strerror}; QVQ_CACHE names another."
        ) from None
    try:
        from qvq_serve.demo.build import build

        build(work)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work, target)  # a second process that builds at once leaves the same files
    except OSError as error:
        if missing_files(target):
            raise StartError(f"the demo model cannot be written to {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
