"""What goes wrong outside: disks, sources, teachers. It happens for real; then the build goes on, or is resumed."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from label_sets import SMALL, same_files, same_label_sets
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import (
    DeviceFailedError,
    ImageError,
    OutOfMemoryError,
    SourceError,
    StorageFullError,
    TeacherError,
)
from ferkd_data.images import open_source
from ferkd_data.images.retrying import ReopeningFile, retried
from ferkd_data.remote import Retries
from ferkd_data.threads import in_background


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("ferkd_data.images.retrying.RETRIES", Retries(attempts=5, first_wait=0.01, longest_wait=0.2))


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize(("layout", "workers"), [("parquet", 1), ("webdataset", 1), ("parquet", 2)])
def test_a_full_disk_loses_nothing(photos, tiny_teachers, tmp_path, small_disk, layout, workers):
    out = small_disk / "out"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4_100_000))
    settings = {**SMALL, "images_per_shard": 2, "crops": 20, "layout": layout}
    with pytest.raises(StorageFullError, match="no space left on the disk; free some and run"):
        fd.build(photos, out, teachers=[tiny_teachers], workers=workers, **settings)
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))
    ballast.unlink()
    fd.build(photos, out, teachers=[tiny_teachers], **settings)
    fd.build(photos, tmp_path / "other", teachers=[tiny_teachers], **settings)
    assert same_files(out, tmp_path / "other")


@pytest.mark.parametrize(("mood", "message"), [("raising", "device-side"), ("equal", "the same for"), ("nan", "NaN")])
def test_one_bad_batch_stops_the_build_by_name_and_it_resumes(
    photos, tiny_teachers, tmp_path, monkeypatch, mood, message
):
    monkeypatch.setenv("FERKD_MOOD", str(tmp_path / "mood"))
    teacher, out = f"python:moody_teachers:{mood}", tmp_path / "out"
    (tmp_path / "mood").touch()
    # An error of a GPU stays one, and names the teacher that it came with.
    kind = DeviceFailedError if mood == "raising" else TeacherError
    with pytest.raises(kind, match=f"moody_teachers:{mood}.*{message}"):
        fd.build(photos, out, teachers=[teacher], batch_size=32, **SMALL)
    assert len(list(out.glob(".build/shards/*.json"))) == 1, "the first shard was whole"
    (tmp_path / "mood").unlink()
    fd.build(photos, out, teachers=[teacher], batch_size=32, **SMALL)
    fd.build(photos, tmp_path / "undisturbed", teachers=[teacher], batch_size=32, **SMALL)
    assert same_files(out, tmp_path / "undisturbed")


@pytest.fixture
def movable(make_photos, tmp_path):
    return make_photos(tmp_path / "photos", 20)


def test_a_source_that_is_gone_for_a_moment(movable, tiny_teachers, tmp_path, label_set, monkeypatch):
    """As a mount that is lost while the first shard is labelled, and comes back when the next was asked for."""
    away, waits = movable.with_name("away"), []

    class Waiting(Retries):
        def wait(self, attempt):
            waits.append(attempt)
            if attempt == 2:
                away.rename(movable)

    monkeypatch.setattr("ferkd_data.images.retrying.RETRIES", Waiting())
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    fd.build(
        movable,
        tmp_path / "out",
        teachers=teachers,
        on_progress=lambda progress: waits or away.exists() or movable.rename(away),
        **SMALL,
    )
    assert waits == [1, 2]
    assert same_label_sets(tmp_path / "out", label_set)


def test_a_source_that_stays_away_stops_the_build_and_it_resumes(movable, tiny_teachers, tmp_path, label_set):
    out, away = tmp_path / "out", movable.with_name("away")
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]

    def go_away(progress):
        if not away.exists():
            movable.rename(away)

    with pytest.raises(SourceError, match=r"3 images in a row cannot be read, the last .*photos is gone"):
        fd.build(movable, out, teachers=teachers, on_progress=go_away, **SMALL)
    assert not (out / "rejects.parquet").exists()
    away.rename(movable)
    fd.build(movable, out, teachers=teachers, **SMALL)
    assert same_label_sets(out, label_set)


def test_a_file_that_never_can_be_read_is_a_reject_with_the_reason(movable, tiny_teachers, tmp_path):
    """A process's own memory at address 0 gives EIO, as a bad sector does."""
    (movable / "class0/photo9999.jpg").symlink_to("/proc/self/mem")
    result = fd.build(movable, tmp_path / "out", teachers=[tiny_teachers], **SMALL)
    (row,) = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert (row["key"], row["reason"]) == ("class0/photo9999", "unreadable")
    assert row["detail"] == "class0/photo9999.jpg: Input/output error, also after 5 attempts"
    assert result.manifest.num_images == 20


def test_a_file_that_is_not_there_is_not_waited_for(movable, monkeypatch):
    class Never(Retries):
        def wait(self, attempt):
            pytest.fail("it will not come")

    monkeypatch.setattr("ferkd_data.images.retrying.RETRIES", Never())
    source = open_source(movable)
    ref = next(iter(source.list_images()))
    (movable / ref.file).unlink()
    with pytest.raises(ImageError, match="No such file"):
        source.read_one(ref)


def tar_of(photos: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, photo in enumerate(sorted(photos.rglob("*.jpg"))):
            tar.add(photo, f"photo{number:03d}.jpg")
    return path


def test_a_server_that_fails_for_a_while_and_answers_late(photos, tiny_teachers, tmp_path):
    tar = tar_of(photos, tmp_path / "images.tar")
    fd.build(tar, tmp_path / "local", teachers=[tiny_teachers], **SMALL)
    with serve(tmp_path) as server:
        server.unavailable = 2
        server.before_body = lambda name: time.sleep(0.02)

        def fail(progress):
            server.unavailable = 2 if progress.shard == 1 else 0

        fd.build(f"{server.url}/images.tar", tmp_path / "out", teachers=[tiny_teachers], on_progress=fail, **SMALL)
    assert same_label_sets(tmp_path / "local", tmp_path / "out")


def test_a_server_that_refuses_is_not_asked_again(tmp_path):
    with serve(tmp_path) as server:
        server.refuse = {"images.tar": 403}
        with pytest.raises(SourceError, match="cannot be opened"):
            list(open_source(f"{server.url}/images.tar").list_images())
        assert len(server.requests) <= 2


def test_a_damaged_parquet_row_is_a_reject_and_a_failing_one_is_read_again(monkeypatch, tmp_path):
    import pyarrow as pa

    from ferkd_data.images.parquet_rows import RowCursor

    images = [{"bytes": b"%d" % number, "path": f"{number}.jpg"} for number in range(5)]
    pq.write_table(pa.table({"image": images}), tmp_path / "0.parquet")
    source = open_source(tmp_path)
    refs = list(source.list_images())
    real, failures = (
        RowCursor.advance_to,
        [TimeoutError("late"), OSError(5, "Input/output error"), OSError("corrupt page")],
    )

    def advance_to(cursor, row):
        if row == 2 and failures:
            cursor.file = "broken"
            raise failures.pop(0)
        assert cursor.file != "broken", "it has failed"
        return real(cursor, row)

    monkeypatch.setattr(RowCursor, "advance_to", advance_to)
    contents = list(source.read(refs))
    assert contents[:2] == [b"0", b"1"] and contents[3:] == [b"3", b"4"]
    assert isinstance(contents[2], ImageError) and "corrupt page" in contents[2].detail
    assert list(source.read(refs))[2] == b"2"


def test_a_read_goes_on_where_it_was(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with ReopeningFile(str(tmp_path / "file")) as file:
        assert file.read(10) == bytes(range(10))
        file._stream.close()
        file._stream = Breaking()
        assert file.read(5) == bytes(range(10, 15)) and file.tell() == 15


class Breaking:
    def seek(self, position):
        pass

    def read(self, size):
        raise ConnectionResetError("reset by peer")

    def close(self):
        pass


def test_what_will_not_pass_is_raised_at_once():
    tries = []

    def action():
        tries.append(1)
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        retried(action, "x")
    assert len(tries) == 1


def test_reading_in_the_background_keeps_order_depth_and_errors():
    taken = []

    def items():
        for number in range(6):
            taken.append(number)
            yield number
        raise OSError("the disk is gone")

    found = in_background(items(), depth=2)
    assert next(found) == 0
    time.sleep(0.1)
    assert len(taken) <= 3
    assert [next(found) for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_a_host_without_memory_rejects_no_image_and_the_build_resumes(photos, tiny_teachers, tmp_path, monkeypatch):
    """The error is made here: tests/rooms/images/test_decode.py takes the memory away for real."""

    def short(data, *, max_pixels):
        raise OutOfMemoryError("too little memory to decode an image")

    with monkeypatch.context() as context:
        context.setattr("ferkd_data.builder.labelling.crop_batches.decode_rgb", short)
        with pytest.raises(OutOfMemoryError, match=r"image 'class\d/photo\d+': too little memory .* \(--max-pixels\)"):
            fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL)
    assert fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL).rejects == 0
