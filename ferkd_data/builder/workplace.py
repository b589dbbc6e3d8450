"""Where the workers of a build run, and with how much each: on this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ferkd_data.builder.settings import Resources, default_batch_size
from ferkd_data.builder.workers.ray_cluster import Fleet, open_fleet


@dataclass(frozen=True, kw_only=True)
class Workplace:
    devices: list[str]
    """The device of each worker on this machine; on a cluster, the kind of device of all."""
    batch_size: int
    workers: int
    """Threads that decode and cut, in each process."""
    threads: int
    """Threads that compute, in each process."""
    fleet: Fleet | None = None

    @property
    def num_workers(self) -> int:
        """Number of workers that a build would have now; at least one."""
        if self.fleet is None:
            return len(self.devices)
        room = self.fleet.room()
        return max(1, min(self.fleet.processes or room, room))

    @property
    def device_here(self) -> str:
        """Device of the teachers that the driver loads. It labels only where it is the one worker itself."""
        return self.devices[0] if self.fleet is None else "cpu"


@contextmanager
def open_workplace(resources: Resources) -> Iterator[Workplace]:
    """Connected to the cluster for as long as the context lasts. Raises UsageError, MissingExtraError, BuildError."""
    if resources.engine == "local":
        yield Workplace(
            devices=resources.resolved_devices(),
            batch_size=resources.resolved_batch_size(),
            workers=resources.resolved_workers(),
            threads=resources.resolved_threads(),
        )
        return
    with open_fleet(resources) as fleet:
        yield Workplace(
            devices=[fleet.device],
            batch_size=resources.batch_size or default_batch_size(fleet.device),
            workers=fleet.workers,
            threads=fleet.threads,
            fleet=fleet,
        )
