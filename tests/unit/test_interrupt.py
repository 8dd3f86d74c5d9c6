"""What is found of a process's descendants, while they make more."""

import subprocess
import sys
from contextlib import suppress

import psutil

SPAWNS = "while :; do sleep 30 & sleep 0.001; done"
PROGRAM = f"""
import subprocess, time
from qvq_serve import interrupt
child = subprocess.Popen(["bash", "-c", {SPAWNS!r}], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
time.sleep(0.3)
print(*interrupt.halted(), flush=True)
time.sleep(0.3)
import psutil
print(*(one.pid for one in psutil.Process().children(recursive=True) if interrupt.lives(one)), flush=True)
"""


def test_a_process_that_makes_others_meanwhile_is_found_with_all_of_them() -> None:
    """A worker that was made as its parent was killed lived on until it had loaded."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    found, left = (set(map(int, line.split())) for line in done.stdout.splitlines())
    try:
        assert len(found) > 3
        assert found == left
    finally:
        for pid in left:
            with suppress(psutil.NoSuchProcess):  # its group was left without a parent
                psutil.Process(pid).kill()
