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


DENIED = """
import subprocess, psutil
from qvq_serve import interrupt
children = [subprocess.Popen(["sleep", "30"]) for _ in range(2)]
suspend = psutil.Process.suspend
def refused(process):
    if process.pid == children[0].pid:
        raise psutil.AccessDenied(process.pid)
    suspend(process)
psutil.Process.suspend = refused
print(interrupt.halted() == [children[1].pid])
for child in children:
    child.kill()
"""


def test_a_child_with_other_rights_does_not_end_the_wait_for_signals() -> None:
    """nvidia-modprobe while CUDA starts: from then on neither Ctrl-C nor SIGTERM was answered."""
    done = subprocess.run([sys.executable, "-c", DENIED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"


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
