"""The plan: every image once, in order, in shards; with memory that does not grow; and which images are known."""

from __future__ import annotations

import hashlib
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd_data.builder.known_images import Known, KnownImages
from ferkd_data.builder.plan import load_or_make_plan, open_plan
from ferkd_data.errors import SourceError
from ferkd_data.images import ImageRef, Reject


class MadeUp:
    """Images that nobody reads; every seventh is a reject where asked for."""

    class_names = None
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


def test_ten_times_the_images_plan_in_the_same_memory(tmp_path, quick_process):
    """300,000 references alone would take 100 MB."""
    peaks = {}
    for num_images in (30_000, 300_000):
        queue = quick_process.SimpleQueue()
        process = quick_process.Process(target=peak_of_plan, args=(num_images, tmp_path / str(num_images), queue))
        process.start()
        peaks[num_images] = queue.get()
        process.join()
    assert peaks[300_000] < peaks[30_000] + 10, peaks


keys = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True, max_size=30)


@given(keys, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_known_images_are_found_wherever_they_are_listed(all_keys, rng):
    """Half of the keys are known; the listing comes in any order; rows come back in theirs."""
    half = all_keys[: len(all_keys) // 2]
    with KnownImages() as known:
        known.add_labelled(0, half, [None if i % 3 == 0 else i for i in range(len(half))])
        for number, key in enumerate(rng.sample(all_keys, len(all_keys))):
            found = known.find(key)
            if key in half:
                row = half.index(key)
                assert found == Known(row, None if row % 3 == 0 else row)
                known.place(row, ImageRef(key=key, target=found.target, file=key, offset=number, length=-1))
            else:
                assert found is None
        placed = known.placed(0, len(half))
    assert list(placed) == list(range(len(half))) and [ref.key for ref in placed.values()] == half


def test_rejected_images_are_listed_or_gone():
    with KnownImages() as known:
        known.add_rejected(["a", "b", "a"])
        for key in ("b", "c"):
            known.note_listed(key)
        assert (known.is_listed("a"), known.is_listed("b")) == (False, True)
