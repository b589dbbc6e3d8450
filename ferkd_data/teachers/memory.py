"""How a device says that its memory does not do."""

from __future__ import annotations

import torch

SAYINGS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
)
"""Of PyTorch within a compiler's error, the driver, the libraries that have memory of their own, and ONNX Runtime."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer crops at a time may do; not all that run out of memory raise PyTorch's OutOfMemoryError."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(saying in str(error) for saying in SAYINGS)
