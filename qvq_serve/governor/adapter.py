"""What the two adapters share: the governor of this process, from the launched profile and vLLM's configuration."""

import logging
from typing import Any

import torch

from qvq_serve.engine import launched_profile
from qvq_serve.governor.core import COUNTED, Governor, Text
from qvq_serve.governor.policy import XARG, Orders
from qvq_serve.governor.tokens import PHRASES, conclusion_tokens, encoded, natural_markers, read_vocabulary

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
        tuple(tuple(encoded(tokenizer, phrase)) for phrase in PHRASES),
    )  # fmt: skip
    mode = launched_profile().governor
    governor = Governor(slots, device, text, read_vocabulary(tokenizer, model.get_vocab_size()), acts=mode == "on")
    GOVERNORS[:] = [governor]
    log.info("governor: %s, %d slots", mode, slots)
    return governor


def read_orders(sampling_params: Any) -> Orders:
    """What our route ordered for a request; nothing for one that came another way."""
    given = (sampling_params.extra_args or {}).get(XARG)
    return Orders(*given).of(sampling_params.max_tokens) if given else Orders()  # now with room for the prompt


def counted() -> dict[str, int]:
    """What this worker's governor counted; empty where it has none. Waits for nothing."""
    return dict(zip(COUNTED, GOVERNORS[0].told.tolist(), strict=True)) if GOVERNORS else {}
