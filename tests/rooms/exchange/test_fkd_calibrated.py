"""Calibrated targets in FKD's files: what FKD's training script recovers from them is what `CropLoader` gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ferkd_data as fd
from ferkd_data.calibration import calibrate, crop_buckets
from ferkd_data.errors import UsageError
from ferkd_data_cli.main import run

CLASSES = 10
MIXED = fd.Calibration(thresholds=fd.Thresholds(low=0.4, mid=0.6, top=0.9))
CALIBRATIONS = {
    "fkd": fd.Calibration.fkd(),
    "ferkd": fd.Calibration.ferkd(),
    "many hard crops": MIXED,
    "temperature": fd.Calibration(thresholds=MIXED.thresholds, temperature=2.0, epsilon=0.3),
    "renorm": fd.Calibration(thresholds=MIXED.thresholds, recovery="renorm"),
    "blend": fd.Calibration(thresholds=MIXED.thresholds, moderate_hard="blend"),
}


def recovered(labels, num_classes=CLASSES):
    """FKD's `marginal_smoothing_kK`: the rest of the mass goes evenly to the classes that are not listed."""
    index, value = labels[:, 0].long(), labels[:, 1]
    rest = (1 - value.sum(dim=1, keepdim=True)) / (num_classes - index.shape[1])
    return (rest * torch.ones(len(index), num_classes)).scatter_(1, index, value)


def expected(row, calibration):
    """Crops that are not discarded and their dense targets; all of them where none is left."""
    codes = crop_buckets(calibration, row.bucket, row.class_prob, row.target_prob)
    used = np.flatnonzero(codes > 0) if calibration.extreme_hard == "discard" else np.arange(len(codes))
    crops = used if len(used) else np.arange(len(codes))
    targets = calibrate(
        calibration,
        class_index=row.class_index[crops],
        class_prob=row.class_prob[crops],
        codes=codes[crops],
        target=np.full(len(crops), row.target),
        num_classes=CLASSES,
    )
    return crops, targets.dense()


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_fkds_script_sees_the_calibrated_targets(label_set, tmp_path, name):
    calibration = CALIBRATIONS[name]
    assert fd.export_fkd(label_set, tmp_path / "fkd", calibration=calibration, min_crops=1) == "marginal_smoothing_k5"
    left_out = softened = 0
    for row in fd.open_labels(label_set):
        coords, flip, labels = torch.load(tmp_path / "fkd" / f"{row.key}.tar")
        crops, dense = expected(row, calibration)
        assert labels.shape == (len(crops), 2, 5) and labels.dtype == torch.float32
        assert torch.equal(flip, torch.from_numpy(row.flip[crops]))
        size = np.array([row.height, row.width] * 2)
        assert np.array_equal(np.rint(coords.numpy() * size), row.boxes[crops])
        assert (recovered(labels) - dense).abs().max() < 2e-7
        assert all(len(set(crop)) == 5 for crop in labels[:, 0].long().tolist())
        left_out += len(row.flip) - len(crops)
        softened += int((dense.max(dim=1).values == np.float32(1 - calibration.epsilon)).sum())
    if name == "many hard crops":
        assert left_out > 3 and softened > 3
    if name == "fkd":
        assert left_out == softened == 0


def test_an_image_has_as_many_crops_as_fkds_script_draws(label_set, tmp_path):
    harsh = fd.Calibration(thresholds=fd.Thresholds(low=0.97, mid=0.98, top=0.99))
    fd.export_fkd(label_set, tmp_path / "fkd", calibration=harsh, min_crops=7)
    numbers = set()
    for row in fd.open_labels(label_set):
        _, _, labels = torch.load(tmp_path / "fkd" / f"{row.key}.tar")
        crops, dense = expected(row, harsh)
        numbers.add(len(crops))
        assert len(labels) == max(len(crops), 7)
        again = np.resize(np.arange(len(crops)), len(labels))
        assert (recovered(labels) - dense[again]).abs().max() < 2e-7
    assert min(numbers) < 7


def test_thinned_out_crops_are_the_same_in_every_export(label_set, tmp_path):
    thin = fd.Calibration(easy_positive="thin(0.5)", thresholds=fd.Thresholds(low=0, mid=0, top=0))
    counts = []
    for name in ("a", "b"):
        fd.export_fkd(label_set, tmp_path / name, calibration=thin, min_crops=1)
        files = sorted((tmp_path / name).rglob("*.tar"))
        counts.append([len(torch.load(path)[2]) for path in files])
    assert counts[0] == counts[1] and 60 < sum(counts[0]) < 140


def test_what_fkds_files_cannot_hold_is_refused(label_set, photos, tiny_teachers, tmp_path):
    fd.build(photos, tmp_path / "whole", teachers=[tiny_teachers], crops=2, top_k=10, device="cpu")
    with pytest.raises(UsageError, match=r"hold 5 or 10 classes of a crop, .* have 10 of 10"):
        fd.export_fkd(tmp_path / "whole", tmp_path / "out", calibration=fd.Calibration())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["fkd", "ferkd", "blend"])
def test_every_preset_of_the_command_is_exported(preset, label_set, tmp_path, capsys):
    command = ["convert", str(label_set), str(tmp_path / "fkd"), "--to", "fkd", "--calibration", preset]
    assert run(command) == 0
    assert "run it with --soft_label_type marginal_smoothing_k" in capsys.readouterr().out
    fd.export_fkd(label_set, tmp_path / "same", calibration=getattr(fd.Calibration, preset)())
    names = sorted(path.relative_to(tmp_path / "fkd") for path in (tmp_path / "fkd").rglob("*.tar"))
    assert names
    for name in names:
        by_command, by_function = torch.load(tmp_path / "fkd" / name), torch.load(tmp_path / "same" / name)
        torch.testing.assert_close(by_command, by_function, rtol=0, atol=0)


def test_the_command(label_set, tmp_path, capsys):
    command = ["convert", str(label_set), str(tmp_path / "fkd"), "--to", "fkd", "--calibration", "ferkd"]
    for _ in range(2):
        assert run(command) == 0
        assert "run it with --soft_label_type marginal_smoothing_k5" in capsys.readouterr().out
    assert run([*command[:-1], "fkd"]) == 2
    assert "an interrupted command with other settings" not in capsys.readouterr().out
    assert run(["convert", str(label_set), str(tmp_path / "x"), "--layout", "parquet", "--calibration", "fkd"]) == 2
    assert "--calibration is for --to fkd" in capsys.readouterr().err
