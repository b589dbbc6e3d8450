"""Which processes train together: as the user says, or as torch.distributed does when an iteration begins."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from ferkd_data.errors import UsageError

LAUNCHERS = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
"""Environment variables that torchrun, Accelerate, DeepSpeed and MPI set for the processes they start."""


class Ranks(NamedTuple):
    """The number of this process among those that train together, and how many these are."""

    rank: int
    world_size: int


def check_ranks(rank: int | None, world_size: int | None) -> None:
    """Raise UsageError unless both are given and fit, or neither is given."""
    if (rank is None) != (world_size is None):
        raise UsageError(
            f"rank and world_size go together, got rank={rank} and world_size={world_size}; give neither to take those "
            "of torch.distributed"
        )
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise UsageError(f"rank must be 0..{world_size - 1}, got {rank}")


def ranks_now(rank: int | None, world_size: int | None) -> Ranks:
    """Return the ranks given, else those of torch.distributed where it is initialised, else one process alone."""
    if rank is not None and world_size is not None:
        return Ranks(rank, world_size)
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks(0, 1)


def warn_if_alone(ranks: Ranks, given: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Warn where a launcher started several processes, and this one is about to train on all images.

    `given` is the world size that the user asked for: 1 is then meant.
    """
    if ranks.world_size > 1 or given is not None:
        return
    for rank, world_size in LAUNCHERS:
        count = environment.get(world_size, "")
        if rank in environment and count.isdecimal() and int(count) > 1:
            warnings.warn(
                f"{rank}={environment[rank]} and {world_size}={count} say that {count} processes train together, but "
                "torch.distributed is not initialised: each of them trains on all images, and len() counts all "
                "batches. Initialise it before that, or give rank= and world_size= (0 and 1 if it is meant so)",
                stacklevel=3,
            )
            return
