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
