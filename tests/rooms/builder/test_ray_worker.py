"""What a worker on Ray finds out before it labels, and a cluster on which none ever gets ready. No Ray runs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import ferkd_data
from ferkd_data.builder import Stop
from ferkd_data.builder.workers.messages import Failed
from ferkd_data.builder.workers.pool import WorkerPool
from ferkd_data.builder.workers.ray_actors import Actor, RayWorkers
from ferkd_data.builder.workers.ray_cluster import Cluster
from ferkd_data.errors import BuildError, BuildStoppedError


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (ferkd_data.__version__, "does not see .*out; OUT has to be on a file system that all share"),
        ("0.0.0", "the build was started by 0.0.0; install the same version"),
    ],
)
def test_a_node_that_cannot_take_part_says_why(job, version, text):
    worker = Actor(job, "cpu", driver_folder=str(Path.cwd()), driver_version=version)
    answer = worker.open()
    assert isinstance(answer, Failed) and answer.kind == "BuildError"
    with pytest.raises(BuildError, match=text):
        raise BuildError(answer.text)


class LostError(Exception):
    pass


class DeadlyRay:
    """As Ray, with processes that die as soon as they are there."""

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=KeyError)

    def __init__(self):
        self.killed = 0
        self.started = []
        open_ = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: object()))
        self.actor = SimpleNamespace(open=open_)

    def remote(self, kind):
        return SimpleNamespace(options=lambda **asked: SimpleNamespace(remote=lambda *_, **__: self.start(asked)))

    def start(self, asked):
        self.started.append(asked)
        return self.actor

    def wait(self, calls, **_):
        return calls, []

    def get(self, call):
        raise LostError("some\ntrace\nthe reason")

    def kill(self, actor):
        self.killed += 1

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1, "GPU": 1}}]


def pool_of(job, cluster, stop):
    return WorkerPool(RayWorkers(job, cluster), mock.Mock(), mock.Mock(), stop)


@pytest.fixture
def cluster(job):
    return Cluster(
        ray=DeadlyRay(),
        device="cuda",
        cpus=1,
        gpus=0.5,
        worker=job.resources,
        max_workers=None,
        grows=False,
    )


def test_workers_that_never_get_ready_end_the_build(job, cluster):
    with (
        pytest.raises(
            BuildError, match=r"^worker 0: died 3 times .* ready, the last time lost \(LostError: the reason\); `ray"
        ),
        pool_of(job, cluster, Stop()) as pool,
    ):
        pool.label(range(10))
    asked = cluster.ray.started[0]
    assert (asked["num_gpus"], asked["num_cpus"]) == (0.5, 1)
    assert len({asked["name"] for asked in cluster.ray.started}) == len(cluster.ray.started) >= 3
    assert cluster.ray.killed >= 3


def test_no_more_workers_than_shards_or_room(job, cluster):
    for workers, shards, expected in ((None, 10, 1), (4, 10, 4), (4, 2, 2)):
        pool = pool_of(job, replace(cluster, max_workers=workers), Stop())
        pool.todo.add(range(shards))
        pool._grow()
        assert len(pool.members) == expected


def test_waiting_for_a_place_is_said_once(job, cluster, monkeypatch, caplog):
    monkeypatch.setattr("ferkd_data.builder.workers.ray_actors.NOTICE_SECONDS", -1)
    workers = RayWorkers(job, cluster)
    for _ in range(2):
        workers.with_messages([workers.start(0)], 0)
    (said,) = caplog.messages
    assert "no worker yet: each asks for 0.5 GPU and 1 CPU" in said


def test_a_worker_that_dies_after_the_stop_is_the_stop(job, cluster):
    """A batch system may signal Ray's own processes at the same time."""
    stop = Stop(grace_seconds=60)
    pool = pool_of(job, cluster, stop)
    with pytest.raises(BuildStoppedError), pool, stop.labelling():
        pool.todo.add([0])
        pool._grow()
        stop.request()
        pool._hear(pool.members[0])
