"""Reasons not to start, each with the value seen and what would do."""

import importlib
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from qvq_serve.cli import main
from qvq_serve.engine import OTHER_SERVERS
from qvq_serve.errors import DoesNotFit, StartError, UsageError
from qvq_serve.gpu import GIB, Gpu
from qvq_serve.memory import MemoryPlan, plan
from qvq_serve.model import ModelGeometry
from qvq_serve.preflight import (
    check_build,
    check_compiler,
    check_driver,
    check_environment,
    check_flashinfer,
    check_gpus,
    check_groups,
    check_image_dir,
    check_memory,
    check_model,
    check_open_files,
    check_others,
    check_port,
    check_shared_memory,
    check_start,
    check_usage,
    machine_checks,
)
from qvq_serve.profile import Profile, Resolved, resolve, shipped_profile
from tests.download.hub import MODEL, WEIGHTS

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", int(79.6 * GIB))


def with_gpus(profile: Profile) -> Resolved:
    return Resolved(profile, {})


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused_with_what_would_do() -> None:
    with pytest.raises(UsageError, match=r"--tp 3: the model's 64 attention heads .* 1, 2, 4, 8, 16 would do"):
        check_usage(with_gpus(Profile(tp=3)))
    check_usage(with_gpus(Profile(tp=4)))


def test_the_vision_heads_bound_it_too_unless_the_encoder_is_split_by_data() -> None:
    with pytest.raises(UsageError, match="--tp 32: the model's 16 vision heads"):
        check_usage(with_gpus(Profile(tp=32)))
    check_usage(with_gpus(Profile(tp=32, vllm=("--mm-encoder-tp-mode", "data"))))


def test_more_context_than_the_model_has_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-model-len 128001 is above the model's context of 128000"):
        check_usage(with_gpus(Profile(max_model_len=128_001)))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="--pp 81: the model has 80 layers"):
        check_usage(with_gpus(Profile(pp=81)))


def test_a_missing_image_directory_is_named() -> None:
    with pytest.raises(UsageError, match="--allowed-image-dir /none/there: there is no such directory"):
        check_image_dir(Profile(allowed_image_dir="/none/there"))


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


def test_groups_that_the_split_cuts_are_refused() -> None:
    groups = {"quant_method": "awq", "bits": 4, "group_size": 128}
    unpadded = replace(ModelGeometry.load("qvq-72b"), quantization=groups)
    check_groups(unpadded, Profile(tp=1))
    with pytest.raises(UsageError, match=r"--tp 2: 29568 MLP columns give each GPU 14784, .* groups of 128"):
        check_groups(unpadded, Profile(tp=2))
    for tp in (1, 2, 4, 8):
        check_groups(ModelGeometry.load("qvq-72b-awq"), Profile(tp=tp))
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(UsageError, match=r"--tp 2: .* groups of 128"):
        check_groups(replace(unpadded, quantization=blocks), Profile(tp=2))
    channels = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"group_size": None}}}}
    for tp in (1, 2, 4, 8):
        check_groups(replace(unpadded, quantization=channels), Profile(tp=tp))


def test_an_image_that_must_be_encoded_whole_and_is_larger_than_a_batch_is_refused() -> None:
    whole = ("--disable-chunked-mm-input", "--max-num-batched-tokens", "1024")
    with pytest.raises(UsageError, match="--max-visual-tokens 1280 is above --max-num-batched-tokens 1024"):
        check_usage(with_gpus(Profile(vllm=whole)))
    check_usage(with_gpus(Profile(vllm=whole[1:])))


def test_a_plan_that_does_not_fit_is_refused_with_what_would() -> None:
    def planned(memory_bytes: int, gpus: int) -> MemoryPlan:
        return plan(Profile(), ModelGeometry.load("qvq-72b"), "H100", memory_bytes, gpus)

    with pytest.raises(DoesNotFit, match=r"take 142\.3 GiB .* Would fit: .*--tp 4"):
        check_memory(planned(H100.memory_bytes, 4))
    with pytest.raises(DoesNotFit, match="`qvq-serve plan` shows each use"):
        check_memory(planned(20 * GIB, 1))
    check_memory(planned(200 * GIB, 1))


def test_check_ends_with_4_for_a_plan_that_does_not_fit_these_cards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was 3, after which systemd tries again."""
    monkeypatch.setattr("qvq_serve.gpu.visible_gpus", lambda: [H100])
    monkeypatch.setattr("qvq_serve.preflight.driver_version", lambda: "580.0")
    monkeypatch.setattr("qvq_serve.preflight.processes_on", lambda _: [])
    monkeypatch.setattr("qvq_serve.preflight.check_compiler", lambda: None)
    monkeypatch.setattr("qvq_serve.preflight.check_build", lambda: None)
    assert main(["check", "--tp", "1", "--port", "18996"]) == 4
    assert "weights and working memory take 142.3 GiB" in capsys.readouterr().err


def test_vllm_for_cpus_is_no_server_for_gpus() -> None:
    """147 GB came before it said so."""
    with pytest.raises(StartError, match="this environment has vLLM for CPUs, and GPUs are visible"):
        check_build()  # these tests' own
    assert check_build in list(machine_checks(with_gpus(Profile()), [H100]))


@pytest.mark.parametrize("name", OTHER_SERVERS)
def test_variables_by_which_vllm_would_serve_otherwise_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_environment()
    monkeypatch.setenv(name, "0")
    check_environment()
    monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match=f"{name} is set, and vLLM then"):
        check_environment()
    assert check_environment in list(machine_checks(with_gpus(Profile()), [H100]))


def test_a_card_that_others_use_is_refused_with_their_pids() -> None:
    with pytest.raises(StartError, match=r"in use by process 4242 \(10\.0 GiB\), .* give at most 0\.86"):
        check_others(H100, [(4242, 10 * GIB)], 0.92)
    check_others(H100, [(4242, GIB)], 0.92)


def test_an_old_driver_is_refused() -> None:
    with pytest.raises(StartError, match=r"the NVIDIA driver is 535\.104\.05, and CUDA 13 needs 580"):
        check_driver("535.104.05")
    check_driver("580.159.04")


def test_an_older_driver_passes_with_cudas_compatibility_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", "1")
    check_driver("535.104.05")


def test_what_triton_compiles_with_is_asked_for_before_the_weights_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match="there is no gcc"):
        check_compiler()
    (tmp_path / "clang").touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    with pytest.raises(StartError, match=r"there is no \S+/Python\.h; install gcc and Python's headers"):
        check_compiler()
    (tmp_path / "Python.h").touch()
    check_compiler()
    assert check_compiler in list(machine_checks(with_gpus(Profile()), [H100]))


def test_flashinfer_without_its_kernels_and_without_a_compiler_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc, ninja = tmp_path / "cuda/bin/nvcc", tmp_path / "bin/ninja"
    monkeypatch.setenv("PATH", str(ninja.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for tool in (nvcc, ninja):
        with pytest.raises(StartError, match=rf"there is no {tool if tool == nvcc else 'ninja'}\b.* FLASH_ATTN"):
            check_flashinfer()
        tool.parent.mkdir(parents=True)
        tool.touch(mode=0o755)
    check_flashinfer()
    for flags in ((), ("--attention-backend", "FLASH_ATTN"), ("--attention-backend=flashinfer",)):
        checks = list(machine_checks(with_gpus(Profile(vllm=flags)), [H100]))
        assert (check_flashinfer in checks) == (flags == ("--attention-backend=flashinfer",))


def test_flashinfers_compiled_kernels_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/none")
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("flashinfer_jit_cache", "flashinfer_cubin"):  # vLLM takes the one alone for none
        with pytest.raises(StartError, match="needs compiled kernels"):
            check_flashinfer()
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        importlib.invalidate_caches()
    check_flashinfer()


def test_small_shared_memory_is_refused_for_several_workers_only() -> None:
    with pytest.raises(StartError, match=r"/dev/shm has 0\.06 GiB free, and 4 workers need 1;"):
        check_shared_memory(4, 64 * 2**20)
    check_shared_memory(1, 64 * 2**20)


def test_too_few_files_are_refused() -> None:
    with pytest.raises(StartError, match=r"may open 1024 files, .*ulimit -Hn 4096"):
        check_open_files(1024)
    check_open_files(65536)


def test_force_goes_on_and_says_against_what() -> None:
    resolved = with_gpus(Profile(tp=3, port=18997))
    with pytest.raises(UsageError, match="--tp 3"):
        check_start(resolved, [])
    passed_over = check_start(resolved, [], force=True)
    assert [text.split(":")[0] for text in passed_over][:1] == ["--tp 3"]
    assert any("no NVIDIA GPU is visible" in text for text in passed_over)


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"--port {port} cannot be listened on: Address already in use"):
            check_port("--port", "127.0.0.1", port)
    check_port("--port", "127.0.0.1", port)


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    for name in ("no.such.host.invalid", "a..b"):
        with pytest.raises(StartError, match=f"--host {re.escape(name)}: .*; 127.0.0.1 or 0.0.0.0 would do"):
            check_port("--port", name, 8000)


def test_a_model_directory_that_lacks_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartError, match=r"lacks preprocessor_config.json, tokenizer_config.json, \*.safetensors"):
        check_model(Profile(model=str(tmp_path)))


def test_a_model_directory_with_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    for name, content in MODEL.items():
        (tmp_path / name).write_bytes(content)
    check_model(Profile(model=str(tmp_path)))
    (tmp_path / WEIGHTS).write_bytes(MODEL[WEIGHTS][:-1])
    with pytest.raises(StartError, match=r"model.safetensors is cut short, or no weights; remove it"):
        check_model(Profile(model=str(tmp_path)))


def test_made_up_weights_need_no_files_of_weights(tmp_path: Path) -> None:
    made_up = Profile(model=str(tmp_path), vllm=("--load-format", "dummy"))
    with pytest.raises(StartError, match=r"has no config\.json, which --load-format dummy needs too"):
        check_model(made_up)
    (tmp_path / "config.json").touch()
    check_model(made_up)


def test_each_of_several_machines_needs_its_share_of_the_gpus() -> None:
    two = Profile(tp=8, vllm=("--nnodes", "2"))
    check_gpus(with_gpus(two), [H100] * 4)
    with pytest.raises(StartError, match="--tp 8 x --pp 1 needs 4 GPUs on each of 2 machines, and 2 are visible"):
        check_gpus(with_gpus(two), [H100] * 2)


def test_a_number_of_machines_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="--nnodes two: it is a number of machines, 1 or more"):
        check_gpus(with_gpus(Profile(vllm=("--nnodes=two",))), [H100])
