"""Lets torchvision be imported, which transformers and timm do.

Its builds for GPUs lack their own operators beside a torch for CPUs, and stop at the
first. None of them is used.
"""

import importlib.util

if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        import torch

        LIBRARY = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
