"""Our Prometheus metrics, in one table; vLLM's own /metrics serves them beside its `vllm:` ones."""

from prometheus_client import Counter, Gauge, Histogram

MEMORY = Gauge(
    "qvq_memory_bytes",
    "Memory by use: planned before the start, and measured by the workers and the driver; gpu is 'cpu' without one",
    ["gpu", "use", "source"],
)
HEADROOM = Gauge("qvq_memory_headroom_bytes", "Memory of the card (or host) that nothing uses", ["gpu"])

SERVER = Gauge(
    "qvq_server_info", "1, with the launch in its labels: versions, card, settings that are not the default, arguments",
    ["version", "vllm", "card", "gpus", "weights", "profile", "argv"],
)  # fmt: skip
MODEL = Gauge(
    "qvq_model_figures",
    "What a token costs the fullest GPU at the least, in bytes read and in FLOPs (qvq_serve/api/about.py)",
    ["figure"],
)

ANSWERS = Counter("qvq_answers_total", "Finished choices by how they ended", ["ended"])
for ended in ("answered", "unmarked", "concluded", "looped", "length", "timeout", "filtered", "cancelled", "error"):
    ANSWERS.labels(ended)  # from 0 on: Prometheus sees no increase in a counter that comes to be as 1
TOKENS = Counter("qvq_output_tokens_total", "Output tokens by part: reasoning or answer", ["part"])
WASTED = Counter(
    "qvq_wasted_tokens_total", "Output tokens of choices that ended without an answer of their own", ["ended"]
)
SAVED = Counter("qvq_governor_saved_tokens_total", "Tokens up to max_tokens that concluded loops did not write")
GOVERNOR = Counter(
    "qvq_governor_total",
    "What the governor found and did, observing what it would have done: found (a loop), loop, budget, sure (a turn "
    "made to conclude), second_loop, limit (ended after it), look (told to look again)",
    ["what"],
)
SWITCHES = Counter("qvq_language_switches_total", "Sentences whose main script differs from that of the one before")
IMAGES = Counter("qvq_images_total", "Images: taken, resized to the request's bounds, or refused", ["outcome"])
VISUAL_TOKENS = Counter("qvq_visual_tokens_total", "Visual tokens of the images taken")
GUARD = Counter("qvq_guard_checks_total", "Checks by the guard model", ["part", "verdict"])

HOOK_FAILURES = Counter("qvq_hook_failures_total", "Requests that a hook failed by an exception or its time", ["hook"])
HOOK_SECONDS = Histogram(
    "qvq_hook_seconds", "Time of a hook's call", ["hook", "stage"],
    buckets=(1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10),
)  # fmt: skip

IN_FLIGHT = Gauge("qvq_requests_in_flight", "POST requests that came in and are not finished")
REJECTED = Counter("qvq_rejections_total", "Requests that the door or the engine's queue turned away", ["reason"])
READY = Gauge("qvq_ready", "1 once a request with an image was answered, 0 before, and in a drain")
DRAINING = Gauge("qvq_draining", "1 after SIGTERM")
