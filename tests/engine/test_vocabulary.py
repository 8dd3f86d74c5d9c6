"""Qwen's real vocabulary of 152,064, on random weights: QVQ's token ids on their way through the server."""

from collections.abc import Iterator

import httpx
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.geometry import qwen_bpe
from qvq_serve.demo.build import build_config, build_tokenizer, save
from tests.engine.conftest import Server, data_url, photo, serving, user

VOCABULARY = 152_064


@pytest.fixture(scope="module")
def qwen_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("qwen") / "tiny-qvq"
    directory.mkdir()
    vocab, merges = qwen_bpe()
    tokenizer = build_tokenizer(vocab, merges)
    torch.manual_seed(72)
    save(Qwen2VLForConditionalGeneration(build_config(tokenizer, VOCABULARY)), tokenizer, directory)
    arguments = ["--model", str(directory), "--max-model-len", "8192", "--open-routes", "/tokenize,/detokenize"]
    vllm = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "268435456"]
    with serving(directory.parent, *arguments, "--", *vllm) as running:
        yield running


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("**Final Answer**\n\n", [334, 19357, 21806, 56177]),
        ("\\boxed{", [59, 79075, 90]),
        ("<|im_start|>assistant\n", [151644, 77091, 198]),
        ("<|vision_start|><|image_pad|><|vision_end|>", [151652, 151655, 151653]),
    ],
)
def test_the_server_tokenises_as_qvq_does(qwen_server: Server, text: str, ids: list[int]) -> None:
    body = {"prompt": text, "add_special_tokens": False}
    answer = httpx.post(f"{qwen_server.url}/tokenize", json=body, headers=qwen_server.headers, timeout=30)
    assert answer.json()["tokens"] == ids


@pytest.mark.parametrize("text", ["How much is the tax in total?", "这张发票的总额是多少？", "naïve café 🙂 ∫ x² dx"])
def test_text_survives_the_way_there_and_back(qwen_server: Server, text: str) -> None:
    headers = qwen_server.headers
    ids = httpx.post(f"{qwen_server.url}/tokenize", json={"prompt": text}, headers=headers).json()["tokens"]
    assert max(ids) < VOCABULARY
    assert httpx.post(f"{qwen_server.url}/detokenize", json={"tokens": ids}, headers=headers).json()["prompt"] == text


def test_an_image_becomes_image_pads_and_is_answered(qwen_server: Server) -> None:
    answer = qwen_server.chat(
        user({"url": data_url(photo(476, 476))}, "What?"), max_tokens=16, ignore_eos=True, return_token_ids=True
    ).json()
    assert answer["prompt_token_ids"].count(151655) == 17 * 17
    tokens = answer["choices"][0]["token_ids"]
    assert len(tokens) == 16
    assert all(0 <= token < VOCABULARY for token in tokens)
    assert max(tokens) > 1_280  # beyond the demo's own vocabulary
