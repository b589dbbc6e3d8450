"""The plan: every image once, in order, in shards; with memory that does not grow; and which images are known."""

from __future__ import annotations

import hashlib
import itertools
import resource
import secrets
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd_data.builder.known_images import KnownImages
from ferkd_data.builder.plan import load_or_make_plan, open_plan
from ferkd_data.errors import SourceError, StorageFullError
from ferkd_data.images import ImageRef, LeftOut, Reject


class MadeUp:
    """Images that nobody reads; every seventh is a reject where asked for."""

    class_names = None
    class_folder_names = None
    left_out = LeftOut()
    notes = ()
    containers = ()
    description = "made up"

    def __init__(self, num_images, with_rejects=False):
        self.num_images = num_images
        self.with_rejects = with_rejects

    def list_images(self):
        for number in range(self.num_images):
            key = f"class{number % 1000:04d}/photo{number:09d}"
            if self.with_rejects and number % 7 == 3:
                yield Reject(key=key, reason="bad_key", detail="made up")
            else:
                target = None if number % 5 == 0 else number % 1000
                yield ImageRef(key=key, target=target, file=f"{key}.jpg", offset=number, length=-1)


@pytest.mark.parametrize(("num_images", "per_shard"), [(1, 1), (20, 7), (21, 7), (50, 100)])
def test_every_image_once_in_order(tmp_path, num_images, per_shard):
    source = MadeUp(num_images, with_rejects=True)
    plan = load_or_make_plan(source, tmp_path, images_per_shard=per_shard)
    listed = [item for item in source.list_images() if isinstance(item, ImageRef)]
    shards = [plan.refs(shard) for shard in plan.shards]
    assert [ref for refs in shards for ref in refs] == listed
    assert [len(refs) for refs in shards[:-1]] == [per_shard] * (len(shards) - 1)
    assert plan.shard_images(plan.shards) == [len(refs) for refs in shards]
    assert plan.summary.images + plan.summary.rejects == num_images
    text = "".join(f"{ref.key}\0{ref.target}\n" for ref in listed)
    assert plan.summary.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert open_plan(tmp_path) == load_or_make_plan(MadeUp(3), tmp_path, images_per_shard=2) == plan


def test_a_source_of_rejects_alone_is_a_plan_and_one_of_nothing_is_none(tmp_path):
    plan = load_or_make_plan(MadeUp(4, with_rejects=True), tmp_path, images_per_shard=9)
    assert (plan.summary.images, plan.summary.rejects) == (3, 1)
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="no images found"):
        load_or_make_plan(MadeUp(0), tmp_path / "none", images_per_shard=9)


def peak_of_plan(num_images, folder, queue):
    folder.mkdir()
    load_or_make_plan(MadeUp(num_images), folder, images_per_shard=4096)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peaks_of_plans(sizes, folder, quick_process):
    """Megabytes of a process for each."""
    peaks = {}
    for num_images in sizes:
        queue = quick_process.SimpleQueue()
        process = quick_process.Process(target=peak_of_plan, args=(num_images, folder / str(num_images), queue))
        process.start()
        peaks[num_images] = queue.get()
        process.join()
    return peaks


def test_ten_times_the_images_plan_in_the_same_memory(tmp_path, quick_process):
    """300,000 references alone would take 100 MB."""
    peaks = peaks_of_plans((30_000, 300_000), tmp_path, quick_process)
    assert peaks[300_000] < peaks[30_000] + 10, peaks


def test_ten_million_images_plan_in_little_memory(tmp_path, quick_process):
    """The footer of the plan grows by 6 kB for each of its 2,442 shards; a worker reads it, and one shard."""
    peaks = peaks_of_plans((30_000, 10_000_000), tmp_path, quick_process)
    assert peaks[10_000_000] < peaks[30_000] + 60, peaks
    plan = open_plan(tmp_path / "10000000")
    assert (plan.summary.images, len(plan.shards)) == (10_000_000, 2442)
    assert [ref.offset for ref in plan.refs(2441)] == list(range(2441 * 4096, 10_000_000))


def image(key, number, target=None):
    return ImageRef(key=key, target=target, file=f"{key}.jpg", offset=number, length=-1)


keys = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True, max_size=30)


@given(keys, st.integers(0, 30), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=60, deadline=None)
def test_known_images_are_found_wherever_they_are_listed(all_keys, num_known, rng, place_known):
    """The label set has some of the keys, the source all of them in any order."""
    had = rng.sample(all_keys, min(num_known, len(all_keys)))
    digests = [bytes([row]) * 16 for row in range(len(had))]
    targets = {key: None if row % 3 == 0 else row for row, key in enumerate(had)}
    listed = [image(key, i, targets.get(key, 7)) for i, key in enumerate(rng.sample(all_keys, len(all_keys)))]
    with KnownImages(len(had), 0) as known:
        for start in range(0, len(had), 3):
            few = had[start : start + 3]
            known.add_labelled(start, few, [targets[key] for key in few], digests[start : start + 3])
        for start in range(0, len(listed), 5):
            known.add_listed(listed[start : start + 5])
        tables = list(itertools.takewhile(len, known.placed(itertools.repeat(3), place_known=place_known)))
        assert known.missing() is None
    assert (known.num_found, known.num_listed) == (len(had), len(listed))
    assert known.mismatch is None
    assert known.max_target == max((-1 if ref.target is None else ref.target for ref in listed), default=-1)
    found = sorted((ref for ref in listed if ref.key in targets), key=lambda ref: had.index(ref.key))
    expected = [*(found if place_known else ()), *(ref for ref in listed if ref.key not in targets)]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row.pop("image_digest") for row in rows] == [
        digests[had.index(ref.key)] if ref.key in targets else None for ref in expected
    ]
    assert [ImageRef(**row) for row in rows] == expected
    assert [len(table) for table in tables[:-1]] == [3] * (len(tables) - 1)


def test_the_first_that_is_missing_or_has_another_target():
    """In the order of the label set, and of the source."""
    for prefix in "abc":
        names = [f"{prefix}{i}" for i in range(40)]
        with KnownImages(40, 0) as known:
            known.add_labelled(0, names, list(range(40)), [bytes(16)] * 40)
            known.add_listed([image(names[i], 0, None if i == 19 else i + 1) for i in reversed(range(20))])
            assert known.missing() == names[20]
        assert known.mismatch == (names[19], 19, None)
        assert known.num_found == 20


def test_rejected_images_are_back_or_gone():
    """Back as an image, or with a verdict again."""
    rejected = [f"image{i}" for i in range(12)]
    with KnownImages(1, 13) as known:
        known.add_labelled(0, ["good"], [None], [bytes(16)])
        known.add_rejected(0, [*rejected, "image0"])
        known.add_named(["image3", "image0", "good"])
        known.add_listed([image("image7", 0), image("new", 1)])
        placed = next(known.placed([9], place_known=False)).column("key").to_pylist()
        assert known.missing() == "good"
    back = [not gone for gone in known.is_gone]
    assert back == [name in ("image0", "image3", "image7") for name in [*rejected, "image0"]]
    assert placed == ["image7", "new"] and known.num_found == 0


def peak_of_join(num_images, queue):
    refs = MadeUp(num_images).list_images()
    with KnownImages(num_images, 0) as known:
        for start in range(0, num_images, 4096):
            few = list(itertools.islice(refs, 4096))
            known.add_labelled(start, [ref.key for ref in few], [ref.target for ref in few], [bytes(16)] * len(few))
            known.add_listed(few)
        tables = itertools.takewhile(len, known.placed(itertools.repeat(4096), place_known=True))
        num_placed = sum(map(len, tables))
    queue.put((num_placed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def test_ten_times_the_images_are_joined_in_the_same_memory(quick_process):
    """150,000 images on both sides would take 40 MB."""
    peaks = {}
    for num_images in (15_000, 150_000):
        queue = quick_process.SimpleQueue()
        process = quick_process.Process(target=peak_of_join, args=(num_images, queue))
        process.start()
        num_placed, peaks[num_images] = queue.get()
        process.join()
        assert num_placed == num_images
    assert peaks[150_000] < peaks[15_000] + 15, peaks


def test_a_full_disk_while_images_are_joined(small_disk, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(StorageFullError, match=rf"^{small_disk}/.*TMPDIR") as caught, KnownImages(2**20, 0) as known:
        for first in range(0, 2**20, 2**14):
            keys = [secrets.token_hex(20) for _ in range(2**14)]
            known.add_labelled(first, keys, [None] * len(keys), [bytes(16)] * len(keys))
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
