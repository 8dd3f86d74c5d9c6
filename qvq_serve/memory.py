"""The memory plan: bytes of each GPU by use, before anything is loaded. Arithmetic where it can be, measured where not.

Constants that are not arithmetic were fitted to benchmarks/results/memory_2026-11-24.json: vLLM 0.32.0 with its V2
runner on one H100 and one H200. FITTED names the runs; the others of that file were left out, and
tests/unit/test_memory.py holds the plan to all of them. What tensor parallelism changes was fitted to
starts_2026-11-28.json, TP 2 and 4 on H200.
"""

import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from qvq_serve.errors import UsageError, nearest
from qvq_serve.gpu import GIB, Gpu
from qvq_serve.model import ModelGeometry
from qvq_serve.profile import Profile, data_parallel, given_flags, given_words, local_workers, workers

MIB = 2**20
BF16, FP32 = 2, 4
BLOCK_TOKENS = 16
"""Tokens of a block of vLLM's KV cache on CUDA."""
PATCHES_PER_TOKEN = 4
PATCH_VALUES = 3 * 2 * 14 * 14
"""Values of a patch: colours x frames x 14 x 14 px."""

FITTED = ("72b-fp8-graphs", "72b-fp8-eager-2k", "72b-fp8-eager-16k-large-image", "72b-awq-eager-2k", "7b-bf16-graphs",
          "2b-bf16-graphs-64")  # fmt: skip

CONTEXT = int(0.515 * GIB)
"""CUDA's own context, taken before vLLM looks at the card: 139.80 - 139.29 GiB (H200), 79.18 - 78.66 (H100)."""
LOAD_OVERHEAD = int(0.1 * GIB)
"""Beside the parameters, what loading leaves allocated: 0.07 to 0.11 GiB in all runs."""
NON_TORCH = int(0.38 * GIB)
"""Kernel modules, cuBLAS and fragmentation, beside parameters and buffers: 0.30 to 0.44 GiB in all runs."""
COMMUNICATION = int(0.955 * GIB)
"""NCCL and vLLM's all-reduce with more than one GPU, taken with the context: 139.80 - 138.33 GiB at TP 4 on H200, less
CONTEXT. (llm-d-planner reports 2.1 GiB of both and libraries; accuracy/blog-gpu-capacity.md, vLLM 0.17, H100.)"""
AWQ_FRAGMENTS = int(5.85 * MIB)
"""A weight that vLLM converts from AWQ: pages of PyTorch's expandable segments that stay half empty. 1.83 GiB for
QVQ's 320 on an H200; without such segments none at the start, and the more under load."""
CONVERTED_WEIGHTS = 4
"""Of a layer: attention's two, the MLP's two."""
# Bytes at the peak of a text batch, a token: (of the MLP's width, of the hidden size). 3 copies of each in BF16 are
# gate, up and their product, and hidden states, residual and output; FP8 adds copies of one byte, torch.compile one.
TEXT_EAGER = {"bf16": (6, 6), "int4": (6, 6), "fp8": (7, 6)}
TEXT_COMPILED = {"bf16": (6, 8), "int4": (6, 8), "fp8": (6, 7)}
PATCH_EAGER, PATCH_COMPILED = 29_500, 39_750
"""Bytes at the peak of the vision encoder, a patch at a width of 1280: 461.5 and 620.9 MiB for 16384 patches."""
# vLLM reserves CUDA graphs by a trial capture, which overstates what they then take (2.2 GiB for 1.3, 1.0 for 0.4).
GRAPH, GRAPH_PIECEWISE_LAYER, GRAPH_FULL_LAYER = 3.5 * MIB, 0.061 * MIB, 0.386 * MIB
"""Bytes of a graph, of a layer in a piecewise one, and of a layer in a full one of 512 sequences (linear below), which
tensor parallelism divides: 2.22, 1.51 and 1.16 GiB at TP 1, 2 and 4."""

# Total memory in GiB as CUDA reports it. H100 and H200 were read here; the rest is what their users report, within 0.3.
CARDS = {"h100": 79.18, "h200": 139.80, "h100-nvl": 93.1, "a100-80gb": 79.2, "a100-40gb": 39.4, "l40s": 44.4,
         "rtx-6000-ada": 47.4, "l4": 22.0, "b200": 178.4}  # fmt: skip
CUDA_SHARE = 0.995
"""Of a card's memory as NVML counts it: what CUDA reports."""
FLASHINFER_WORKSPACE = 394 * MIB
"""vLLM's own, the default of VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE; allocated in the trial capture of CUDA graphs."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where PyTorch's allocator is configured; what an operator says there stays."""
SUFFIXES = "kKmMgGtT"
"""Of the numbers that vLLM reads with them: 8k is 8000, 8K is 8192 (vllm/engine/arg_utils.py, `human_readable_int`)."""
TYPICAL_TEXT = 256
"""Tokens of a typical request's text."""
KV_CACHE_TYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc")
UNREAD = ("-O", "--attention-config", "--compilation-config", "--cpu-offload-gb", "--enable-lora",
          "--kv-offloading-size", "--optimization-level", "--speculative-config")  # fmt: skip
"""Flags of vLLM's that may change memory, and that the plan does not read."""
USES = ("weights", "vision_encoder", "activation_peak", "encoder_cache", "cuda_graphs", "non_torch", "kv_cache")


@dataclass(frozen=True)
class EngineLimits:
    """vLLM's own flags that change memory, with vLLM's defaults where they are not given."""

    max_num_seqs: int
    max_num_batched_tokens: int
    eager: bool
    encoder_data_parallel: bool
    whole_images: bool
    """An image is encoded in one batch, never in parts."""
    kv_cache_memory_bytes: int | None
    processor_cache_bytes: int
    """Of host memory, in the API process and in the engine each."""
    capture_sizes: tuple[int, ...]
    """Tokens of the batches that have CUDA graphs, ascending; none with --enforce-eager."""


def uses_flashinfer(profile: Profile) -> bool:
    """Whether the flags choose FlashInfer; by itself vLLM takes FlashAttention 3 on a Hopper card."""
    return given_flags(profile.vllm).get("--attention-backend", "").upper() == "FLASHINFER"


def told_allocator() -> str:
    """What the environment says to PyTorch's allocator; an operator's word, or what `engine.command` chose."""
    return ",".join(filter(None, map(os.environ.get, ALLOCATOR_VARIABLES)))


def expandable_segments(profile: Profile) -> bool:
    """Whether PyTorch's allocator extends its segments on a GPU: as it is told, and else where we tell it to.

    At TP above 1 vLLM's all-reduce shares memory between processes, which was not tried with such segments; with
    --kv-transfer-config vLLM refuses them.
    """
    if told := told_allocator():
        return "expandable_segments:True" in told
    return profile.tp == 1 and "--kv-transfer-config" not in given_flags(profile.vllm)


def engine_limits(profile: Profile, card: str, memory_gib: float) -> EngineLimits:
    """Reads the flags after `--`. Raises UsageError for a value that is no number, or that vLLM refuses beside another.

    Defaults by card: vllm/engine/arg_utils.py, `get_batch_defaults` and
    `_set_default_max_num_seqs_and_batched_tokens_args`, for the API server.
    """
    given = given_flags(profile.vllm)

    def number(name: str, default: int, suffixes: str = "") -> int:
        text = given.get(name)
        if text is None:
            return default
        found = re.fullmatch(rf"(\d+(?:\.\d+(?=[a-z]))?)([{suffixes}]?)" if suffixes else r"(\d+)()", text)
        digits, suffix = found.groups() if found else ("0", "")
        thousand = 1024 if suffix.isupper() else 1000
        power = "kmgt".index(suffix.lower()) + 1 if suffix else 0
        if not (value := int(Fraction(digits) * thousand**power)):
            raise UsageError(f"{name} {text}: it must be a whole number from 1 up.")
        return value

    tokens, seqs = (
        (2048, 256) if memory_gib < 70 or "a100" in card else (8192, 1024) if memory_gib < 160 else (16384, 1024)
    )
    twice = 2 if given.get("--performance-mode") == "throughput" else 1
    seqs = number("--max-num-seqs", twice * seqs)
    tokens = number("--max-num-batched-tokens", min(twice * tokens, seqs * profile.max_model_len), SUFFIXES)
    if "--max-num-seqs" not in given:
        seqs = min(seqs, tokens)
    elif seqs > tokens:
        raise UsageError(
            f"--max-num-seqs {seqs} is above --max-num-batched-tokens {tokens}, and each running sequence takes a "
            "token of a step; lower the one or raise the other."
        )
    kv_bytes = number("--kv-cache-memory-bytes", 0, SUFFIXES)
    sizes = capture_sizes(number("--max-cudagraph-capture-size", min(2 * seqs, 512)))
    if words := given_words(profile.vllm, "--cudagraph-capture-sizes"):
        if not all(word.isdecimal() and int(word) for word in words):
            raise UsageError(f"--cudagraph-capture-sizes {' '.join(words)}: they are whole numbers from 1 up.")
        sizes = sorted({int(word) for word in words})
    cache_gb = given.get("--mm-processor-cache-gb", "4")
    if not re.fullmatch(r"\d+(\.\d*)?", cache_gb):
        raise UsageError(f"--mm-processor-cache-gb {cache_gb}: it must be a number of GiB, 0 or more.")
    eager = "--enforce-eager" in given
    return EngineLimits(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        eager=eager,
        encoder_data_parallel=given.get("--mm-encoder-tp-mode") == "data",
        whole_images="--disable-chunked-mm-input" in given,
        kv_cache_memory_bytes=kv_bytes or None,
        processor_cache_bytes=int(float(cache_gb) * GIB),
        capture_sizes=() if eager else tuple(size for size in sizes if size <= tokens),
    )


def weight_kind(profile: Profile, geometry: ModelGeometry, source: str = "--quantization") -> str:
    """ "bf16", "fp8" or "int4": how the layers' weights lie in memory. Raises UsageError for a method unknown here.

    `source` is who gave `quantization`: the flag, a variable or a profile.
    """
    config = geometry.quantization or {}
    own = config.get("quant_method")
    method = profile.quantization or own
    if method is None:
        return "bf16"
    if own and method not in (own, f"{own}_marlin"):
        by = "" if source == "--quantization" else f" of {source}"
        remedy = f"give --quantization {own}" if by else "leave it out"
        raise UsageError(f"--quantization {method}{by}: the checkpoint is quantised already, with {own}; {remedy}.")
    if method == "compressed-tensors":
        stored = {(weights.get("num_bits"), weights.get("type")) for weights in geometry.compressed_weights}
        kinds: dict[Any, str] = {(8, "float"): "fp8", (4, "int"): "int4"}
        if len(stored) != 1 or not stored <= set(kinds):
            raise UsageError(
                "the checkpoint has compressed-tensors weights that are neither all 8-bit floats nor all 4-bit "
                "integers: the plan knows those only."
            )
        return kinds[stored.pop()]
    known = {"fp8": "fp8", "fp8_per_channel": "fp8", "fp8_per_tensor": "fp8", "awq": "int4", "awq_marlin": "int4",
             "gptq": "int4", "gptq_marlin": "int4"}  # fmt: skip
    if method not in known:
        raise UsageError(
            f"--quantization {method}: the plan does not know it.{nearest(method, known)} Known: {', '.join(known)}."
        )
    if not own and known[method] == "int4":
        raise UsageError(
            f"--quantization {method}: the checkpoint of {profile.model} is not quantised so; give one that is "
            "(--model qvq-72b-awq), or fp8_per_channel."
        )
    return known[method]


def four_bit_size(geometry: ModelGeometry) -> float:
    """Bytes of a four-bit weight with its share of what its group has, as Hopper's kernels hold it.

    A scale of 2 bytes, or of FP8 eight times where activations are FP8 as well; a zero point of 2 bytes, of half a byte
    in GPTQ's, of none where compressed-tensors is symmetric.
    """
    config, scale = geometry.quantization or {}, 2
    if geometry.compressed_weights:
        if any(group.get("input_activations") for group in config["config_groups"].values()):
            scale = 8
        zero = 0.0 if geometry.compressed_weights[0].get("symmetric", True) else 2.0
    else:
        zero = 2.0 if config.get("quant_method") == "awq" else 0.5
    group = geometry.quantization_group
    return float((config.get("bits") or 4) / 8 + ((scale + zero) / group if group > 1 else 0))


def language_weights(geometry: ModelGeometry, kind: str, tp: int, pp: int) -> int:
    """Bytes of the language model on its fullest GPU; embeddings and output head stay BF16."""
    g = geometry
    kv_size = g.kv_heads * g.head_size
    per_layer = g.hidden_size * (2 * g.hidden_size + 2 * max(kv_size, tp * g.head_size) + 3 * g.intermediate_size) // tp
    weight = four_bit_size(g) if kind == "int4" else float({"bf16": BF16, "fp8": 1}[kind])
    ends = g.vocab_size * g.hidden_size * BF16 // tp  # embeddings on the first stage, the head on the last
    copies = 1 if g.tied_embeddings or pp > 1 else 2
    return math.ceil(g.layers / pp) * int(per_layer * weight) + copies * ends + rope_table(g)


def vision_weights(geometry: ModelGeometry, kind: str, tp: int, data_parallel: bool) -> int:
    """Bytes of the vision encoder on a GPU: every pipeline stage has one. vLLM's FP8 takes its layers too;
    checkpoints may, and four-bit ones do, leave them in BF16."""
    split = 1 if data_parallel else tp
    patch_embedding = PATCH_VALUES * geometry.vision_size * BF16
    size = 1 if kind == "fp8" and geometry.quantizes_vision else BF16
    return sum(vision_parameters(geometry)) * size // split + patch_embedding


def vision_parameters(geometry: ModelGeometry) -> tuple[int, int]:
    """(parameters of the vision encoder's layers, of its merger); without the embedding of patches."""
    g = geometry
    merged = PATCHES_PER_TOKEN * g.vision_size
    layers = g.vision_layers * (4 * g.vision_size**2 + 2 * g.vision_size * g.vision_mlp_size)
    return layers, merged * merged + merged * g.hidden_size


def rope_table(geometry: ModelGeometry) -> int:
    """Bytes of M-RoPE's table of cosines and sines, which has four times the positions."""
    return 4 * geometry.max_position_embeddings * geometry.head_size * BF16


def text_bytes_per_token(geometry: ModelGeometry, kind: str, tp: int, eager: bool) -> int:
    """Bytes at the peak of a text batch, a token."""
    of_mlp, of_hidden = (TEXT_EAGER if eager else TEXT_COMPILED)[kind]
    return of_mlp * geometry.intermediate_size // tp + of_hidden * geometry.hidden_size


def encoder_tokens(profile: Profile, limits: EngineLimits) -> int:
    """Visual tokens that vLLM encodes in one batch when it profiles (multimodal/encoder_budget.py)."""
    largest = profile.max_visual_tokens
    per_request = max(1, min(profile.max_images, profile.max_model_len // largest))
    items = min(max(limits.max_num_batched_tokens, largest) // largest, limits.max_num_seqs * per_request)
    return max(1, items) * largest


def activation_peak(geometry: ModelGeometry, kind: str, profile: Profile, limits: EngineLimits) -> tuple[int, int]:
    """(peak, of it the encoder's outputs), in bytes: the largest of the vision encoder's batch, and, with its outputs
    kept, of a text batch or of the sampler. Logits are gathered whole on each GPU: BF16 and FP32."""
    tokens = encoder_tokens(profile, limits)
    outputs = tokens * geometry.hidden_size * BF16
    split = 1 if limits.encoder_data_parallel else profile.tp
    patch = (PATCH_EAGER if limits.eager else PATCH_COMPILED) * geometry.vision_size // 1280
    encoder = tokens * PATCHES_PER_TOKEN * patch // split
    text = limits.max_num_batched_tokens * text_bytes_per_token(geometry, kind, profile.tp, limits.eager)
    sampled = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    sampler = sampled * geometry.vocab_size * (BF16 + FP32)
    return max(encoder, outputs + text, outputs + sampler), outputs


def capture_sizes(largest: int) -> list[int]:
    """vLLM's default batch sizes of CUDA graphs up to `largest`: 1, 2, 4, then by 8 to 256, by 16 above."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return [size for size in sizes if size <= largest]


def cuda_graphs(geometry: ModelGeometry, kind: str, profile: Profile, limits: EngineLimits) -> int:
    """Bytes that vLLM reserves for CUDA graphs: piecewise ones for every size, full ones for decode batches."""
    sizes = limits.capture_sizes
    if not sizes:
        return 0
    full = [size for size in sizes if size <= limits.max_num_seqs]
    layers = math.ceil(geometry.layers / profile.pp)
    pool = sizes[-1] * text_bytes_per_token(geometry, kind, profile.tp, eager=False)
    of_full = GRAPH_FULL_LAYER * len(full) * max(full, default=0) / 512 / profile.tp
    per_layer = GRAPH_PIECEWISE_LAYER * len(sizes) + of_full
    return int(pool + GRAPH * (len(sizes) + len(full)) + layers * per_layer)


def buffers(geometry: ModelGeometry, limits: EngineLimits) -> int:
    """Bytes that the V2 runner keeps: penalty counts and masks for each sequence over the vocabulary (INT32, and bits),
    and the embeddings of a batch."""
    penalties = limits.max_num_seqs * (geometry.vocab_size * FP32 + geometry.vocab_size // 8)
    return penalties + limits.max_num_batched_tokens * geometry.hidden_size * BF16


def fragments(geometry: ModelGeometry, profile: Profile) -> int:
    """Bytes that the conversion of AWQ's weights leaves in PyTorch's allocator."""
    is_awq = (geometry.quantization or {}).get("quant_method") == "awq"
    return is_awq * expandable_segments(profile) * geometry.layers * CONVERTED_WEIGHTS * AWQ_FRAGMENTS


def dtype_bytes(profile: Profile) -> int:
    """Bytes of a number of the model's type: BF16, or FP32 by vLLM's --dtype (the demo's)."""
    return FP32 if given_flags(profile.vllm).get("--dtype") in ("float32", "float") else BF16


def kv_bytes_per_token(geometry: ModelGeometry, profile: Profile) -> int:
    """Bytes of keys and values of one token on one GPU: 327680 for QVQ in BF16, half of it in FP8."""
    size = 1 if profile.kv_cache_dtype.startswith("fp8") else dtype_bytes(profile)
    heads = max(1, geometry.kv_heads // profile.tp)
    return 2 * math.ceil(geometry.layers / profile.pp) * heads * geometry.head_size * size


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each GPU by use; the fullest GPU where they differ."""

    card: str
    memory: int
    num_gpus: int
    profile: Profile
    uses: dict[str, int]
    notes: dict[str, str]
    """How each use was worked out."""
    requested: int
    kv_bytes_per_token: int
    host: int
    typical_output: int = 2048
    problems: list[str] = field(default_factory=list)

    @property
    def fixed(self) -> int:
        """Everything but the KV cache."""
        return sum(self.uses.values()) - self.uses["kv_cache"]

    @property
    def kv_cache_tokens(self) -> int:
        return self.uses["kv_cache"] // (self.kv_bytes_per_token * BLOCK_TOKENS) * BLOCK_TOKENS

    @property
    def headroom(self) -> int:
        """Bytes that neither CUDA's context, nor communication between GPUs, nor vLLM takes."""
        return self.memory - self.context - self.requested

    @property
    def context(self) -> int:
        """Bytes that are gone before vLLM looks at the card."""
        return CONTEXT + (COMMUNICATION if self.profile.tp * self.profile.pp > 1 else 0)

    def requests(self, tokens: int) -> float:
        """How many requests of so many tokens fit at once, each rounded up to whole blocks."""
        blocks = math.ceil(tokens / BLOCK_TOKENS)
        return self.kv_cache_tokens / BLOCK_TOKENS / blocks

    @property
    def typical_tokens(self) -> int:
        """A typical request: one image at the limit, 256 tokens of text, and the output."""
        return self.profile.max_visual_tokens + TYPICAL_TEXT + self.output

    @property
    def output(self) -> int:
        """Of a typical request: as asked for, but no more than a request may write."""
        room = self.profile.max_model_len - self.profile.max_visual_tokens - TYPICAL_TEXT
        return max(1, min(self.typical_output, self.profile.max_output_tokens, room))

    @property
    def unread(self) -> list[str]:
        """Flags that may change memory, and that the plan does not read."""
        return [name for name in given_flags(self.profile.vllm) if name in UNREAD or re.fullmatch(r"-O\d", name)]

    @property
    def fits(self) -> bool:
        return not self.problems


def card_memory(card: str) -> tuple[str, int]:
    """(name, bytes) of a card by name or by its GiB. Raises UsageError for an unknown name."""
    try:
        size = float(card)
    except ValueError:
        name = card.lower()
    else:
        if not 1 <= size < 10_000:
            raise UsageError(f"--gpu {card}: a card's GiB are a number from 1 up, for example 80.")
        return f"{size:g} GiB", int(size * GIB)
    if name not in CARDS:
        raise UsageError(f"--gpu {card}: not a known card.{nearest(name, CARDS)} Known: {', '.join(CARDS)}, or GiB.")
    return name.upper(), int(CARDS[name] * GIB)


def card_of(gpu: Gpu) -> tuple[str, int]:
    """(name, bytes) of a card of this machine, as CUDA reports it, where the table has it as CUDA did."""
    name, counted = gpu.name.lower(), int(gpu.memory_bytes * CUDA_SHARE)
    for card in sorted(CARDS, key=len, reverse=True):
        # A GH200 is no H200, an L40 no L4, and a share of a card not the card.
        if all(part in name for part in card.split("-")) and abs(counted / GIB / CARDS[card] - 1) < 0.03:
            return card.upper(), int(CARDS[card] * GIB)
    return gpu.name, counted


def plan(
    profile: Profile, geometry: ModelGeometry, card: str, memory: int, num_gpus: int, typical_output: int = 2048
) -> MemoryPlan:
    """The plan of a launch on `num_gpus` cards of `memory` bytes. What does not fit is in `problems`."""
    limits = engine_limits(profile, card.lower(), memory / GIB)
    kind = weight_kind(profile, geometry)
    tp, pp = profile.tp, profile.pp
    peak, outputs = activation_peak(geometry, kind, profile, limits)
    lost = fragments(geometry, profile)
    uses = dict.fromkeys(USES, 0) | {
        "weights": language_weights(geometry, kind, tp, pp) * (dtype_bytes(profile) if kind == "bf16" else BF16) // BF16
        + LOAD_OVERHEAD,
        "vision_encoder": vision_weights(geometry, kind, tp, limits.encoder_data_parallel),
        "activation_peak": peak - outputs,
        "encoder_cache": outputs,
        "cuda_graphs": cuda_graphs(geometry, kind, profile, limits) + uses_flashinfer(profile) * FLASHINFER_WORKSPACE,
        "non_torch": NON_TORCH + buffers(geometry, limits) + lost,
    }
    fixed = sum(uses.values())
    requested = math.ceil(memory * profile.gpu_memory_utilization)
    if limits.kv_cache_memory_bytes:
        requested = fixed + limits.kv_cache_memory_bytes
    uses["kv_cache"] = max(0, requested - fixed)
    made = MemoryPlan(
        card=card, memory=memory, num_gpus=num_gpus, profile=profile, uses=uses, requested=requested,
        notes=explain(profile, limits, kind, lost), kv_bytes_per_token=kv_bytes_per_token(geometry, profile),
        host=host_bytes(profile, limits), typical_output=typical_output,
    )  # fmt: skip
    made.problems.extend(find_problems(made))
    return made


def plan_host(profile: Profile, geometry: ModelGeometry) -> dict[str, int]:
    """Planned bytes of host memory on a machine without a GPU: weights, and the KV cache where its size is given."""
    limits = engine_limits(profile, "cpu", 0)
    weights = language_weights(geometry, "bf16", profile.tp, profile.pp) - rope_table(geometry)  # a buffer there
    weights += vision_weights(geometry, "bf16", profile.tp, limits.encoder_data_parallel)
    return {"weights": weights * dtype_bytes(profile) // BF16, "kv_cache": limits.kv_cache_memory_bytes or 0}


def host_bytes(profile: Profile, limits: EngineLimits) -> int:
    """Host memory that grows with the limits: pinned token ids and M-RoPE positions (4 of INT32) for each sequence over
    the context, and the processor cache in the API process and in the engine."""
    return limits.max_num_seqs * profile.max_model_len * 4 * FP32 + 2 * limits.processor_cache_bytes


CPU_QUEUED = 256
"""Requests that may run or wait on a CPU, which the plan knows nothing of: twice vLLM's own sequences there."""


def queue_limit(profile: Profile, gpus: list[Gpu]) -> int:
    """Requests that may run or wait at once: twice the typical ones that the cards of this machine have room for."""
    if not gpus:
        return CPU_QUEUED
    smallest = min(gpus[: local_workers(profile)], key=lambda gpu: gpu.memory_bytes)
    try:
        made = plan(profile, ModelGeometry.load(profile.model), *card_of(smallest), len(gpus))
    except UsageError:  # the plan knows nothing of this, and --force started it
        return CPU_QUEUED
    limits = engine_limits(profile, made.card.lower(), made.memory / GIB)
    return max(16, math.ceil(2 * data_parallel(profile) * min(limits.max_num_seqs, made.requests(made.typical_tokens))))


def explain(profile: Profile, limits: EngineLimits, kind: str, lost: int) -> dict[str, str]:
    """How each use was worked out, in a few words; `lost` is what AWQ's conversion leaves."""
    split = f" / TP {profile.tp}" if profile.tp > 1 else ""
    stage = f" / PP {profile.pp}" if profile.pp > 1 else ""
    graphs = "off" if not limits.capture_sizes else (
        f"{len(limits.capture_sizes)} sizes up to {limits.capture_sizes[-1]}, as vLLM reserves them"
    )  # fmt: skip
    if uses_flashinfer(profile):
        graphs += ", and FlashInfer's workspace"
    return {
        "weights": f"{kind}{split}{stage}; embeddings and head in BF16",
        "vision_encoder": "replicated" if limits.encoder_data_parallel or profile.tp == 1 else f"sharded{split}",
        "activation_peak": f"{limits.max_num_batched_tokens} tokens a batch, {limits.max_num_seqs} sequences, or the "
        f"encoder with {encoder_tokens(profile, limits)} visual tokens",
        "encoder_cache": f"outputs of {encoder_tokens(profile, limits)} visual tokens",
        "cuda_graphs": graphs,
        "non_torch": f"libraries and vLLM's buffers for {limits.max_num_seqs} sequences"
        + (", and what AWQ's conversion loses" if lost else ""),
        "kv_cache": f"the rest of {profile.gpu_memory_utilization:g} of the card"
        if not limits.kv_cache_memory_bytes else "--kv-cache-memory-bytes",
    }  # fmt: skip


def find_problems(made: MemoryPlan) -> list[str]:
    """What does not fit, each with the numbers."""
    profile, problems = made.profile, []
    if workers(profile) > made.num_gpus:
        replicas = workers(profile) // (profile.tp * profile.pp)
        more = f" x --data-parallel-size {replicas}" if replicas > 1 else ""
        problems.append(
            f"--tp {profile.tp} x --pp {profile.pp}{more} needs {workers(profile)} GPUs, and there are {made.num_gpus}"
        )
    if made.requested > made.memory - made.context:
        free = (made.memory - made.context) / GIB
        problems.append(f"{made.requested / GIB:.1f} GiB are requested of each card, which has {free:.1f}")
    if made.fixed > made.requested:
        problems.append(
            f"weights and working memory take {made.fixed / GIB:.1f} GiB of each card, above the "
            f"{made.requested / GIB:.1f} requested"
        )
    elif made.kv_cache_tokens < profile.max_model_len:
        problems.append(
            f"the KV cache holds {made.kv_cache_tokens} tokens, fewer than --max-model-len {profile.max_model_len}"
        )
    return problems


def as_table(made: MemoryPlan, suggestions: list[dict[str, Any]]) -> str:
    """The plan for a reader: each use in GiB with how it was worked out, then requests, problems and what would fit."""
    profile = made.profile
    nccl = " and NCCL's" if made.context > CONTEXT else ""
    lines = [f"{profile.model} on {made.num_gpus} x {made.card} ({made.memory / GIB:.1f} GiB), "
             f"TP {profile.tp}, PP {profile.pp}; GiB of each GPU:"]  # fmt: skip
    lines += [f"  {name:16}{made.uses[name] / GIB:8.2f}  {made.notes[name]}" for name in USES]
    lines += [
        f"  {'requested':16}{made.requested / GIB:8.2f}",
        f"  {'headroom':16}{made.headroom / GIB:8.2f}  beside {made.context / GIB:.2f} of CUDA's own{nccl}",
        f"host memory that grows with the limits: {made.host / GIB:.1f} GiB (pinned buffers, processor caches)",
        f"KV cache: {made.kv_cache_tokens} tokens of {made.kv_bytes_per_token} bytes a GPU; at once "
        f"{f'in each of {copies} replicas ' if (copies := data_parallel(profile)) > 1 else ''}"
        f"{made.requests(profile.max_model_len):.1f} requests of {profile.max_model_len} tokens, "
        f"{made.requests(made.typical_tokens):.1f} typical ones of {made.typical_tokens} "
        f"({profile.max_visual_tokens} of image, {TYPICAL_TEXT} of text, {made.output} of output)",
    ]
    lines += [f"not in the plan: {', '.join(made.unread)}"] if made.unread else []
    lines += [f"does not fit: {problem}" for problem in made.problems]
    lines += [
        f"  would fit: {s['change']} ({s['flags']}): {s['kv_cache_tokens']} tokens of KV cache" for s in suggestions
    ]
    if made.problems and not suggestions:
        lines.append("  no change or pair of changes that the planner knows would fit")
    return "\n".join(lines)


def as_json(made: MemoryPlan, suggestions: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan as --json prints it; memory in GiB."""
    gib = {name: round(value / GIB, 3) for name, value in made.uses.items()}
    return {
        "gpu": {"name": made.card, "memory_gib": round(made.memory / GIB, 2)},
        "num_gpus": made.num_gpus, "tp": made.profile.tp, "pp": made.profile.pp,
        "quantization": made.profile.quantization, "kv_cache_dtype": made.profile.kv_cache_dtype,
        "per_gpu_gib": gib | {"requested": round(made.requested / GIB, 3), "headroom": round(made.headroom / GIB, 3)},
        "host_gib": round(made.host / GIB, 2),
        "kv_bytes_per_token": made.kv_bytes_per_token, "kv_cache_tokens": made.kv_cache_tokens,
        "max_requests": {"at_max_model_len": round(made.requests(made.profile.max_model_len), 2),
                         "typical": round(made.requests(made.typical_tokens), 1)},
        "not_in_the_plan": made.unread, "fits": made.fits, "problems": made.problems, "suggestions": suggestions,
    }  # fmt: skip
