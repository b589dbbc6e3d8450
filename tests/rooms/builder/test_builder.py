from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
import torch
from label_sets import SMALL

import ferkd_data as fd
from ferkd_data.builder.labelling.job import open_tools
from ferkd_data.builder.prepare import make_request, open_request
from ferkd_data.crops import Crops
from ferkd_data.errors import TeacherError, UsageError, describe_differences
from ferkd_data.images import decode_rgb
from ferkd_data.replay import replay
from ferkd_data.teachers import load_teachers
from ferkd_data.threads import look_ahead


def test_a_label_is_what_the_teachers_say_of_the_replayed_crop(photos, label_set, tiny_teachers):
    """Recompute one image's labels by hand, from the stored boxes."""
    image = fd.open_labels(label_set)["class3/photo0013"]
    pixels = decode_rgb((photos / "class3/photo0013.jpg").read_bytes())
    batch = replay(pixels, Crops(boxes=image.boxes, flip=image.flip), size=32)
    teachers = load_teachers([tiny_teachers, "python:ferkd_tiny_teachers:second"])
    prob = sum(teacher.logits(batch).softmax(1) for teacher in teachers).numpy() / 2
    best = np.argsort(-prob.astype(np.float16), axis=1, kind="stable")[:, :4]
    assert np.array_equal(image.class_index, best)
    np.testing.assert_allclose(image.class_prob, np.take_along_axis(prob, best, 1), atol=1e-3)
    np.testing.assert_allclose(image.target_prob, prob[:, 3], atol=1e-3)
    assert (image.height, image.width, image.target) == (48, 64, 3)


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_quantile_thresholds_are_of_this_sets_own_crops(photos, tiny_teachers, tmp_path, layout, label_set):
    out = tmp_path / "out"
    asked = fd.QuantileThresholds(low=0.1, mid=0.25, top=0.8)
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    result = fd.build(photos, out, teachers=teachers, layout=layout, thresholds=asked, **SMALL)
    labels = fd.open_labels(out)
    p_max = np.concatenate([image.class_prob[:, 0] for image in labels]).astype(float)
    bucket = np.concatenate([image.bucket for image in labels])
    found = result.manifest.thresholds
    assert found.quantile == (0.1, 0.25, 0.8)
    assert np.array_equal(bucket, np.digitize(p_max, [found.low, found.mid, found.top]))
    assert tuple(np.bincount(bucket, minlength=4)) == labels.statistics.bucket_counts
    assert abs((bucket == 0).mean() - 0.1) < 0.02 and abs((bucket == 3).mean() - 0.2) < 0.02
    assert labels[0].boxes.tolist() == fd.open_labels(label_set)[0].boxes.tolist()


def test_thresholds_on_the_targets_probability(photos, tiny_teachers, tmp_path):
    thresholds = fd.Thresholds(low=0.05, mid=0.2, top=0.5, confidence="target")
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], thresholds=thresholds, **SMALL)
    image = fd.open_labels(tmp_path / "out")[0]
    assert np.array_equal(image.bucket, np.digitize(image.target_prob.astype(float), [0.05, 0.2, 0.5]))


@pytest.mark.parametrize(("factory", "message"), [("nan", "gave NaN"), ("flat", "gives the same for every class")])
def test_a_teacher_that_says_nothing_stops_the_build_by_name(photos, tiny_teachers, tmp_path, factory, message):
    with pytest.raises(TeacherError, match=f"ferkd_tiny_teachers:{factory} {message}"):
        fd.build(photos, tmp_path / "out", teachers=[f"python:ferkd_tiny_teachers:{factory}"], **SMALL)


def test_threads_that_decode_have_no_threads_of_their_own(photos, tiny_teachers, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with (
            open_request(make_request(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL)) as prepared,
            open_tools(prepared.job, "cpu", prepared.teachers) as tools,
        ):
            assert tools.executor.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_top_k_may_be_all_classes(photos, tiny_teachers, tmp_path):
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **{**SMALL, "top_k": 10})
    prob = fd.open_labels(tmp_path / "out").shard(0).class_prob.astype(float)
    np.testing.assert_allclose(prob.sum(axis=2), 1, atol=5e-3)
    with pytest.raises(UsageError, match="11 is more than the teachers' 10"):
        fd.build(photos, tmp_path / "more", teachers=[tiny_teachers], **{**SMALL, "top_k": 11})


def test_targets_that_cannot_mean_the_teachers_classes(make_photos, tiny_teachers, tmp_path):
    few = make_photos(tmp_path / "few", 4, classes=4)
    with pytest.raises(UsageError, match=r"4 classes in the source, 10 in the teachers.*--classes"):
        fd.build(few, tmp_path / "out", teachers=[tiny_teachers], **SMALL)


def test_a_setting_corrected_before_the_build_began_meets_no_other(make_photos, tiny_teachers, tmp_path):
    few, out, classes = make_photos(tmp_path / "few", 4, classes=4), tmp_path / "out", tmp_path / "classes.txt"
    with pytest.raises(UsageError, match="--classes"):
        fd.build(few, out, teachers=[tiny_teachers], **SMALL)
    classes.write_text("".join(f"class{i}\n" for i in range(10)))
    assert fd.build(few, out, teachers=[tiny_teachers], classes=classes, **SMALL).manifest.num_images == 4


def test_a_mistake_with_overwrite_leaves_out_ours(make_photos, photos, label_set, tiny_teachers, tmp_path):
    """The old label set is cleared away, its README.md stays, and the corrected command was refused because of it."""
    out = shutil.copytree(label_set, tmp_path / "out")
    (out / "README.md").write_text("ours")
    many = make_photos(tmp_path / "many", 6, classes=6)
    with pytest.raises(UsageError, match="6 classes in the source"):
        fd.build(many, out, teachers=[tiny_teachers], overwrite=True, **SMALL)
    assert not (out / "manifest.json").exists()
    fd.build(photos, out, teachers=[tiny_teachers], **SMALL)
    assert (out / "README.md").read_text() == "ours" and fd.open_labels(out).num_crops == 10


def test_unknown_settings_are_named(photos, tiny_teachers, tmp_path):
    with pytest.raises(UsageError, match="no setting 'topk'"):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], topk=3)
    for name, value in {"crops": 0, "crops_per_block": 0, "layout": "zip", "ensemble": "max", "workers": 0}.items():
        with pytest.raises(UsageError, match=name):
            fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **{name: value})


def test_progress_counts_to_the_end(photos, tiny_teachers, tmp_path):
    seen = []
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], on_progress=seen.append, **SMALL)
    assert seen[-1].images_done == seen[-1].images_total == 20
    assert seen[-1].crops_done == 200 and seen[-1].shards_total == 3
    done = [progress.images_done for progress in seen]
    assert done == sorted(done)


def test_look_ahead_keeps_order_and_its_depth():
    from concurrent.futures import ThreadPoolExecutor

    taken = []
    lock = threading.Lock()

    def items():
        for i in range(20):
            with lock:
                taken.append(i)
            yield i

    with ThreadPoolExecutor(4) as executor:
        results = look_ahead(executor, lambda i: i * i, items(), depth=3)
        for i, square in enumerate(results):
            assert square == i * i
            assert len(taken) <= i + 3
        with pytest.raises(ZeroDivisionError):
            list(look_ahead(executor, lambda i: 1 // i, [2, 1, 0], depth=2))


def test_differences_name_both_values():
    saved, present = {"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}, "d": None}
    assert describe_differences(saved, present) == ["b.c[1]: saved 2, now 3"]
