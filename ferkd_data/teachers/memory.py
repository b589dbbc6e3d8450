"""Recognise out-of-memory errors of PyTorch, CUDA's libraries and ONNX Runtime."""

from __future__ import annotations

import torch

SAYINGS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
)
"""Texts of PyTorch (within a compiler's error), the driver, cuBLAS, cuDNN and ONNX Runtime."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, so that a smaller batch may fit; such errors do not share a class."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(saying in str(error) for saying in SAYINGS)
