"""The memory plan against what the workers measured: once in the log at the start, and in metrics for good."""

import asyncio
import logging
import math
from typing import Any

from qvq_serve import metrics
from qvq_serve.errors import StartError
from qvq_serve.gpu import GIB, Gpu, used_bytes, visible_gpus
from qvq_serve.memory import card_of, plan, plan_host
from qvq_serve.model import ModelGeometry
from qvq_serve.profile import Profile, local_workers

log = logging.getLogger("vllm.qvq_serve")  # below vLLM's logger, so that its handlers and level hold
POLL_S = 5.0


def planned_uses(profile: Profile, gpus: list[Gpu]) -> dict[str, int]:
    """Planned bytes of each GPU (or of the host) by the names under which workers measure."""
    geometry = ModelGeometry.load(profile.model)
    if not gpus:
        return plan_host(profile, geometry)
    uses = plan(profile, geometry, *card_of(gpus[0]), len(gpus)).uses
    return {
        "weights": uses["weights"] + uses["vision_encoder"],
        "activation_peak": uses["activation_peak"] + uses["encoder_cache"],
        **{use: uses[use] for use in ("cuda_graphs", "non_torch", "kv_cache")},
    }


def label(rank: int, gpus: list[Gpu]) -> str:
    """The label of a worker's memory: its card's index (or its rank, elsewhere); cpu, cpu1, ... without cards."""
    if not gpus:
        return f"cpu{rank or ''}"
    return str(gpus[rank].index) if rank < len(gpus) else f"rank{rank}"


def report(planned: dict[str, int], measured: list[dict[str, int]], gpus: list[Gpu]) -> None:
    """One line a use and GPU: planned, measured, difference in GiB; and both as metrics."""
    for rank, found in enumerate(measured):
        gpu = label(rank, gpus)
        for use, bytes_planned in planned.items():
            metrics.MEMORY.labels(gpu, use, "planned").set(bytes_planned)
            if use in found:
                a, b = bytes_planned / GIB, found[use] / GIB
                log.info("memory of %s, %s: planned %.3f GiB, measured %.3f, difference %+.3f", gpu, use, a, b, a - b)


def export(measured: list[dict[str, int]], gpus: list[Gpu]) -> None:
    """Set the gauges of what is measured now: the workers' figures, the cards' use, and what is left."""
    import psutil

    for rank, found in enumerate(measured):
        for use, value in found.items():
            metrics.MEMORY.labels(label(rank, gpus), use, "measured").set(value)
    if not gpus:
        metrics.HEADROOM.labels("cpu").set(psutil.virtual_memory().available)
    for gpu, used in zip(gpus, used_bytes(gpus), strict=True):
        metrics.MEMORY.labels(str(gpu.index), "card", "measured").set(used)
        metrics.HEADROOM.labels(str(gpu.index)).set(gpu.memory_bytes - used)


def export_governor(known: dict[str, int], told: list[dict[str, int]]) -> dict[str, int]:
    """Count up to what the workers tell: all that sample the same, and a pipeline's other stages 0."""
    now = {what: max(one[what] for one in told if one) for what in next(filter(None, told), {})} or known
    for what, value in now.items():
        metrics.GOVERNOR.labels(what).inc(max(value - known.get(what, 0), 0))
    return now


async def prove_governor(engine_client: Any) -> None:
    """Raises StartError where no worker has the governor that was asked for."""
    if not any(await engine_client.collective_rpc("qvq_governor")):
        raise StartError("vLLM runs without the governor that --governor asks for; its log above says why.")


async def watch(engine_client: Any, profile: Profile) -> None:
    """Compare at the start, then read again every 5 s until the engine ends.

    One call is in flight at most, and none has a timeout: a late reply would be taken for the next step's.
    """
    gpus = visible_gpus()[: local_workers(profile)]
    measured = await engine_client.collective_rpc("qvq_memory")
    report(planned_uses(profile, gpus), measured, gpus)
    counted: dict[str, int] = {}
    failed = ""
    while True:
        try:
            await asyncio.to_thread(export, measured, gpus)  # the driver is asked, and streams must not wait for it
            failed = ""
        except StartError as error:  # of the driver, which may come back
            for gpu in gpus:
                metrics.HEADROOM.labels(str(gpu.index)).set(math.nan)
            if str(error) != failed:
                failed = str(error)
                log.warning("memory of the cards is not known: %s", failed)
        await asyncio.sleep(POLL_S)
        if engine_client.errored:
            return
        if profile.governor != "off":
            counted = export_governor(counted, await engine_client.collective_rpc("qvq_governor"))
        measured = await engine_client.collective_rpc("qvq_memory")
