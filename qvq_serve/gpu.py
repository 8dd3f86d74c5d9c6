"""The GPUs of this machine, as the driver sees them; no torch, no CUDA context."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qvq_serve.errors import StartError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One card: its name as the driver gives it ("NVIDIA H200"), and its memory in bytes."""

    index: int
    name: str
    memory_bytes: int

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GIB


@contextmanager
def nvml() -> Iterator[Any]:
    """The driver's library, open for a moment.

    Raises pynvml's own NVMLError_LibraryNotFound or NVMLError_DriverNotLoaded where there is no driver, and StartError
    where there is one that fails: a machine with a broken driver is none without GPUs.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        raise
    except pynvml.NVMLError as error:
        raise StartError(f"the NVIDIA driver fails: {error}; `nvidia-smi` may tell more.") from None


def used_bytes(gpus: list[Gpu]) -> list[int]:
    """Bytes in use on each card, by all processes, as the driver counts them."""
    if not gpus:
        return []
    with nvml() as driver:
        handles = [driver.nvmlDeviceGetHandleByIndex(gpu.index) for gpu in gpus]
        return [int(driver.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]


def driver_version() -> str:
    """The NVIDIA driver's version: "580.159.04"."""
    with nvml() as driver:
        return str(driver.nvmlSystemGetDriverVersion())


def processes_on(gpu: Gpu) -> list[tuple[int, int]]:
    """(pid, bytes) of the processes that compute on a card; 0 bytes, or no process, where the driver does not tell."""
    with nvml() as driver:
        try:
            found = driver.nvmlDeviceGetComputeRunningProcesses(driver.nvmlDeviceGetHandleByIndex(gpu.index))
        except driver.NVMLError_NotSupported:  # of virtual cards
            return []
        return [(process.pid, process.usedGpuMemory or 0) for process in found]


def visible_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order; empty where there is no driver.

    Raises StartError where the driver fails.
    """
    import pynvml

    try:
        with nvml() as driver:
            gpus, uuids, lost = [], [], {}
            for index in range(driver.nvmlDeviceGetCount()):
                try:
                    handle = driver.nvmlDeviceGetHandleByIndex(index)
                    memory = int(driver.nvmlDeviceGetMemoryInfo(handle).total)
                    uuid, name = str(driver.nvmlDeviceGetUUID(handle)), str(driver.nvmlDeviceGetName(handle))
                except driver.NVMLError as error:  # it fell off the bus: nobody need use it
                    lost[str(index)] = error
                else:
                    gpus.append(Gpu(index, name, memory))
                    uuids.append(uuid)
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if bad := [name for name in lost if listed is None or name in [part.strip() for part in listed.split(",")]]:
        raise StartError(f"GPU {bad[0]} fails: {lost[bad[0]]}; CUDA_VISIBLE_DEVICES can name the others.")
    if listed is None:
        return gpus
    if listed.startswith("MIG-"):
        raise StartError(
            f"CUDA_VISIBLE_DEVICES is {listed}: a part of a card (MIG) is not known here; name whole cards."
        )
    chosen = []
    for name in (part.strip() for part in listed.split(",")):
        found = [gpu for gpu, uuid in zip(gpus, uuids, strict=True) if name == str(gpu.index) or uuid.startswith(name)]
        if not name or not found:  # CUDA stops at the first name that it does not know
            break
        chosen.append(found[0])
    return chosen
