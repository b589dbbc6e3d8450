"""A Ray cluster to build on: the connection, and how many workers it has room for.

Where a worker runs, when it starts again and which nodes are added for it is Ray's business. A build says what one
worker needs, and asks for as many as there is room for and a few more: those wait, which is what an autoscaler goes by,
and what makes use of a node that joins later.
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

from ferkd_data.builder.settings import Resources, cores
from ferkd_data.errors import BuildError, UsageError
from ferkd_data.extras import require

log = logging.getLogger("ferkd_data.ray")

ANSWER_SECONDS = 10.0
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a gRPC client begins: the preface of HTTP/2 and empty settings. The server sends its own settings back."""
HTTP2_SETTINGS = 4
WAITING_WORKERS = 8
"""So many more than there is room for ask for a place on a cluster that may grow."""
LOCAL_STORE_BYTES = 100_000_000
"""Only messages go through Ray's object store."""
CPU_THREADS = 4
"""Of a worker that has no GPU: more share one teacher's memory, fewer lose less to waiting for each other."""
LEAST_CPU = 0.1
"""Of a worker on a GPU node that counts few CPUs."""
MOST_DECODERS = 8


@dataclass(frozen=True, kw_only=True)
class Fleet:
    ray: Any
    """The module, connected."""
    device: str
    """cpu or cuda"""
    cpus: float
    """That one worker asks for."""
    gpus: float
    """The same; 0 where it labels on a CPU."""
    workers: int
    threads: int
    processes: int | None
    """Workers that the user asked for in all."""
    grows: bool
    """Nodes may join."""

    def size(self) -> int:
        """Workers to ask for now."""
        if self.processes is not None:
            return self.processes
        return max(1, self.room() + (WAITING_WORKERS if self.grows else 0))

    @property
    def workers_on_a_gpu(self) -> int:
        """One on a CPU, too."""
        return int(1 / self.gpus + 1e-6) if self.gpus else 1

    def room(self) -> int:
        """Workers that the nodes hold which are there now, if nothing else runs on them."""
        return sum(self._room(node) for node in _nodes(self.ray))

    def __str__(self) -> str:
        """What each worker asks for."""
        return f"{self.gpus:g} GPU and {self.cpus:g} CPU" if self.gpus else f"{self.cpus:g} CPU"

    def _room(self, node: Mapping[str, float]) -> int:
        by_cpu = int(node.get("CPU", 0) / self.cpus)
        return min(by_cpu, int(node.get("GPU", 0)) * self.workers_on_a_gpu) if self.gpus else by_cpu


@contextmanager
def open_fleet(resources: Resources) -> Iterator[Fleet]:
    if resources.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"device {resources.device}: on a Ray cluster it is auto, cpu or cuda; Ray chooses which GPU a worker gets"
        )
    ray = require("ray", extra="ray", what_for="--engine ray")
    if ray.is_initialized():  # by the program that calls us; we leave it as it is
        if resources.ray_address is not None:
            raise UsageError("this program is connected to Ray already: leave ray_address out, or call ray.shutdown()")
        yield _fleet(ray, resources, grows=True)
        return
    address = resources.ray_address or os.environ.get("RAY_ADDRESS") or None
    with _quiet(ray):
        try:
            _start(ray, resources) if address is None else _connect(ray, address)
            yield _fleet(ray, resources, grows=address is not None)
        finally:
            ray.shutdown()


def _fleet(ray: Any, resources: Resources, *, grows: bool) -> Fleet:
    nodes = _nodes(ray)
    with_gpu = [node for node in nodes if node.get("GPU", 0) > 0]
    if resources.device == "cuda" or (resources.device == "auto" and with_gpu):
        device, gpus = "cuda", resources.gpus_per_teacher
        share = min((node.get("CPU", 0) * gpus / node["GPU"] for node in with_gpu), default=CPU_THREADS)
        threads = max(1, int(share))
        cpus = max(LEAST_CPU, min(1.0, share))
    else:
        device, gpus = "cpu", 0.0
        threads = _threads([int(node.get("CPU", 0)) for node in nodes], resources.processes)
        cpus = threads
    return Fleet(
        ray=ray,
        device=device,
        cpus=cpus,
        gpus=gpus,
        workers=resources.workers or max(1, min(MOST_DECODERS, threads // 2)),
        threads=threads,
        processes=resources.processes,
        grows=grows,
    )


def _threads(cpus_of_nodes: list[int], processes: int | None) -> int:
    """The most, at which so many processes find room; without a number, a few that every node has."""
    if processes is None:
        return min(CPU_THREADS, *filter(None, cpus_of_nodes), CPU_THREADS)
    counts = range(1, max(cpus_of_nodes, default=1) + 1)
    fitting = [count for count in counts if sum(cpus // count for cpus in cpus_of_nodes) >= processes]
    return max(fitting, default=1)


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _start(ray: Any, resources: Resources) -> None:
    """A Ray of this machine, for this build. It ends with this process, whatever ends that."""
    _init(
        ray,
        address="local",
        num_cpus=max(cores(), resources.processes or 1),
        num_gpus=0 if resources.device == "cpu" else None,
        include_dashboard=False,
        object_store_memory=LOCAL_STORE_BYTES,
    )


def _connect(ray: Any, address: str) -> None:
    """Raises BuildError soon where no cluster answers; Ray itself would try for minutes."""
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
    """The cluster that this machine belongs to, as Ray remembers it; it may have ended."""
    try:
        found: str = ray._private.services.get_ray_address_from_environment("auto", None)
    except ConnectionError as error:
        raise BuildError("Ray address auto: no Ray runs on this machine; start it with `ray start`") from error
    return found


def _check_answers(host: str, port: int) -> None:
    where = f"no Ray cluster answers at {host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(HTTP2_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        raise BuildError(f"{where} ({error}); `ray status` on its head node shows whether it runs") from error
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
        # Ray takes the signal, in the one thread that can, and ours has a grace time.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray prints the death of workers and nodes to stdout, where `--json` writes; they go to Python's log instead.

    There is no setting for it. Where a Ray to come has another inside, its lines are seen again and nothing breaks.
    """
    inside = getattr(getattr(ray, "_private", None), "worker", None)
    printing = getattr(inside, "print_to_stdstream", None)
    if printing is None:
        yield
        return

    def write_to_log(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
        log.info("%s", " ".join(map(str, data.get("lines", ()))))

    inside.print_to_stdstream = write_to_log  # type: ignore[union-attr]
    try:
        yield
    finally:
        inside.print_to_stdstream = printing  # type: ignore[union-attr]
