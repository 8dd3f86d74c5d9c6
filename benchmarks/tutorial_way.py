"""The model card's way, transformers and one request at a time, on this card: seconds of a prompt, and of a token.

    python -m benchmarks.tutorial_way RESULT.json GEOMETRY [--layers 8 16]

GEOMETRY is a directory of benchmarks.geometry; weights are made up, in BF16 on a card and FP32 without one. The whole
model (144 GB) fits no single card, so two models with fewer layers of text (`--layers`) are measured, the
vision encoder whole, and a line through the two gives the time of all layers, as if one card held them. A request is
one image of 980 x 980 and 256 tokens of text, with 2,048 tokens of output: the workload image-2k.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.startup import machine

IMAGE_TOKENS, TEXT_TOKENS, OUTPUT_TOKENS = 35 * 35, 256, 2048
TOKENS, ROUNDS = 64, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made_up(config: Qwen2VLConfig, layers: int) -> Any:
    """The model with so many layers of text, and random weights."""
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = None
    torch.set_default_dtype(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with torch.device(DEVICE):
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config.to_dict())).eval()


def prompt(config: Qwen2VLConfig) -> dict[str, torch.Tensor]:
    """An image and a text as the model's processor gives them: (1, 1483) token ids, (4900, 1176) patches."""
    image = [config.image_token_id] * IMAGE_TOKENS
    text = torch.randint(1000, (TEXT_TOKENS,)).tolist()
    ids = torch.tensor([[config.vision_start_token_id, *image, config.vision_end_token_id, *text]])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(4 * IMAGE_TOKENS, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 70, 70]]),
    }
    return {name: value.to(DEVICE) for name, value in given.items()}


def seconds(model: Any, given: dict[str, torch.Tensor], tokens: int) -> float:
    """Seconds of one answer of exactly so many tokens."""
    started = time.perf_counter()
    out = model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).cpu()
    took = time.perf_counter() - started
    assert out.shape[1] == given["input_ids"].shape[1] + tokens
    return took


def measure(config: Qwen2VLConfig, layers: int) -> dict[str, Any]:
    """Seconds of the prompt (its first token), and of each further token: medians."""
    model, given = made_up(config, layers), prompt(config)
    seconds(model, given, TOKENS)
    first = statistics.median(seconds(model, given, 1) for _ in range(ROUNDS))
    whole = statistics.median(seconds(model, given, TOKENS) for _ in range(ROUNDS))
    found = {"layers": layers, "prompt_s": first, "token_s": (whole - first) / (TOKENS - 1)}
    print(found, flush=True)
    return found


def at(rows: list[dict[str, Any]], what: str, layers: int) -> float:
    """A value on the line through the two rows."""
    less, more = rows
    slope = (more[what] - less[what]) / (more["layers"] - less["layers"])
    return float(less[what] + slope * (layers - less["layers"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("geometry", type=Path)
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 16])
    options = parser.parse_args()
    config = Qwen2VLConfig.from_pretrained(options.geometry)
    whole = config.text_config.num_hidden_layers
    rows = []
    for layers in options.layers:
        rows.append(measure(config, layers))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    prompt_s, token_s = at(rows, "prompt_s", whole), at(rows, "token_s", whole)
    found = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.tutorial_way RESULT.json {options.geometry.name} "
        f"--layers {' '.join(map(str, options.layers))}",
        "card": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "measured": rows,
        "layers": whole,
        "prompt_s": prompt_s,
        "token_s": token_s,
        "output_tokens_per_second": OUTPUT_TOKENS / (prompt_s + token_s * (OUTPUT_TOKENS - 1)),
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print({name: value for name, value in found.items() if name not in ("measured", "machine")})


if __name__ == "__main__":
    main()
