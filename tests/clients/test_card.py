"""The card as its readers use it: the hub's library, datasets, mlcroissant, and every piece of code that it shows."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from label_sets import edit_manifest

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.exchange.card_facts import check_fields, completed, mark, recalled
from ferkd_data.exchange.front_matter import distinct, quoted, size_category
from ferkd_data.exchange.publish import check_number_of_files
from ferkd_data.format.manifest import BlockEntry, ShardEntry
from ferkd_data.format.manifest_file import read_manifest

CARD = fd.CardFields(
    name="tiny labels",
    license="CC-BY-4.0",
    image_license="cc0-1.0",
    author="Lab --> <b>",
    published="2026-11-24",
    source_datasets=("imagenet-1k",),
)
LAYOUTS = ["label_set", "tar_label_set"]
NAMES = ["crane", 'a "b", c: {d}', "caf\u00e9 \U0001f600", "\x7f\u2028", "- x", "crane", "null", "1", "'", "a|b"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=LAYOUTS)
def published(request, tmp_path):
    """A published label set with class names of every kind, pulled into `labels` as its card says."""
    folder = shutil.copytree(request.getfixturevalue(request.param), tmp_path / "set")
    edit_manifest(folder, lambda content: content.update(class_names=NAMES))
    fd.publish(folder, str(tmp_path / "public"), card=CARD)
    fd.pull(str(tmp_path / "public"), tmp_path / "labels")
    return tmp_path / "labels"


def front(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("\n---\n")[0].removeprefix("---"))


def test_the_hubs_library_reads_it(published):
    from huggingface_hub import DatasetCard

    card = DatasetCard((published / "README.md").read_text())
    content = card.data.to_dict()
    assert content == front(published)
    assert (content["license"], content["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert content["source_datasets"] == ["imagenet-1k"]
    assert "https://arxiv.org/abs/2312.17473" in card.text and "| `class_index` |" in card.text.replace(".npy", "")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_datasets_loads_every_configuration_with_class_names(published, tmp_path, streaming):
    import datasets

    ours = list(fd.open_labels(published))
    for config in front(published)["configs"]:
        name = config["config_name"]
        place = str(tmp_path / f"hf-{streaming}")
        rows = datasets.load_dataset(str(published), name, split="train", streaming=streaming, cache_dir=place)
        target = "cls" if "cls" in rows.features else "target"
        assert rows.features[target].names == distinct(tuple(NAMES))
        found = list(rows)
        assert [row[target] for row in found] == [image.target for image in ours]
        index = [row["class_index" if target == "target" else "class_index.npy"] for row in found]
        first = int(name.rpartition("-")[2]) * 4 if target == "target" else 0
        for row, image in zip(index, ours, strict=True):
            values = np.array(row).reshape(-1, image.class_index.shape[1])
            assert np.array_equal(values, image.class_index[first : first + len(values)])


def test_images_of_several_formats_and_unlabelled_ones_load_by_the_card(tmp_path, tiny_teachers):
    """Without the features that the card gives, datasets refuses samples of other members than the first."""
    import datasets
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.jpg", "d.webp")):
        Image.new("RGB", (30, 20 + number), "red").save(photos / name)
    fd.build(photos, tmp_path / "set", teachers=[tiny_teachers], crops=3, layout="webdataset", device="cpu")
    fd.publish(tmp_path / "set", str(tmp_path / "public"), card=CARD)
    rows = datasets.load_dataset(str(tmp_path / "public"), split="train", cache_dir=str(tmp_path / "hf"))
    assert "cls" not in rows.features
    pictures = [[row[suffix] for suffix in ("png", "jpg", "webp") if row[suffix] is not None] for row in rows]
    assert [[picture.size for picture in found] for found in pictures] == [[(30, 20 + number)] for number in range(4)]
    assert "No image has a ground truth" in (tmp_path / "public/README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_every_piece_of_code_runs(published, photos, monkeypatch, capsys):
    """In a folder into which the label set was pulled, with a model and images."""
    import torch

    monkeypatch.chdir(published.parent)
    text = (published / "README.md").read_text()
    pieces = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    libraries = [re.search(r"^import (\w+)", piece, re.MULTILINE).group(1) for piece in pieces]
    tables = ["duckdb", "polars"] if "labels only" in text else ["json"]
    assert libraries == ["ferkd_data", "datasets", *tables]
    for piece in pieces:
        code = piece.replace("PATH/OR/URL", "labels").replace("your/images", str(photos)).replace("size=224", "size=32")
        code = code.replace("batch_size=256", "batch_size=8")
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
        names = {"model": model}
        exec(code, names)
        assert names.get("loss", torch.ones(())).isfinite()
        assert names.get("boxes", np.zeros((10, 4))).shape == (10, 4)
    assert "first_crop_target_prob" in capsys.readouterr().out or "json" in tables


@pytest.mark.filterwarnings("ignore")
def test_mlcroissant_validates_it(published):
    import mlcroissant

    dataset = mlcroissant.Dataset(jsonld=str(published.parent / "public/croissant.json"))
    assert not dataset.metadata.ctx.issues.errors and not dataset.metadata.ctx.issues.warnings
    assert dataset.metadata.conforms_to == ["http://mlcommons.org/croissant/1.1"]


def test_a_card_counts_the_crops_of_each_class(published):
    text = (published / "README.md").read_text()
    labels = list(fd.open_labels(published))
    for index in {image.target for image in labels}:
        images = sum(image.target == index for image in labels)
        assert re.search(rf"^\| {index} \| `.*` \| {images} \| {images * 10} \|$", text, re.MULTILINE)
    assert "Published by Lab --> <b>." in text and text.splitlines()[-1].count("-->") == 1


def test_publishing_again_keeps_what_is_not_given_anew(label_set, tar_label_set, tmp_path):
    place = str(tmp_path / "public")
    first = fd.CardFields(name="N", license="mit", author="A", citation="C", homepage="x.org", published="2020-01-02")
    fd.publish(label_set, place, card=first)
    before = (tmp_path / "public/README.md").read_bytes()
    assert not fd.publish(label_set, place).sent and (tmp_path / "public/README.md").read_bytes() == before
    fd.publish(label_set, place, card=fd.CardFields(author="B"))
    assert recalled((tmp_path / "public/README.md").read_text())[0] == fd.CardFields(**{**vars(first), "author": "B"})
    other = fd.CardFields(image_license="cc0-1.0")
    fd.publish(tar_label_set, place, card=other, overwrite=True)
    kept, identity = recalled((tmp_path / "public/README.md").read_text())
    assert (kept.name, kept.author, kept.citation, kept.license) == ("N", "B", "C", "mit")
    assert identity == fd.open_labels(tar_label_set).identity and kept.published != "2020-01-02"
    assert kept.homepage == "x.org"


def test_a_part_has_its_own_card(published, tmp_path):
    options = {"shards": [1]} if list(published.glob("shards")) else {"crops": 4, "shards": [0, 1]}
    part = fd.pull(str(tmp_path / "public"), tmp_path / "part", **options)
    text = (tmp_path / "part/README.md").read_text()
    said = front(tmp_path / "part")
    assert "**This is a part of a larger label set**" in text
    assert f"for each of {part.manifest.num_images} images" in text
    assert recalled(text)[0] == recalled((published / "README.md").read_text())[0]
    for config in said["configs"]:
        for pattern in config["data_files"]:
            assert list((tmp_path / "part").glob(pattern)), pattern
    files = [file.path for shard in part.manifest.shards for file in shard.files]
    assert len(said["configs"]) == part.manifest.num_blocks and f"{len(files)} shard file" in text
    assert fd.verify(tmp_path / "part").ok
    again = fd.publish(tmp_path / "part", str(tmp_path / "public2"))
    assert "README.md" in [file.name for file in again.sent]


def test_a_part_of_a_set_with_its_publishers_own_words(label_set, tmp_path):
    own = shutil.copytree(label_set, tmp_path / "own")
    (own / "README.md").write_text("our own words about 10 crops")
    fd.pull(str(own), tmp_path / "part", crops=4)
    text = (tmp_path / "part/README.md").read_text()
    assert "our own words" not in text and "see the card of" in text and "4 crops for each" in text


@pytest.mark.parametrize(
    "number, category",
    [(0, "n<1K"), (1_000, "1K<n<10K"), (14 * 10**6, "10M<n<100M"), (10**9, "1B<n<10B"), (10**12, "n>1T")],
)
def test_sizes_up_to_billions(number, category):
    assert size_category(number) == category


@pytest.mark.parametrize("text", [*NAMES, "a\nb", "---", "\ufeff", "\x00\x1f\x85\ufffe", "#", "\\"])
def test_any_text_is_a_yaml_string(text):
    assert yaml.safe_load(f"x: {quoted(text)}") == {"x": text}


def test_what_a_card_remembers_comes_back():
    fields = fd.CardFields(name="a --> b <!-- c", license="mit", citation="x\ny", source_datasets=("a", "b"))
    assert recalled(f"# title\n{mark(fields, 'f' * 64, '# title')}\n") == (fields, "f" * 64)
    for text in ("", "# words", "<!-- ferkd-data card {} -->", "<!-- ferkd-data card {[}] -->"):
        assert recalled(text) == (fd.CardFields(), None)
    hostile = '<!-- ferkd-data card {"name": 3, "license": ["x"], "source_datasets": [1], "nonsense": 1} -->'
    assert recalled(hostile) == (fd.CardFields(), None)


def test_another_licence_needs_a_name_and_a_place():
    manifest = SimpleNamespace(layout="parquet")
    for wrong in ({}, {"license_name": "My Licence"}):
        with pytest.raises(UsageError, match="--license-name"):
            check_fields(fd.CardFields(license="other", **wrong), manifest)
    named = fd.CardFields(license="other", license_name="my-licence")
    check_fields(named, manifest)
    with pytest.raises(UsageError, match="--license-link"):
        check_fields(named, manifest, has_license_file=False)


def test_another_licence_in_the_card_with_its_file(label_set, tmp_path):
    folder = shutil.copytree(label_set, tmp_path / "set")
    (folder / "LICENSE").write_text("Do good.")
    fields = fd.CardFields(license="other", license_name="good-1.0")
    fd.publish(folder, str(tmp_path / "public"), card=fields)
    said = front(tmp_path / "public")
    assert (said["license"], said["license_name"], said["license_link"]) == ("other", "good-1.0", "LICENSE")
    assert (tmp_path / "public/LICENSE").read_text() == "Do good."


def test_the_day_stays_while_the_label_set_is_the_same():
    card = mark(fd.CardFields(license="mit", published="2020-01-02"), "a", "")
    assert completed(fd.CardFields(), [card], identity="a", folder_name="x").published == "2020-01-02"
    assert completed(fd.CardFields(), [card], identity="b", folder_name="x").published > "2026"


@pytest.mark.parametrize("shards, blocks, match", [(30_000, 4, "120,000: .*--crops-per-block 200 .*images-per-shard"),
                                                   (2_000, 12, r"labels/ has 24,000: .*--crops-per-block 200"),
                                                   (2_000, 4, None)])  # fmt: skip
def test_more_files_than_the_hub_takes_are_refused_before_anything_is_sent(label_set, shards, blocks, match):
    manifest = read_manifest(label_set)
    entries = tuple(
        ShardEntry(
            index=number,
            rows=1,
            files=tuple(
                BlockEntry(path=f"labels/{number}-{block}.parquet", block=block, bytes=1, sha256="0" * 64)
                for block in range(blocks)
            ),
        )
        for number in range(shards)
    )
    manifest = manifest.model_copy(update={"shards": entries, "num_crops": 200, "crops_per_block": -(-200 // blocks)})
    if match is None:
        check_number_of_files(manifest)
        return
    with pytest.raises(UsageError, match=match):
        check_number_of_files(manifest)
