"""The GPUs of this machine, as the driver sees them; no torch, no CUDA context."""

import os
from dataclasses import dataclass

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


def used_bytes(gpus: list[Gpu]) -> list[int]:
    """Bytes in use on each card, by all processes, as the driver counts them."""
    if not gpus:
        return []
    import pynvml

    pynvml.nvmlInit()
    try:
        return [int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(gpu.index)).used) for gpu in gpus]
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str:
    """The NVIDIA driver's version: "580.159.04"."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def processes_on(gpu: Gpu) -> list[tuple[int, int]]:
    """(pid, bytes) of the processes that compute on a card; 0 bytes where the driver does not tell."""
    import pynvml

    pynvml.nvmlInit()
    try:
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(gpu.index))
        return [(process.pid, process.usedGpuMemory or 0) for process in found]
    finally:
        pynvml.nvmlShutdown()


def visible_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order; empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = [
            Gpu(i, str(pynvml.nvmlDeviceGetName(handle)), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
            for i, handle in enumerate(handles)
        ]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return gpus
    chosen = []
    for name in (part.strip() for part in listed.split(",")):
        found = [gpu for gpu, uuid in zip(gpus, uuids, strict=True) if name == str(gpu.index) or uuid.startswith(name)]
        if not name or not found:  # CUDA stops at the first name that it does not know
            break
        chosen.append(found[0])
    return chosen
