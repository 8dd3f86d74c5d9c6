"""The governor in vLLM's V1 runner, which runs on the CPU: rows of the batch are its slots."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from qvq_serve.governor.adapter import check_orders, largest, make, read_orders
from qvq_serve.governor.policy import Orders


class GovernorV1(LogitsProcessor):  # type: ignore[misc]
    """Loaded by --logits-processors."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        slots = vllm_config.scheduler_config.max_num_seqs
        self.governor = make(vllm_config, slots, device)
        self.outputs: list[list[int]] = [[] for _ in range(slots)]
        """Each row's output tokens: vLLM's own lists, which grow."""
        self.orders = [Orders()] * slots

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_orders(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.outputs[row], self.orders[row] = [], Orders()
        for row, params, _, output in batch_update.added:
            self.outputs[row], self.orders[row] = output, read_orders(params)
            self.governor.begin([row], [self.orders[row]], [list(output)])
        for source, target, direction in batch_update.moved:
            self.governor.move(source, target)
            for held in (self.outputs, self.orders):
                held[source], held[target] = held[target], held[source]
            if direction is MoveDirectionality.UNIDIRECTIONAL:
                self.outputs[source], self.orders[source] = [], Orders()

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = range(len(logits))
        wanted = largest(self.orders[row] for row in rows)
        if wanted.governed:
            last = torch.tensor([self.outputs[row][-1] if self.outputs[row] else 0 for row in rows])
            seen = torch.tensor([len(self.outputs[row]) for row in rows])
            self.governor.apply(logits, torch.arange(len(logits)), last, seen, wanted)
        return logits
