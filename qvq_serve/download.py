"""A model's files onto this disk, by the hubs' own libraries: space checked first, resumed, hashes checked."""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qvq_serve.errors import QvqError, StartError, UsageError, nearest
from qvq_serve.gpu import GIB
from qvq_serve.model import KNOWN, UNFINISHED, locate, missing_files

BLOCK_BYTES = 8 * 2**20
WAIT_S = 5.0
SPARE_SHARE = 0.01
"""Of the model's bytes, left free on its disk beside it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes, and, where we check it, its hash (git's "sha1" for a small file)."""

    path: str
    size: int
    algorithm: str = "sha256"
    digest: str | None = None


def directory(model: str, to: str | None) -> Path:
    """Where a known model goes. Raises UsageError for an unknown one, or no name."""
    if model not in KNOWN:
        raise UsageError(
            f"--model {model}: only a known model can be downloaded.{nearest(model, KNOWN)} Known: {', '.join(KNOWN)}."
        )
    if to == "":
        raise UsageError("--to is empty; give a directory, or leave it out.")
    return Path(to) if to else locate(model)


def download(model: str, source: str | None = None, to: str | None = None) -> Path:
    """Bring a known model into a directory that `--model DIR` serves, and return it.

    Raises UsageError for an unknown model or source, StartError where space, network or content fail; running it again
    goes on from there.
    """
    target = directory(model, to)
    known = KNOWN[model]
    source = source or known.sources[0]
    if source not in known.sources:
        raise UsageError(f"--source {source}: {known.repo} is on {', '.join(known.sources)}.")
    list_files, fetch = SOURCES[source]
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"{target} cannot be written: {reason(error)}; --to or QVQ_CACHE names another.") from None
    try:
        with alone(target) as waited:
            if waited and not missing_files(target):
                return target  # another process brought it meanwhile
            files = list_files(known.repo)
            check_space(target, files)
            if missing_files(target):  # not where whole files are looked at again, which may be served meanwhile
                (target / UNFINISHED).touch()
            fetch(known.repo, target, files)
            (target / UNFINISHED).unlink(missing_ok=True)
    except QvqError:
        raise
    except OSError as error:  # requests' and the hubs' network errors are OSErrors too
        raise StartError(f"{known.repo} from {source} to {target}: {reason(error)}. {AGAIN}") from None
    except Exception as error:
        failed = getattr(error, "failed_files", None) or {}
        details = "; ".join(f"{path}: {reason(cause)}" for path, cause in list(failed.items())[:3]) or reason(error)
        raise StartError(f"{known.repo} from {source} to {target}: {details}. {AGAIN}") from None
    if lacking := missing_files(target):
        raise StartError(f"{known.repo} from {source} has no {', '.join(lacking[:3])}; {target} cannot be served.")
    return target


@contextmanager
def alone(target: Path) -> Iterator[bool]:
    """A directory for this process, of those on all machines that share it; whether another one had it first.

    The hubs' libraries lock their files in a cache of each machine's own, and two of them cut each other's short.
    """
    with (target / ".qvq-download.lock").open("w") as lock:
        waited = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            print(f"qvq-serve: another process downloads to {target}; waiting", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield waited


def wait(model: str, to: str | None = None) -> Path:
    """Return the directory once its files are all there; the hubs' libraries give a file its name when it is whole."""
    target = directory(model, to)
    said = ""
    while lacking := missing_files(target):
        if (now := f"{target} lacks {lacking[0]} and {len(lacking) - 1} more files; waiting") != said:
            print(f"qvq-serve: {now}", file=sys.stderr, flush=True)
            said = now
        time.sleep(WAIT_S)
    return target


AGAIN = "What has come is kept; the same command goes on from there."


def reason(error: BaseException) -> str:
    """An error's text on one line, short enough for a terminal."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def check_space(target: Path, files: list[RemoteFile]) -> None:
    """Raises StartError where the disk cannot hold what is still to come."""
    lacking = [f for f in files if not is_of_size(target / f.path, f.size)]
    parts = sum(part.stat().st_size for part in target.rglob("*.incomplete") if part.is_file())  # of both hubs
    missing = max(0, sum(f.size for f in lacking) - parts)
    free = shutil.disk_usage(target).free
    if missing * (1 + SPARE_SHARE) > free:
        raise StartError(
            f"{target} needs {missing * (1 + SPARE_SHARE) / GIB:.1f} GiB for {len(lacking)} files, and its disk has "
            f"{free / GIB:.1f} GiB free; make room, or name another place with --to or QVQ_CACHE."
        )


def is_of_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def list_modelscope(repo: str) -> list[RemoteFile]:
    """The files of a ModelScope repository."""
    from modelscope.hub.api import HubApi

    files = HubApi().get_model_files(repo, recursive=True)
    return [RemoteFile(f["Path"], int(f["Size"])) for f in files]  # directories too, of size 0


def fetch_modelscope(repo: str, target: Path, files: list[RemoteFile]) -> None:
    """ModelScope's own download: it resumes by range, checks each file's SHA-256, and retries."""
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")  # its 1 h a file fails 4 GB at 1 MB/s
    from modelscope.hub.callback import ProgressCallback
    from modelscope.hub.snapshot_download import snapshot_download
    from tqdm import tqdm

    present = sum(f.size for f in files if (target / f.path).is_file())
    with tqdm(total=sum(f.size for f in files), initial=present, unit="B", unit_scale=True, desc=repo) as bar:

        class OnBar(ProgressCallback):  # type: ignore[misc]
            """All files on one bar: bytes, rate and time left."""

            def update(self, size: int) -> None:
                bar.update(size)

        snapshot_download(repo, local_dir=str(target), progress_callbacks=[OnBar])


def list_huggingface(repo: str) -> list[RemoteFile]:
    """The files of a Hugging Face repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    files = (f for f in HfApi().list_repo_tree(repo, recursive=True) if isinstance(f, RepoFile))
    return [
        RemoteFile(f.path, f.size, "sha256", f.lfs.sha256) if f.lfs else RemoteFile(f.path, f.size, "sha1", f.blob_id)
        for f in files
    ]


def fetch_huggingface(repo: str, target: Path, files: list[RemoteFile]) -> None:
    """Hugging Face's own download, which resumes and checks sizes; the hashes are checked here."""
    from huggingface_hub import snapshot_download
    from tqdm import tqdm

    snapshot_download(repo, local_dir=target, tqdm_class=tqdm)
    with ThreadPoolExecutor(4) as pool:
        sound = tqdm(
            pool.map(lambda f: is_sound(target / f.path, f), files), total=len(files), unit="file", desc="hashes"
        )
        bad = [f.path for f, good in zip(files, sound, strict=True) if not good]
    for path in bad:
        (target / path).unlink(missing_ok=True)
    if bad:
        raise StartError(
            f"{', '.join(bad[:3])} came with another hash than {repo} lists, and was removed; run it again."
        )


def is_sound(path: Path, file: RemoteFile) -> bool:
    """Whether a local file has the size and hash that its repository lists."""
    if not is_of_size(path, file.size):
        return False
    digest = hashlib.new(file.algorithm)
    if file.algorithm == "sha1":  # git hashes a header before the content
        digest.update(b"blob %d\0" % file.size)
    with path.open("rb") as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == file.digest


List = Callable[[str], list[RemoteFile]]
Fetch = Callable[[str, Path, list[RemoteFile]], None]
SOURCES: dict[str, tuple[List, Fetch]] = {
    "modelscope": (list_modelscope, fetch_modelscope),
    "huggingface": (list_huggingface, fetch_huggingface),
}
