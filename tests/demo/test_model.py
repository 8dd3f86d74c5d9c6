"""The model that is shipped: its size, its files, and the picture of the README's first screen."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from qvq_serve.demo import DIRECTORY
from qvq_serve.demo.build import GEOMETRY
from qvq_serve.demo.cases import case
from qvq_serve.demo.tokenizer import tokenizer
from qvq_serve.engine import CHAT_TEMPLATE

INVOICE = Path(__file__).parents[2] / "benchmarks/invoice.png"


def test_the_model_is_small_and_lies_in_bf16() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 24e6
    assert json.loads((DIRECTORY / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_shipped_files_are_those_of_the_generator() -> None:
    made, shipped = json.loads(GEOMETRY.read_text()), json.loads((DIRECTORY / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        assert made[part].items() <= shipped[part].items()
    assert json.loads((DIRECTORY / "tokenizer.json").read_text()) == json.loads(tokenizer().backend_tokenizer.to_str())
    assert (DIRECTORY / "chat_template.jinja").read_text() == CHAT_TEMPLATE.read_text()


def test_the_readmes_invoice_is_a_case_that_was_never_in_training() -> None:
    one = case(135, "invoice", language="en", size=(476, 476), difficulty=0.8)
    assert (np.asarray(Image.open(INVOICE)) == one.pixels).all()
    assert one.answer == "190"
