"""Where a model lies, and what its config says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qvq_serve.errors import UsageError
from qvq_serve.model import (
    KNOWN,
    ModelGeometry,
    cache_dir,
    config_path,
    cut_short,
    locate,
    missing_files,
    read_config,
)
from tests.download.hub import MODEL, WEIGHTS


def test_qvqs_geometry_is_carried() -> None:
    geometry = ModelGeometry.load("qvq-72b")
    assert (geometry.layers, geometry.heads, geometry.kv_heads, geometry.vision_heads) == (80, 64, 8, 16)
    assert (geometry.intermediate_size, geometry.max_position_embeddings) == (29568, 128000)
    assert ModelGeometry.load("qvq-72b-awq").intermediate_size == 29696


def test_a_config_of_transformers_5_is_read_like_one_of_transformers_4() -> None:
    flat = read_config(Path("qvq_serve/configs/qvq-72b.json").absolute())
    nested = {"text_config": flat, "vision_config": flat["vision_config"]}
    assert ModelGeometry.from_config(nested, Path("x")) == ModelGeometry.load("qvq-72b")


def test_a_known_name_lies_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QVQ_CACHE", str(tmp_path))
    assert locate("qvq-72b") == tmp_path / "models" / KNOWN["qvq-72b"].repo
    monkeypatch.delenv("QVQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/qvq-serve")


def changed(**values: object) -> str:
    """QVQ's config.json with other values."""
    return json.dumps(read_config(config_path("qvq-72b")) | values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json, so it is no model directory"),
        ("{", "cannot be read as JSON"),
        ('{"architectures": ["LlamaForCausalLM"]}', "is of architecture ['LlamaForCausalLM']"),
        ("[]", "is of architecture None"),
        ('{"architectures": ["Qwen2VLForConditionalGeneration"]}', "lacks 'num_hidden_layers'"),
        (changed(vision_config=None), "is no Qwen2-VL model's: "),
        (changed(hidden_size="8192"), "hidden_size is '8192', and must be a whole number from 1 up"),
        (changed(num_attention_heads=0), "heads is 0, and must be"),
        (changed(quantization_config="awq"), "is no Qwen2-VL model's: "),
        (changed(quantization_config={"group_size": "128"}), "is no Qwen2-VL model's: "),
        (changed(quantization_config={"bits": "4"}), "bits of its quantization_config is '4'"),
        (changed(quantization_config={"quant_method": ["fp8"]}), "quant_method of its quantization_config is ['fp8']"),
        (changed(quantization_config={"ignore": 1}), "ignore of its quantization_config is 1"),
        (changed(quantization_config={"group_size": 4096}), "groups of 4096 do not divide 29568 columns"),
    ],
)
def test_a_directory_that_is_no_qwen2_vl_model_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError) as error:
        ModelGeometry.load(str(tmp_path))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match=r"--model qvq-72: there is no such directory.*Did you mean 'qvq-72b'\?"):
        locate("qvq-72")


def test_missing_shards_are_found_by_the_index(tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "a.safetensors"):
        (tmp_path / name).write_text("{}")
    assert missing_files(tmp_path) == []
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert missing_files(tmp_path) == ["b.safetensors"]


@pytest.mark.parametrize("content", ["", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_that_names_no_shards_is_lacking(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert missing_files(tmp_path)[-1] == "model.safetensors.index.json"


def test_a_shard_of_several_without_their_index_lacks_it(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_text("")
    assert missing_files(tmp_path)[-1] == "model.safetensors.index.json"


def test_weights_that_are_not_whole_are_told_from_those_that_are(tmp_path: Path) -> None:
    whole = MODEL[WEIGHTS]
    (tmp_path / "whole.safetensors").write_bytes(whole)
    assert cut_short(tmp_path) == []
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name, content in (("cut", whole[:-1]), ("empty", b""), ("header", whole[:40]), ("pointer", pointer)):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    assert cut_short(tmp_path) == [f"{name}.safetensors" for name in ("cut", "empty", "header", "pointer")]


@pytest.mark.parametrize("key", ["ignore", "ignored_layers", "modules_to_not_convert"])
def test_a_checkpoint_says_that_its_vision_encoder_is_not_quantised(key: str) -> None:
    config = {"quant_method": "fp8", "bits": None, key: ["lm_head", "visual.blocks.0.mlp"]}
    assert not replace(ModelGeometry.load("qvq-72b"), quantization=config).quantizes_vision
    assert replace(ModelGeometry.load("qvq-72b"), quantization=config | {key: None}).quantizes_vision


def test_whole_rows_that_share_a_scale_are_no_groups() -> None:
    """GPTQ writes -1 for them, which no number of GPUs divides."""
    rows = replace(ModelGeometry.load("qvq-72b"), quantization={"quant_method": "gptq", "bits": 4, "group_size": -1})
    assert rows.quantization_group == 1
    assert 4 in rows.tensor_parallel_sizes()
