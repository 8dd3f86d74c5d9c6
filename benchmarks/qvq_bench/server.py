"""What a server tells of itself while it works: its metrics, and the cards and the host where they are ours to ask."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from qvq_bench.client import connection_errors

GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:prompt_tokens_cached_total": "prompt_tokens_cached",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:mm_cache_queries_total": "image_queries",
    "vllm:mm_cache_hits_total": "image_hits",
    "vllm:request_prefill_time_seconds_sum": "prefill_seconds",
    "vllm:request_queue_time_seconds_sum": "queue_seconds",
    "vllm:request_queue_time_seconds_count": "queue_count",
    "process_resident_memory_bytes": "api_resident_bytes",
}
"""Sums over engines (`kv_usage`: the largest); counters are kept as they stand."""
WANTED = (*GAUGES, "qvq_memory", "qvq_server", "qvq_model", "vllm:cache_config_info")


def parse(text: str) -> dict[str, Any]:
    """The figures of one /metrics page; what the server does not have is absent.

    Only the lines that are wanted are parsed: a page has 1,500.
    """
    kept = "\n".join(line for line in text.splitlines() if line.startswith(WANTED)) + "\n"
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(kept):
        for name, labels, value, *_ in family.samples:
            if name in GAUGES:
                key = GAUGES[name]
                old = found.get(key, 0.0)
                found[key] = max(old, value) if key == "kv_usage" else old + value
            elif name == "vllm:cache_config_info":
                with suppress(KeyError, ValueError):
                    found["kv_capacity_tokens"] = found.get("kv_capacity_tokens", 0) + kv_capacity(labels)
            elif name == "qvq_memory_bytes":
                found.setdefault("memory", {}).setdefault(labels["gpu"], {}).setdefault(labels["source"], {})[
                    labels["use"]
                ] = value
            elif name == "qvq_memory_headroom_bytes":
                found.setdefault("headroom", {})[labels["gpu"]] = value
            elif name == "qvq_model_figures":
                found.setdefault("model", {})[labels["figure"]] = value
            elif name == "qvq_server_info":
                found["server"] = labels
    return found


def kv_capacity(labels: dict[str, str]) -> int:
    """Tokens that the KV cache holds, of vLLM's info metric."""
    return int(labels["num_gpu_blocks"]) * int(labels["block_size"])


class Watcher:
    """Samples a server's /metrics, and this machine where the server runs on it. Without /metrics a sample is empty."""

    def __init__(self, session: aiohttp.ClientSession, metrics_url: str, local: bool) -> None:
        self.session, self.url = session, metrics_url
        self.local: Callable[[], dict[str, Any]] = local_figures() if local else dict

    async def __call__(self) -> dict[str, Any]:
        """One sample. Raises ConnectionError where the server cannot be reached."""
        with connection_errors():
            async with self.session.get(self.url, timeout=aiohttp.ClientTimeout(total=5)) as response:
                text = await response.text() if response.status == 200 else ""
        try:
            return parse(text) | self.local()
        except ValueError:  # no page of metrics
            return self.local()


def local_figures() -> Callable[[], dict[str, Any]]:
    """Reads the driver's memory figures of each card here, and the host's; open once, some microseconds a call."""
    import psutil

    cards: list[Any] = []
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def read() -> dict[str, Any]:
        host = psutil.virtual_memory()
        figures: dict[str, Any] = {"host": {"total": host.total, "available": host.available}}
        if cards:
            with suppress(pynvml.NVMLError):  # a card that does not tell, or fails
                memory = [pynvml.nvmlDeviceGetMemoryInfo(card) for card in cards]
                figures["cards"] = {str(i): {"total": m.total, "used": m.used} for i, m in enumerate(memory)}
        return figures

    return read
