"""Reasons not to start, each with the value seen and what would do."""

import socket
from pathlib import Path

import pytest

from qvq_serve.errors import StartError, UsageError
from qvq_serve.gpu import GIB, Gpu
from qvq_serve.preflight import check_gpus, check_model, check_port, check_usage
from qvq_serve.profile import Profile, Resolved, resolve, shipped_profile

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", int(79.6 * GIB))


def with_gpus(profile: Profile) -> Resolved:
    return Resolved(profile, {})


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused_with_what_would_do() -> None:
    with pytest.raises(UsageError, match=r"--tp 3: the model's 64 attention heads .* 1, 2, 4, 8, 16 would do"):
        check_usage(Profile(tp=3))
    check_usage(Profile(tp=4))


def test_the_vision_heads_bound_it_too_unless_the_encoder_is_split_by_data() -> None:
    with pytest.raises(UsageError, match="--tp 32: the model's 16 vision heads"):
        check_usage(Profile(tp=32))
    check_usage(Profile(tp=32, vllm=("--mm-encoder-tp-mode", "data")))


def test_more_context_than_the_model_has_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-model-len 128001 is above the model's context of 128000"):
        check_usage(Profile(max_model_len=128_001))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="--pp 81: the model has 80 layers"):
        check_usage(Profile(pp=81))


def test_a_missing_image_directory_is_named() -> None:
    with pytest.raises(UsageError, match="--allowed-image-dir /none/there: there is no such directory"):
        check_usage(Profile(allowed_image_dir="/none/there"))


def test_a_gpu_profile_on_a_machine_without_one_is_refused() -> None:
    resolved = resolve({}, {}, (shipped_profile("qvq72b_h200x1_fp8"),))
    with pytest.raises(StartError, match="a profile for 1 x H200 141 GB needs 1"):
        check_gpus(resolved, [])
    with pytest.raises(StartError, match="the model qvq-72b needs 4"):
        check_gpus(with_gpus(Profile(tp=4)), [])
    check_gpus(with_gpus(Profile(model="demo")), [])


def test_pipeline_stages_on_the_cpu_are_refused() -> None:
    with pytest.raises(StartError, match=r"--pp 2: vLLM 0\.32 cannot run pipeline stages on the CPU; --tp 2 would do"):
        check_gpus(with_gpus(Profile(model="demo", pp=2)), [])


def test_too_few_or_too_small_gpus_are_refused() -> None:
    with pytest.raises(StartError, match=r"--tp 2 x --pp 2 needs 4 GPUs, and 1 are visible \(NVIDIA H100"):
        check_gpus(with_gpus(Profile(tp=2, pp=2)), [H100])
    with pytest.raises(StartError, match=r"GPU 0 \(NVIDIA H100 80GB HBM3\) has 79.6 GiB, .* made for 138"):
        check_gpus(resolve({}, {}, (shipped_profile("qvq72b_h200x1_fp8"),)), [H100])
    check_gpus(resolve({}, {}, (shipped_profile("qvq72b_h100x1_int4"),)), [H100])


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"--port {port} cannot be listened on: Address already in use"):
            check_port(Profile(port=port))
    check_port(Profile(port=port))


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(StartError, match=r"--host no\.such\.host\.invalid"):
        check_port(Profile(host="no.such.host.invalid"))


def test_a_model_directory_that_lacks_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartError, match=r"lacks preprocessor_config.json, tokenizer_config.json, \*.safetensors"):
        check_model(Profile(model=str(tmp_path)))
