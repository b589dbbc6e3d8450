"""`Placement`: where the workers of a build run. `Cluster`: a Ray cluster, and the connection to it.

Ray decides on which node a worker runs and which nodes are added. A build says what one worker needs, and asks for as
many as there is room for and a few more. These wait: an autoscaler adds nodes for them, and a node that joins later is
used at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ferkd_data.builder.settings import Resources, WorkerResources, cores
from ferkd_data.errors import BuildError, UsageError
from ferkd_data.extras import require

log = logging.getLogger("ferkd_data.ray")

ANSWER_SECONDS = 10.0
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes of a gRPC client: the preface of HTTP/2 and empty settings. The server answers with its own settings."""
HTTP2_SETTINGS = 4
WAITING_WORKERS = 8
"""Workers beyond the present room that wait on a cluster that may grow."""
LOCAL_STORE_BYTES = 100_000_000
"""Size of Ray's object store, through which only messages go."""
CPU_THREADS = 4
"""Computing threads of a worker without a GPU. More of them share one teacher's memory, fewer wait less."""
LEAST_CPU = 0.1
"""CPUs that a worker asks for on a GPU node that counts few of them."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster, and what one worker asks it for."""

    ray: Any
    """The module, connected."""
    device: str
    """cpu or cuda"""
    cpus: float
    gpus: float
    """Share of a GPU; 0 where workers compute on the CPU."""
    worker: WorkerResources
    max_workers: int | None
    """Workers that the user asked for in all; None: as many as there is room for."""
    grows: bool
    """True where nodes may join."""

    def size(self) -> int:
        """Return the number of workers to ask for now."""
        if self.max_workers is not None:
            return self.max_workers
        return max(1, self.room() + (WAITING_WORKERS if self.grows else 0))

    @property
    def workers_on_a_gpu(self) -> int:
        """Workers that share a GPU; 1 on a CPU."""
        # Shares such as 0.33333 are meant as thirds: without the margin, rounding could lose a worker.
        return int(1 / self.gpus + 1e-6) if self.gpus else 1

    def room(self) -> int:
        """Return how many workers the present nodes hold, if nothing else runs on them."""
        return sum(self._room(node) for node in _nodes(self.ray))

    def __str__(self) -> str:
        """Return what each worker asks for."""
        return f"{self.gpus:g} GPU and {self.cpus:g} CPU" if self.gpus else f"{self.cpus:g} CPU"

    def _room(self, node: Mapping[str, float]) -> int:
        by_cpu = int(node.get("CPU", 0) / self.cpus)
        return min(by_cpu, int(node.get("GPU", 0)) * self.workers_on_a_gpu) if self.gpus else by_cpu


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The devices of a build's workers, here or on a cluster, and the resources of each worker."""

    devices: list[str]
    """The device of each worker on this machine; on a cluster, the kind of device of all."""
    worker: WorkerResources
    cluster: Cluster | None = None

    @property
    def num_workers(self) -> int:
        """Number of workers that a build would have now; at least one."""
        if self.cluster is None:
            return len(self.devices)
        room = self.cluster.room()
        return max(1, min(self.cluster.max_workers or room, room))

    @property
    def driver_device(self) -> str:
        """Device of the teachers that the driver loads. It labels only where it is the one worker itself."""
        return self.devices[0] if self.cluster is None else "cpu"


@contextmanager
def open_placement(resources: Resources) -> Iterator[Placement]:
    """Resolve `resources`; stay connected to the cluster, if there is one, for as long as the context lasts.

    Raises UsageError, MissingExtraError, BuildError.
    """
    if resources.engine == "local":
        yield Placement(devices=resources.resolved_devices(), worker=resources.local_worker())
        return
    with open_cluster(resources) as cluster:
        yield Placement(devices=[cluster.device], worker=cluster.worker, cluster=cluster)


@contextmanager
def open_cluster(resources: Resources) -> Iterator[Cluster]:
    if resources.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"device {resources.device}: on a Ray cluster it is auto, cpu or cuda; Ray chooses which GPU a worker gets"
        )
    ray = require("ray", extra="ray", what_for="--engine ray")
    if ray.is_initialized():  # by the program that calls us; we leave it as it is
        if resources.ray_address is not None:
            raise UsageError("this program is connected to Ray already: leave ray_address out, or call ray.shutdown()")
        yield _cluster(ray, resources, grows=True)
        return
    address = resources.ray_address or os.environ.get("RAY_ADDRESS") or None
    try:
        _start(ray, resources) if address is None else _connect(ray, address)
        yield _cluster(ray, resources, grows=address is not None)
    finally:
        ray.shutdown()


def _cluster(ray: Any, resources: Resources, *, grows: bool) -> Cluster:
    nodes = _nodes(ray)
    with_gpu = [node for node in nodes if node.get("GPU", 0) > 0]
    if resources.device == "cuda" or (resources.device == "auto" and with_gpu):
        device, gpus = "cuda", resources.gpus_per_teacher
        # CPUs for one worker on the node with the fewest for each GPU. A worker asks Ray for one of them at most, so
        # that GPUs and not CPUs decide how many workers find room; it computes with all of its share.
        share = min((node.get("CPU", 0) * gpus / node["GPU"] for node in with_gpu), default=CPU_THREADS)
        cores_of_worker = max(1, int(share))
        cpus = max(LEAST_CPU, min(1.0, share))
    else:
        device, gpus = "cpu", 0.0
        cores_of_worker = _cores([int(node.get("CPU", 0)) for node in nodes], resources.workers)
        cpus = cores_of_worker
    return Cluster(
        ray=ray,
        device=device,
        cpus=cpus,
        gpus=gpus,
        worker=resources.worker_resources(device, cores_of_worker),
        max_workers=resources.workers,
        grows=grows,
    )


def _cores(cpus_of_nodes: list[int], workers: int | None) -> int:
    """Return the most cores per worker at which that many workers find room; for None, a few that every node has."""
    if workers is None:
        # Nodes without CPUs, such as some head nodes, do not count. The second CPU_THREADS keeps `min` from having one
        # argument.
        return min(CPU_THREADS, *filter(None, cpus_of_nodes), CPU_THREADS)
    counts = range(1, max(cpus_of_nodes, default=1) + 1)
    fitting = [count for count in counts if sum(cpus // count for cpus in cpus_of_nodes) >= workers]
    return max(fitting, default=1)


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _start(ray: Any, resources: Resources) -> None:
    """Start a Ray on this machine for this build. It ends with this process, whatever ends that."""
    _init(
        ray,
        address="local",
        # Ray gives each worker a CPU of its own. Whoever asks for more workers than there are cores wants them all the
        # same.
        num_cpus=max(cores(), resources.workers or 1),
        num_gpus=0 if resources.device == "cpu" else None,
        include_dashboard=False,
        object_store_memory=LOCAL_STORE_BYTES,
    )


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster. Raises BuildError soon where none answers: Ray itself would try for minutes."""
    if "://" in address:
        raise UsageError(
            f"Ray address {address}: give HOST:PORT, or auto, on a machine of the cluster; from elsewhere, submit the "
            "command with: ray job submit -- ferkd-data build …"
        )
    host, _, port = (_running_here(ray) if address == "auto" else address).rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"Ray address {address}: must be HOST:PORT (such as 10.0.0.1:6379) or auto")
    _check_answers(host.strip("[]"), int(port))
    _init(ray, address=address)


def _running_here(ray: Any) -> str:
    """Return the address of the cluster that this machine belongs to, as Ray remembers it. It may have ended."""
    try:
        # Ray has no public call that answers this without connecting.
        found: str = ray._private.services.get_ray_address_from_environment("auto", None)
    except ConnectionError as error:
        raise BuildError("Ray address auto: no Ray runs on this machine; start it with `ray start`") from error
    return found


def _check_answers(host: str, port: int) -> None:
    where = f"no Ray cluster answers at {host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
            # The port is open; the rest would have to be said in TLS.
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(HTTP2_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        raise BuildError(f"{where} ({error}); `ray status` on its head node shows whether it runs") from error
    # The head of an HTTP/2 frame has 9 bytes: 3 of length, then the type.
    if answer[3:4] != bytes([HTTP2_SETTINGS]):
        raise BuildError(f"{where}: something else does; the cluster's own port is 6379 unless it was told otherwise")


def _init(ray: Any, address: str, **arguments: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        token = "" if address == "local" else "; a cluster that asks for a token needs RAY_AUTH_MODE=token here"
        raise BuildError(f"Ray {address}: cannot be used: {error}{token}") from error
    finally:
        # ray.init installs a handler of its own, where it may: in the main thread. Ours has a grace time.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
