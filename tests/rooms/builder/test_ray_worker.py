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
from ferkd_data.builder.workers.pool import Crew
from ferkd_data.builder.workers.ray_actors import Actor, RayWorkers
from ferkd_data.builder.workers.ray_cluster import Fleet
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


def crew_of(job, fleet, stop):
    return Crew(RayWorkers(job, fleet), mock.Mock(), mock.Mock(), stop)


@pytest.fixture
def fleet():
    return Fleet(ray=DeadlyRay(), device="cuda", cpus=1, gpus=0.5, workers=1, threads=1, processes=None, grows=False)


def test_workers_that_never_get_ready_end_the_build(job, fleet):
    with (
        pytest.raises(
            BuildError, match=r"^worker 0: died 3 times .* ready, the last time lost \(LostError: the reason\); `ray"
        ),
        crew_of(job, fleet, Stop()) as crew,
    ):
        crew.label(range(10))
    asked = fleet.ray.started[0]
    assert (asked["num_gpus"], asked["num_cpus"]) == (0.5, 1)
    assert len({asked["name"] for asked in fleet.ray.started}) == len(fleet.ray.started) >= 3
    assert fleet.ray.killed >= 3


def test_no_more_workers_than_shards_or_room(job, fleet):
    for processes, shards, expected in ((None, 10, 1), (4, 10, 4), (4, 2, 2)):
        crew = crew_of(job, replace(fleet, processes=processes), Stop())
        crew.todo.add(range(shards))
        crew._grow()
        assert len(crew.members) == expected


def test_waiting_for_a_place_is_said_once(job, fleet, monkeypatch, caplog):
    monkeypatch.setattr("ferkd_data.builder.workers.ray_actors.PATIENCE_SECONDS", -1)
    workers = RayWorkers(job, fleet)
    for _ in range(2):
        workers.with_news([workers.start(0)], 0)
    (said,) = caplog.messages
    assert "no worker yet: each asks for 0.5 GPU and 1 CPU" in said


def test_a_worker_that_dies_after_the_stop_is_the_stop(job, fleet):
    """A batch system may signal Ray's own processes at the same time."""
    stop = Stop(grace_seconds=60)
    crew = crew_of(job, fleet, stop)
    with pytest.raises(BuildStoppedError), crew, stop.labelling():
        crew.todo.add([0])
        crew._grow()
        stop.request()
        crew._hear(crew.members[0])
