"""The pass over a label set: its sums are exact, its samples depend on keys alone, its memory is bounded."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data.calibration import Calibration, use_probability
from ferkd_data.labels.buckets import Thresholds, assign_buckets
from ferkd_data.labels.rows import ShardLabels
from ferkd_data.report import temperatures
from ferkd_data.report.charts import Reliability
from ferkd_data.report.collect import Collector, Duplicates, collect
from ferkd_data.report.findings import _accuracy, _calibrated_apart, duplicates_said, ensemble_reliability, findings
from ferkd_data.report.samples import Smallest, priorities
from ferkd_data.report.sketch import FLOAT16_VALUES, Sketch, counts_below, counts_between
from ferkd_data.report.suspects import CSV_COLUMNS, SuspectList
from ferkd_data.report.tables import short_names, threshold_table
from ferkd_data.report.temperatures import TemperatureSample
from ferkd_data.report.thresholds import suggest
from ferkd_data.targets import recover
from ferkd_data.words import percent


def made_up(num_images: int, *, seed: int = 0, num_crops: int = 8, classes: int = 6, start: int = 0) -> ShardLabels:
    """Make labels without images; about half of the rows have no ground truth."""
    generator = np.random.default_rng([seed, start])
    prob = -np.sort(-generator.dirichlet([0.3] * classes, (num_images, num_crops)), axis=2)[..., :3].astype(np.float16)
    index = np.argsort(generator.random((num_images, num_crops, classes)), axis=2)[..., :3].astype(np.uint16)
    target = generator.integers(-1, classes, num_images).astype(np.int32)
    hit = index == target[:, None, None]
    said = np.where(hit.any(axis=2), np.where(hit, prob, 0).max(axis=2), np.float16(0.01))
    said = np.where(target[:, None] < 0, np.nan, said).astype(np.float16)
    height, width = generator.integers(20, 400, (2, num_images)).astype(np.uint16)
    box_h = (height[:, None] * generator.uniform(0.3, 1, (num_images, num_crops))).astype(np.uint16)
    box_w = (width[:, None] * generator.uniform(0.3, 1, (num_images, num_crops))).astype(np.uint16)
    top = ((height[:, None] - box_h) * generator.random((num_images, num_crops))).astype(np.uint16)
    left = ((width[:, None] - box_w) * generator.random((num_images, num_crops))).astype(np.uint16)
    return ShardLabels(
        keys=[f"image{start + number}" for number in range(num_images)],
        image_digest=generator.integers(0, 256, (num_images, 16)).astype(np.uint8),
        height=height,
        width=width,
        target=target,
        boxes=np.stack([top, left, box_h, box_w], axis=2),
        flip=generator.random((num_images, num_crops)) < 0.5,
        class_index=index,
        class_prob=prob,
        target_prob=said,
        bucket=assign_buckets(prob[..., 0], Thresholds()),
    )


@pytest.fixture(scope="module")
def opened(hostile_labels: Path) -> fd.LabelSet:
    return fd.open_labels(hostile_labels)


@pytest.fixture(scope="module")
def found(opened):
    return collect(opened)


@given(st.lists(st.floats(0, 1, width=16), max_size=200), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_counts_below_are_what_assign_buckets_compares(values, edges):
    stored = np.array(values, np.float16)
    counts = np.bincount(stored.view(np.uint16), minlength=len(FLOAT16_VALUES))
    for edge, below in zip(edges, counts_below(counts, np.array(edges)), strict=True):
        assert below == (assign_buckets(stored, Thresholds(low=edge, mid=1, top=1)) == 0).sum()


@given(st.lists(st.floats(0, 1, width=16), max_size=200))
def test_bins_hold_every_value_once(values):
    counts = np.bincount(np.array(values, np.float16).view(np.uint16), minlength=len(FLOAT16_VALUES))
    assert counts_between(counts, np.linspace(0, 1, 11)).sum() == len(values)


def test_sums_are_those_of_the_manifest(opened, found):
    told, sketch = opened.statistics, found.sketch
    assert sketch.crops == told.crops and sketch.images == len(opened)
    assert sketch.buckets[0].tolist() == list(told.bucket_counts)
    assert sketch.confidence["max"][2].sum() == told.top1_matches_target
    assert sketch.mass_by_rank.sum() == pytest.approx(told.kept_prob_sum)
    assert (sketch.truth * FLOAT16_VALUES).sum() == pytest.approx(told.target_prob_sum)
    edges = np.arange(201) / 200
    assert counts_between(sketch.confidence["max"][0], edges).tolist() == list(told.p_max_histogram)


def test_sums_over_places_classes_and_images(opened, found):
    sketch = found.sketch
    assert sketch.centres.sum() == sketch.areas.sum() == sketch.crops
    p_max = np.concatenate([shard.class_prob[..., 0].reshape(-1) for shard in opened.shards()]).astype(float)
    assert sketch.centre_p_max.sum() == pytest.approx(p_max.sum())
    right = Counter()
    for image in opened:
        right[image.target] += int((image.class_index[:, 0] == image.target).sum())
    assert {number: right[number] for number in range(10)} == dict(enumerate(sketch.class_right.tolist()))
    assert sum(sketch.confusions.values()) + sketch.class_right.sum() == sketch.crops
    assert sketch.class_named.sum() == sketch.crops


def test_the_mix_of_an_epoch_is_what_a_loader_draws_from(opened, found):
    share = np.zeros(4)
    images = 0
    for image in opened:
        use = use_probability(Calibration.ferkd(), image.bucket)
        if use.any():
            images += 1
            share += np.bincount(image.bucket, use, minlength=4) / use.sum()
    assert found.sketch.epoch_share == pytest.approx(share)
    assert found.sketch.in_use[0] == len(opened) - images


def test_ece_is_the_mean_gap(opened, found):
    p_max = np.concatenate([shard.class_prob[..., 0].reshape(-1) for shard in opened.shards()]).astype(float)
    right = np.concatenate([(s.class_index[..., 0] == s.target[:, None]).reshape(-1) for s in opened.shards()])
    bins = np.minimum((p_max * 15).astype(int), 14)
    gaps = [abs(p_max[bins == b].sum() - right[bins == b].sum()) for b in range(15)]
    assert ensemble_reliability(found.sketch, "all").ece == pytest.approx(sum(gaps) / len(p_max))


def sampled_keys(found) -> list[list[tuple[str, int]]]:
    groups = [*found.sheets, found.wrong, found.strata]
    return [[(crop.image.key, crop.number) for crop in group] for group in groups]


def test_samples_do_not_depend_on_the_order_of_shards(opened, found):
    backwards = Collector(opened)
    shards = list(opened.shards())
    for shard in reversed(shards):
        backwards.add(shard)
    other = backwards.finish(opened)
    assert sampled_keys(other) == sampled_keys(found)
    assert [image.key for image in other.images] == [image.key for image in found.images]


def test_a_key_that_comes_twice_is_no_error(opened):
    collector = Collector(opened)
    for shard in [*opened.shards(), *opened.shards()]:
        collector.add(shard)
    assert collector._sketch.images == 2 * len(opened)


def test_samples_are_of_their_group(opened, found):
    thresholds = opened.manifest.thresholds
    for code, sheet in enumerate(found.sheets):
        assert len(sheet) == min(14, found.sketch.buckets[0, code])
        assert all(crop.image.bucket[crop.number] == code for crop in sheet)
    assert all(crop.p_max >= thresholds.mid and crop.top1 != crop.image.target for crop in found.wrong)
    assert [crop.p_max for crop in found.strata] == sorted(crop.p_max for crop in found.strata)
    for crop in found.strata:
        assert opened[crop.image.row].key == crop.image.key


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), max_size=40), st.integers(1, 5))
def test_smallest_keeps_the_smallest(entries, capacity):
    kept = Smallest(capacity)
    for rank, number in entries:
        kept.add(rank, f"key{number}", number, lambda rank=rank: rank)
    assert kept.items() == sorted(rank for rank, _ in entries)[:capacity]


def test_duplicates_and_rejects_are_found(found):
    assert [set(group.keys) for group in found.duplicates] == [{"class5/photo0005", "class6/copy"}]
    assert found.duplicate_groups == found.duplicate_conflicts == 1
    assert found.rejects == {"truncated": 1} or sum(found.rejects.values()) == 1
    (example,) = next(iter(found.reject_examples.values()))
    assert example.key == "class7/broken"


def with_digests(digests: np.ndarray) -> ShardLabels:
    labels = made_up(len(digests))
    wide = np.zeros((len(digests), 16), np.uint8)
    wide[:, :8] = digests.astype("<u8")[:, None].view(np.uint8)
    return ShardLabels(**{**vars(labels), "image_digest": wide})


def test_duplicates_in_bounded_memory_are_estimated():
    generator = np.random.default_rng(3)
    digests = generator.integers(1, 2**63, 20_000).astype(np.uint64)
    digests[10_000:] = digests[:10_000]
    duplicates = Duplicates(capacity=2000)
    for part in np.split(generator.permutation(digests), 20):
        duplicates.add(with_digests(part))
        assert len(duplicates._kept) + duplicates._num_waiting <= 2000
    assert duplicates.share == 1 / 16
    assert len(duplicates.groups()) / duplicates.share == pytest.approx(10_000, rel=0.1)


def test_copies_contradict_each_other_by_what_is_known_and_the_one_that_differs_is_shown(
    tmp_path, make_greys, tiny_teachers
):
    """An unlabelled copy was said to have another ground truth; the tenth copy's was not shown."""
    photos = [path.read_bytes() for path in sorted(make_greys(tmp_path / "greys", 3, each=1).rglob("*.png"))]
    copies = [(0, [0] * 9 + [2]), (1, [1, None]), (2, [2, 2])]
    rows = [
        {"image": {"bytes": photos[number], "path": f"{number}_{i}.png"}, "label": target}
        for number, targets in copies
        for i, target in enumerate(targets)
    ]
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), source / "train.parquet")
    teacher = "python:ferkd_tiny_teachers:brightness_of_three"
    fd.build(source, tmp_path / "out", teachers=[teacher], crops=2, top_k=2, device="cpu")
    labels = fd.open_labels(tmp_path / "out")
    found = collect(labels)
    assert (found.duplicate_groups, found.duplicate_conflicts) == (3, 1)
    first = found.duplicates[0]
    assert first.keys[:2] == ("0_0", "0_9") and first.targets[:2] == (0, 2) and first.conflict
    assert (first.images, len(first.keys)) == (10, 8) and not any(one.conflict for one in found.duplicates[1:])
    text = fd.write_report(labels, tmp_path / "report.html").path.read_text(encoding="utf-8")
    assert " and 2 more" in text and "3 images come more than once, 1 of them under different ground truths" in text


def test_an_estimate_of_duplicates_is_called_one(found):
    """Scaled up by a power of two it is a whole number, and was written like a count."""
    exact = replace(found, duplicate_groups=3.0, duplicate_conflicts=0.0)
    assert duplicates_said(exact) == "3 images come more than once"
    assert duplicates_said(replace(exact, duplicates_compared=0.25)) == "about 3 images come more than once"
    none = replace(exact, duplicate_groups=0.0)
    assert duplicates_said(none) == "None"
    assert duplicates_said(replace(none, duplicates_compared=0.25)) == (
        "None among the 25.0% of the images that were compared"
    )


def test_images_without_a_digest_are_no_duplicates():
    duplicates = Duplicates()
    duplicates.add(with_digests(np.zeros(50, np.uint64)))
    assert duplicates.groups() == []


def test_a_wrong_ground_truth_is_suspected(opened):
    labels = made_up(40, classes=10)
    labels.target[:] = 3
    labels.class_index[...] = np.array([3, 4, 5], np.uint16)
    labels.class_prob[...] = np.array([0.9, 0.05, 0.01], np.float16)
    labels.target_prob[...] = 0.9
    labels.bucket[...] = 2
    labels.class_index[7, :6] = (8, 3, 5)
    labels.target_prob[7, :6] = 0.05
    collector = Collector(opened)
    collector._sketch.num_crops = 8
    suspects = collector._suspects
    suspects.add(labels, 0)
    (suspect,) = suspects.worst()
    assert (suspect.image.key, suspect.suggested, suspect.crops, suspects.found) == ("image7", 8, 6, 1)
    assert suspect.share == 0.75 and suspect.mean_p_max == pytest.approx(0.9, abs=1e-3)


def test_surely_wrong_ones_come_first_and_are_counted_apart(opened):
    labels = made_up(40, classes=10)
    labels.target[:] = 3
    labels.class_index[...] = np.array([8, 4, 5], np.uint16)
    labels.class_prob[...] = np.array([0.99, 0.005, 0.001], np.float16)
    labels.target_prob[...] = 0.06
    labels.bucket[...] = 3
    labels.target_prob[7] = 0.01
    labels.class_prob[7, :, 0] = 0.6
    labels.target_prob[8], labels.class_prob[8, :, 0] = 0.01, 0.45  # not sure enough
    labels.target_prob[9], labels.class_index[9, :2, 0] = 0.01, 3  # two of the eight crops name the label
    labels.target_prob[10] = np.nan  # not stored
    suspects = SuspectList(10)
    suspects.add(labels, 0)
    assert (suspects.found, suspects.sure) == (40, 1)
    assert [one.image.key for one in suspects.worst() if one.sure] == [suspects.worst()[0].image.key] == ["image7"]
    groups = suspects.shown()
    assert [len(group) for group in groups] == [1, 24] and not any(one.sure for one in groups[1])


@pytest.mark.parametrize("confidence", ["max", "target"])
def test_a_wrong_ground_truth_is_found_whatever_the_buckets_compare(confidence, tmp_path, make_greys, tiny_teachers):
    """A wrong label has no probability, so buckets by the ground truth's never called such a crop confident."""
    greys, out = make_greys(tmp_path / "greys", 3), tmp_path / "out"
    (greys / "class0/grey004.png").rename(greys / "class2/grey004.png")
    thresholds = fd.Thresholds(confidence=confidence)
    teacher = "python:ferkd_tiny_teachers:brightness_of_three"
    fd.build(greys, out, teachers=[teacher], crops=4, top_k=2, device="cpu", thresholds=thresholds)
    (suspect,) = collect(fd.open_labels(out)).suspects.worst()
    assert (suspect.image.key, suspect.suggested, suspect.crops, suspect.sure) == ("class2/grey004", 0, 4, True)


def test_a_teacher_whose_calibration_error_stands_out_is_named():
    def curve(name: str, ece: float) -> Reliability:
        return Reliability(name=name, crops=(5,), mean_p_max=(0.5,), accuracy=(0.5,), ece=ece, top1=0.5)

    def named(*errors: float) -> list[str]:
        return [finding.text for finding in _calibrated_apart([curve(f"t{i}", ece) for i, ece in enumerate(errors)])]

    (text,) = named(0.057, 0.208, 0.184)
    assert text.startswith("t0 has a calibration error of 0.057, the others 0.184 to 0.208")
    assert "?temperature=T" in text
    assert len(named(0.02, 0.2)) == 1
    assert named(0.15, 0.2, 0.18) == named(0.001, 0.02) == named() == []


def test_the_list_of_doubtful_images(opened, tmp_path, hostile_labels):
    result = fd.write_report(hostile_labels, tmp_path / "report.html", csv=tmp_path / "doubtful.csv")
    with (tmp_path / "doubtful.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == result.suspects and tuple(rows[0]) == CSV_COLUMNS if rows else result.suspects == 0


def test_findings_name_what_was_planted(opened, found):
    said = {finding.section: finding for finding in findings(opened, found)}
    texts = " ".join(finding.text for finding in findings(opened, found))
    assert "1 image comes more than once, under different ground truths" in texts
    assert "1 of 32 images could not be used" in texts
    assert "near chance" in texts and said["teachers"].level in ("warning", "note")
    assert "ferkd discards them" in texts


def test_suggested_thresholds_are_in_their_order_and_fit(found):
    thresholds = suggest(found.sketch).thresholds
    assert 0 <= thresholds.low <= thresholds.mid <= thresholds.top <= 1


def sketch_of(p_max: np.ndarray, right: np.ndarray) -> Sketch:
    """Make crops with a ground truth and these values of p_max."""
    sketch = Sketch(num_classes=10, top_k=3, num_crops=1)
    sketch.crops = sketch.images = len(p_max)
    patterns = p_max.astype(np.float16).view(np.uint16)
    for row, mask in enumerate((np.ones(len(p_max), bool), np.ones(len(p_max), bool), right)):
        sketch.confidence["max"][row] = np.bincount(patterns[mask], minlength=len(FLOAT16_VALUES))
    return sketch


def test_a_suggestion_names_the_clause_that_decided_each_threshold():
    p_max = np.linspace(0.001, 0.999, 10_000)
    never = suggest(sketch_of(p_max, np.zeros(len(p_max), bool)))
    assert [clause.decided_by for clause in never.clauses] == ["cap"] * 3 and never.measured == 0
    assert [clause.value for clause in never.clauses] == pytest.approx([0.1, 0.3, 0.9], abs=0.011)
    assert "how often" not in never.summary and "not a measurement" in never.summary
    # Few crops are unsure, so that no cap is reached: wrong below 0.2, right half of the time below 0.5, then always.
    p_max = np.concatenate([np.linspace(0.01, 0.2, 50), np.linspace(0.2, 0.5, 51)[1:], np.linspace(0.5, 0.97, 900)])
    right = (p_max > 0.5) | ((p_max > 0.2) & (np.arange(len(p_max)) % 20 < 9))
    unsure = suggest(sketch_of(p_max, right))
    assert [clause.decided_by for clause in unsure.clauses] == ["accuracy", "accuracy", "cap"]
    assert "How often the teachers are right decided the first and the second; a limit" in unsure.summary
    always = suggest(sketch_of(p_max, p_max > 0.8))
    assert always.clauses[2].decided_by == "cap" and always.thresholds.top > 0.8


@pytest.mark.parametrize("classes", [2, 3])
def test_teachers_of_few_classes_that_are_always_right_are_not_near_chance(
    classes, tmp_path, make_greys, tiny_teachers
):
    name = {2: "brightness_of_two", 3: "brightness_of_three"}[classes]
    greys, out = make_greys(tmp_path / "greys", classes), tmp_path / "out"
    fd.build(greys, out, teachers=[f"python:ferkd_tiny_teachers:{name}"], crops=4, top_k=2, device="cpu")
    labels = fd.open_labels(out)
    said = [one for one in findings(labels, collect(labels)) if one.section == "teachers"]
    assert [one.level for one in said] == ["good"] and "near chance" not in said[0].text


def test_guessing_one_of_two_classes_is_near_chance_and_most_crops_right_are_not_enough(opened):
    binary = _Binary(opened)
    levels = []
    for share in (0.5, 0.7, 0.8):
        p_max = np.linspace(0.5, 1, 1000)
        found = replace(collect(opened), sketch=sketch_of(p_max, np.arange(1000) < 1000 * share))
        (said,) = _accuracy(binary, found)
        levels.append((said.level, "near chance" in said.text, "less than three quarters" in said.text))
    assert levels == [("warning", True, False), ("note", False, True), ("good", False, False)]


def test_teachers_that_guess_put_no_ground_truth_in_doubt(tmp_path, make_greys, tiny_teachers):
    """With classes in another order, nearly every image was said to have a ground truth that is surely wrong."""
    greys, out = make_greys(tmp_path / "greys", 3), tmp_path / "out"
    for old, new in (("class0", "x"), ("class1", "class0"), ("class2", "class1"), ("x", "class2")):
        (greys / old).rename(greys / new)
    fd.build(greys, out, teachers=["python:ferkd_tiny_teachers:brightness_of_three"], crops=4, top_k=2, device="cpu")
    labels = fd.open_labels(out)
    said = findings(labels, collect(labels))
    assert any("near chance" in one.text for one in said if one.level == "warning")
    assert [one.level for one in said if one.section == "suspects"] == ["note"]
    assert not any("surely wrong" in one.text for one in said)


class _Binary:
    """Stands in for a label set of two classes, of which the finding reads nothing else."""

    def __init__(self, labels: fd.LabelSet) -> None:
        self.num_classes = 2


def test_shares_are_those_of_the_crops_however_flat_the_teachers_are():
    """Rounded to three digits, thresholds of very flat teachers had no crop below them, or all."""
    p_max = np.linspace(0.0001, 0.002, 10_000)
    sketch = sketch_of(p_max, np.zeros(len(p_max), bool))
    sketch.confidence["max"][1:] = 0
    found = suggest(sketch)
    below = counts_below(sketch.confidence["max"][0], np.array([clause.value for clause in found.clauses]))
    assert (below / len(p_max)).tolist() == pytest.approx([0.01, 0.03, 0.9], abs=0.005)


def test_a_threshold_below_which_no_crop_lies_is_not_suggested():
    """Without crops, an accuracy test holds everywhere: low and mid were 1, and the next crop was discarded."""
    sure = suggest(sketch_of(np.ones(500), np.ones(500, bool)))
    assert (sure.thresholds.low, sure.thresholds.mid) == (0, 0) and sure.thresholds.top == 1
    assert [clause.decided_by for clause in sure.clauses[:2]] == ["none", "none"]
    assert "How often the teachers are right decided" not in sure.summary
    # All crops from 0.6 on, and right: nothing to discard, nothing to soften.
    high = suggest(sketch_of(np.linspace(0.6, 1, 5000), np.ones(5000, bool)))
    assert (high.thresholds.low, high.thresholds.mid) == (0, 0)


def test_classes_of_the_same_first_name_are_told_apart():
    """ImageNet has two cranes and two maillots: the report said that `crane` was confused with `crane`."""
    names = ("crane", "cat, house cat", "crane, derrick", "Crane")
    assert short_names(names) == ("crane (class 0)", "cat", "crane (class 2)", "Crane")


def test_thresholds_side_by_side(opened, found):
    suggestion = suggest(found.sketch)
    table = threshold_table(opened, found.sketch, suggestion)
    assert [row[0] for row in table.rows] == ["stored", "suggested", "ferkd-data's defaults"]
    counts = found.sketch.buckets
    expected = [f"{percent(a / found.sketch.crops)}, right {percent(r / k)}" if k else "0.0%" for a, k, r in counts.T]
    assert list(table.rows[0][2:]) == expected


def test_without_ground_truth_everything_still_works(tmp_path, make_photos, tiny_teachers):
    photos = tmp_path / "flat"
    make_photos(tmp_path / "classes", num_images=6)
    photos.mkdir()
    for photo in sorted((tmp_path / "classes").rglob("*.jpg")):
        photo.rename(photos / photo.name)
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], crops=4, top_k=2, device="cpu")
    result = fd.write_report(tmp_path / "out", tmp_path / "report.html", images=photos)
    assert (result.images, result.suspects, result.pictures) == (6, 0, "")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No ground truth is known" in text and "by shares of the crops" in text
    assert "keep their soft labels, since no ground truth is known" in text and "they get the softened" not in text


def right_on(share: float, num_images: int = 300, start: int = 0) -> ShardLabels:
    """Make labels whose most probable class is the ground truth on about this share of the crops."""
    labels = made_up(num_images, start=start)
    target = np.full(num_images, 5, np.int32)
    hit = np.random.default_rng(3).random(labels.flip.shape) < share
    index = labels.class_index.copy()
    index[..., 0] = np.where(hit, 5, 0)
    index[..., 1:] = [1, 2]
    return replace(labels, target=target, class_index=index)


def sample_of(*shards: ShardLabels) -> TemperatureSample:
    sample = TemperatureSample(6)
    for shard in shards:
        sample.add(shard, priorities(shard, 0)[0])
    return sample


@pytest.mark.parametrize("share", [0.35, 0.6, 0.75])
def test_at_the_fitted_temperature_sureness_is_accuracy(share):
    labels = right_on(share)
    fitted = sample_of(labels).fitted()
    assert fitted is not None
    prob = labels.class_prob.reshape(-1, 3)
    weight, floor = recover(prob, num_classes=6, temperature=fitted)
    right = (labels.class_index[..., 0] == 5).mean()
    assert (weight[:, 0] + floor).mean() == pytest.approx(right, abs=1e-4)
    surer = prob[:, 0].astype(float).mean() < right
    assert (fitted < 1) == surer


def test_no_temperature_from_few_crops_or_where_none_fits():
    assert sample_of(right_on(0.6, num_images=20)).fitted() is None
    assert sample_of(right_on(1.0)).fitted() is None
    assert sample_of(right_on(0.0)).fitted() is None
    assert sample_of(replace(right_on(0.6), target=np.full(300, -1, np.int32))).fitted() is None


def test_the_sample_is_bounded_and_the_same_whatever_the_order_of_shards(monkeypatch):
    monkeypatch.setattr(temperatures, "CROPS_KEPT", 1000)
    shards = [right_on(0.6, 100, start=100 * i) for i in range(5)]
    sample, other = sample_of(*shards), sample_of(*shards[::-1])
    assert len(sample._rank) == 1000
    assert sample.fitted() == pytest.approx(other.fitted(), rel=1e-6)
