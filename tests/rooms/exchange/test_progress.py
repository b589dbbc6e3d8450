"""What `on_progress` hears of transfers: totals before the first byte, and nothing that goes back."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from label_sets import SMALL
from servers import serve

import ferkd_data as fd
from ferkd_data.threads import as_they_end


def check(told, *, images=None):
    """The first one has done nothing, the last one all; counts never fall."""
    first, last = told[0], told[-1]
    assert (first.files, first.bytes) == (0, 0) and first.images == (None if images is None else 0)
    assert first.files_total == last.files == last.files_total > 0
    for before, after in itertools.pairwise(told):
        assert before.files <= after.files and before.bytes <= after.bytes
        assert (before.images or 0) <= (after.images or 0)
    if images is None:
        assert first.bytes_total == last.bytes == last.bytes_total > 0
    else:
        assert last.images == last.images_total == images and last.bytes > 0


def bytes_of(manifest) -> int:
    return sum(file.bytes for shard in manifest.shards for file in shard.files)


def test_verify_publish_and_pull(label_set, tmp_path):
    manifest = fd.open_labels(label_set).manifest
    files = sum(len(shard.files) for shard in manifest.shards)
    told = []
    fd.verify(label_set, on_progress=told.append)
    check(told)
    assert told[-1].files == files and told[-1].bytes == bytes_of(manifest)
    told = []
    card = fd.CardFields(license="cc0-1.0")
    fd.publish(label_set, str(tmp_path / "there"), card=card, on_progress=told.append)
    check(told)
    told = []
    fd.pull(str(tmp_path / "there"), tmp_path / "here", on_progress=told.append)
    check(told)
    assert told[-1].files == files + 1, "with the rejects"
    again = []
    fd.pull(str(tmp_path / "there"), tmp_path / "here", on_progress=again.append)
    check(again)


def test_bytes_of_a_file_that_is_under_way_count(label_set, tmp_path):
    """The server waits in the middle of the first file until its first half was told of."""
    heard, told = threading.Event(), []

    def pause(name):
        if name.endswith(".parquet"):
            server.in_the_middle = None
            assert heard.wait(60)

    def on_progress(progress):
        told.append(progress)
        if progress.files == 0 and progress.bytes:
            heard.set()

    with serve(label_set) as server:
        server.in_the_middle = pause
        fd.pull(server.url, tmp_path / "out", threads=1, on_progress=on_progress)
    assert heard.is_set()
    check(told)


@pytest.mark.parametrize(("layout", "changes"), [("webdataset", {}), ("parquet", {"crops_per_block": 3})])
def test_convert(label_set, photos, tmp_path, layout, changes):
    told = []
    images = photos if layout == "webdataset" else None
    manifest = fd.convert(label_set, tmp_path, layout=layout, images=images, on_progress=told.append, **changes)
    check(told, images=20)
    assert told[-1].bytes == bytes_of(manifest)


def test_to_and_from_files_of_fkd(label_set, photos, tmp_path):
    told = []
    fd.export_fkd(label_set, tmp_path / "fkd", on_progress=told.append)
    check(told, images=20)
    told = []
    teacher = fd.FkdTeacher(name="tiny", size=32)
    manifest = fd.import_fkd(
        tmp_path / "fkd", tmp_path / "out", images=photos, num_classes=10, teacher=teacher, on_progress=told.append
    )
    assert (told[0].images, told[-1].images, told[-1].images_total) == (0, 20, None)
    assert (told[-1].files, told[-1].bytes) == (sum(len(s.files) for s in manifest.shards), bytes_of(manifest))


@pytest.mark.parametrize("kind", ["teachers", "crops", "images"])
def test_merge(label_set, photos, make_photos, tmp_path, tiny_teachers, kind):
    source, changes = photos, {}
    if kind == "crops":
        changes = {"seed": 5}
    if kind == "images":
        source = make_photos(tmp_path / "more", 40)
        for path in [path for path in source.rglob("*.jpg") if int(path.stem[-4:]) < 20]:
            path.unlink()
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    if kind == "teachers":
        teachers = ["python:ferkd_tiny_teachers:third"]
    first = fd.open_labels(label_set).manifest
    settings = SMALL | {"crops": first.num_crops, "top_k": first.top_k} | changes
    fd.build(source, tmp_path / "other", teachers=teachers, **settings)
    told = []
    result = fd.merge([label_set, tmp_path / "other"], tmp_path / "out", on_progress=told.append)
    assert result.kind == kind
    check(told, images=40 if kind == "images" else 20)
    assert told[-1].bytes == bytes_of(result.manifest)


def test_results_come_as_they_end():
    gates = [threading.Event() for _ in range(5)]

    def action(number):
        assert gates[number].wait(60)
        return number * 10

    with ThreadPoolExecutor(2) as executor:
        stream = as_they_end(executor, action, range(5), ahead=2, seconds=0.01)
        assert next(stream) == ([], [0, 1]), "nothing ended"
        gates[1].set()
        ended = []
        while not ended:
            ended, under_way = next(stream)
        assert ended == [(1, 10)] and under_way == [0]
        for gate in gates:
            gate.set()
        rest = sorted(item for ended, _ in stream for item, _ in ended)
    assert rest == [0, 2, 3, 4]
