"""Checkpoints of the training, and the model as it is served."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from qvq_serve.demo.build import build_config, save
from qvq_serve.demo.tokenizer import VOCABULARY, tokenizer

NAME = "checkpoint.pt"


def new_model(seed: int = 72) -> Qwen2VLForConditionalGeneration:
    """The demo's model with seeded random weights, in float32."""
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(build_config(tokenizer(), VOCABULARY))


def write(directory: Path, model: Any, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> Path:
    """Writes the weights (float16), AdamW's second moments (BF16) and the state; returns the file.

    The first moments are dropped: they come back within a few steps, and cost 20 MB.
    """
    moments, step = {}, 0
    if optimizer is not None:
        for name, weight in model.named_parameters():
            if kept := optimizer.state.get(weight):
                moments[name], step = kept["exp_avg_sq"].to(torch.bfloat16).cpu(), int(kept["step"])
    weights = {name: weight.detach().to(torch.float16).cpu() for name, weight in model.named_parameters()}
    torch.save({"weights": weights, "moments": moments, "step": step, "state": state}, directory / NAME)
    return directory / NAME


def read(directory: Path) -> dict[str, Any]:
    """What `write` wrote, or a model's weights as `export` wrote them, with new moments.

    Raises FileNotFoundError where a directory has neither.
    """
    if (directory / "model.safetensors").is_file():
        model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        return {"weights": dict(model.named_parameters()), "moments": {}, "step": 0, "state": {"steps": 0}}
    if not (directory / NAME).is_file():
        raise FileNotFoundError(f"neither {NAME} nor model.safetensors in {directory}")
    found: dict[str, Any] = torch.load(directory / NAME, weights_only=True)
    return found


def load(model: Any, optimizer: torch.optim.Optimizer | None, kept: dict[str, Any]) -> None:
    """Puts a checkpoint into a model and its optimizer."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(kept["weights"][name])
            if optimizer is not None and name in kept["moments"]:
                moment = kept["moments"][name].to(weight)
                optimizer.state[weight] = {
                    "step": torch.tensor(float(kept["step"]), device=weight.device if weight.is_cuda else None),
                    "exp_avg": torch.zeros_like(weight), "exp_avg_sq": moment,
                }  # fmt: skip


def export(checkpoint: Path, directory: Path) -> None:
    """Writes a checkpoint's model as vLLM and transformers load it."""
    model = new_model()
    load(model, None, read(checkpoint))
    save(model, tokenizer(), directory)
