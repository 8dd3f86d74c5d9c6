"""The hardware's ceiling beside a measured number: shares of a card's memory bandwidth (MBU) and arithmetic (MFU)."""

from dataclasses import dataclass
from typing import Any

from qvq_bench.client import Row
from qvq_serve.memory import PATCHES_PER_TOKEN


@dataclass(frozen=True)
class Card:
    """A card's figures: bytes a second, and dense FLOPs a second by the type of the weights."""

    bandwidth: float
    bf16: float
    fp8: float

    def flops(self, weights: str) -> float:
        """Four-bit weights are multiplied as BF16 (Marlin)."""
        return self.fp8 if weights == "fp8" else self.bf16


CARDS = {
    # NVIDIA's data sheets; dense, without sparsity.
    "NVIDIA A100-SXM4-80GB": Card(2.039e12, 312e12, 312e12),
    "NVIDIA L40S": Card(0.864e12, 362e12, 733e12),
    "NVIDIA H100 80GB HBM3": Card(3.35e12, 989e12, 1979e12),
    "NVIDIA H100 PCIe": Card(2.0e12, 756e12, 1513e12),
    "NVIDIA H200": Card(4.8e12, 989e12, 1979e12),
    "NVIDIA B200": Card(8.0e12, 2250e12, 4500e12),
}


def shares(
    server: dict[str, str], model: dict[str, float], steps: float, kv_tokens: float, rows: list[Row], seconds: float,
    tokens: float, cached: float,
) -> dict[str, float | None]:  # fmt: skip
    """{"mbu", "mfu"} of a window, each 0 to 1, or None where the card or the model is not known.

    `steps`: decode steps a second. `kv_tokens`: tokens in the KV cache, on average. `tokens`: output tokens of the
    window, and `rows` the requests whose prompts were worked through in it, `cached` tokens of which were not.
    Bytes: the weights once a step, and all that is in the cache. FLOPs: every token's, attention over half its length.
    """
    card = CARDS.get(server.get("card", ""))
    if card is None or not model or seconds <= 0:
        return {"mbu": None, "mfu": None}
    read = steps * (model["weight_bytes"] + kv_tokens * model["kv_bytes"])
    flops = (tokens - cached) * model["token_flops"]
    for row in rows:
        prompt, output = row.prompt_tokens or 0, row.output_tokens or row.chunks
        flops += prompt * model["token_flops"]
        flops += (prompt**2 / 2 + output * (prompt + output / 2)) * model["attention_flops"]
        if row.visual_tokens and row.images:
            patches = PATCHES_PER_TOKEN * row.visual_tokens
            flops += patches * (model["patch_flops"] + patches / row.images * model["patch_pair_flops"])
    return {"mbu": read / card.bandwidth, "mfu": flops / seconds / card.flops(server.get("weights", ""))}


def alone(server: dict[str, str], model: dict[str, float]) -> dict[str, Any]:
    """The ceiling of one user alone: output tokens a second if the weights' bytes were all that a step takes."""
    card = CARDS.get(server.get("card", ""))
    if card is None or not model:
        return {"tokens_per_second_alone": None, "weight_bytes": model.get("weight_bytes")}
    return {"tokens_per_second_alone": card.bandwidth / model["weight_bytes"], "weight_bytes": model["weight_bytes"]}
