"""What a build tells: events, the log for machines, the figures for Prometheus, the line on the terminal."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta

import pytest
from label_sets import SMALL

import ferkd_data as fd
from ferkd_data.builder import JsonLog, MetricsFile, build_part
from ferkd_data.builder.engines import _ReportHalvings
from ferkd_data.builder.shard_files import ShardRecord
from ferkd_data.builder.watch import progress as counting
from ferkd_data.builder.watch.events import (
    BatchHalved,
    BuildFailed,
    BuildFinished,
    Progress,
    ShardDone,
    Watchers,
    WorkerDied,
    WorkerProgress,
)
from ferkd_data.builder.watch.progress import ProgressCounter
from ferkd_data.errors import TeacherError, UsageError
from ferkd_data.labels.statistics import Statistics
from ferkd_data_cli.display import frame, plain_line
from ferkd_data_cli.main import run


def events(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def of_kind(kind, path):
    return [event for event in events(path) if event["event"] == kind]


def test_the_log_of_a_build_and_of_its_extension(make_photos, tiny_teachers, tmp_path):
    photos, log = make_photos(tmp_path / "photos", 20), tmp_path / "logs/build.jsonl"
    (photos / "class1/broken.jpg").write_bytes(b"no picture")
    (photos / "class1/dot.ted.jpg").write_bytes(b"no picture")
    common = ["build", str(photos), str(tmp_path / "out"), "--device", "cpu", "--log-json", str(log)]
    settings = ["--crops", "8", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "8"]
    assert run([*common, "--teacher", tiny_teachers, *settings]) == 3
    names = [event["event"] for event in events(log)]
    assert names[0] == "build_started" and names[-1] == "build_finished"
    (started,) = of_kind("build_started", log)
    assert (started["images"], started["crops"], started["forwards"], started["shards"]) == (21, 168, 168, 3)
    assert started["teachers"] == [tiny_teachers] and started["settings"]["crops"] == 8 and not started["extends"]
    assert [(event["worker"], event["device"]) for event in of_kind("worker_started", log)] == [(0, "cpu")]
    done = of_kind("shard_done", log)
    assert [(event["shard"], event["images"], event["crops"], event["rejects"]) for event in done] == [
        (0, 7, 56, 1),
        (1, 8, 64, 0),
        (2, 5, 40, 0),
    ]
    assert all(event["seconds"] > 0 and event["worker"] == 0 for event in done)
    assert [(event["key"], event["reason"], event["shard"]) for event in of_kind("image_rejected", log)] == [
        ("class1/dot.ted", "bad_key", None),
        ("class1/broken", "not_an_image", 0),
    ]
    last = of_kind("progress", log)[-1]
    assert last["images_done"] == last["images_total"] == 21 and last["forwards_done"] == last["forwards_total"] == 160
    assert last["workers"][0]["crops_per_second"] > 0 and last["stragglers"] == []
    assert {name: of_kind("build_finished", log)[0][name] for name in ("images", "rejects", "files")} == {
        "images": 20,
        "rejects": 2,
        "files": 6,
    }
    for event in events(log):
        assert datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0)
    assert run([*common, "--extend", "--crops", "12"]) == 3
    second = of_kind("build_started", log)[1]
    assert second["extends"] and second["crops"] == 20 * 4 + 12
    assert of_kind("progress", log)[-1]["forwards_done"] == 80


def test_a_worker_that_dies_and_the_reason_of_a_failure(photos, tiny_teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("WATCHED_LIFE", str(tmp_path / "life"))
    (tmp_path / "life").touch()
    log = tmp_path / "log"
    teacher = "python:watched_teachers:once"
    fd.build(photos, tmp_path / "out", teachers=[teacher], watchers=[JsonLog(log)], workers=2, **SMALL)
    (died,) = of_kind("worker_died", log)
    assert died["how"] == "killed by SIGKILL" and len(died["shards"]) == 1
    assert len(of_kind("worker_started", log)) >= 2 and len(of_kind("shard_done", log)) == 3
    with pytest.raises(TeacherError):
        nan = "python:ferkd_tiny_teachers:nan"
        fd.build(photos, tmp_path / "nan", teachers=[nan], watchers=[JsonLog(log)], **SMALL)
    failed = events(log)[-1]
    assert failed["event"] == "build_failed" and failed["error"] == "TeacherError" and "NaN" in failed["reason"]


def test_a_log_that_breaks_hides_nothing(photos, tiny_teachers, tmp_path, capsys):
    """/dev/full takes no byte: said once, and neither the build nor the reason of a failure suffers."""
    from pathlib import Path

    full = Path("/dev/full")
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], watchers=[JsonLog(full)], **SMALL)
    assert len(re.findall("log /dev/full: cannot be written any more", capsys.readouterr().err)) == 1
    with pytest.raises(TeacherError, match="NaN"):
        nan = "python:ferkd_tiny_teachers:nan"
        fd.build(photos, tmp_path / "nan", teachers=[nan], watchers=[JsonLog(full)], **SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"log .*file/log: cannot be opened"):
        JsonLog(tmp_path / "file/log")
    with pytest.raises(UsageError, match=r"metrics .*file/prom: cannot be written"):
        MetricsFile(tmp_path / "file/prom")


class FullDisk:
    def see(self, event):
        if isinstance(event, BuildFailed):
            raise OSError(28, "no space")


def test_runs_that_share_a_log_have_names(tmp_path):
    log = tmp_path / "log"
    first, second = JsonLog(log), JsonLog(log)
    for watcher in (first, second, first):
        watcher.see(BuildFinished(out="x", images=1, rejects=0, files=1))
    names = [json.loads(line)["run"] for line in log.read_text().splitlines()]
    assert names[0] == names[2] != names[1] and len(names[0]) == 16


def test_a_watcher_that_fails_on_the_failure_does_not_take_its_place():
    with pytest.raises(KeyError), Watchers([FullDisk()]).reporting_failure():
        raise KeyError


SAMPLE = re.compile(r'ferkd_build_\w+(\{worker="\d+"\})? [-+.\de]+')


def test_metrics_are_rewritten_and_end_with_the_build(photos, tiny_teachers, tmp_path):
    path = tmp_path / "metrics/ferkd.prom"
    seen = []
    metrics = MetricsFile(path, write_seconds=0)
    fd.build(
        photos,
        tmp_path / "out",
        teachers=[tiny_teachers],
        watchers=[metrics],
        on_progress=lambda progress: seen.append((progress, path.read_text())),
        **SMALL,
    )
    for progress, text in seen:
        assert f"\nferkd_build_images_done {progress.images_done}\n" in text and "ferkd_build_running 1\n" in text
    text = path.read_text()
    assert "\nferkd_build_forwards_done 200\n" in text and "ferkd_build_running 0\n" in text
    for text_line in text.splitlines():
        assert text_line.startswith(("# HELP ferkd_build_", "# TYPE ferkd_build_")) or SAMPLE.fullmatch(text_line)
    assert [item.name for item in path.parent.iterdir()] == ["ferkd.prom"]


class Seen(list):
    def see(self, event):
        self.append(event)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, for the counter alone."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(counting, "time", clock)
    return clock


def counter_of(seen, clock, **changes):
    known = {"watcher": seen, "crops_of": lambda shard: 10, "shards_total": 9, "images_total": 900, "num_teachers": 2}
    return ProgressCounter(**{**known, "crops_total": 9000, "started": clock.now, "_told_at": clock.now, **changes})


def record(shard, rows=100):
    return ShardRecord(index=shard, rows=rows, files=(), rejects=(), statistics=Statistics(), thresholds=(0, 0, 1))


def test_a_straggler_is_far_below_the_median_and_has_work(clock):
    seen = Seen()
    counter = counter_of(seen, clock)
    for worker in range(4):
        counter.worker_started(worker, "cpu")
        counter.shard_begun(worker, worker)
    for _ in range(40):
        clock.now += 1
        for worker, crops in enumerate((10, 10, 4, 9)):
            counter.batch(worker, crops, 0, worker)
    progress = seen[-1]
    assert progress.stragglers == (2,)
    assert [worker.crops_per_second for worker in progress.workers] == pytest.approx([10, 10, 4, 9], rel=0.05)
    assert "4 workers at 3.9 to 10.0 crops/s, far behind: 2, " in plain_line(frame(progress))
    assert frame(progress).workers[0].split() == ["worker", "2", "shard", "2", "3.9", "crops/s", "far", "behind"]
    for _ in range(120):
        clock.now += 1
        counter.batch(0, 10, 0, 0)
    assert seen[-1].stragglers == (1, 2, 3), "silent for a minute"
    for worker in (1, 2, 3):
        counter.worker_idle(worker)
        counter.shard_done(record(worker), worker)
    clock.now += 1
    counter.batch(0, 10, 0, 0)
    assert seen[-1].stragglers == ()


def test_a_worker_that_had_no_work_for_a_while_is_no_straggler(clock):
    """As one that gets the shard of another that died late in the build."""
    seen = Seen()
    counter = counter_of(seen, clock)

    def label(seconds, *workers):
        for _ in range(seconds):
            clock.now += 1
            for worker in workers:
                counter.batch(worker, 10, 0, worker)

    for worker in range(3):
        counter.worker_started(worker, "cpu")
        counter.shard_begun(worker, worker)
    label(40, 0, 1, 2)
    counter.worker_idle(0)
    label(100, 1, 2)
    counter.shard_begun(0, 0)
    label(2, 0, 1, 2)
    assert seen[-1].stragglers == ()
    assert [worker.crops_per_second for worker in seen[-1].workers] == pytest.approx([10] * 3, rel=0.05)
    label(40, 1, 2)
    assert seen[-1].stragglers == (0,)


def test_rates_are_of_the_last_minute_and_silence_is_told(clock):
    seen = Seen()
    counter = counter_of(seen, clock)
    counter.worker_started(0)
    for rate in (10, 50):
        for _ in range(100):
            clock.now += 1
            counter.batch(0, rate, 0)
    assert seen[-1].workers[0].crops_per_second == pytest.approx(50, rel=0.02)
    assert seen[-1].crops_per_second == pytest.approx(30, rel=0.02)
    before = len(seen)
    counter.tick()
    assert len(seen) == before
    clock.now += 60
    counter.tick()
    assert seen[-1].workers[0].crops_per_second == 0


def test_forwards_and_the_expected_end_know_what_was_there_and_what_was_lost(clock):
    seen = Seen()
    counter = counter_of(seen, clock, crops_of=lambda shard: 4 if shard == 0 else 10, crops_total=100 * 4 + 800 * 10)
    counter.shard_found(record(0))
    counter.shard_begun(1)
    clock.now += 10
    counter.batch(1, 500, 0)
    assert (seen[-1].forwards_done, seen[-1].forwards_total) == (1000, 16000)
    assert seen[-1].seconds_left == pytest.approx((8000 - 500) / 50)
    assert (seen[-1].images_done, seen[-1].shards_done) == (150, 1)
    counter.worker_died(0, "killed by SIGKILL", [1])
    assert seen[-1] == WorkerDied(worker=0, how="killed by SIGKILL", shards=(1,))
    counter.shard_begun(1)
    clock.now += 10
    counter.batch(1, 1000, 0)
    assert seen[-1].forwards_done == 3000 and seen[-1].images_done == 200
    counter.shard_done(record(1))
    assert next(event for event in seen if isinstance(event, ShardDone)).seconds == 10


def test_a_halved_batch_is_told(clock):
    seen = Seen()
    _ReportHalvings(counter_of(seen, clock)).halved("timm:big", 64)
    assert seen == [BatchHalved(worker=0, teacher="timm:big", crops=64)]


def test_the_line_of_one_worker_is_short():
    progress = Progress(
        shard=3,
        shards_done=2,
        shards_total=9,
        images_done=5,
        images_total=20,
        crops_done=50,
        rejects=1,
        crops_per_second=12.34,
        seconds_left=61,
        workers=(WorkerProgress(worker=0, shard=3, crops_per_second=12.3),),
        forwards_done=1500,
        forwards_total=6000,
    )
    assert plain_line(frame(progress)) == (
        "build: 5/20 images, 12.3 crops/s, 0:01:01 left, 1 reject, 2 of 9 shards, 1,500 of 6,000 forwards"
    )


def test_a_part_is_watched_too(photos, tiny_teachers, tmp_path):
    log = tmp_path / "log"
    build_part(photos, tmp_path / "out", part="1/2", teachers=[tiny_teachers], watchers=[JsonLog(log)], **SMALL)
    assert of_kind("build_started", log)[0]["shards"] == 2 and of_kind("build_finished", log)[0]["images"] == 12
