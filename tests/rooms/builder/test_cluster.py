"""How many workers a Ray cluster has room for, and addresses where none is. No Ray runs here."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from types import SimpleNamespace

import pytest
from label_sets import SMALL

import ferkd_data as fd
from ferkd_data.builder import Resources
from ferkd_data.builder.workers.ray_cluster import CPU_THREADS, WAITING_WORKERS, Placement, open_cluster
from ferkd_data.errors import BuildError, FerkdError, MissingExtraError, UsageError


@pytest.fixture
def cluster_of(monkeypatch):
    """The cluster of a program that is connected to a cluster of these nodes."""

    def cluster_of(*nodes, **resources):
        described = [{"Alive": True, "Resources": node} for node in nodes]
        dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
        ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: [*described, dead])
        monkeypatch.setitem(sys.modules, "ray", ray)
        with open_cluster(Resources(engine="ray", **resources)) as cluster:
            return cluster

    return cluster_of


def asked(cluster):
    return cluster.device, cluster.gpus, cluster.cpus, cluster.worker.compute_threads, cluster.worker.threads


def test_a_worker_for_each_share_of_each_gpu(cluster_of):
    head, node = {"CPU": 4}, {"CPU": 64, "GPU": 8}
    whole = cluster_of(head, node, node)
    assert asked(whole) == ("cuda", 1, 1, 8, 4)
    assert whole.size() == 16 + WAITING_WORKERS
    halves = cluster_of(head, node, node, gpus_per_teacher=0.5)
    assert asked(halves) == ("cuda", 0.5, 1, 4, 2)
    assert halves.size() == 32 + WAITING_WORKERS
    assert cluster_of(node, gpus_per_teacher=0.3).size() == 24 + WAITING_WORKERS
    assert cluster_of(node, workers=3).size() == 3
    few_cores = cluster_of({"CPU": 4, "GPU": 8})
    assert (few_cores.cpus, few_cores.size()) == (0.5, 8 + WAITING_WORKERS)
    assert asked(cluster_of(head, device="cuda", threads=6)) == ("cuda", 1, 1, CPU_THREADS, 6)


def test_workers_on_cpus(cluster_of):
    assert asked(cluster_of({"CPU": 64, "GPU": 8}, device="cpu")) == ("cpu", 0, 4, 4, 2)
    default = cluster_of({}, {"CPU": 16}, {"CPU": 9})
    assert (default.worker.compute_threads, default.size()) == (4, 6 + WAITING_WORKERS)
    assert cluster_of({"CPU": 16}, {"CPU": 2}).worker.compute_threads == 2
    many = [cluster_of({"CPU": 4}, {"CPU": 2}, workers=count) for count in (1, 2, 3, 6, 9)]
    assert [cluster.worker.compute_threads for cluster in many] == [4, 2, 2, 1, 1]
    assert cluster_of({}).size() >= 1


def test_workers_that_an_estimate_counts_on(monkeypatch, cluster_of):
    """Those that find room now: not the ones that wait, nor more than were asked for."""
    node = {"CPU": 64, "GPU": 8}

    def counted(*nodes, **resources):
        cluster = cluster_of(*nodes, **resources)
        placement = Placement(devices=[cluster.device], worker=cluster.worker, cluster=cluster)
        return placement.num_workers, cluster.workers_on_a_gpu

    assert counted(node, node) == (16, 1)
    assert counted(node, gpus_per_teacher=0.3) == (24, 3)
    assert counted(node, workers=3) == (3, 1)
    assert counted(node, workers=100) == (8, 1)
    assert counted({"CPU": 9}) == (2, 1)
    assert counted({}) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "slurm"}, "engine must be local or ray"),
        ({"ray_address": "auto"}, "needs --engine ray"),
        ({"gpus_per_teacher": 0.5}, "--gpus-per-teacher needs --engine ray"),
        ({"engine": "ray", "gpus_per_teacher": 0}, "above 0 and at most 1"),
        ({"engine": "ray", "gpus_per_teacher": 2}, "above 0 and at most 1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UsageError, match=message):
        Resources(**settings)


def test_what_a_connected_program_cannot_ask_for(cluster_of):
    with pytest.raises(UsageError, match="leave ray_address out"):
        cluster_of({"CPU": 1}, ray_address="10.0.0.1:6379")
    with pytest.raises(UsageError, match="Ray chooses which GPU"):
        cluster_of({"CPU": 1, "GPU": 4}, device="cuda:3")


def test_ray_is_an_extra(photos, tiny_teachers, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"--engine ray needs .* pip install 'ferkd-data\[ray\]'"):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], engine="ray", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def server():
    """Answers as an HTTP/1 server does, or not at all; yields its port, and takes what it says."""
    answer = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.recv(100)
                connection.sendall(b"".join(answer))
                connection.recv(100)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], answer


def address_error(address) -> FerkdError:
    with pytest.raises(FerkdError) as raised, open_cluster(Resources(engine="ray", ray_address=address)):
        pass
    return raised.value


def test_addresses_where_no_cluster_answers(server, monkeypatch):
    port, answer = server
    monkeypatch.setattr("ferkd_data.builder.workers.ray_cluster.ANSWER_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    refused = address_error(f"127.0.0.1:{free}")
    assert isinstance(refused, BuildError) and f"no Ray cluster answers at 127.0.0.1:{free}" in str(refused)
    answer.append(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert "something else does" in str(address_error(f"127.0.0.1:{port}"))
    assert isinstance(address_error("10.0.0.1"), UsageError)
    assert "ray job submit" in str(address_error("ray://127.0.0.1:10001"))


def test_a_server_that_says_nothing_is_no_cluster(server, monkeypatch):
    monkeypatch.setattr("ferkd_data.builder.workers.ray_cluster.ANSWER_SECONDS", 0.5)
    assert "(timed out)" in str(address_error(f"127.0.0.1:{server[0]}"))


def test_an_address_in_the_environment_counts(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    assert "Ray address nowhere" in str(address_error(None))


def test_a_cluster_that_asks_for_a_token(server, monkeypatch):
    """Ray brings the token by itself for the address `auto`; for another it has to be told to."""
    port, answer = server
    answer.append(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    asked = []

    def init(address, **_):
        asked.append(address)
        raise ConnectionError("Failed to connect")

    services = SimpleNamespace(get_ray_address_from_environment=lambda *_: f"127.0.0.1:{port}")
    private = SimpleNamespace(services=services)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None, _private=private)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert str(address_error("auto")).endswith("a cluster that asks for a token needs RAY_AUTH_MODE=token here")
    assert asked == ["auto"]
