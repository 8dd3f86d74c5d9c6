"""Ctrl-C at a server or a download, and SIGTERM at one that does not serve yet: one thread acts on them.

SIGINT comes to all of their processes. Left to themselves vLLM's each end at it, with a traceback while they load, and
the server sees its engine die. A SIGTERM while it loads vLLM loses, or hangs at; and the first process of a container
gets none that it does not ask for.
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


SIGNALS = {signal.SIGINT, signal.SIGTERM}
SERVING = threading.Event()
"""SIGTERM is the main thread's."""


def end_at_once() -> None:
    """From now on SIGINT and SIGTERM end this process and its children; to be called before there is a second thread.

    Threads and children that come later inherit that both are blocked, whatever handlers they set for them.
    """
    start_tracker()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=wait, name="Ctrl-C", daemon=True).start()


def hand_over() -> None:
    """To be called in the main thread, whose own handler SIGTERM has from now on."""
    SERVING.set()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def start_tracker() -> None:
    """Start Python's resource tracker: later its start would unblock both. It is not to warn after a kill."""
    warnings = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [warnings, "ignore:resource_tracker"]))
    resource_tracker.ensure_running()
    if warnings is None:
        del os.environ["PYTHONWARNINGS"]
    else:
        os.environ["PYTHONWARNINGS"] = warnings


def wait() -> None:
    """Wait for a signal; then `end` takes this process over, so that nothing else in it can say or do anything more."""
    while (number := signal.sigwait(SIGNALS)) == signal.SIGTERM and SERVING.is_set():
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    children = [str(pid) for pid in halted()]
    os.execv(sys.executable, [sys.executable, "-m", "qvq_serve.interrupt", str(int(number)), *children])


def halted() -> list[int]:
    """This process's descendants, each stopped before the next look, as one that runs could make another meanwhile.

    But for resource trackers: they free the others' shared memory, and end by themselves.
    """
    seen, found = set[int](), list[int]()
    while new := [child for child in psutil.Process().children(recursive=True) if child.pid not in seen]:
        for child in new:
            seen.add(child.pid)
            if (name := title(child)) and "multiprocessing.resource_tracker" not in name:
                with suppress(psutil.Error):
                    child.suspend()
                    found.append(child.pid)
    return found


def end(pids: list[int]) -> None:
    """Kill these processes, and wait until they are gone."""
    killed = []
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            process.kill()
            killed.append(process)
    deadline = time.monotonic() + GONE_S
    while any(map(lives, killed)) and time.monotonic() < deadline:
        time.sleep(0.05)


def title(process: psutil.Process) -> str:
    """A process's command line, or the name that it gave itself; nothing for one that has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def lives(process: psutil.Process) -> bool:
    """Whether a process runs, and is not only waiting to be buried."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    number, *pids = map(int, sys.argv[1:])
    told = "interrupted" if number == signal.SIGINT else "terminated before it was done, or served"
    print(f"qvq-serve: {told}", file=sys.stderr, flush=True)
    end(pids)
    if number == signal.SIGTERM:  # for systemd an end by the signal is in order, and one with its code is not
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    sys.exit(128 + number)  # the first process of a container survives that
