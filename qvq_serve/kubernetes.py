"""What Kubernetes must know of a launch, worked out from its profile: `qvq-serve plan --values`, and the chart's plan.

Each number has its reason beside it. Seconds that were measured are in benchmarks/results, with dummy weights.
"""

import math
from dataclasses import dataclass, replace

from qvq_serve.errors import UsageError
from qvq_serve.gpu import GIB
from qvq_serve.memory import (
    card_memory,
    engine_limits,
    host_bytes,
    language_weights,
    plan_host,
    vision_weights,
    weight_kind,
)
from qvq_serve.model import DEMO, ModelGeometry
from qvq_serve.preflight import CPU_OVERHEAD_GIB, LEAST_SHM_BYTES
from qvq_serve.profile import Resolved, data_parallel, workers

START_DEMO_S, START_EAGER_S, START_COMPILED_S = 115, 100, 249
"""The slowest measured start of its kind: starts_2026-11-24.json has 115.0, 99.3 and 248.2 (85 of it torch.compile)."""
START_FACTOR = 3
READ_BYTES_S = 1e9
"""Of a volume, where weights are read from it. ASSUMED: the measured starts had dummy weights."""
TOKEN_S, FIRST_TOKEN_S = 0.1, 10.0
"""The slowest that qvq-bench's default objective lets a server be (tpot_p95=100ms, ttft_p95=10s)."""
PRE_STOP_S = 15
"""Between a pod's end and SIGTERM: proxies take it off their lists, and until then new requests are answered."""
END_S = 30
"""From the last answer to the exit: vLLM gives its workers 8 s, and the card its memory back."""
WORKER_GIB = 6
"""Host memory of a GPU's worker: CUDA, libraries, pinned buffers. 3.1 to 5.7 were measured after loads, with made-up
weights (`resident` in starts_2026-11-28.json and starts_2026-11-29.json); shards that are read are the cache's."""


@dataclass(frozen=True)
class Figure:
    """A value of the chart, and how it came about."""

    value: int
    reason: str


def figures(resolved: Resolved, gpu: str | None = None) -> dict[str, Figure]:
    """The chart's `plan` of a launch on the GPUs that its profile was made for, or on `gpu`; of one replica.

    Raises UsageError for copies within one, which the chart does not count.
    """
    profile, hardware = resolved.profile, resolved.hardware
    if (copies := data_parallel(profile)) > 1:
        raise UsageError(
            f"--data-parallel-size {copies}: the chart's replicas have --tp x --pp GPUs; leave it out, and set the "
            f"chart's replicas to {copies}."
        )
    geometry = ModelGeometry.load(profile.model)
    demo = profile.model == DEMO
    gpus = workers(profile)
    card, size = card_memory(gpu or f"{hardware.gpu_gib or 1}")  # a CPU's says nothing
    limits = engine_limits(profile, (hardware.name if not gpu else card).lower(), size / GIB)

    kind = weight_kind(replace(profile, quantization=None), geometry)  # as it lies on disk
    checkpoint = language_weights(geometry, kind, 1, 1) + vision_weights(geometry, kind, 1, True)
    processes = CPU_OVERHEAD_GIB + (0 if demo else WORKER_GIB * gpus)
    in_host = sum(plan_host(profile, geometry).values()) if demo else 0
    shm = max(1, math.ceil(2 * LEAST_SHM_BYTES * gpus / GIB))
    memory = processes + shm + (host_bytes(profile, limits) + in_host) / GIB
    started = START_DEMO_S if demo else START_EAGER_S if limits.eager else START_COMPILED_S
    read = 0 if demo else math.ceil(checkpoint / READ_BYTES_S)
    answer = math.ceil(min(profile.request_timeout, FIRST_TOKEN_S + profile.max_output_tokens * TOKEN_S))
    given = resolved.sources["drain_timeout"] != "default"
    drain = math.ceil(profile.drain_timeout) if given else answer
    return {
        "gpus": Figure(0 if demo else gpus, "none: a CPU" if demo else f"tp {profile.tp} x pp {profile.pp}"),
        "cpus": Figure(
            2 if demo else 2 * (2 + gpus),
            "the demo was measured on 2" if demo else f"two threads each for API, engine and {gpus} workers",
        ),
        "memoryGiB": Figure(
            math.ceil(memory), f"processes {processes}, /dev/shm {shm}, the rest grows with the limits (README)"
        ),
        "shmGiB": Figure(shm, f"twice what the start asks for with {gpus} workers, at least 1"),
        "weightsGiB": Figure(
            1 if demo else math.ceil(checkpoint * 1.1 / GIB),
            "the demo is in the package" if demo else f"{checkpoint / 1e9:.0f} GB on disk, and a tenth",
        ),
        "startupSeconds": Figure(
            START_FACTOR * (started + read),
            f"{START_FACTOR} x ({started} s measured + {read} s to read the weights)",
        ),
        "drainSeconds": Figure(
            drain,
            f"drain_timeout of {resolved.sources['drain_timeout']}"
            if given
            else f"the longest answer: {profile.max_output_tokens} tokens of {TOKEN_S:g} s, at most request_timeout",
        ),
        "graceSeconds": Figure(
            PRE_STOP_S + drain + END_S, f"{PRE_STOP_S} of preStop, the drain, {END_S} for the engine's end"
        ),
        "requestSeconds": Figure(math.ceil(profile.request_timeout), "request_timeout: what a proxy has to wait for"),
    }


def as_values(made: dict[str, Figure]) -> str:
    """The figures as a values file of the chart."""
    width = max(len(f"{name}: {figure.value}") for name, figure in made.items())
    lines = [f"  {f'{name}: {figure.value}':{width}}  # {figure.reason}" for name, figure in made.items()]
    return "\n".join(["plan:", *lines])
