"""Import of Dataset Reinforcement's files, written here as its generator writes them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

import ferkd_data as fd
from ferkd_data.errors import ForeignFileError, UsageError
from ferkd_data.importers.dataset_reinforcement import image_folder_ids, listed_ids
from ferkd_data_cli.main import run

CONFIG = {
    "dataset": "imagenet",
    "num_classes": 10,
    "gpu": None,
    "teacher": {"timm_ensemble": True, "name": "big,bigger"},
    "reinforce": {
        "num_samples": 10,
        "topk": 4,
        "compress": True,
        "image_augmentation": {
            "uint8": {"enable": True},
            "random_resized_crop": {"enable": True, "size": 32},
            "random_horizontal_flip": {"enable": True, "p": 0.5},
            "to_tensor": {"enable": True},
            "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        },
    },
}


def params_of(row, crop, compress):
    box, flip = tuple(row.boxes[crop].tolist()), bool(row.flip[crop])
    if compress:
        return [box, flip]
    other = (1, 2, 3, 4), not flip
    return {
        "random_horizontal_flip": (flip, other[1]),
        "normalize": ((), ()),
        "uint8": ((), ()),
        "random_resized_crop": (box, other[0]),
        "to_tensor": ((), ()),
    }


def dr_files(folder, labels, photos, compress=True, change=None):
    """Each image's file under its number in ImageFolder; probabilities in no order, as `argpartition` leaves them."""
    folder.mkdir()
    for number, (file, _) in enumerate(ImageFolder(str(photos)).samples):
        row = labels["/".join(file.split("/")[-2:]).removesuffix(".jpg")]
        samples = []
        for crop in range(len(row.flip)):
            prob = (row.class_prob[crop][::-1].tolist(), row.class_index[crop][::-1].tolist())
            samples.append({"params": params_of(row, crop, compress), "prob": prob})
        content = (number, samples)
        if change:
            content = change(content)
        torch.save(content, folder / f"{number}.pth.tar", pickle_protocol=4)
    torch.save(CONFIG, folder / "config.pth.tar")
    return folder


@pytest.mark.parametrize("compress", [True, False])
def test_crops_and_labels_come_over_exactly(label_set, photos, tmp_path, compress):
    ours = fd.open_labels(label_set)
    files = dr_files(tmp_path / "dr", ours, photos, compress)
    manifest = fd.import_dr(files, tmp_path / "out", images=photos, images_per_shard=8)
    assert (manifest.num_images, manifest.num_crops, manifest.top_k, manifest.num_classes) == (20, 10, 4, 10)
    assert [(teacher.name, teacher.size) for teacher in manifest.teachers] == [("big", 32), ("bigger", 32)]
    assert (manifest.crop_distribution.scale, manifest.crop_distribution.hflip) == ((0.08, 1.0), 0.5)
    assert fd.verify(tmp_path / "out", images=photos).ok
    for mine, theirs in zip(ours.shards(), fd.open_labels(tmp_path / "out").shards(), strict=True):
        assert list(mine.keys) == list(theirs.keys)
        for name in ("boxes", "flip", "class_index", "class_prob", "image_digest", "target"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name


def test_ids_from_a_list_of_keys(label_set, photos, tmp_path):
    files = dr_files(tmp_path / "dr", fd.open_labels(label_set), photos)
    keys = list(image_folder_ids(photos, files))
    assert keys == sorted(keys) and len(keys) == 20
    (files / "3.pth.tar").unlink()
    with pytest.raises(UsageError, match=r"has files for 19 images, .* has 20; an ID is"):
        fd.import_dr(files, tmp_path / "out", images=photos)
    (tmp_path / "keys.txt").write_text("\n".join(keys) + "\n")
    manifest = fd.import_dr(files, tmp_path / "out", images=photos, ids=tmp_path / "keys.txt")
    assert (manifest.num_images, manifest.rejects.rows) == (19, 1)
    assert fd.verify(tmp_path / "out").ok
    (tmp_path / "keys.txt").write_text("a\na\n")
    with pytest.raises(UsageError, match="names a key twice"):
        fd.import_dr(files, tmp_path / "other", images=photos, ids=tmp_path / "keys.txt")
    with pytest.raises(UsageError, match="only a folder of class folders numbers its images"):
        fd.import_dr(files, tmp_path / "other", images=photos / "class0")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rand_augment", "saw other colours"),
        ("random_erase", "with a hole in it"),
        ("mixup", "two images mixed"),
        ("cutmix", "two images mixed"),
        ("random_crop", "reach over the image's edge"),
        ("resize", "pixels of the resized image"),
        ("posterize_twice", "not known here"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(label_set, photos, tmp_path, name, why):
    files = dr_files(tmp_path / "dr", fd.open_labels(label_set), photos)
    config = copy.deepcopy(CONFIG)
    config["reinforce"]["image_augmentation"][name] = {"enable": True, "p": 0.5}
    torch.save(config, files / "config.pth.tar")
    with pytest.raises(UsageError, match=rf"went through '{name}': .*{why}.*crops and flips alone"):
        fd.import_dr(files, tmp_path / "out", images=photos)
    assert not (tmp_path / "out").exists()
    config["reinforce"]["image_augmentation"][name]["enable"] = False
    torch.save(config, files / "config.pth.tar")
    assert fd.import_dr(files, tmp_path / "out", images=photos).num_images == 20


DAMAGES = {
    "of another image": lambda content: (content[0] + 1, content[1]),
    "no samples": lambda content: (content[0], []),
    "mixed after all": lambda content: (
        content[0],
        [{**s, "params": {**s["params"], "mixup": 0.3}} for s in content[1]],
    ),
    "without probabilities": lambda content: (content[0], [{"params": s["params"]} for s in content[1]]),
    "a class too many": lambda content: (content[0], [{**s, "prob": ([0.5] * 4, [1, 2, 3, 10])} for s in content[1]]),
    "more than 1": lambda content: (content[0], [{**s, "prob": ([0.5] * 4, [1, 2, 3, 4])} for s in content[1]]),
    "negative": lambda content: (content[0], [{**s, "prob": ([0.5, -1, 0, 0], [1, 2, 3, 4])} for s in content[1]]),
    "not finite": lambda content: (content[0], [{**s, "prob": ([float("nan")] * 4, [1, 2, 3, 4])} for s in content[1]]),
    "text": lambda content: (content[0], "crops"),
    "one sample shorter": lambda content: (content[0], [{**content[1][0], "prob": ([0.5], [1])}, *content[1][1:]]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_cannot_be_right(label_set, photos, tmp_path, damage):
    labels = fd.open_labels(label_set)
    files = dr_files(tmp_path / "dr", labels, photos, compress=False, change=DAMAGES[damage])
    with pytest.raises(UsageError, match=r"FOLDER/ID\.pth\.tar is expected; the first: class0/photo0000: "):
        fd.import_dr(files, tmp_path / "out", images=photos)


def test_a_crop_outside_the_image_and_params_too_many(label_set, photos, tmp_path):
    files = dr_files(tmp_path / "dr", fd.open_labels(label_set), photos)
    crops = [{"params": [(0, 0, 40, 70), False], "prob": ([0.5, 0.2, 0.1, 0.1], [1, 2, 3, 4])}] * 10
    torch.save((4, crops), files / "4.pth.tar")
    torch.save((5, [{**crop, "params": [None, *crop["params"]]} for crop in crops]), files / "5.pth.tar")
    manifest = fd.import_dr(files, tmp_path / "out", images=photos)
    assert (manifest.num_images, manifest.rejects.rows) == (18, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["reinforce"].pop("image_augmentation"), ForeignFileError, "no reinforce.image_augmentation"),
        (lambda c: c["reinforce"]["image_augmentation"].pop("random_resized_crop"), UsageError, "no crops to replay"),
        (lambda c: c.pop("num_classes"), UsageError, "how many classes"),
        (
            lambda c: c["reinforce"]["image_augmentation"]["random_resized_crop"].update(scale=[0, "x"]),
            ForeignFileError,
            "settings of crops or teachers",
        ),
        (lambda c: c.update(teacher=7), ForeignFileError, "settings of crops or teachers"),
    ],
)
def test_configurations_that_cannot_be_right(label_set, photos, tmp_path, change, error, message):
    files = dr_files(tmp_path / "dr", fd.open_labels(label_set), photos)
    config = copy.deepcopy(CONFIG)
    change(config)
    torch.save(config, files / "config.pth.tar")
    with pytest.raises(error, match=message):
        fd.import_dr(files, tmp_path / "out", images=photos)


def test_no_configuration_or_joblib(label_set, photos, tmp_path):
    files = dr_files(tmp_path / "dr", fd.open_labels(label_set), photos)
    (files / "config.pth.tar").unlink()
    with pytest.raises(UsageError, match=r"no config\.pth\.tar"):
        fd.import_dr(files, tmp_path / "out", images=photos)
    (files / "0.jb").touch()
    with pytest.raises(UsageError, match=r"0\.jb is of joblib"):
        fd.import_dr(files, tmp_path / "out", images=photos)


def test_the_command(label_set, photos, tmp_path, capsys):
    files = dr_files(tmp_path / "dr", fd.open_labels(label_set), photos)
    command = ["convert", str(files), str(tmp_path / "out"), "--from", "dr"]
    assert run(command) == 2
    assert "--from dr needs --images" in capsys.readouterr().err
    assert run([*command, "--images", str(photos), "--teacher", "mine"]) == 0
    said = capsys.readouterr().out
    assert "20 images with 10 crops" in said and "the ground truth is the most probable class of" in said
    assert [teacher.name for teacher in fd.open_labels(tmp_path / "out").manifest.teachers] == ["mine"]


def test_a_line_of_the_list_of_keys_ends_at_its_newline_alone(tmp_path):
    (tmp_path / "ids.txt").write_bytes("a/1\r\nodd\u2028name\nb/2\n".encode())
    assert listed_ids(tmp_path / "ids.txt") == {"a/1": 0, "odd\u2028name": 1, "b/2": 2}
