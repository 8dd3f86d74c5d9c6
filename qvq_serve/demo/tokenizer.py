"""The demo's own tokenizer: byte-level BPE with Qwen's pre-tokenizer and special tokens, learned from its own cases.

`merges.txt` beside this file is what `python -m qvq_serve.demo.tokenizer` writes: a pair a line, the most useful first.
Any text can be encoded, since all bytes are tokens; digits stay apart, as Qwen's do.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from qvq_serve.demo import weakness as weak
from qvq_serve.demo.build import SPECIAL_TOKENS, build_tokenizer, pre_tokenizer
from qvq_serve.demo.cases import TRAINING, case

MERGES = Path(__file__).parent / "merges.txt"
VOCABULARY = 1_280
"""Bytes, merges and special tokens; a multiple of 64, so that vLLM pads nothing."""
ALPHABET = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))


def texts(count: int = 4_000) -> Iterator[str]:
    """What the generator says, honest and weak, and the words of the chat template and of everyday questions."""
    for seed in range(count):
        one = case(TRAINING + seed, size=(280, 280))
        yield from (one.system or "", one.question, one.reply)
    for seed in range(count // 4):
        one = case(TRAINING + seed, size=(280, 280), weakness=weak.KINDS[seed % len(weak.KINDS)], length=60)
        yield from (one.system or "", one.question, one.reply)
    for role in ("system", "user", "assistant"):
        yield from [f"{role}\n"] * count


def learn() -> list[tuple[str, str]]:
    """The merges that fill the vocabulary, the same each time."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS), initial_alphabet=list(ALPHABET), max_token_length=24,
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(texts(), trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def read() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary without special tokens, and the merges."""
    merges = []
    for line in MERGES.read_text(encoding="utf-8").splitlines():
        left, right = line.split(" ")
        merges.append((left, right))
    tokens = dict.fromkeys([*ALPHABET, *(left + right for left, right in merges)])
    return {token: i for i, token in enumerate(tokens)}, merges


@cache
def tokenizer() -> Qwen2TokenizerFast:
    """The demo's tokenizer, with the server's chat template."""
    return build_tokenizer(*read())


if __name__ == "__main__":
    MERGES.write_text("".join(f"{left} {right}\n" for left, right in learn()), encoding="utf-8")
