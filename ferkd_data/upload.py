"""Copy from the host to a device without making the host wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(data: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Copy an array, or a tensor of the CPU, to a device; on the CPU the result may share its memory.

    >>> upload(np.zeros((2, 3)), torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    # Out of pageable memory, CUDA copies while the host waits. PyTorch keeps page-locked memory until a copy is done.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
