"""The main job: three real ImageNet teachers label 20 real ImageNet photos."""

from __future__ import annotations

from pathlib import Path

import pytest

import ferkd_data as fd
from ferkd_data.demo import write_demo
from ferkd_data.evaluate import evaluate
from ferkd_data_cli.main import run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo"))


def test_the_demo_command(demo, capsys):
    """With few crops here; README shows the whole."""
    folder = demo.photos.parent
    assert run(["demo", str(folder), "--crops", "12"]) == 0
    printed = capsys.readouterr().out
    for part in ("0.95-1.00", "hard_positive", "ferkd-data build", "fd.open_labels", "bald eagle"):
        assert part in printed
    labels = fd.open_labels(folder / "labels")
    assert len(labels) == 20 and labels.num_classes == 1000
    # Crops that show most of the photo are centre-ish: there the ensemble names the ground truth.
    right = 0
    for image in labels:
        area = image.boxes[:, 2].astype(int) * image.boxes[:, 3]
        right += int(image.class_index[area.argmax(), 0] == image.target)
    assert right >= 15
    assert labels.statistics.top1_matches_target / labels.statistics.crops > 0.6
    assert run(["demo", str(folder), "--crops", "2"]) == 0
    assert fd.open_labels(folder / "labels").num_crops == 2


def test_evaluate_finds_a_wrong_normalisation(demo):
    right = demo.teachers[0]
    wrong = f"{right}?mean=0&std=1/255"
    result = evaluate(demo.photos, teachers=[right, wrong], classes=demo.classes)
    good, bad, ensemble = result.scores
    assert good.top1 >= 0.8 and good.top5 >= 0.9 and bad.top1 <= 0.5
    assert ensemble.images == 20
    assert not any(warning.startswith(f"{good.name}:") for warning in result.warnings)
    about_bad = [warning for warning in result.warnings if warning.startswith(bad.name)]
    assert any("is its normalisation wrong?" in warning for warning in about_bad)


def test_the_demo_finds_its_material_only_in_packages(demo):
    assert all(Path(spec.removeprefix("onnx:")).exists() for spec in demo.teachers)
    assert len(demo.classes.read_text().splitlines()) == 1000
