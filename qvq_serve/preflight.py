"""Each reason not to start, found before anything is loaded: the value seen, and what would do."""

import os
import socket
from pathlib import Path

from qvq_serve.errors import StartError, UsageError
from qvq_serve.gpu import GIB, Gpu
from qvq_serve.model import DEMO, KNOWN, ModelGeometry, divisors, locate, missing_files, weight_bytes
from qvq_serve.profile import Profile, Resolved

CPU_OVERHEAD_GIB = 5
"""Host memory of a server on the CPU beside weights and KV cache: three processes hold 4.4 GiB (2026-11-24)."""


def check_usage(profile: Profile) -> None:
    """What can be told from the flags and the model's config alone. Raises UsageError."""
    geometry = ModelGeometry.load(profile.model)
    check_split(geometry, profile)
    if profile.max_model_len > geometry.max_position_embeddings:
        raise UsageError(
            f"--max-model-len {profile.max_model_len} is above the model's context of "
            f"{geometry.max_position_embeddings}; lower it."
        )
    if profile.allowed_image_dir is not None and not Path(profile.allowed_image_dir).is_dir():
        raise UsageError(f"--allowed-image-dir {profile.allowed_image_dir}: there is no such directory.")


def check_split(geometry: ModelGeometry, profile: Profile) -> None:
    """Tensor and pipeline parallelism that the geometry can be divided by. Raises UsageError."""
    sharded_vision = "--mm-encoder-tp-mode=data" not in "=".join(profile.vllm)
    parts = {"attention heads": geometry.heads, "MLP columns": geometry.intermediate_size}
    if sharded_vision:
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


def check_gpus(resolved: Resolved, gpus: list[Gpu]) -> None:
    """Enough GPUs, each with the memory that the profile was made for. Raises StartError."""
    profile, needs = resolved.profile, resolved.hardware
    wanted = max(profile.tp * profile.pp, needs.gpus)
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
    if gpus and wanted > len(gpus):
        raise StartError(
            f"--tp {profile.tp} x --pp {profile.pp} needs {wanted} GPUs, and {len(gpus)} are visible "
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
    if profile.model == DEMO and not directory.exists():
        return  # it is built at the start
    if lacking := missing_files(directory):
        remedy = f"`qvq-serve download --model {profile.model}`" if profile.model in KNOWN else "the complete directory"
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise StartError(f"{directory} lacks {shown}; {remedy} brings it.")


def check_host_memory(profile: Profile, gpus: list[Gpu]) -> None:
    """On the CPU, memory for weights and processes. Raises StartError."""
    if gpus or profile.model == DEMO:
        return
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    needed = weight_bytes(locate(profile.model)) / GIB + CPU_OVERHEAD_GIB
    if needed > available:
        raise StartError(
            f"no NVIDIA GPU is visible, and on the CPU --model {profile.model} needs some {needed:.0f} GiB of memory, "
            f"of which {available:.0f} are free; serve it on a GPU, or `qvq-serve --demo` the built-in model."
        )


def check_port(profile: Profile) -> None:
    """An address that can be listened on. Raises StartError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            profile.host or None, profile.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror as error:
        raise StartError(f"--host {profile.host}: {error.strerror}; 127.0.0.1 or 0.0.0.0 would do.") from None
    except OSError as error:
        raise StartError(
            f"--host {profile.host} --port {profile.port} cannot be listened on: {error.strerror}; choose another with "
            "--port, or stop what uses it."
        ) from None


def check_start(resolved: Resolved, gpus: list[Gpu]) -> None:
    """All that can be told of this machine before anything is loaded. Raises the first UsageError or StartError."""
    check_usage(resolved.profile)
    check_gpus(resolved, gpus)
    check_port(resolved.profile)
    check_model(resolved.profile)
    check_host_memory(resolved.profile, gpus)
