"""What a server says of its launch, and of what a token costs."""

import json
import sys

import pytest

from qvq_serve.api.about import launch_labels, token_figures
from qvq_serve.gpu import Gpu
from qvq_serve.model import ModelGeometry
from qvq_serve.profile import Profile

QVQ = ModelGeometry.load("qvq-72b")


def test_a_token_of_qvq_costs_what_its_parameters_say() -> None:
    figures = token_figures(Profile(), QVQ)
    layers = 80 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 29568)
    head = 152064 * 8192
    assert figures["token_flops"] == 2 * (layers + head)
    assert figures["weight_bytes"] == 2 * (layers + head)  # the embeddings are looked up, not read
    assert figures["kv_bytes"] == 327_680
    assert figures["attention_flops"] == 4 * 80 * 8192
    assert figures["patch_flops"] == pytest.approx(2 * (32 * 12 * 1280**2 + (5120 * 5120 + 5120 * 8192) / 4))


def test_four_gpus_share_it_and_fewer_bits_are_fewer_bytes() -> None:
    whole, quarter = token_figures(Profile(), QVQ), token_figures(Profile(tp=4), QVQ)
    assert all(quarter[name] == pytest.approx(whole[name] / 4) for name in whole)
    fp8 = token_figures(Profile(quantization="fp8_per_channel", kv_cache_dtype="fp8"), QVQ)
    assert fp8["weight_bytes"] < 0.52 * whole["weight_bytes"] and fp8["kv_bytes"] == whole["kv_bytes"] / 2
    assert fp8["token_flops"] == whole["token_flops"]


def test_the_launch_is_told_without_keys_and_without_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qvq-serve", "--model", "/secret/place/qvq-72b", "--tp", "2"])
    profile = Profile(model="qvq-72b", tp=2, api_key="sk-secret", guard_api_key="sk-other", log_format="json")
    labels = launch_labels(profile, QVQ, [Gpu(0, "NVIDIA H200", 140), Gpu(1, "NVIDIA H200", 140)])
    assert "secret" not in json.dumps(labels) and "sk-other" not in json.dumps(labels)
    assert labels["argv"] == "qvq-serve --model qvq-72b --tp 2"
    assert json.loads(labels["profile"]) == {"tp": 2, "log_format": "json"}
    assert (labels["card"], labels["gpus"], labels["weights"]) == ("NVIDIA H200", "2", "bf16")


def test_nobody_reads_in_the_metrics_what_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need no key. The system prompt, the guard's URL and vLLM's --hf-token stood there."""
    ours = ["--system-prompt", "hush 1", "--guard-url=http://user:hush@guard", "--guard-extra-body", '{"token":"hush"}']
    vllm = ("--hf-token", "hf_hush", "--max-num-seqs", "8")
    monkeypatch.setattr(sys, "argv", ["qvq-serve", *ours, "--max-output-tokens", "9", "--", *vllm])
    private = {"system_prompt": "hush 1", "guard_url": "http://user:hush@guard", "guard_extra_body": '{"token":"hush"}'}
    labels = launch_labels(Profile(**private, vllm=vllm), QVQ, [])
    assert "hush" not in json.dumps(labels)
    assert "--guard-url=... --guard-extra-body ... --max-output-tokens 9 -- --hf-token ... --max-num-seqs 8" in (
        labels["argv"].replace("'", "")
    )
    assert json.loads(labels["profile"]) == {"vllm": ["--hf-token", "...", "--max-num-seqs", "8"]}


def test_the_gpus_of_all_machines_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qvq-serve"])
    two = Profile(tp=8, vllm=("--nnodes", "2"))
    assert launch_labels(two, QVQ, [Gpu(i, "NVIDIA H200", 140) for i in range(4)])["gpus"] == "8"


def test_open_routes_are_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qvq-serve", "--open-routes", "/tokenize,/v1/completions"])
    labels = launch_labels(Profile(open_routes="/tokenize,/v1/completions"), QVQ, [])
    assert labels["argv"] == "qvq-serve --open-routes /tokenize,/v1/completions"
    assert json.loads(labels["profile"]) == {"open_routes": "/tokenize,/v1/completions"}
