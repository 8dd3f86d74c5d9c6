"""The governor in vLLM's V2 runner, which runs on GPUs: slots are vLLM's own, and rows name theirs."""

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from qvq_serve.governor.adapter import check_orders, largest, make, read_orders
from qvq_serve.governor.policy import Orders


class GovernorV2(LogitsProcessor):  # type: ignore[misc]
    """Loaded by --logits-processors; in the API process as well, which only looks at the class."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        self.requests = req_states
        self.governor = make(vllm_config, req_states.max_num_reqs, req_states.device)
        self.orders = [Orders()] * req_states.max_num_reqs
        self.fresh: list[int] = []
        """Slots that a request came into since the last step."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_orders(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.orders[req_idx] = read_orders(sampling_params)
        self.fresh.append(req_idx)
        return bool(self.orders[req_idx].governed)

    def apply_staged_writes(self) -> None:
        """Now a request's tokens are on the device: one that was preempted has written some of them."""
        if self.fresh:
            slots = list(dict.fromkeys(self.fresh))
            self.governor.begin(slots, [self.orders[slot] for slot in slots], [self.history(slot) for slot in slots])
            self.fresh.clear()

    def history(self, slot: int) -> list[int]:
        """What a request wrote before it was preempted; the one place that waits for the device, and only then."""
        first, last = int(self.requests.prompt_len.np[slot]), int(self.requests.prefill_len.np[slot])
        if first == last or not self.orders[slot].governed:
            return []
        written: list[int] = self.requests.all_token_ids.gpu[slot, first:last].tolist()
        return written

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        wanted = largest(self.orders[slot] for slot in ctx.idx_mapping_np.tolist())
        if wanted.governed:
            slots = ctx.expanded_idx_mapping.long()
            length = ctx.pos + 1
            # A row whose prefill is not done samples nothing.
            done = length >= self.requests.prefill_len.gpu[slots]
            seen = torch.where(done, length - self.requests.prompt_len.gpu[slots], 0)
            self.governor.apply(logits, slots, ctx.input_ids, seen, wanted)
        return logits
