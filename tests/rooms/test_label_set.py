from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest

import ferkd_data as fd
from ferkd_data.errors import ManifestError, ShardError, UsageError
from ferkd_data.labels.statistics import RANGE_EDGES, add, count_agreement, histogram, p_max_table, summarise


def test_length_keys_rows_and_shards_agree(label_set):
    labels = fd.open_labels(label_set)
    keys = list(labels.keys())
    assert len(labels) == len(keys) == len(set(keys)) == 20
    assert [image.key for image in labels] == keys
    assert [len(shard) for shard in labels.shards()] == [8, 8, 4]
    for row, key in enumerate(keys):
        assert labels[key].key == labels[row].key == key
        assert key in labels
    assert "nobody" not in labels and 3 not in labels
    assert labels[-1].key == keys[-1] and labels[-20].key == keys[0]
    with pytest.raises(KeyError, match=r"no image has the key 'nobody'; keys look like 'class0/photo0000'"):
        labels["nobody"]
    for row in (20, -21):
        with pytest.raises(IndexError, match=f"row {row} of 20"):
            labels[row]
    with pytest.raises(TypeError, match=r"select\(rows=slice"):
        labels[0:3]


def test_a_folder_that_holds_a_label_set_under_the_name_labels_is_pointed_to(label_set, tmp_path):
    """As `ferkd-data demo OUT` makes it."""
    shutil.copytree(label_set, tmp_path / "demo" / "labels")
    with pytest.raises(ManifestError, match=rf"did you mean {tmp_path / 'demo' / 'labels'}\?"):
        fd.open_labels(tmp_path / "demo")


def test_shapes_and_types(label_set):
    shard = fd.open_labels(label_set).shard(2)
    assert shard.boxes.shape == (4, 10, 4) and shard.boxes.dtype == np.uint16
    assert shard.flip.shape == (4, 10) and shard.flip.dtype == np.bool_
    assert shard.class_index.shape == (4, 10, 4) and shard.class_index.dtype == np.uint16
    assert shard.class_prob.shape == (4, 10, 4) and shard.class_prob.dtype == np.float16
    assert shard.target_prob.shape == (4, 10) and shard.target_prob.dtype == np.float16
    assert shard.bucket.shape == (4, 10) and shard.bucket.dtype == np.uint8
    assert shard.image_digest.shape == (4, 16) and shard.target.dtype == np.int32


def test_fewer_crops_touch_only_their_blocks(label_set, tmp_path):
    import shutil

    copy = shutil.copytree(label_set, tmp_path / "copy")
    for path in copy.glob("labels/*-002.parquet"):
        path.unlink()
    whole = fd.open_labels(label_set)
    for crops in (1, 4, 5, 8):
        part = fd.open_labels(copy, crops=crops)
        assert part.num_crops == crops
        assert np.array_equal(part.shard(0).boxes, whole.shard(0).boxes[:, :crops])
        assert np.array_equal(part["class0/photo0000"].class_prob, whole["class0/photo0000"].class_prob[:crops])
    with pytest.raises(ShardError, match="missing"):
        fd.open_labels(copy).shard(0)
    for crops in (0, 11):
        with pytest.raises(UsageError, match=r"1\.\.10"):
            fd.open_labels(label_set, crops=crops)


def test_a_label_set_can_be_pickled(label_set):
    labels = fd.open_labels(label_set, crops=5)
    labels["class0/photo0000"]
    copy = pickle.loads(pickle.dumps(labels))
    assert copy.num_crops == 5 and copy["class0/photo0000"].boxes.shape == (5, 4)


def test_what_is_no_label_set(tmp_path):
    with pytest.raises(ManifestError, match=r"no manifest\.json; is this the folder"):
        fd.open_labels(tmp_path)
    with pytest.raises(ManifestError, match="no manifest"):
        fd.open_labels(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="the list is empty"):
        fd.open_labels([])


@pytest.mark.parametrize("crops", [2.0, "2", -1])
def test_what_is_no_number_of_crops(label_set, crops):
    with pytest.raises(UsageError, match="crops must be"):
        fd.open_labels(label_set, crops=crops)


@pytest.mark.parametrize("row", [1.0, slice(0, 2), None])
def test_what_is_no_row(label_set, row):
    with pytest.raises(TypeError):
        fd.open_labels(label_set)[row]


def test_statistics_are_those_of_the_rows(label_set):
    labels = fd.open_labels(label_set)
    statistics = labels.statistics
    p_max = np.concatenate([shard.class_prob[..., 0].reshape(-1) for shard in labels.shards()]).astype(float)
    assert statistics.crops == 200 == sum(statistics.bucket_counts) == statistics.crops_with_target
    for row in p_max_table(statistics):
        last = row.high == 1.0
        inside = (p_max >= row.low) & ((p_max <= row.high) if last else (p_max < row.high))
        assert row.crops == inside.sum()
    assert p_max_table(statistics)[-1].aggregate == pytest.approx(100)
    right = sum(int((image.class_index[:, 0] == image.target).sum()) for image in labels)
    assert statistics.top1_matches_target == right
    agreement = np.array(statistics.teacher_agreement)
    assert agreement.shape == (2, 2) and (np.diag(agreement) == 200).all() and agreement[0, 1] == agreement[1, 0] < 200
    together, right_alone = np.array(statistics.teacher_right_together), statistics.teacher_top1_matches_target
    assert together.diagonal().tolist() == list(right_alone) and (together <= agreement).all()
    assert (together <= np.minimum.outer(right_alone, right_alone)).all()
    crops, hits, p_max = (np.array(getattr(statistics, f"teacher_bin_{name}")) for name in ("crops", "right", "p_max"))
    assert (
        crops.shape == (2, 15) and (crops.sum(axis=1) == 200).all() and hits.sum(axis=1).tolist() == list(right_alone)
    )
    low, high = np.arange(15) / 15 * crops, np.arange(1, 16) / 15 * crops
    assert (low <= p_max / 65536 + 1e-3).all() and (p_max / 65536 <= high + 1e-3).all()
    summary = summarise(statistics)
    assert summary["agreement_with_target"] == right / 200
    counted = count_agreement(labels.shards())
    worst = counted.by_class
    assert sum(row[1] for row in worst) == 200
    assert round(sum(row[1] * row[2] for row in worst)) == right
    assert [row[2] for row in worst] == sorted(row[2] for row in worst)
    for code, share in enumerate(counted.by_bucket):
        hits = [image.class_index[image.bucket == code, 0] == image.target for image in labels]
        assert share == (np.concatenate(hits).mean() if statistics.bucket_counts[code] else None)


def test_edges_fall_into_the_upper_range():
    """A float16 on an edge of the table counts where FerKD's ranges say, from below and above."""
    for low in RANGE_EDGES[:-1]:
        at = float(np.float16(low))
        expected = round(low * 200) if at >= low else round(low * 200) - 1
        assert int(np.flatnonzero(histogram(np.array([at])))[0]) == expected


def test_statistics_of_parts_add_up(label_set):
    statistics = fd.open_labels(label_set).statistics
    doubled = statistics + statistics
    assert doubled.crops == 400 and doubled.p_max_histogram[100] == 2 * statistics.p_max_histogram[100]
    assert add([]).crops == 0
