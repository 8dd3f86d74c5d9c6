"""Our Prometheus metrics, in one table; vLLM's own /metrics serves them beside its `vllm:` ones."""

from prometheus_client import Gauge

MEMORY = Gauge(
    "qvq_memory_bytes",
    "Memory by use: planned before the start, and measured by the workers and the driver; gpu is 'cpu' without one",
    ["gpu", "use", "source"],
)
HEADROOM = Gauge("qvq_memory_headroom_bytes", "Memory of the card (or host) that nothing uses", ["gpu"])
