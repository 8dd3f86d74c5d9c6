"""The memory plan against measurements: a table of every run, worst first; exit code 1 where a limit is broken.

    python -m benchmarks.check_plan RESULT.json…

Fits nothing: any result of benchmarks/measure_memory.py can be given, also of settings that nobody has tried yet.
Limits: weights and KV tokens 3 %, everything but the KV cache 2 %, no use off by more than 0.7 GiB.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.geometry import config_of
from qvq_serve.gpu import GIB
from qvq_serve.memory import ALLOCATOR_VARIABLES, FITTED, MemoryPlan, plan
from qvq_serve.model import ModelGeometry
from qvq_serve.profile import Profile

WEIGHTS_LIMIT = KV_LIMIT = 0.03
FIXED_LIMIT = 0.02
USE_LIMIT_GIB = 0.7


@dataclass(frozen=True)
class Comparison:
    """One run: (planned, measured) by use in GiB, and of the KV cache in tokens."""

    name: str
    gpu: str
    uses: dict[str, tuple[float, float]]
    kv_cache_tokens: tuple[int, int]

    def off(self, use: str) -> float:
        planned, measured = self.uses[use]
        return planned / measured - 1

    @property
    def kv_off(self) -> float:
        return self.kv_cache_tokens[0] / self.kv_cache_tokens[1] - 1

    @property
    def worst_use_gib(self) -> float:
        return max(abs(planned - measured) for use, (planned, measured) in self.uses.items() if use != "all but KV")

    @property
    def broken(self) -> list[str]:
        """The limits that this run breaks."""
        found = [
            ("weights", abs(self.off("weights")) > WEIGHTS_LIMIT),
            ("all but KV", abs(self.off("all but KV")) > FIXED_LIMIT),
            ("KV tokens", abs(self.kv_off) > KV_LIMIT),
            ("a use", self.worst_use_gib > USE_LIMIT_GIB),
        ]
        return [name for name, is_broken in found if is_broken]


def planned(row: dict[str, Any]) -> MemoryPlan:
    """The plan of a run's setting, on the memory that CUDA reported there."""
    setting, args = row["setting"], row["setting"]["args"]
    vllm = [
        "--max-num-seqs",
        str(args["max_num_seqs"]),
        "--max-num-batched-tokens",
        str(args["max_num_batched_tokens"]),
    ]
    profile = Profile(
        min_visual_tokens=4, max_visual_tokens=setting["visual_tokens"], max_images=setting["images"],
        max_model_len=args["max_model_len"], kv_cache_dtype=args["kv_cache_dtype"],
        gpu_memory_utilization=args["gpu_memory_utilization"], quantization=args.get("quantization"),
        vllm=(*vllm, *(["--enforce-eager"] if args["enforce_eager"] else [])),
    )  # fmt: skip
    geometry = ModelGeometry.from_config(config_of(setting["model"]), Path(setting["model"]))
    return plan(profile, geometry, row["measured"]["gpu"], row["measured"]["total_memory"], 1)


def compare(row: dict[str, Any]) -> Comparison:
    """A run's plan beside what its worker measured."""
    made, measured = planned(row), row["measured"]
    graphs = measured["cudagraph_memory_estimate"]
    pairs = {
        "weights": (made.uses["weights"] + made.uses["vision_encoder"], measured["weights"]),
        "activations": (made.uses["activation_peak"] + made.uses["encoder_cache"],
                        measured["peak_activation_memory"] - graphs),
        "CUDA graphs": (made.uses["cuda_graphs"], graphs),
        "non-torch": (made.uses["non_torch"], measured["total_consumed"] - measured["weights"]),
        "all but KV": (made.fixed, measured["total_consumed"] + measured["peak_activation_memory"]),
    }  # fmt: skip
    return Comparison(
        name=row["setting"]["name"],
        gpu=measured["gpu"],
        uses={use: (a / GIB, b / GIB) for use, (a, b) in pairs.items()},
        kv_cache_tokens=(made.kv_cache_tokens, row["kv_cache_tokens"]),
    )


def table(comparisons: list[Comparison]) -> str:
    """Markdown: planned / measured in GiB, and the differences, the worst KV cache first."""
    uses = ["weights", "activations", "CUDA graphs", "non-torch", "all but KV"]
    lines = ["| run | GPU | " + " | ".join(uses) + " | KV tokens | all but KV | KV |", "|" + " --- |" * (len(uses) + 5)]
    for c in sorted(comparisons, key=lambda c: -abs(c.kv_off)):
        name = c.name if c.name in FITTED else f"**{c.name}**"
        cells = [f"{a:.2f} / {b:.2f}" for a, b in (c.uses[use] for use in uses)]
        tokens = f"{c.kv_cache_tokens[0]} / {c.kv_cache_tokens[1]}"
        off = f"{100 * c.off('all but KV'):+.2f} % | {100 * c.kv_off:+.2f} %"
        lines.append(f"| {name} | {c.gpu.split()[1]} | {' | '.join(cells)} | {tokens} | {off} |")
    return "\n".join(lines)


def main() -> int:
    """Compare all rows of the given results."""
    os.environ.setdefault(ALLOCATOR_VARIABLES[0], "expandable_segments:False")  # as benchmarks.measure_memory runs
    rows = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text()) if "measured" in row]
    comparisons = [compare(row) for row in rows]
    print(table(comparisons))
    broken = {c.name: c.broken for c in comparisons if c.broken}
    for name, limits in broken.items():
        print(f"{name}: {', '.join(limits)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
