"""Lets a CUDA build of torchvision be imported beside a CPU build of torch. launch/env.sh installs it only then.

Such a torchvision dies at import with "operator torchvision::nms does not exist": it registers fake kernels for two
operators whose compiled library could not be loaded. vLLM's Qwen2-VL needs torchvision's image transforms and never
calls those operators, so declaring their schemas first is enough. A .pth file imports this module in every process of
the virtual environment (vLLM starts several); it imports torch only where torchvision is imported anyway.
"""

import sys

SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class DeclareOperators:
    """An import finder that declares the schemas when torchvision is asked for, then lets the others find it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            for operator, schema in SCHEMAS.items():
                torch.library.define(operator, schema)
        return None


sys.meta_path.insert(0, DeclareOperators)
