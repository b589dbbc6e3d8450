"""Import of ReLabel's label maps, written here as its authors' files are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

import ferkd_data as fd
from ferkd_data.crops import CropDistribution, draw_crops
from ferkd_data.errors import ForeignFileError, UsageError
from ferkd_data.importers.relabel_maps import RelabelMaps, pooled
from ferkd_data_cli.main import run

CLASSES = 10


def label_map(seed: int, classes: int = CLASSES) -> torch.Tensor:
    """(2, 5, 15, 15): at each place five different classes with their scores, the best first."""
    generator = torch.Generator().manual_seed(seed)
    scores, index = (torch.randn(15, 15, classes, generator=generator) * 4).topk(5)
    return torch.stack([scores, index.float()]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture
def maps(photos, tmp_path):
    """A map for each of the 20 photos."""
    folder = tmp_path / "relabel"
    for number, photo in enumerate(sorted(photos.rglob("*.jpg"))):
        path = folder / photo.relative_to(photos).with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(label_map(number), path)
    return folder


def pooled_densely(whole: torch.Tensor, box: list[int], height: int, width: int, classes: int) -> torch.Tensor:
    """The authors' arithmetic, written anew: a dense map of all classes, one box."""
    dense = torch.zeros(classes, 15, 15)
    for place in range(5):
        for y in range(15):
            for x in range(15):
                dense[int(whole[1, place, y, x]), y, x] = whole[0, place, y, x]
    top, left, box_height, box_width = box
    ends = [top / height, left / width, (top + box_height) / height, (left + box_width) / width]
    region = torch.tensor([[0.0, *(15 * end - 0.5 for end in ends)]])
    return roi_align(dense[None], region, output_size=(1, 1)).flatten().softmax(dim=0)


@pytest.mark.parametrize("classes", [10, 1000])
def test_labels_are_what_the_authors_compute(classes):
    crops = draw_crops("a", 48, 64, seed=3, count=12, distribution=CropDistribution())
    whole = label_map(5, classes)
    ours = pooled(whole[0].numpy(), whole[1].numpy().astype(np.int64), crops.boxes, 48, 64, num_classes=classes)
    for n, box in enumerate(crops.boxes.tolist()):
        theirs = pooled_densely(whole, box, 48, 64, classes)
        assert np.abs(ours[n] - theirs.numpy()).max() < 1e-6


def test_a_label_set_without_a_teacher(maps, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))
    manifest = fd.import_relabel(maps, tmp_path / "out", images=photos, crops=6, top_k=4, num_classes=CLASSES, seed=2)
    assert (manifest.num_images, manifest.num_crops, manifest.top_k, manifest.seed) == (20, 6, 4, 2)
    assert fd.verify(tmp_path / "out", images=photos).ok
    fd.publish(tmp_path / "out", str(tmp_path / "public"), card=fd.CardFields(license="mit"))
    card = (tmp_path / "public/README.md").read_text()
    assert ", seed 2; in blocks" in card and "drawn elsewhere" not in card and "another tool" not in card
    for row in fd.open_labels(tmp_path / "out"):
        drawn = draw_crops(row.key, row.height, row.width, seed=2, count=6, distribution=CropDistribution())
        assert np.array_equal(row.boxes, drawn.boxes) and np.array_equal(row.flip, drawn.flip)
        whole = torch.load(maps / f"{row.key}.pt")
        theirs = pooled_densely(whole, row.boxes[0].tolist(), row.height, row.width, CLASSES)
        assert np.allclose(row.class_prob[0], theirs.sort(descending=True).values[:4].numpy(), atol=1e-3)


def test_the_command_says_what_it_did(maps, photos, tmp_path, capsys):
    command = ["convert", str(maps), str(tmp_path / "out"), "--from", "relabel", "--images", str(photos)]
    assert run([*command, "--crops", "3", "--num-classes", str(CLASSES)]) == 0
    assert "20 images with 3 crops" in capsys.readouterr().out


def test_an_image_without_a_map_is_a_reject(maps, photos, tmp_path):
    next(maps.rglob("*.pt")).unlink()
    manifest = fd.import_relabel(maps, tmp_path / "out", images=photos, crops=2, num_classes=CLASSES)
    assert (manifest.num_images, manifest.rejects.rows) == (19, 1)


@pytest.mark.parametrize(
    "content, said",
    [
        (torch.zeros(2, 5, 15), "shape"),
        (torch.zeros(3, 5, 15, 15), "shape"),
        (torch.zeros(2, 5, 15, 14), "not square"),
        (torch.full((2, 5, 15, 15), float("nan")), "not finite"),
        (torch.full((2, 5, 15, 15), 10.0), "classes 10 to 10 of 10"),
        (torch.full((2, 5, 15, 15), 0.5), "classes 0.5"),
        ({"a": 1}, "is dict"),
    ],
)
def test_what_is_no_label_map_is_an_error(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pt")
    files = RelabelMaps(folder=tmp_path, num_classes=CLASSES, top_k=5, crops=2, seed=0, drawn=CropDistribution())
    with pytest.raises(ForeignFileError, match=said):
        files.read("a", (48, 64))


def test_more_classes_than_there_are(maps, photos, tmp_path):
    with pytest.raises(UsageError, match="top_k 11"):
        fd.import_relabel(maps, tmp_path / "out", images=photos, num_classes=CLASSES, top_k=11)
