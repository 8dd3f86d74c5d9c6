"""Ctrl-C at a server or a download. SIGINT comes to all of their processes; one thread acts on it, the rest do not.

Left to themselves vLLM's processes each end at SIGINT, with a traceback while they load, and the server sees its engine
die.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import resource_tracker

import psutil

GONE_S = 10.0
"""For the children to be gone, and with them what they held of the GPUs' memory."""


def end_at_once() -> None:
    """From now on SIGINT ends this process and its children; to be called before there is a second thread.

    Threads and children that come later inherit that SIGINT is blocked, whatever handlers they set for it.
    """
    start_tracker()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=wait, name="Ctrl-C", daemon=True).start()


def start_tracker() -> None:
    """Start Python's resource tracker: later its start would unblock SIGINT. It is not to warn after a kill."""
    warnings = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [warnings, "ignore:resource_tracker"]))
    resource_tracker.ensure_running()
    if warnings is None:
        del os.environ["PYTHONWARNINGS"]
    else:
        os.environ["PYTHONWARNINGS"] = warnings


def wait() -> None:
    """Wait for SIGINT; then `end` takes this process over, so that nothing else in it can say or do anything more."""
    signal.sigwait({signal.SIGINT})
    children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    os.execv(sys.executable, [sys.executable, "-m", "qvq_serve.interrupt", *children])


def end(pids: list[int]) -> None:
    """Kill these processes, but for the resource tracker: it frees the others' shared memory, and ends."""
    killed = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
                killed.append(process)
    deadline = time.monotonic() + GONE_S
    while any(map(lives, killed)) and time.monotonic() < deadline:
        time.sleep(0.05)


def lives(process: psutil.Process) -> bool:
    """Whether a process runs, and is not only waiting to be buried."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    print("qvq-serve: interrupted", file=sys.stderr, flush=True)
    end([int(pid) for pid in sys.argv[1:]])
    sys.exit(130)
