"""What vLLM takes of a GPU's memory, by use: one start for each setting, with dummy weights in a real geometry.

    python -m benchmarks.measure_memory SETTINGS.json TOKENIZER_DIR RESULT.json [NAME…]

SETTINGS.json is a list of {"name", "model", "args": {vLLM's engine arguments}, "visual_tokens", "images", "phases"}.
Each setting runs in a process of its own and adds a row to RESULT.json: what the worker measured (bytes), vLLM's log
lines about memory, and, with "phases", the peak and what stays of each phase of a forward pass by itself: the vision
encoder for some numbers of patches, the text layers for some of tokens, the sampler for some of requests.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIGURES = ("requested_memory", "total_consumed", "peak_activation_memory", "cudagraph_memory_estimate",
           "available_kv_cache_memory_bytes")  # fmt: skip
"""Attributes of vLLM 0.32's GPU worker, in bytes."""
PATCHES = (1024, 4096, 16384, 32768)
TOKENS = (512, 2048, 4096, 8192, 16384)
REQUESTS = (16, 64, 256, 1024)
LOG = re.compile(r"GiB|KV cache size|Encoder cache|MemoryProfilingResult|took .* s|cuda ?graph", re.IGNORECASE)


def figures(worker: Any) -> dict[str, Any]:
    """The worker's own figures, in bytes; runs in the worker."""
    import torch

    start = worker.init_snapshot
    row = {name: int(getattr(worker, name)) for name in FIGURES if hasattr(worker, name)}
    return row | {
        "weights": int(worker.model_runner.model_memory_usage),
        "total_memory": int(start.total_memory),
        "free_at_start": int(start.free_memory),
        "torch_at_start": int(start.torch_memory),
        "allocated_after_start": int(torch.cuda.memory_allocated()),
        "reserved_after_start": int(torch.cuda.memory_reserved()),
        "free_after_start": int(torch.cuda.mem_get_info()[0]),
        "gpu": torch.cuda.get_device_name(),
    }


def parameters(worker: Any) -> dict[str, int]:
    """Bytes of all parameters and buffers by the first three parts of their names; runs in the worker."""
    found: dict[str, int] = {}
    model = worker.model_runner.get_model()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts = [part for part in name.split(".") if not part.isdigit()]
        key = ".".join(parts)
        found[key] = found.get(key, 0) + tensor.numel() * tensor.element_size()
    return found


def phases(worker: Any) -> dict[str, Any]:
    """Peak and remaining bytes of each phase alone, above what stood before; runs in the worker."""
    import torch

    runner = worker.model_runner
    model = runner.get_model()

    def measured(call: Any) -> dict[str, int]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        row = {"peak": torch.cuda.max_memory_allocated() - before, "kept": torch.cuda.memory_allocated() - before}
        del kept
        return row

    def encode(patches: int) -> Any:
        rows = 32
        pixels = torch.zeros(patches, 1176, dtype=torch.uint8, device="cuda")  # as vLLM's processor gives them
        return model.embed_multimodal(pixel_values=pixels, image_grid_thw=torch.tensor([[1, rows, patches // rows]]))

    rows: dict[str, Any] = {"encoder": {}, "text": {}, "sampler": {}}
    with torch.inference_mode():
        for patches in PATCHES:
            try:
                rows["encoder"][patches] = measured(lambda patches=patches: encode(patches))
            except Exception as error:
                rows["encoder"][patches] = repr(error)
        for tokens in (n for n in TOKENS if n <= runner.max_num_tokens):
            rows["text"][tokens] = measured(lambda n=tokens: runner._dummy_run(n, skip_attn=True, is_profile=True))
        _, hidden = runner._dummy_run(runner.max_num_tokens, skip_attn=True, is_profile=True)
        for requests in (n for n in REQUESTS if n <= hidden.shape[0]):
            rows["sampler"][requests] = measured(lambda n=requests: runner._dummy_sampler_run(hidden[:n]))
    return rows


def run(setting: dict[str, Any], tokenizer: Path, out: Path) -> None:
    """One start, in this process; writes the row to `out`."""
    from benchmarks.geometry import write_geometry

    started = time.monotonic()
    from vllm import LLM

    from qvq_serve.visual import pixels

    directory = write_geometry(Path(tempfile.mkdtemp()), tokenizer, setting["model"])
    llm = LLM(
        model=str(directory), load_format="dummy",
        limit_mm_per_prompt={"image": setting.get("images", 4), "video": 0},
        mm_processor_kwargs={"size": {"shortest_edge": pixels(4), "longest_edge": pixels(setting["visual_tokens"])}},
        **setting["args"],
    )  # fmt: skip
    config = llm.llm_engine.vllm_config
    row = {
        "setting": setting,
        "start_s": round(time.monotonic() - started, 1),
        "kv_cache_tokens": config.cache_config.kv_cache_size_tokens,
        "block_size": config.cache_config.block_size,
        "gpu_blocks": config.cache_config.num_gpu_blocks,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "capture_sizes": config.compilation_config.cudagraph_capture_sizes,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "measured": llm.collective_rpc(figures)[0],
        "parameters": llm.collective_rpc(parameters)[0],
    }
    out.write_text(json.dumps(row))
    if setting.get("phases"):
        row["phases"] = llm.collective_rpc(phases)[0]
        out.write_text(json.dumps(row))
    os._exit(0)  # vLLM's orderly end takes seconds


def main() -> None:
    """Run each setting (or those named) in turn; a failure becomes a row with its last lines."""
    settings_path, tokenizer, result = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    names = sys.argv[4:]
    rows = json.loads(result.read_text()) if result.exists() else []
    environ = os.environ | {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for setting in json.loads(settings_path.read_text()):
        if names and setting["name"] not in names:
            continue
        out = Path(tempfile.mkdtemp()) / "row.json"
        one = ["--one", json.dumps(setting), str(tokenizer), str(out)]
        command = [sys.executable, "-m", "benchmarks.measure_memory", *one]
        done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
        log = done.stdout + done.stderr
        row = json.loads(out.read_text()) if out.exists() else {"setting": setting, "failed": log[-3000:]}
        if done.returncode:
            row["failed"] = log[-3000:]
        row["log"] = [line.split("] ", 1)[-1][:600] for line in log.splitlines() if LOG.search(line)]
        rows.append(row)
        result.write_text(json.dumps(rows, indent=1))
        figures_ = row.get("measured", {})
        print(setting["name"], row.get("start_s"), row.get("kv_cache_tokens"),
              {k: round(v / 2**30, 2) for k, v in figures_.items() if isinstance(v, int)},
              log[-1500:] if "failed" in row else "", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        run(json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
