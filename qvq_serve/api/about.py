"""What runs here, for whoever measures it: the launch, and what one token costs the fullest GPU at the least."""

import json
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from qvq_serve import __version__, metrics
from qvq_serve.engine import SECRET
from qvq_serve.gpu import Gpu
from qvq_serve.memory import (
    BF16,
    PATCHES_PER_TOKEN,
    dtype_bytes,
    kv_bytes_per_token,
    language_weights,
    rope_table,
    vision_parameters,
    weight_kind,
)
from qvq_serve.model import ModelGeometry
from qvq_serve.profile import Profile, flag, workers

PRIVATE = (*SECRET, "system_prompt", "guard_url", "guard_extra_body")
HIDDEN = re.compile("|".join(map(flag, PRIVATE)) + "|--.*(token|key|password)")


def token_figures(profile: Profile, geometry: ModelGeometry) -> dict[str, float]:
    """Bytes and FLOPs of the fullest GPU, by arithmetic; two FLOPs a multiplication with a weight.

    `weight_bytes` are read once a step, whatever the batch; `kv_bytes` once a step for each token in the cache.
    Attention costs `attention_flops` for each pair of a token and one before it. Of an image, each patch costs
    `patch_flops`, and `patch_pair_flops` with each patch of the same image.
    """
    g, kind = geometry, weight_kind(profile, geometry)
    size = dtype_bytes(profile)
    head = g.vocab_size * g.hidden_size // profile.tp
    layers = -(-g.layers // profile.pp)
    per_layer = g.hidden_size * (2 * g.hidden_size + 2 * g.kv_heads * g.head_size + 3 * g.intermediate_size)
    weights = language_weights(g, kind, profile.tp, profile.pp) - rope_table(g)
    if not g.tied_embeddings and profile.pp == 1:
        weights -= head * BF16  # of the embeddings only the rows of the batch are read
    encoder, merger = vision_parameters(g)
    return {
        "weight_bytes": weights * (size / BF16 if kind == "bf16" else 1),
        "kv_bytes": kv_bytes_per_token(g, profile),
        "token_flops": 2 * (layers * per_layer // profile.tp + head),
        "attention_flops": 4 * layers * g.hidden_size / profile.tp,
        "patch_flops": 2 * (encoder + merger / PATCHES_PER_TOKEN) / profile.tp,
        "patch_pair_flops": 4 * g.vision_layers * g.vision_size / profile.tp,
    }


def launch_labels(profile: Profile, geometry: ModelGeometry, gpus: list[Gpu]) -> dict[str, str]:
    """The launch in words, for anybody who may read metrics: without what is `PRIVATE`, or a key or token of vLLM's,
    and of a file's path with nothing but its last part."""
    from vllm import __version__ as vllm_version

    default = Profile()
    chosen = {
        name: shown(value, profile.open_routes) if name == "vllm" else last_part(value, profile.open_routes)
        for name, value in asdict(profile).items()
        if name not in PRIVATE and value != getattr(default, name)
    }
    return {
        "version": __version__,
        "vllm": vllm_version,
        "card": gpus[0].name if gpus else "",
        "gpus": str(workers(profile) if gpus else 0),
        "weights": weight_kind(profile, geometry),
        "profile": json.dumps(chosen),
        "argv": shlex.join(["qvq-serve", *shown(sys.argv[1:], profile.open_routes)]),
    }


def shown(arguments: Iterable[str], routes: str | None) -> list[str]:
    """A command line's arguments as anybody may see them."""
    line: list[str] = []
    private = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if private and not argument.startswith("-"):
            line.append("...")
        elif private := bool(HIDDEN.fullmatch(name)):
            line.append(name + equals + ("..." if equals else ""))
            private = not equals
        else:
            line.append(last_part(argument, routes))
    return line


def last_part(value: Any, routes: str | None) -> Any:
    """A file's path's last part; anything else, routes too, as it is."""
    if isinstance(value, str) and value != routes and value.startswith(("/", "~/")):
        return value.rstrip("/").rsplit("/", 1)[-1]
    return value


def export(profile: Profile, gpus: list[Gpu]) -> None:
    """Sets the metrics, once."""
    geometry = ModelGeometry.load(profile.model)
    metrics.SERVER.labels(**launch_labels(profile, geometry, gpus)).set(1)
    for name, value in token_figures(profile, geometry).items():
        metrics.MODEL.labels(name).set(value)
