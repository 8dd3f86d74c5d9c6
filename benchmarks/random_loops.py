"""Loops of models with random weights, greedy, in Qwen's vocabulary: cases for the detection of loops.

    python -m benchmarks.random_loops tests/governor/random_weights.jsonl

Each line has the tokens up to four periods and 256 tokens after the loop's start, the start, and the period.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY, KNOWN, LENGTH, WANTED = 151_643, 1_000, 1_200, 24
"""Qwen's tokens without the special ones; those that a model knows, other ones for each seed."""


def written(seed: int) -> list[int]:
    """What a small random model writes."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=KNOWN, hidden_size=64, intermediate_size=128, num_hidden_layers=1 + seed % 4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=(0.05, 0.1, 0.2, 0.4)[seed // 4 % 4],
        max_position_embeddings=4096, tie_word_embeddings=bool(seed % 3), eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, KNOWN, (1, 24), generator=draw)
    ids = torch.randperm(VOCABULARY, generator=draw)[:KNOWN]
    made = model.generate(prompt, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    found: list[int] = ids[made[0, prompt.shape[1] :]].tolist()
    return found


def loop_of(tokens: list[int]) -> tuple[int, int] | None:
    """(start, period) of the loop at the end, of the shortest period; None where its tokens are not four times there."""
    for period in range(1, 513):
        start = len(tokens) - period
        while start and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - start >= max(4 * period, 400):
            return start, period
    return None


def main() -> None:
    rows: list[str] = []
    seen: dict[int, int] = {}
    for seed in range(400):
        tokens = written(seed)
        if (found := loop_of(tokens)) is None or seen.get(found[1], 0) >= 2:
            continue
        start, period = found
        seen[period] = seen.get(period, 0) + 1
        kept = tokens[: start + 4 * period + 256]
        rows.append(json.dumps({"seed": seed, "start": start, "period": period, "tokens": kept}))
        print(seed, start, period, flush=True)
        if len(rows) == WANTED:
            break
    Path(sys.argv[1]).write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
