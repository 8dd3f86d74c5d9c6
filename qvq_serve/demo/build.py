"""A model's files as vLLM and transformers load them: a byte-level tokenizer with Qwen's tokens, config, processor."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from qvq_serve.engine import CHAT_TEMPLATE
from qvq_serve.model import read_config

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
"""Qwen2's, in its order."""
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer."""
GEOMETRY = Path(__file__).parent / "config.json"


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Qwen2's: pieces of a text, as bytes."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def build_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Qwen2TokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens after `vocab`, and the server's chat template."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        chat_template=CHAT_TEMPLATE.read_text(), model_max_length=32_768,
    )  # fmt: skip


def build_config(
    tokenizer: Qwen2TokenizerFast, vocab_size: int, geometry: dict[str, Any] | None = None
) -> Qwen2VLConfig:
    """A geometry (the demo's, if none is given; it splits over 2 GPUs) with a tokenizer's ids and size."""
    geometry = geometry or read_config(GEOMETRY)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    geometry["text_config"] |= {
        "vocab_size": vocab_size, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    return Qwen2VLConfig(
        **geometry, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def save(model: Qwen2VLForConditionalGeneration, tokenizer: Qwen2TokenizerFast, directory: Path) -> None:
    """Writes a model in BF16 and all that vLLM and transformers read beside it."""
    model.generation_config.update(do_sample=False)
    model.to(torch.bfloat16).save_pretrained(directory)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE.read_text(),
    ).save_pretrained(directory)  # fmt: skip
    # The form in which QVQ's own repository has it, which vLLM and older transformers read.
    Qwen2VLImageProcessor().save_pretrained(directory)
