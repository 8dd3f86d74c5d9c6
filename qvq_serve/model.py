"""Where a model lies, and what its config.json says of its geometry."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvq_serve.demo import DIRECTORY
from qvq_serve.errors import UsageError, nearest

ARCHITECTURE = "Qwen2VLForConditionalGeneration"
DEMO = "demo"
LEFT_OUT = ("ignore", "ignored_layers", "modules_to_not_convert")
"""Where a quantization_config names what is not quantised: compressed-tensors, and vLLM's FP8."""
HEADER_BYTES = 100_000_000
"""Of a safetensors file, at most (the library's own bound)."""


@dataclass(frozen=True)
class KnownModel:
    """A model that is known by a short name: its repository, and the hubs that have it, the best one first."""

    repo: str
    sources: tuple[str, ...]


KNOWN = {
    "qvq-72b": KnownModel("Qwen/QVQ-72B-Preview", ("modelscope", "huggingface")),
    # Four-bit AWQ with the MLP padded from 29568 to 29696, so that groups of 128 divide up to TP 8.
    "qvq-72b-awq": KnownModel("kosbu/QVQ-72B-Preview-AWQ", ("huggingface",)),
}


def config_path(model: str) -> Path:
    """The config.json of a model: of a known name the one that we carry, else the directory's own."""
    if model in KNOWN:
        return Path(__file__).parent / "configs" / f"{model}.json"
    return locate(model) / "config.json"


def cache_dir() -> Path:
    """The directory for weights: QVQ_CACHE, else $XDG_CACHE_HOME/qvq-serve, else ~/.cache/…"""
    if chosen := os.environ.get("QVQ_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvq-serve"


def locate(model: str) -> Path:
    """The directory of a model: of a known name, where `download` puts it.

    Raises UsageError for what is neither a known name nor a directory.
    """
    if model == DEMO:
        return DIRECTORY
    if known := KNOWN.get(model):
        return cache_dir() / "models" / known.repo
    path = Path(model)
    if path.is_dir():
        return path
    names = [*KNOWN, DEMO]
    raise UsageError(
        f"--model {model}: there is no such directory, and it is no known name.{nearest(model, names)} "
        f"Known: {', '.join(names)}."
    )


@dataclass(frozen=True)
class ModelGeometry:
    """The numbers of a Qwen2-VL config.json that decide how a model can be split and what memory it takes."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    vision_layers: int
    vision_size: int
    """Width of the vision encoder, `embed_dim`."""
    vision_mlp_size: int
    vision_heads: int
    quantization: dict[str, Any] | None = None
    """The checkpoint's own `quantization_config`."""

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads

    @property
    def compressed_weights(self) -> list[dict[str, Any]]:
        """How compressed-tensors stores the weights, one entry a group of layers; empty for other checkpoints."""
        groups = (self.quantization or {}).get("config_groups", {}).values()
        return [group.get("weights") or {} for group in groups]

    @property
    def quantization_group(self) -> int:
        """Columns of a weight that share a scale, so that no split may cut them; 1 where it is whole rows."""
        config, weights = self.quantization or {}, self.compressed_weights
        blocks = [config.get("weight_block_size"), *(weight.get("block_structure") for weight in weights)]
        sizes = [config.get("group_size"), *(weight.get("group_size") for weight in weights)]
        return max([size for size in sizes if size and size > 0] + [block[-1] for block in blocks if block], default=1)

    @property
    def quantizes_vision(self) -> bool:
        """Whether FP8 takes the vision encoder's layers: vLLM's own does, and a checkpoint names what it leaves out."""
        config = self.quantization or {}
        left_out = [name for key in LEFT_OUT for name in config.get(key) or []]
        return not any("visual" in str(name) for name in left_out)

    def tensor_parallel_sizes(self) -> Iterator[int]:
        """The numbers of GPUs that its heads, vision heads and groups of MLP columns can be divided by."""
        return divisors(self.heads, self.vision_heads, self.intermediate_size // self.quantization_group)

    @classmethod
    def load(cls, model: str) -> "ModelGeometry":
        """The geometry of a known name (from the config that we carry) or of a directory.

        Raises UsageError where there is no config.json, or where it is not a Qwen2-VL model's.
        """
        path = config_path(model)
        return cls.from_config(read_config(path), path)

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> "ModelGeometry":
        """The geometry in a config as transformers 4 (flat) or 5 (`text_config`) writes it."""
        text, vision = config.get("text_config", config), config.get("vision_config", {})
        try:
            made = cls(
                layers=text["num_hidden_layers"],
                hidden_size=text["hidden_size"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                intermediate_size=text["intermediate_size"],
                vocab_size=text["vocab_size"],
                max_position_embeddings=text["max_position_embeddings"],
                tied_embeddings=config.get("tie_word_embeddings", False),
                # Where a config leaves one out, the default of transformers' Qwen2VLVisionConfig.
                vision_layers=vision.get("depth", 32),
                vision_size=vision.get("embed_dim", 1280),
                vision_mlp_size=int(vision.get("embed_dim", 1280) * vision.get("mlp_ratio", 4)),
                vision_heads=vision.get("num_heads", 16),
                quantization=config.get("quantization_config"),
            )
            for name, value in vars(made).items():
                if name not in ("tied_embeddings", "quantization") and not (type(value) is int and value > 0):
                    raise ValueError(f"{name} is {value!r}, and must be a whole number from 1 up")
            method = made.quantization or {}
            for name, kind in (("quant_method", str), ("bits", int), *((name, list) for name in LEFT_OUT)):
                if not isinstance(value := method.get(name) or kind(), kind):
                    raise ValueError(f"{name} of its quantization_config is {value!r}")
            if made.intermediate_size % (group := made.quantization_group):
                raise ValueError(f"its quantisation groups of {group} do not divide {made.intermediate_size} columns")
            return made
        except KeyError as missing:
            raise UsageError(f"{path} lacks {missing}, which a Qwen2-VL model has.") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"{path} is no Qwen2-VL model's: {error}.") from None


def read_config(path: Path) -> dict[str, Any]:
    """A Qwen2-VL config.json. Raises UsageError where it is missing, is no JSON, or is another model's."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path.parent} has no config.json, so it is no model directory. `qvq-serve download --to DIR` makes one."
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    found = config.get("architectures") if isinstance(config, dict) else None
    if found != [ARCHITECTURE]:
        raise UsageError(
            f"{path} is of architecture {found}, and qvq-serve serves {ARCHITECTURE} (QVQ and Qwen2-VL) only."
        )
    return dict(config)


UNFINISHED = ".qvq-unfinished"
"""In a directory whose download has begun, until the hashes of all its files were checked."""


def missing_files(directory: Path) -> list[str]:
    """What a model directory lacks: config.json, tokenizer, weight files of its index, or the end of its download."""
    lacking = [
        name
        for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json")
        if not (directory / name).is_file()
    ]
    if (directory / UNFINISHED).exists():
        lacking.append(f"the end of its download, with the check of its hashes ({UNFINISHED})")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            shards[0]
        except (ValueError, LookupError, TypeError, AttributeError):
            return [*lacking, index.name]  # cut short: to be brought again
        lacking += [shard for shard in shards if not (directory / shard).is_file()]
    elif not (shards := list(directory.glob("*.safetensors"))):
        lacking.append("*.safetensors")
    elif any(re.search(r"-\d{5}-of-\d{5}$", shard.stem) for shard in shards):
        lacking.append(index.name)  # which says how many they are
    return lacking


def cut_short(directory: Path) -> list[str]:
    """The weight files that end before the tensors of their header, or have none, as Git LFS's pointers."""
    return sorted(path.name for path in directory.glob("*.safetensors") if not is_whole(path))


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes, the header's length, and the header first."""
    size = path.stat().st_size
    with path.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 0 < length <= min(size - 8, HEADER_BYTES):
            return False
        try:
            tensors = json.loads(content.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
            return bool(size == 8 + length + max(ends, default=0))
        except (ValueError, LookupError, TypeError, AttributeError):
            return False


def weight_bytes(directory: Path) -> int:
    """Bytes of all weight files of a model directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def divisors(*numbers: int) -> Iterator[int]:
    """The numbers from 1 up that divide all of `numbers`."""
    return (n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers))
