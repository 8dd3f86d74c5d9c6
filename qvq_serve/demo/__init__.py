"""The built-in demo model: Qwen2-VL's architecture in 21 MB, trained to read drawn images (`train`)."""

from pathlib import Path

DIRECTORY = Path(__file__).parent / "model"
"""The model as vLLM and transformers load it; `checkpoint.export` writes it."""
