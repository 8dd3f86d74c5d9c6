"""When requests are sent: open-loop arrivals as times in seconds from the load's start. A closed loop has none."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

OPEN = ("constant", "poisson", "bursts", "ramp", "trace")


def due_times(arrivals: dict[str, Any], load: float, seed: int) -> Iterator[float]:
    """Increasing times at which requests are due; endless, but for a trace.

    `load` is requests a second; of a trace it is how many times faster than recorded it is played.
    """
    kind, rng = arrivals["kind"], random.Random(f"arrivals {seed} {load}")
    if kind == "constant":
        return (index / load for index in itertools.count())
    if kind == "poisson":
        return itertools.accumulate(iter(lambda: rng.expovariate(load), None))
    if kind == "bursts":
        size = arrivals["burst"]
        return (index // size * size / load for index in itertools.count())
    if kind == "ramp":
        return ramp(arrivals["ramp_from"], load, arrivals["ramp_seconds"])
    return (at / load for at in arrivals["trace_at"])


def ramp(low: float, high: float, seconds: float) -> Iterator[float]:
    """A rate that goes from `low` to `high` requests a second in `seconds`, and stays there.

    The n-th request is due when the integral of the rate is n.
    """
    slope = (high - low) / seconds
    in_ramp = (low + high) / 2 * seconds
    for index in itertools.count():
        if index >= in_ramp:
            yield seconds + (index - in_ramp) / high
        elif slope == 0:
            yield index / low
        else:
            yield ((low**2 + 2 * slope * index) ** 0.5 - low) / slope
