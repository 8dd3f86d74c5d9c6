"""What the two adapters share: the governor of this process, from the launched profile and vLLM's configuration."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch

from qvq_serve.engine import launched_profile
from qvq_serve.governor.core import COUNTED, Governor, Text
from qvq_serve.governor.policy import XARG, Orders
from qvq_serve.governor.tokens import (
    PHRASES,
    conclusion_tokens,
    encoded,
    marker_firsts,
    natural_markers,
    read_vocabulary,
)

log = logging.getLogger("vllm.qvq_serve")
GOVERNORS: list[Governor] = []
"""The governor of this worker, if it has one."""


def make(vllm_config: Any, slots: int, device: torch.device) -> Governor:
    """The governor of this worker. Raises ValueError for speculative decoding, which it cannot follow."""
    from vllm.tokenizers import cached_tokenizer_from_config

    if vllm_config.speculative_config is not None:
        raise ValueError("--governor works without speculative decoding only; leave one of them out")
    model = vllm_config.model_config
    tokenizer = cached_tokenizer_from_config(model)
    lead, conclusion = conclusion_tokens(tokenizer)
    text = Text(
        conclusion, tokenizer.convert_tokens_to_ids("<|im_end|>"), lead, natural_markers(tokenizer),
        marker_firsts(tokenizer), tuple(tuple(encoded(tokenizer, phrase)) for phrase in PHRASES),
    )  # fmt: skip
    mode, stages = launched_profile().governor, vllm_config.parallel_config.pipeline_parallel_size
    known = read_vocabulary(tokenizer, model.get_vocab_size())
    governor = Governor(slots, device, text, known, mode == "on", stages)
    GOVERNORS[:] = [governor]
    log.info("governor: %s, %d slots", mode, slots)
    return governor


def check_orders(sampling_params: Any) -> None:
    """Raises ValueError for orders that are none: a route of vLLM's that was opened takes them from clients."""
    given = (sampling_params.extra_args or {}).get(XARG)
    try:
        good = given is None or (len(given) == len(Orders._fields) and all(map(math.isfinite, given)))
        good = good and (given is None or Orders(*given).chinese in (0, 1))
    except (TypeError, OverflowError):
        good = False
    if not good:
        raise ValueError(f"vllm_xargs.{XARG} is the server's own; leave it out")


def read_orders(sampling_params: Any) -> Orders:
    """What our route ordered for a request; nothing for one that came another way."""
    given = (sampling_params.extra_args or {}).get(XARG)
    return Orders(*given).of(sampling_params.max_tokens) if given else Orders()  # now with room for the prompt


def largest(orders: Iterable[Orders]) -> Orders:
    """The largest of each order: what nobody wants is not run."""
    return Orders(*map(max, zip(*orders, strict=True)))


def counted() -> dict[str, int]:
    """What this worker's governor counted; empty where it has none. Waits for nothing."""
    return dict(zip(COUNTED, GOVERNORS[0].told.tolist(), strict=True)) if GOVERNORS else {}
