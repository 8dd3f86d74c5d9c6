"""Milliseconds of a layer's four GEMMs by batch with AWQ's four-bit weights: vLLM's two kernels for them.

    python -m benchmarks.gemm_int4 RESULT.json [BATCH...]

Each is vLLM's own class. Shapes, turns and graphs as in `benchmarks.gemm`; the MLP has 29,696 columns, as padded
checkpoints.
"""

import os
import sys
from itertools import cycle
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.kernels.linear.mixed_precision import (
    MacheteLinearKernel,
    MarlinLinearKernel,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from benchmarks.gemm import BATCHES, LAYERS, milliseconds, save

SHAPES = {"qkv": (10_240, 8_192), "o": (8_192, 8_192), "gate_up": (59_392, 8_192), "down": (8_192, 29_696)}
KERNELS: dict[str, type[MPLinearKernel]] = {"machete": MacheteLinearKernel, "marlin": MarlinLinearKernel}
GROUP, PACKED = 128, 8


def layer(kind: type[MPLinearKernel], out: int, width: int) -> tuple[MPLinearKernel, torch.nn.Module]:
    """A kernel and its layer of random weights, ready as after loading."""
    config = MPLinearLayerConfig(
        full_weight_shape=(width, out), partition_weight_shape=(width, out), weight_type=scalar_types.uint4,
        act_type=torch.bfloat16, group_size=GROUP, zero_points=True,
    )  # fmt: skip

    def packed(*shape: int, input_dim: int) -> PackedvLLMParameter:
        data = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        return PackedvLLMParameter(
            data=data, input_dim=input_dim, output_dim=1 - input_dim, packed_dim=0, packed_factor=PACKED,
            weight_loader=lambda *_: None,
        )  # fmt: skip

    made = torch.nn.Module()
    made.register_parameter("qweight", packed(width // PACKED, out, input_dim=0))
    made.register_parameter("qzeros", packed(out // PACKED, width // GROUP, input_dim=1))
    scales = torch.rand(width // GROUP, out, dtype=torch.bfloat16, device="cuda") / 64
    made.register_parameter(
        "scales", GroupQuantScaleParameter(data=scales, input_dim=0, output_dim=1, weight_loader=lambda *_: None)
    )
    kernel = kind(config, "qweight", "scales", "qzeros")
    kernel.process_weights_after_loading(made)
    return kernel, made


def one(turns: list[tuple[MPLinearKernel, torch.nn.Module]], batch: int, width: int) -> float:
    """Milliseconds of one GEMM; `turns` are its layer several times."""
    x = torch.randn(batch, width, dtype=torch.bfloat16, device="cuda")
    layers = cycle(turns)

    def call() -> torch.Tensor:
        kernel, made = next(layers)
        return kernel.apply_weights(made, x)

    return milliseconds(call)


def main() -> None:
    batches = [int(word) for word in sys.argv[2:]] or BATCHES
    rows: dict[int, dict[str, Any]] = {batch: {"batch": batch} for batch in batches}
    for name, kind in KERNELS.items():
        for gemm, (out, width) in SHAPES.items():
            turns = [layer(kind, out, width) for _ in range(3)]
            for batch, row in rows.items():
                took = one(turns, batch, width)
                row[f"{gemm}_{name}_ms"] = round(took, 4)
                row[f"model_{name}_ms"] = round(row.get(f"model_{name}_ms", 0) + LAYERS * took, 3)
        print(name, {batch: row[f"model_{name}_ms"] for batch, row in rows.items()}, flush=True)
        save("gemm_int4", list(rows.values()))


if __name__ == "__main__":
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(1, 0, f"file:///tmp/gemm-{os.getpid()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        main()
