"""Milliseconds of one layer's attention in a decode step, by kernel, requests and context, of the 72B on one card.

    python -m benchmarks.attention RESULT.json

The kernels are those of vLLM's back ends: `fa3` (FLASH_ATTN, its default on Hopper), `xqa` (FLASHINFER) and `triton`
(TRITON_ATTN), with a BF16 or an FP8 cache and pages of 16 tokens, or as the name says, in random order. `gb_s`
is the cache's bytes that a kernel has to read, by its time. `error` is the largest difference from attention in FP32
over the same cache, of one request.
"""

import math
from collections.abc import Callable

import torch

from benchmarks.gemm import milliseconds, save

HEADS, KV_HEADS, SIZE = 64, 8, 128
BATCHES = ((1, 1_500), (16, 2_500), (64, 400), (64, 2_500), (112, 2_500), (192, 400), (256, 400), (100, 1_700))
SCALE = 1 / math.sqrt(SIZE)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Batch:
    """Queries of `requests` that generate, and their cache: pages, heads, tokens of a page, and key beside value."""

    def __init__(self, requests: int, context: int, kind: torch.dtype, page: int) -> None:
        per_request = -(-context // page)
        pages = requests * per_request
        self.requests, self.context, self.page = requests, context, page
        self.query = torch.randn(requests, HEADS, SIZE, device="cuda", dtype=BF16)
        self.key, self.value = (
            torch.randn(pages, KV_HEADS, page, SIZE, device="cuda", dtype=BF16).to(kind) for _ in range(2)
        )
        self.table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(requests, per_request)
        self.lengths = torch.full((requests,), context, device="cuda", dtype=torch.int32)
        self.out = torch.zeros_like(self.query)
        self.bytes = 2 * requests * context * KV_HEADS * SIZE * self.key.element_size()

    def expected(self) -> torch.Tensor:
        """The first request's answer in FP32, (heads, size)."""
        key, value = (
            cache[self.table[0].long()].transpose(0, 1).reshape(KV_HEADS, -1, SIZE)[:, : self.context].float()
            for cache in (self.key, self.value)
        )
        query = self.query[0].float().view(KV_HEADS, -1, SIZE)
        weights = torch.softmax(query @ key.transpose(1, 2) * SCALE, dim=-1)
        return (weights @ value).reshape(HEADS, SIZE)

    def in_token_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as FLASH_ATTN and TRITON_ATTN keep them: pages, tokens, heads, key beside value."""
        both = torch.cat((self.key, self.value), dim=-1).transpose(1, 2).contiguous()
        return both[..., :SIZE], both[..., SIZE:]


def fa3(batch: Batch, splits: int) -> Callable[[], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    key, value = batch.in_token_order()
    quantized = key.dtype == FP8
    query = batch.query.to(key.dtype)
    one = torch.ones(batch.requests, KV_HEADS, device="cuda")
    scales = {f"{name}_descale": one for name in "qkv"} if quantized else {}
    starts = torch.arange(batch.requests + 1, device="cuda", dtype=torch.int32)
    schedule = get_scheduler_metadata(
        batch_size=batch.requests, max_seqlen_q=1, max_seqlen_k=batch.context, num_heads_q=HEADS, num_heads_kv=KV_HEADS,
        headdim=SIZE, cache_seqlens=batch.lengths, qkv_dtype=key.dtype, cu_seqlens_q=starts, page_size=batch.page,
        causal=True, window_size=(-1, -1), num_splits=splits,
    )  # fmt: skip
    return lambda: flash_attn_varlen_func(
        q=query, k=key, v=value, out=batch.out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=batch.lengths,
        max_seqlen_k=batch.context, softmax_scale=SCALE, causal=True, block_table=batch.table,
        scheduler_metadata=schedule, num_splits=splits, fa_version=3, **scales,
    )  # fmt: skip


def xqa(batch: Batch) -> Callable[[], object]:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    space = torch.zeros(256 << 20, device="cuda", dtype=torch.uint8)
    return lambda: xqa_batch_decode_with_kv_cache(
        query=batch.query, kv_cache=(batch.key, batch.value), workspace_buffer=space, block_tables=batch.table,
        seq_lens=batch.lengths, max_seq_len=batch.context, bmm1_scale=SCALE, bmm2_scale=1.0, kv_layout="HND",
        out=batch.out, q_len_per_req=1,
    )  # fmt: skip


def triton(batch: Batch) -> Callable[[], object]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    key, value = batch.in_token_order()
    quantized = key.dtype == FP8
    one = torch.ones(1, device="cuda").expand(batch.requests, KV_HEADS)
    threshold, segments = 16, 16  # TRITON_ATTN's own for 8 heads of keys
    partial = torch.empty(threshold, HEADS, segments, SIZE, device="cuda")
    highest, total = (torch.empty(threshold, HEADS, segments, device="cuda") for _ in range(2))
    starts = torch.arange(batch.requests + 1, device="cuda", dtype=torch.int32)
    return lambda: unified_attention(
        q=batch.query, k=key, v=value, out=batch.out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=batch.lengths,
        max_seqlen_k=batch.context, softmax_scale=SCALE, causal=True, window_size=(-1, -1), block_table=batch.table,
        softcap=0, q_descale=None, k_descale=one, v_descale=one, seq_threshold_3D=threshold,
        num_par_softmax_segments=segments, softmax_segm_output=partial, softmax_segm_max=highest,
        softmax_segm_expsum=total, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if quantized else KVQuantMode.NONE,
    )  # fmt: skip


KERNELS: dict[str, tuple[Callable[[Batch], Callable[[], object]], torch.dtype, int]] = {
    "fa3_bf16": (lambda batch: fa3(batch, 32), BF16, 16),
    "fa3_fp8": (lambda batch: fa3(batch, 32), FP8, 16),
    "fa3_fp8_one_split": (lambda batch: fa3(batch, 1), FP8, 16),
    "fa3_fp8_page_128": (lambda batch: fa3(batch, 32), FP8, 128),
    "triton_bf16": (triton, BF16, 16),
    "triton_fp8": (triton, FP8, 16),
    "xqa_bf16": (xqa, BF16, 16),
    "xqa_fp8": (xqa, FP8, 16),
    "xqa_fp8_page_64": (xqa, FP8, 64),
}


def main() -> None:
    rows = []
    for requests, context in BATCHES:
        for name, (kernel, kind, page) in KERNELS.items():
            batch = Batch(requests, context, kind, page)
            row: dict[str, object] = {"requests": requests, "context": context, "kernel": name}
            try:
                call = kernel(batch)
                given = call()
                torch.cuda.synchronize()
                out = given if isinstance(given, torch.Tensor) else batch.out
                row["error"] = round((out.view(-1, HEADS, SIZE)[0].float() - batch.expected()).abs().max().item(), 4)
                time = milliseconds(call)
                row |= {"ms": round(time, 4), "gb_s": round(batch.bytes / time / 1e6)}
            except Exception as error:  # a kernel that is not there is a row that says so
                row["failed"] = str(error)[-300:]
            rows.append(row)
            print(row, flush=True)
    save("attention", rows)


if __name__ == "__main__":
    main()
