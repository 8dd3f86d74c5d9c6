"""A stand-in for Slurm's srun: runs a command once a machine, with the variables and the ends that Slurm gives it.

As read in Slurm's sources, and seen with Slurm 22.05: `scancel --signal=TERM JOB` reaches the first process of each
machine alone (proctrack/cgroup); the exit code is the highest one; --wait=S ends what is left S seconds after the first
end. The cluster has KillOnBadExit=1, which ends all at the first bad exit where the command line does not say no.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SECOND = 0.02
"""Of --wait, in seconds of the clock."""


def main() -> int:
    at = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
    options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:at])
    assert options["cpus-per-task"] == os.environ["SLURM_CPUS_PER_TASK"]
    nodes = int(options.get("ntasks", os.environ["SLURM_NNODES"]))
    tasks: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    Path(os.environ["SRUN_PID"]).write_text(str(os.getpid()))  # before a task can say that it serves
    for rank in range(nodes):
        given = {"SLURM_NODEID": str(rank), "SLURM_PROCID": str(rank)}
        tasks.append(subprocess.Popen(sys.argv[at:], env=os.environ | given))
    first = None
    while None in (codes := [task.poll() for task in tasks]):
        ended = [code for code in codes if code is not None]
        first = first or (time.monotonic() if ended else None)
        at_once = any(ended) and options.get("kill-on-bad-exit") != "0"
        waited = first and "wait" in options and time.monotonic() - first > int(options["wait"]) * SECOND
        if at_once or waited:
            for task in tasks:
                task.kill()
        time.sleep(0.02)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit(main())
