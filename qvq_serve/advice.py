"""What would fit: each change is tried by the planner itself."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from qvq_serve.errors import DoesNotFit, UsageError
from qvq_serve.gpu import GIB
from qvq_serve.memory import EngineLimits, MemoryPlan, engine_limits, plan
from qvq_serve.model import ModelGeometry
from qvq_serve.profile import Profile, flag, given_flags

SHOWN = 5
ENOUGH_REQUESTS = 16
"""Typical requests at once from which --fit takes a weights' precision over the next lower one."""
FEWER_SEQUENCES = ("--max-num-seqs", "128")

FITTED = ("model", "tp", "quantization", "kv_cache_dtype")
"""The fields that `fit` chooses; --pp stays at 1."""

Change = tuple[str, dict[str, Any]]
"""What is changed, in words, and the fields of Profile that it replaces."""


def changes(
    profile: Profile, geometry: ModelGeometry, limits: EngineLimits, num_gpus: int, most_gpus: int
) -> Iterator[Change]:
    """Single changes that take less memory of each GPU, or fewer GPUs where there are too few."""
    if profile.kv_cache_dtype == "auto":
        yield "FP8 KV cache", {"kv_cache_dtype": "fp8"}
    if profile.quantization is None and geometry.quantization is None:
        yield "FP8 weights", {"quantization": "fp8_per_channel"}
    if profile.model == "qvq-72b":
        yield "four-bit weights", {"model": "qvq-72b-awq", "quantization": None}
    for tp in geometry.tensor_parallel_sizes():
        if tp != profile.tp and num_gpus // profile.pp < profile.tp and tp <= num_gpus // profile.pp:
            yield f"{tp * profile.pp} of the GPUs", {"tp": tp}
        elif profile.tp < tp <= most_gpus // profile.pp:
            yield f"{tp * profile.pp} GPUs", {"tp": tp}
    if profile.max_visual_tokens // 2 >= profile.min_visual_tokens:
        yield "half the visual tokens", {"max_visual_tokens": profile.max_visual_tokens // 2}
    if profile.max_model_len // 2 > profile.max_visual_tokens:
        yield "half the context", {"max_model_len": profile.max_model_len // 2}
    name, fewer = FEWER_SEQUENCES
    if limits.max_num_seqs > int(fewer) and name not in given_flags(profile.vllm):
        yield "fewer sequences at once", {"vllm": (*profile.vllm, name, fewer)}


def flags_of(fields: dict[str, Any], before: Profile) -> str:
    """The flags that make a change: {"tp": 2} -> "--tp 2"."""
    ours = [[flag(name), str(value)] for name, value in fields.items() if name != "vllm" and value is not None]
    more = fields.get("vllm", ())[len(before.vllm) :]
    return shlex.join([part for pair in ours for part in pair] + (["--", *more] if more else []))


def suggestions(made: MemoryPlan, most_gpus: int = 8) -> list[dict[str, Any]]:
    """The nearest changes that fit, one at a time and then two, best first: {"change", "flags", "kv_cache_tokens"}."""
    profile, geometry = made.profile, ModelGeometry.load(made.profile.model)
    limits = engine_limits(profile, made.card.lower(), made.memory / GIB)
    single = list(changes(profile, geometry, limits, made.num_gpus, most_gpus))
    for count in (1, 2):
        found: list[dict[str, Any]] = []
        for chosen in combinations(single, count):
            fields = {name: value for _, change in chosen for name, value in change.items()}
            if len(fields) < sum(len(change) for _, change in chosen):
                continue  # two changes of the same field
            try:
                changed = replace(profile, **fields)
            except UsageError:
                continue
            tried = plan(changed, ModelGeometry.load(changed.model), made.card, made.memory,
                         max(made.num_gpus, (changed.tp > profile.tp) * changed.tp * changed.pp),
                         made.typical_output)  # fmt: skip
            if tried.fits:
                found.append({"change": " and ".join(words for words, _ in chosen), "flags": flags_of(fields, profile),
                              "kv_cache_tokens": tried.kv_cache_tokens})  # fmt: skip
        if found:
            return sorted(found, key=lambda s: -s["kv_cache_tokens"])[:SHOWN]
    return []


def fit(profile: Profile, card: str, memory: int, num_gpus: int, typical_output: int) -> MemoryPlan:
    """The best setting of QVQ for the cards: the weights' highest precision with room for 16 typical requests at once
    (else the one with most room), and of its settings the one with most room. Raises DoesNotFit where none does."""
    precisions: list[dict[str, Any]] = [
        {"quantization": None},
        {"quantization": "fp8_per_channel"},
        {"model": "qvq-72b-awq", "quantization": None},
    ]
    best: MemoryPlan | None = None
    for precision in precisions:
        for tp in ModelGeometry.load(precision.get("model", profile.model)).tensor_parallel_sizes():
            for kv in ("auto", "fp8"):
                if tp > num_gpus:
                    continue
                changed = replace(profile, tp=tp, pp=1, kv_cache_dtype=kv, **precision)
                try:
                    made = plan(changed, ModelGeometry.load(changed.model), card, memory, num_gpus, typical_output)
                except UsageError:  # this checkpoint is quantised already
                    continue
                if made.fits and (best is None or room(made) > room(best)):
                    best = made
        if best is not None and room(best) >= ENOUGH_REQUESTS:
            return best
    if best is None:
        raise DoesNotFit(f"no setting of QVQ-72B fits {num_gpus} x {card} ({memory / GIB:.1f} GiB); add GPUs.")
    return best


def room(made: MemoryPlan) -> float:
    """Typical requests at once, over all GPUs of one replica."""
    return made.requests(made.typical_tokens)
