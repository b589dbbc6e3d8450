"""Builds on a real Ray cluster: what they write, and what is survived. (Their number: test_cluster.py.)"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from label_sets import SMALL, files_below, same_files, wait_until
from servers import s3_store

import ferkd_data as fd
from ferkd_data.builder import dry_run
from ferkd_data.builder.watch.events import WorkerDied, WorkerStarted
from ferkd_data.errors import BuildError, TeacherError
from ferkd_data_cli.main import run

STOPPED = 143
ONE_CPU = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
BUILD = {**SMALL, "images_per_shard": 4, "batch_size": 8}
OPTIONS = ["--crops", "10", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "4", "--device", "cpu"]

pytestmark = [
    # Ray leaves sockets and processes to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_teachers):
    """Where the teachers look; `python:ray_teachers:` is importable on every node."""
    folder = tmp_path_factory.mktemp("ray-teachers")
    with pytest.MonkeyPatch.context() as patch, s3_store(patch, "bucket"):
        patch.setenv("FERKD_DATA_CACHE", str(folder / "cache-of-the-nodes"))
        patch.setenv("RAY_TEACHERS_FOLDER", str(folder))
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield folder


@pytest.fixture(scope="module")
def cluster(folder):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=ONE_CPU)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(folder, photos, tmp_path_factory):
    """Builds on this machine, by the name of the teacher."""
    made = tmp_path_factory.mktemp("undisturbed")

    def build(name):
        if not (made / name).exists():
            fd.build(photos, made / name, teachers=[f"python:ray_teachers:{name}"], **BUILD)
        return made / name

    return build


def test_a_node_joins_and_is_lost(cluster, folder, photos, undisturbed, tmp_path):
    """The second node comes when a worker is ready on the first, and is killed in its first shard."""
    expected = undisturbed("slow")
    for path in folder.glob("at-work-*"):
        path.unlink()
    (folder / "together").touch()
    nodes, events, started = [], [], []

    class Watcher:
        def see(self, event):
            events.append(event)
            if isinstance(event, WorkerStarted):
                started.append(event.device.rpartition(" ")[2])
                if len(started) == 1:
                    nodes.append(cluster.add_node(**ONE_CPU))
                elif len(started) == 2:
                    (folder / f"wait-{started[1]}").touch()
            elif nodes and len(started) > 1 and (folder / f"at-work-{started[1]}").exists():
                cluster.remove_node(nodes.pop(), allow_graceful=False)

    fd.build(
        photos,
        tmp_path / "out",
        teachers=["python:ray_teachers:slow"],
        engine="ray",
        ray_address=cluster.address,
        watchers=[Watcher()],
        **BUILD,
    )
    assert same_files(expected, tmp_path / "out")
    (died,) = [event for event in events if isinstance(event, WorkerDied)]
    first_starts = {
        event.worker: event.device for event in events[: events.index(died)] if isinstance(event, WorkerStarted)
    }
    assert not nodes and died.shards and re.match(r"lost \(\w+Error: .", died.how)
    assert re.fullmatch(rf"cpu of node .*, process {started[1]}", first_starts[died.worker])


def test_killed_workers(cluster, folder, photos, undisturbed, tmp_path, capfd):
    """Three of them with one shard end the build; one more in the next run is survived."""
    expected = undisturbed("deadly")
    for number in range(4):
        (folder / f"life-{number}").touch()
    build = {"teachers": ["python:ray_teachers:deadly"], "engine": "ray", "ray_address": cluster.address, **BUILD}
    with pytest.raises(
        BuildError, match=r"shard 0: 3 workers died while they labelled it, .* lost \(Actor\w+Error: .*; if"
    ):
        fd.build(photos, tmp_path / "out", workers=1, **build)
    assert len(list(folder.glob("life-*"))) == 1
    capfd.readouterr()
    arguments = ["--teacher", "python:ray_teachers:deadly", "--engine", "ray", "--ray-address", cluster.address]
    assert run(["build", str(photos), str(tmp_path / "out"), *arguments, "--workers", "1", *OPTIONS]) == 0
    assert not list(folder.glob("life-*"))
    assert same_files(expected, tmp_path / "out")
    # Ray prints the death of a worker to stdout, where `--json` writes: there is only the command's own line.
    assert capfd.readouterr().out.count("\n") == 1


def test_hosts_that_share_nothing_but_a_store(cluster, folder, photos, undisturbed, tmp_path, monkeypatch):
    expected, out = undisturbed("slow"), "s3://bucket/sets/new"
    (folder / "together").unlink(missing_ok=True)
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache-of-the-driver"))
    fd.build(
        photos,
        out,
        teachers=["python:ray_teachers:slow"],
        engine="ray",
        ray_address=cluster.address,
        workers=1,
        **BUILD,
    )
    assert any((folder / "cache-of-the-nodes/builds").glob("*/.build/plan.json"))
    assert not files_below(tmp_path / "cache-of-the-driver")
    fd.pull(out, tmp_path / "copy")
    assert same_files(expected, tmp_path / "copy")


def test_a_dry_run_measures_on_the_cluster(cluster, folder, photos):
    """In a worker with what a build's gets; for as many as the cluster has room for."""
    (folder / "together").unlink(missing_ok=True)
    for path in folder.glob("at-work-*"):
        path.unlink()
    cluster.wait_for_nodes()  # one that was killed before is still counted for a moment
    dry = {"teachers": ["python:ray_teachers:slow"], "engine": "ray", "ray_address": cluster.address, **BUILD}
    estimate = dry_run(photos, **dry)
    (mark,) = folder.glob("at-work-*")
    assert not mark.name.endswith(f"-{os.getpid()}")
    assert estimate.workers == 1 and estimate.measured_crops == 40
    assert [place.rpartition(" ")[0] for place in estimate.measured_on] == ["cpu of node"]
    with pytest.raises(TeacherError, match=r"^teacher python:ferkd_tiny_teachers:nan gave NaN"):
        dry_run(photos, **{**dry, "teachers": ["python:ferkd_tiny_teachers:nan"]})


def test_teachers_that_fail(cluster, photos, tmp_path):
    build = {"engine": "ray", "ray_address": cluster.address, **BUILD}
    with pytest.raises(TeacherError, match=r"^teacher python:ray_teachers:nan gave NaN") as raised:
        fd.build(photos, tmp_path / "a", teachers=["python:ray_teachers:nan"], **build)
    assert "raise_if_wrong" in str(raised.value.__cause__)
    slow = r"^teacher python:ray_teachers:hanging: no answer for a batch of shard 0 within 0.5 .* of node .* was"
    with pytest.raises(TeacherError, match=slow):
        fd.build(photos, tmp_path / "b", teachers=["python:ray_teachers:hanging"], teacher_timeout=0.5, **build)


def command(photos, out, *more):
    build = [sys.executable, "-m", "ferkd_data_cli.main", "build", str(photos), str(out)]
    return [*build, "--teacher", "python:ray_teachers:slow", "--engine", "ray", "--batch-size", "8", *OPTIONS, *more]


def start(arguments, out):
    """The process, well into a shard that comes after the first of this run."""
    before = len(list(out.glob(".build/shards/*.json")))
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(out.glob(".build/shards/*.json"))) > before or process.poll() is not None)
    time.sleep(0.3)
    return process


def test_a_driver_that_is_stopped_and_one_that_is_killed(cluster, folder, photos, undisturbed, tmp_path):
    """SIGTERM on a Ray of the build's own, kill -9 on a cluster; each time the next run goes on."""
    expected, out = undisturbed("slow"), tmp_path / "out"
    (folder / "slow").touch()
    (folder / "together").unlink(missing_ok=True)
    stopped = start(command(photos, out, "--workers", "1"), out)
    stopped.terminate()
    printed, complaints = stopped.communicate(timeout=60)
    assert stopped.returncode == STOPPED, complaints
    lines = complaints.splitlines()
    assert printed == "" and any(" images, " in line for line in lines)
    assert not any(word in complaints for word in ("Traceback", "raylet", "Error")), complaints
    assert lines[-1] == "ferkd-data: stopped on request; run the same command again to resume"
    assert len(list(out.glob(".build/shards/*.json"))) >= 2 and not list(out.rglob("*.tmp"))

    killed = start(command(photos, out, "--ray-address", cluster.address), out)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    kept = [path for shard in (0, 1, 2) for path in out.glob(f"labels/{shard:05d}-*")]
    written = [path.stat().st_mtime_ns for path in kept]
    (folder / "slow").unlink()
    build = {"teachers": ["python:ray_teachers:slow"], "engine": "ray", "ray_address": cluster.address, **BUILD}
    fd.build(photos, out, **build)
    assert len(kept) == 9 and [path.stat().st_mtime_ns for path in kept] == written
    assert same_files(expected, out)


def test_a_cluster_whose_head_dies(folder, photos, undisturbed, tmp_path, monkeypatch):
    """Ray ends the driver then, after a minute in earnest; what was finished is kept."""
    from ray.cluster_utils import Cluster

    expected, out = undisturbed("slow"), tmp_path / "out"
    (folder / "slow").touch()
    for path in (folder / "together", *folder.glob("at-work-*")):
        path.unlink(missing_ok=True)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    mortal = Cluster(initialize_head=True, head_node_args=ONE_CPU)
    try:
        driver = start(command(photos, out, "--ray-address", mortal.address), out)
        for path in folder.glob("at-work-*"):  # or it would be done before Ray notices
            (folder / path.name.replace("at-work", "wait")).touch()
        mortal.head_node.kill_gcs_server()
        _, complaints = driver.communicate(timeout=60)
    finally:
        mortal.shutdown()
    assert driver.returncode == 1 and "Failed to connect to GCS" in complaints
    kept = {path: path.stat().st_mtime_ns for path in out.glob("labels/00000-*")}
    (folder / "slow").unlink()
    fd.build(photos, out, teachers=["python:ray_teachers:slow"], **BUILD)
    assert len(kept) == 3 and kept == {path: path.stat().st_mtime_ns for path in kept}
    assert same_files(expected, out)
