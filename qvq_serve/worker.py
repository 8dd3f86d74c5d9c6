"""What vLLM's workers tell of their memory and governor: a worker extension, called from the API process."""

from typing import Any


class WorkerFigures:
    """Mixed into vLLM's worker by --worker-extension-cls.

    Its methods never raise and never wait for the device: an error or a timeout would leave a reply unread, and the
    next step of the engine would read the wrong one (vllm/v1/executor/abstract.py).
    """

    def qvq_memory(self) -> dict[str, int]:
        """Bytes by use, as this worker measured them; empty where it cannot tell."""
        try:
            import torch

            if torch.cuda.is_available() and hasattr(self, "init_snapshot"):
                return gpu_figures(self)
            return cpu_figures(self)
        except Exception:
            return {}

    def qvq_governor(self) -> dict[str, int]:
        """What this worker's governor counted; empty where it has none."""
        try:
            from qvq_serve.governor import adapter

            return adapter.counted()
        except Exception:
            return {}


def gpu_figures(worker: Any) -> dict[str, int]:
    """The figures of vLLM 0.32's profiling, and torch's allocator as it stands; counters only, no synchronisation."""
    import torch

    weights = int(worker.model_runner.model_memory_usage)
    found = {"weights": weights, "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
             "allocated_peak": torch.cuda.max_memory_allocated(),
             "reserved_peak": torch.cuda.max_memory_reserved(),
             "pinned": torch.cuda.host_memory_stats().get("allocated_bytes.current", 0),
             "resident": resident()}  # fmt: skip
    if given := worker.cache_config.kv_cache_memory_bytes:  # which skips the profiling
        found["kv_cache"] = int(given)
    elif hasattr(worker, "total_consumed"):
        graphs = int(worker.cudagraph_memory_estimate)
        found |= {
            "activation_peak": int(worker.peak_activation_memory) - graphs,
            "cuda_graphs": graphs,
            "non_torch": int(worker.total_consumed) - weights,
            "kv_cache": int(worker.available_kv_cache_memory_bytes),
        }
    return found


def cpu_figures(worker: Any) -> dict[str, int]:
    """The KV cache of a worker on the CPU, and the memory of its process.

    Weights are in the latter alone: vLLM repacks them where torch does not see them.
    """
    return {"kv_cache": int(worker.cache_config.kv_cache_memory_bytes or 0), "resident": resident()}


def resident() -> int:
    """Bytes of host memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)
