"""The main job: three real ImageNet teachers label 20 real ImageNet photos."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers

import ferkd_data as fd
from ferkd_data.demo import efficientnet_lite, write_demo
from ferkd_data.evaluate import evaluate
from ferkd_data_cli.main import run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "the demo")


def test_the_demo_command(demo, capsys):
    """With few crops here; README shows the whole."""
    folder = demo.photos.parent
    assert run(["demo", str(folder), "--crops", "12"]) == 0
    printed = capsys.readouterr().out
    for part in ("0.95-1.00", "hard_positive", "ferkd-data build", "fd.open_labels", "bald eagle"):
        assert part in printed
    # The command can be copied, also where a name has a space.
    command = printed[printed.index("  ferkd-data build") : printed.index("Read the labels")].replace("\\\n", " ")
    assert shlex.split(command)[2:4] == [str(demo.photos), str(folder / "again")]
    labels = fd.open_labels(folder / "labels")
    assert len(labels) == 20 and labels.num_classes == 1000
    # Crops that show most of the photo are centre-ish: there the ensemble names the ground truth.
    right = 0
    for image in labels:
        area = image.boxes[:, 2].astype(int) * image.boxes[:, 3]
        right += int(image.class_index[area.argmax(), 0] == image.target)
    assert right >= 15
    assert labels.statistics.top1_matches_target / labels.statistics.crops > 0.6
    # Again: shown, and not labelled again.
    written = [path.stat().st_mtime_ns for path in sorted((folder / "labels").rglob("*.parquet"))]
    assert run(["demo", str(folder), "--crops", "12"]) == 0
    assert [path.stat().st_mtime_ns for path in sorted((folder / "labels").rglob("*.parquet"))] == written
    # Hours of the owner's work were replaced by a demo, without a question.
    fd.build(demo.photos, folder / "labels", extend=True, crops=24, device="cpu")
    for number in ("12", "2"):
        assert run(["demo", str(folder), "--crops", number]) == 2
        assert f"has 24 crops per image, asked for {number}" in capsys.readouterr().err
    assert run(["demo", str(folder)]) == 0
    assert "already finished: " in capsys.readouterr().out
    assert fd.open_labels(folder / "labels").num_crops == 24


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


@pytest.fixture(scope="module")
def timm_network():
    """timm's EfficientNet-Lite 0 with the pretrained weights of the demo, which come in another package."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    # The layers of both have the same order and shapes, under other names.
    weights = efficientnet_lite(0).state_dict().values()
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    return network


def test_one_pretrained_network_by_every_way_in(demo, timm_network, tmp_path):
    """An ONNX file, a checkpoint of timm's, and a folder of transformers': the same answers to real photos."""
    torch.save(timm_network.state_dict(), tmp_path / "lite0.pt")
    config = transformers.TimmWrapperConfig.from_dict(
        {
            "architecture": "tf_efficientnet_lite0",
            "num_classes": 1000,
            "label_names": [line.split("\t")[1] for line in demo.classes.read_text(encoding="utf-8").splitlines()],
            "pretrained_cfg": {**timm_network.pretrained_cfg, "mean": [127 / 255] * 3, "std": [128 / 255] * 3},
        }
    )
    wrapped = transformers.TimmWrapperForImageClassification(config).eval()
    wrapped.timm_model.load_state_dict(timm_network.state_dict())
    wrapped.save_pretrained(tmp_path / "hf")
    teachers = [
        demo.teachers[0],
        f"timm:tf_efficientnet_lite0@{tmp_path}/lite0.pt?mean=127/255&std=128/255&interpolation=bilinear",
        f"hf:timm/tf_efficientnet_lite0@{tmp_path}/hf?interpolation=bilinear",
    ]
    scores = evaluate(demo.photos, teachers=teachers, classes=demo.classes).scores
    assert {score.top1 for score in scores[:3]} == {scores[0].top1} and scores[0].top1 >= 0.8
    sets = []
    for number, teacher in enumerate(teachers):
        out = tmp_path / str(number)
        fd.build(demo.photos, out, teachers=[teacher], classes=demo.classes, crops=2, precision="fp32")
        sets.append(fd.open_labels(out))
    for first, *others in zip(*sets, strict=True):
        for other in others:
            np.testing.assert_array_equal(other.boxes, first.boxes)
            np.testing.assert_array_equal(other.class_index[:, 0], first.class_index[:, 0])
            # ONNX Runtime and PyTorch add in different orders; float16 has steps of 2 ** -11 below 1.
            np.testing.assert_allclose(other.target_prob, first.target_prob, atol=2e-3)
