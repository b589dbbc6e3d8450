"""Shards are written beside the labelling of the next: order, bounds, and what happens when either side fails."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from unittest import mock

import pytest
from label_sets import SMALL, same_files

import ferkd_data as fd
from ferkd_data.builder.labelling import write_behind
from ferkd_data.builder.labelling.label_shard import LabelledBatch, TeacherCounts
from ferkd_data.builder.labelling.write_behind import ROWS_AHEAD, BrokenOffError, RowQueue, ShardEnd, WriteBehind
from ferkd_data.builder.shard_files import DiskFiles
from ferkd_data.errors import BuildError

SECONDS = 30
"""For what comes at once, or never."""
END = ShardEnd(rejects=(), counts=TeacherCounts.zeros(0))
FOUR_SHARDS = {**SMALL, "images_per_shard": 5}


@pytest.fixture
def saving(monkeypatch):
    """What a test does to the saving of a shard's record: a function of the record, called in the thread that saves."""
    before: list = []
    save = DiskFiles.save

    def saved(folder, record):
        for function in before:
            function(record)
        save(folder, record)

    monkeypatch.setattr(DiskFiles, "save", saved)
    return before


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_shard_is_saved_while_the_next_is_labelled(photos, tiny_teachers, tmp_path, saving, layout):
    labelled, in_time = threading.Event(), []

    def wait_for_the_next(record):
        if record.index == 0:
            in_time.append(labelled.wait(SECONDS))

    def note(progress):
        if progress.shard == 1:
            labelled.set()

    settings = {"teachers": [tiny_teachers], "layout": layout, **FOUR_SHARDS}
    fd.build(photos, tmp_path / "plain", **settings)
    saving.append(wait_for_the_next)
    fd.build(photos, tmp_path / "out", on_progress=note, **settings)
    assert in_time == [True]
    assert same_files(tmp_path / "plain", tmp_path / "out")


def test_no_third_shard_is_begun_before_the_first_is_saved(photos, tiny_teachers, tmp_path, saving):
    crops, when_saved = {}, []

    def wait_for_the_second(record):
        deadline = time.monotonic() + SECONDS
        while record.index == 0 and crops.get(1) != 5 * SMALL["crops"] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        when_saved.append(sorted(crops))

    saving.append(wait_for_the_second)

    class Watcher:
        done = 0

        def see(self, event):
            if isinstance(event, fd.builder.Progress):
                crops[event.shard] = crops.get(event.shard, 0) + event.crops_done - self.done
                self.done = event.crops_done

    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], watchers=[Watcher()], **FOUR_SHARDS)
    assert when_saved[0] == [0, 1]


@pytest.mark.parametrize("broken", [0, 3])
def test_a_shard_that_cannot_be_saved_ends_the_build_and_it_resumes(photos, tiny_teachers, tmp_path, saving, broken):
    def fail(record):
        if record.index == broken:
            raise BuildError("the store is on fire")

    saving.append(fail)
    with pytest.raises(BuildError, match="on fire"):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **FOUR_SHARDS)
    saved = {path.stem for path in tmp_path.glob("out/.build/shards/*")}
    assert f"{broken:05d}" not in saved and len(saved) >= broken
    saving.clear()
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **FOUR_SHARDS)
    fd.build(photos, tmp_path / "undisturbed", teachers=[tiny_teachers], **FOUR_SHARDS)
    assert same_files(tmp_path / "undisturbed", tmp_path / "out")


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_rows_are_handed_over_in_order_and_not_too_many(thread):
    rows, go, taken = RowQueue(), threading.Event(), []

    def write():
        for row in rows:
            go.wait(SECONDS)
            taken.append(row)

    writer = thread.submit(write)
    given = []

    def give():
        for number in range(200):
            rows.put((number, b""), writer)
            given.append(number)
        rows.close(END, writer)

    with ThreadPoolExecutor(1) as other:
        giver = other.submit(give)
        deadline = time.monotonic() + SECONDS
        while len(given) < ROWS_AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(given) <= ROWS_AHEAD + 1 and not giver.done()
        go.set()
        giver.result(SECONDS)
    writer.result(SECONDS)
    assert rows.end is END
    assert taken == [(number, b"") for number in range(200)]


def test_a_writer_that_fails_is_noticed_also_without_room(thread, monkeypatch):
    monkeypatch.setattr(write_behind, "LOOK_SECONDS", 0.05)
    rows, fail = RowQueue(), threading.Event()

    def write():
        fail.wait(SECONDS)
        raise OSError("no more disk")

    writer = thread.submit(write)
    for number in range(ROWS_AHEAD):
        rows.put((number, b""), writer)
    threading.Timer(0.2, fail.set).start()
    with pytest.raises(OSError, match="no more disk"):
        rows.put((0, b""), writer)
    rows.break_off()
    rows.close(END, writer)


def test_rows_that_are_broken_off_are_no_shard(thread):
    rows = RowQueue()
    writer = thread.submit(lambda: list(rows))
    rows.put((0, b""), writer)
    rows.break_off()
    wait([writer], timeout=SECONDS)
    assert isinstance(writer.exception(), BrokenOffError)


def test_breaking_off_waits_for_no_writer(thread):
    """One that is slow, as a disk may be, does not write what nobody needs."""
    rows, go, taken = RowQueue(), threading.Event(), []

    def write():
        for row in rows:
            taken.append(row)
            go.wait(SECONDS)

    writer = thread.submit(write)
    for number in range(ROWS_AHEAD + 1):
        rows.put((number, b""), writer)
    rows.break_off()
    assert not writer.done()
    go.set()
    wait([writer], timeout=SECONDS)
    assert isinstance(writer.exception(), BrokenOffError) and len(taken) <= 2


def test_ctrl_c_while_the_last_rows_wait_for_room_ends_the_build(photos, tiny_teachers, tmp_path, monkeypatch):
    """The writer would wait for the end of the shard for ever, and the process for the writer."""

    def interrupted(rows, end, writer):
        raise KeyboardInterrupt

    raised = []

    def build():
        try:
            fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **FOUR_SHARDS)
        except KeyboardInterrupt as error:
            raised.append(error)

    monkeypatch.setattr(RowQueue, "close", interrupted)
    builder = threading.Thread(target=build, daemon=True)
    builder.start()
    builder.join(SECONDS)
    assert raised and not list(tmp_path.glob("out/labels/*"))


@pytest.fixture
def behind(monkeypatch):
    """Labels and writes what a test wants: `rows` and `write` of a shard's number."""
    made = WriteBehind(mock.Mock(), mock.Mock(), mock.Mock(teachers=[]), mock.Mock())
    made.rows, made.write = {}, {}

    def write(shard, rows):
        assert list(rows)
        return made.write[shard]()

    def labelled(shard):
        for row in made.rows[shard]:
            yield LabelledBatch(crops=1, rows=(row,), counts=END.counts)

    monkeypatch.setattr(made, "_labelled", labelled)
    monkeypatch.setattr(made, "_write_and_save", write)
    with made:
        yield made


def test_an_error_is_not_told_before_the_shard_before_is_whole(behind):
    """Who hears of it may end the process."""
    saved = []

    def broken():
        yield 0, b""
        raise BuildError("broken")

    behind.rows = {0: [(0, b"")], 1: broken()}
    behind.write = {0: lambda: time.sleep(0.2) or saved.append(0)}
    behind.label(0, mock.Mock())
    with pytest.raises(BuildError, match="broken"):
        behind.label(1, mock.Mock())
    assert saved == [0]


def test_a_shard_that_cannot_be_written_is_noticed_before_the_next_one_ends(behind):
    given = []

    def full():
        raise BuildError("full")

    def rows():
        for number in range(1000):
            time.sleep(0.005)
            given.append(number)
            yield number, b""

    behind.rows, behind.write = {0: [(0, b"")], 1: rows()}, {0: full}
    behind.label(0, mock.Mock())
    with pytest.raises(BuildError, match="full"):
        behind.label(1, mock.Mock())
    assert len(given) < 1000
