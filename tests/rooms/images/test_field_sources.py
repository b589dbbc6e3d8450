"""Sources as they occur in practice: every file is used, rejected or counted, and nothing is guessed in silence."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ferkd_data.errors import SourceError
from ferkd_data.images import ImageRef, Reject, describe_left_out, open_source, read_class_list
from ferkd_data.images.file_kinds import skip_reason, split_of_file, split_of_folder


def jpeg(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "JPEG")
    return buffer.getvalue()


def put(root, *names, data=None):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg() if data is None else data)


def listed(source):
    return {item.key: item.target for item in source.list_images() if isinstance(item, ImageRef)}


def test_jpegs_under_any_name_are_taken(tmp_path):
    put(tmp_path, "a/1.jfif", "a/2.JPE", "a/3", "b/4.jpg_large", "b/5.jpeg!d", "b/6.JPEG", "b/7.jif")
    put(tmp_path, "c/8.png", data=jpeg())
    source = open_source(tmp_path)
    assert listed(source) == {"a/1": 0, "a/2": 0, "a/3": 0, "b/4": 1, "b/5": 1, "b/6": 1, "b/7": 1, "c/8": 2}
    assert not source.left_out.counts


SYSTEM_FILES = (
    "._1.jpg",
    ".DS_Store",
    "Thumbs.db",
    "DESKTOP.INI",
    "@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg",
    ".ipynb_checkpoints/1-checkpoint.jpg",
    "__MACOSX/._1.jpg",
    "lost+found/1.jpg",
)


@pytest.mark.parametrize("name", SYSTEM_FILES)
@pytest.mark.parametrize("where", ["", "a/", "a/deeper/"])
def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path, name, where):
    put(tmp_path, "a/1.jpg", "a/deeper/3.jpg", "b/2.jpg", f"{where}{name}")
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b")
    assert listed(source) == {"a/1": 0, "a/deeper/3": 0, "b/2": 1}
    assert source.left_out.counts == {"system": 1}
    assert describe_left_out(source.left_out.counts) == ["1 system file"]


def test_folders_without_images_are_no_classes_and_are_counted(tmp_path):
    put(tmp_path, "a/1.jpg", "c/2.jpg")
    put(tmp_path, "notes/readme.txt", "a/labels.xml", "top.csv", "a/data", "c/.hidden.jpg", data=b"text of some length")
    (tmp_path / "b/empty").mkdir(parents=True)
    source = open_source(tmp_path)
    assert source.class_names == ("a", "c") and listed(source) == {"a/1": 0, "c/2": 1}
    assert source.left_out.counts == {"empty_folder": 2, ".txt": 1, ".xml": 1, ".csv": 1, "no_image": 1, "hidden": 1}
    assert describe_left_out(source.left_out.counts)[0] == "2 folders without images"


@pytest.mark.parametrize(
    "names", [("train", "val"), ("Train", "Validation", "TEST"), ("train2017", "val2017"), ("train",)]
)
def test_a_root_of_splits_is_asked_about(tmp_path, names):
    for name in names:
        put(tmp_path, f"{name}/cat/1.jpg", f"{name}/dog/2.jpg")
    with pytest.raises(SourceError, match=rf"splits of a data set.*give one of them: .*/{sorted(names)[0]}"):
        open_source(tmp_path)
    assert open_source(tmp_path / names[0]).class_names == ("cat", "dog")


def test_splits_beside_other_folders_are_asked_about_too(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "test/2.jpg", "samples/3.jpg")
    with pytest.raises(SourceError, match="look like the splits"):
        open_source(tmp_path)


def test_a_class_that_is_called_train(tmp_path):
    put(tmp_path, "train/1.jpg", "car/2.jpg", "bullet train/3.jpg")
    assert open_source(tmp_path).class_names == ("bullet train", "car", "train")
    put(tmp_path, "test/4.jpg")
    (tmp_path / "classes.txt").write_text("car\ntrain\ntest\nbullet train\n")
    assert listed(open_source(tmp_path, classes=tmp_path / "classes.txt"))["test/4"] == 2


def test_a_layer_above_the_class_folders_is_asked_about(tmp_path):
    put(tmp_path, "data/cat/1.jpg", "data/dog/2.jpg")
    with pytest.raises(SourceError, match=r"holds one folder, data, whose folders look like the classes \(cat, dog\)"):
        open_source(tmp_path)


def test_images_in_nested_folders_belong_to_the_class_above_and_that_is_said(tmp_path):
    put(tmp_path, "animals/cat/1.jpg", "animals/dog/2.jpg", "plants/3.jpg")
    source = open_source(tmp_path)
    assert listed(source) == {"animals/cat/1": 0, "animals/dog/2": 0, "plants/3": 1}
    assert source.notes == (
        "images in folders below a class folder count for that class: those in animals/cat for animals",
    )


def test_a_link_to_the_root_does_not_bring_other_classes(tmp_path):
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a/itself").symlink_to(tmp_path / "a/itself")
    source = open_source(tmp_path)
    assert listed(source) == {"a/1": 0, "b/2": 1}
    assert source.left_out.counts == {"loop": 2, "empty_folder": 1, "special": 1}


def test_links_to_images_and_broken_ones(tmp_path):
    put(tmp_path, "a/1.jpg")
    (tmp_path / "a/2.jpg").symlink_to(tmp_path / "a/1.jpg")
    (tmp_path / "a/3.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a/4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "a/5")
    os.mkfifo(tmp_path / "a/6.jpg")
    source = open_source(tmp_path)
    items = list(source.list_images())
    assert [(item.key, isinstance(item, Reject)) for item in items] == [
        ("a/1", False),
        ("a/2", False),
        ("a/3", True),
        ("a/6", True),
    ]
    assert source.left_out.counts == {"special": 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "1.jpg",
                "2.png",
                "3",
                "._1.jpg",
                "Thumbs.db",
                "a.txt",
                "b.tif",
                "x.v2.jpg",
                "1.PNG",
                ".git/1.jpg",
                "n/1.jpg",
            ]
        ),
        unique=True,
    )
)
def test_every_file_is_listed_rejected_or_counted(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("any")
    put(root, "c/0.jpg", *(f"c/{name}" for name in names))
    source = open_source(root)
    assert sum(1 for _ in source.list_images()) + source.left_out.counts.total() == 1 + len(names)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_a_tar_made_on_macos(tmp_path):
    """tar on macOS writes a ._ member before each member; webdataset skips them."""
    members = []
    for number in range(4):
        for name, data in ((f"{number}.jpg", jpeg()), (f"{number}.cls", b"%d" % number)):
            members += [(f"./._{name}", b"\0\5\x16\7" + bytes(60)), (f"./{name}", data)]
    members += [("__MACOSX/._x.jpg", b"x"), (".DS_Store", b"x"), ("README", b"hello"), ("@eaDir/1.jpg", jpeg())]
    write_tar(tmp_path / "a.tar", members)
    source = open_source(tmp_path / "a.tar")
    assert [type(item) for item in source.list_images()] == [ImageRef] * 4
    assert listed(source) == {"0": 0, "1": 1, "2": 2, "3": 3}
    assert source.left_out.counts == {"system": 11, "no_image": 1}


def test_images_under_any_name_in_tars(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [("1.jfif", jpeg()), ("2", jpeg()), ("3.img", jpeg()), ("3.cls", b"3"), ("4.tif", b"II*\0"), ("5.txt", b"x")],
    )
    found = list(open_source(tmp_path / "a.tar").list_images())
    assert [(item.key, getattr(item, "reason", None)) for item in found] == [
        ("1", None),
        ("2", None),
        ("3", None),
        ("4", "unsupported_format"),
        ("5", "missing_image"),
    ]


def test_text_labels_in_tars_are_numbered_by_the_classes_file(tmp_path):
    (tmp_path / "classes.txt").write_text("n1\tcat\nn2\tdog\n")
    members = [("0.jpg", jpeg()), ("0.cls", b"dog\n"), ("1.jpg", jpeg()), ("1.json", b'{"label": "n1"}')]
    write_tar(tmp_path / "a.tar", [*members, ("2.jpg", jpeg()), ("2.cls", b"zebra")])
    source = open_source(tmp_path / "a.tar", classes=tmp_path / "classes.txt")
    assert listed(source) == {"0": 1, "1": 0, "2": None}
    assert source.notes == ("1 image with labels that are not in the classes file, such as 'zebra': no ground truth",)


def test_a_folder_that_img2dataset_wrote(tmp_path):
    for shard in ("00000", "00001"):
        json_text = json.dumps({"key": f"{shard}0", "caption": "a cat", "status": "success"}).encode()
        write_tar(
            tmp_path / f"{shard}.tar",
            [(f"{shard}0000.jpg", jpeg()), (f"{shard}0000.txt", b"a cat"), (f"{shard}0000.json", json_text)],
        )
        pq.write_table(pa.table({"url": ["x"], "key": ["0"], "status": ["success"]}), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    source = open_source(tmp_path)
    assert listed(source) == {"000000000": None, "000010000": None}
    assert source.left_out.counts == {"beside_tars": 2, ".json": 2}
    assert source.notes[0].startswith("no ground truth was found: the samples hold jpg, json, txt")


def test_img2dataset_s_other_forms(tmp_path):
    """img2dataset writes numbered folders, which are no classes (files), or a column of bytes (parquet)."""
    put(tmp_path, "files/00000/000000000.jpg", "files/00001/000010000.jpg")
    put(tmp_path, "files/00000/000000000.txt", data=b"a cat")
    for shard in ("00000", "00001"):
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / f"files/{shard}.parquet")
    source = open_source(tmp_path / "files")
    assert listed(source) == {"00000/000000000": None, "00001/000010000": None} and source.class_names is None
    (tmp_path / "parquet").mkdir()
    table = {"jpg": [jpeg()], "key": ["000000000"], "caption": ["a cat"], "exif": ["{}"]}
    pq.write_table(pa.table(table), tmp_path / "parquet/00000.parquet")
    source = open_source(tmp_path / "parquet")
    assert listed(source) == {"000000000": None}
    assert next(source.read([next(iter(source.list_images()))])) == jpeg()


def write_parquet(path, images, features=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, **columns})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def structs(*paths):
    return [{"bytes": jpeg(), "path": path} for path in paths]


def test_base_names_that_repeat_in_every_class(tmp_path):
    """datasets stores cat/0000.jpg as 0000.jpg: no image may be lost as a duplicate."""
    for number in range(3):
        write_parquet(
            tmp_path / f"data/train-0000{number}-of-00003.parquet", structs("0000.jpg", "0001.jpg"), label=[0, 1]
        )
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    keys = list(listed(source))
    assert len(keys) == 6 and keys[:2] == ["train-00000-of-00003/00000000", "train-00000-of-00003/00000001"]
    assert "keys are made of file and row, since image.path has '0000' twice" in source.notes
    assert keys == list(listed(open_source(str(tmp_path / "data/train-*.parquet"))))


def test_an_id_that_repeats_is_no_key(tmp_path):
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", "b.jpg"), id=[7, 7])
    assert list(listed(open_source(tmp_path))) == ["a", "b"]
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", "b.jpg"), id=[7, 8])
    assert list(listed(open_source(tmp_path))) == ["7", "8"]
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", None, None))
    assert list(listed(open_source(tmp_path))) == ["a", "x/00000001", "x/00000002"]


@pytest.mark.parametrize(
    "files",
    [
        [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/validation-00000-of-00001.parquet",
        ],
        ["train.parquet", "test.parquet"],
        ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
        ["train_clean-00000-of-00001.parquet", "unlabeled-00000-of-00001.parquet"],
        ["train.tar", "val.tar"],
        ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"],
    ],
)
def test_several_splits_are_asked_about_and_a_pattern_takes_one(tmp_path, files):
    for number, file in enumerate(files):
        if file.endswith(".tar"):
            write_tar(tmp_path / file, [(f"k{number}.jpg", jpeg())])
        else:
            write_parquet(tmp_path / file, structs(f"k{number}.jpg"))
    with pytest.raises(SourceError, match=r"holds several splits: .*in quotes") as caught:
        open_source(tmp_path)
    pattern = str(caught.value).partition("such as '")[2].partition("'")[0]
    assert 1 <= len(listed(open_source(pattern))) < len(files)
    assert len(listed(open_source(f"{tmp_path}/{{{','.join(files)}}}"))) == len(files)


def test_a_pattern_of_several_splits_is_taken_and_said(tmp_path):
    """Perhaps it was meant, perhaps the test images get into the training."""
    for name in ("train-0", "train-1", "test-0"):
        write_parquet(tmp_path / f"{name}.parquet", structs(f"{name}.jpg"), label=[0])
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", jpeg()), (f"{name}.cls", b"0")])
    for kind in ("parquet", "tar"):
        source = open_source(f"{tmp_path}/*.{kind}")
        assert len(listed(source)) == 3 and source.notes == ("files of several splits: test (1), train (2)",)
        source = open_source(f"{tmp_path}/train-*.{kind}")
        assert len(listed(source)) == 2 and source.notes == ()


@pytest.mark.parametrize("other", ["a.parquet", "z.parquet"])
def test_one_split_beside_files_that_name_none_is_no_choice(tmp_path, other):
    """It used to be asked about where the other file came first in the alphabet."""
    write_parquet(tmp_path / "train-0.parquet", structs("k0.jpg"))
    write_parquet(tmp_path / other, structs("k1.jpg"))
    assert sorted(listed(open_source(tmp_path))) == ["k0", "k1"]


def test_files_whose_names_give_the_same_key_lose_nothing_in_silence(tmp_path):
    """A key has no dots, so both files are called shard-1 in it; both were labelled, under the same keys."""
    for name in ("shard.1.parquet", "shard-1.parquet"):
        write_parquet(tmp_path / name, structs(None, None))
    found = listed(open_source(tmp_path))
    assert sorted(found) == ["shard-1/00000000", "shard-1/00000001"]
    items = list(open_source(tmp_path).list_images())
    assert [item.reason for item in items if isinstance(item, Reject)] == ["duplicate_key", "duplicate_key"]


def test_configurations_in_folders_are_asked_about(tmp_path):
    write_parquet(tmp_path / "small/0.parquet", structs("a.jpg"))
    write_parquet(tmp_path / "large/0.parquet", structs("a.jpg", "b.jpg"))
    with pytest.raises(SourceError, match=r"lie in several folders \(large, small\)"):
        open_source(tmp_path)
    assert len(listed(open_source(f"{tmp_path}/**/*.parquet"))) == 3


CLASS_LABEL = {"names": ["cat", "dog"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("columns", "features", "targets", "names"),
    [
        ({"labels": [1, 0]}, None, [1, 0], None),
        ({"fine_label": [1, 0]}, None, [1, 0], None),
        (
            {"coarse_label": [0, 0], "fine_label": [1, 0]},
            {"fine_label": CLASS_LABEL, "coarse_label": CLASS_LABEL},
            [1, 0],
            ("cat", "dog"),
        ),
        ({"breed": [1, 0]}, {"breed": CLASS_LABEL}, [1, 0], ("cat", "dog")),
        ({"caption": ["x", "y"], "breed": [1, -1]}, {"breed": CLASS_LABEL}, [1, None], ("cat", "dog")),
        ({"label": ["dog", "cat"]}, None, [1, 0], ("cat", "dog")),
        ({"label": pa.array(["dog", None])}, None, [0, None], ("dog",)),
        ({"label": pa.array(["dog", "cat"]).dictionary_encode()}, None, [1, 0], ("cat", "dog")),
        ({"label": ["3", "12"]}, None, [3, 12], None),
        ({"label": ["3.0", "12.0"]}, None, [3, 12], None),
        ({"label": ["12", "nan"]}, None, [12, None], None),
        ({"label": ["3.5", "12"]}, None, [1, 0], ("12", "3.5")),
        ({"label": [1.0, 3.0]}, None, [1, 3], None),
        ({"label": [1.0, float("nan")]}, None, [1, None], None),
        ({"label": [True, False]}, None, [1, 0], None),
        ({"label": pa.array([1, 2], pa.uint8())}, None, [1, 2], None),
        ({"label_text": ["dog", "cat"], "label": [5, 3]}, None, [5, 3], None),
        ({"label": [0.5, 1.0]}, None, [None, 1], None),
        ({"caption": ["x", "y"]}, None, [None, None], None),
        ({"label": [[1], [0]]}, None, [None, None], None),
    ],
)
def test_ground_truth_in_the_columns_that_people_have(tmp_path, columns, features, targets, names):
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", "b.jpg"), features, **columns)
    source = open_source(tmp_path)
    assert list(listed(source).values()) == targets
    assert source.class_names == names
    if targets == [None, None]:
        assert source.notes == (f"no ground truth was found: the columns are image, {next(iter(columns))}",)


def test_names_of_a_classlabel_are_looked_up_in_the_classes_file(tmp_path):
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", "b.jpg"), {"label": CLASS_LABEL}, label=[0, 1])
    classes = tmp_path / "classes.txt"
    classes.write_text("n0\tzebra\nn1\tdog\nn2\tcat\n")
    source = open_source(tmp_path / "x.parquet", classes=classes)
    assert list(listed(source).values()) == [2, 1] and source.class_names == ("zebra", "dog", "cat")
    classes.write_text("zebra\ndog\nmouse\n")
    with pytest.raises(SourceError, match="class 'cat' of the column label is not in the classes file"):
        open_source(tmp_path / "x.parquet", classes=classes)
    classes.write_text("Katze\nHund\n")
    source = open_source(tmp_path / "x.parquet", classes=classes)
    assert list(listed(source).values()) == [0, 1] and source.class_names == ("Katze", "Hund")
    for names in ("Dog\nCat\n", "dog, domestic\ncat, tabby\n"):
        classes.write_text(names)
        with pytest.raises(SourceError, match=r"in another order \(class 0 is 'cat' here and '[Dd]og"):
            open_source(tmp_path / "x.parquet", classes=classes)
    classes.write_text("Cat\nDog\n")
    assert list(listed(open_source(tmp_path / "x.parquet", classes=classes)).values()) == [0, 1]


def test_a_text_that_two_lines_of_the_classes_file_have_names_no_class(tmp_path):
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", "b.jpg", "c.jpg"), label=["crane", "dog", "machine"])
    (tmp_path / "classes.txt").write_text("crane\tbird\ndog\tdog\ncrane\tmachine\n")
    source = open_source(tmp_path / "x.parquet", classes=tmp_path / "classes.txt")
    assert list(listed(source).values()) == [None, 1, 2]
    assert source.notes == ("1 image with labels that are not in the classes file, such as 'crane': no ground truth",)


def test_text_labels_that_programs_sort_differently_are_named(tmp_path):
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", "b.jpg", "c.jpg"), label=["c 10", "c 2", "c 1"])
    source = open_source(tmp_path / "x.parquet")
    assert list(listed(source).values()) == [1, 2, 0]
    assert "so 'c 10' is class 1; timm's own reader makes 'c 2' class 1" in source.notes[0]


def test_keys_that_are_stored_as_bytes(tmp_path):
    write_parquet(tmp_path / "x.parquet", structs("a.jpg", "b.jpg"), key=pa.array(["Jörg/1".encode(), b"\xff"]))
    good, bad = open_source(tmp_path / "x.parquet").list_images()
    assert good.key == "Jörg/1" and bad.reason == "bad_key"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "img", "jpg", "payload"])
def test_images_as_plain_bytes(tmp_path, kind, name):
    table = pa.table({name: pa.array([jpeg("red"), jpeg("blue"), None], kind), "label": [0, 1, 1]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path)
    refs = list(source.list_images())
    assert [ref.key for ref in refs] == ["x/00000000", "x/00000001", "x/00000002"]
    found = list(source.read(refs))
    assert found[:2] == [jpeg("red"), jpeg("blue")] and found[2].reason == "missing_image"


def test_an_image_column_by_its_feature(tmp_path):
    table = pa.table({"mask": structs("m.jpg"), "scan": structs("a.jpg")})
    features = {"scan": {"_type": "Image"}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        tmp_path / "x.parquet",
    )
    with pytest.raises(SourceError, match="holds images in mask and scan; rename the one to use to `image`"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": ["a.jpg"]}, "image holds texts, perhaps paths or URLs"),
        ({"embedding": [b"abc"]}, "needs a column of images"),
        ({"url": ["x"]}, "needs a column of images"),
    ],
)
def test_parquet_without_images(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "x.parquet")


def test_paths_without_bytes_are_said_to_be_that(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write_parquet(tmp_path / "x.parquet", pa.array([{"bytes": None, "path": "a.jpg"}], kind))
    source = open_source(tmp_path)
    (error,) = source.read(list(source.list_images()))
    assert error.reason == "missing_image" and "only a path (a.jpg)" in error.detail


def test_files_that_differ_are_not_one_source(tmp_path):
    write_parquet(tmp_path / "a.parquet", structs("a.jpg"), label=[1])
    write_parquet(tmp_path / "b.parquet", structs("b.jpg"), labels=[1])
    with pytest.raises(SourceError, match="has labels in label and labels"):
        open_source(tmp_path)
    write_parquet(tmp_path / "a.parquet", structs("a.jpg"), id=["a"])
    write_parquet(tmp_path / "b.parquet", structs("b.jpg"))
    with pytest.raises(SourceError, match="has keys in id and none"):
        open_source(tmp_path)


WORDNET = ("n01440764", "n01443537", "n01484850")
CLASS_FILES = {
    "folders": "n01440764\nn01443537\nn01484850\n",
    "no last newline": "n01440764\nn01443537\nn01484850",
    "empty last lines": "n01440764\nn01443537\nn01484850\n\n  \n",
    "CRLF": "n01440764\r\nn01443537\r\nn01484850\r\n",
    "BOM": "\ufeffn01440764\nn01443537\nn01484850\n",
    "spaces": "n01440764 \nn01443537\nn01484850\t\n",
    "Kaggle's LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 shark\n",
    "with names": "n01440764\ttench\nn01443537\tgoldfish\nn01484850\tgreat white shark\n",
    "Keras": '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n01484850", "shark"]}',
    "class to number": '{"n01440764": 0, "n01484850": 2, "n01443537": 1}',
    "number to class": '{"2": "n01484850", "0": "n01440764", "1": "n01443537"}',
    "list": '["n01440764", "n01443537", "n01484850"]',
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_class_files_that_people_have(tmp_path, name):
    path = tmp_path / "classes.txt"
    path.write_bytes(CLASS_FILES[name].encode())
    assert read_class_list(path).folders == WORDNET
    put(tmp_path, "images/n01484850/1.jpg", "images/n01440764/2.jpg")
    assert listed(open_source(tmp_path / "images", classes=path)) == {"n01484850/1": 2, "n01440764/2": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb\n", "line 2 is empty"),
        ("", "has no classes"),
        ("n02119789 1 kit_fox\nn02100735 2 English_setter\n", "class numbers of their own.*development kit"),
        ('{"0": "a", "2": "b"}', "not numbered 0 to 1"),
        ('{"a": 0, "b": 0, "c": 1}', "not numbered 0 to 2, each once"),
        ("{}", "has no classes"),
        ("[1, 2]", "needs a list of names"),
        ("{", "is not JSON"),
    ],
)
def test_class_files_that_could_mean_anything(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_class_list(tmp_path / "classes.txt")


@pytest.mark.parametrize("separator", ["\t", ",", ": ", ";"])
def test_class_files_with_numbers(tmp_path, separator):
    """A pandas series that was written to a file has its numbers in any order."""
    path = tmp_path / "classes.txt"
    for names in ("tench", "goldfish", "shark"), ("1 euro", "2 euro", "10 cents"):
        path.write_text("".join(f"{number}{separator}{name}\n" for number, name in enumerate(names)))
        assert read_class_list(path).names == names
    for order in (0, 2, 1), (1, 2, 3):
        path.write_text("".join(f"{number}{separator}class {number}\n" for number in order))
        if separator == "\t" and order == (1, 2, 3):
            assert read_class_list(path).folders == ("1", "2", "3"), "folders, as those of Flowers 102"
            continue
        with pytest.raises(SourceError, match=r"numbers its lines .* not from 0 in their order.*only these"):
            read_class_list(path)


def test_a_class_folder_in_another_unicode_form(tmp_path):
    put(tmp_path, "images/cafe\u0301/1.jpg")
    (tmp_path / "classes.txt").write_text("caf\u00e9\nother\n")
    with pytest.raises(SourceError, match=r"'caf\\xe9' there is 'cafe\\u0301' here, in another Unicode form"):
        open_source(tmp_path / "images", classes=tmp_path / "classes.txt")


def test_the_label_of_a_sample_that_has_several(tmp_path):
    """The likeliest member counts, wherever it stands and however it is written."""
    members = [("1.class", b"cat"), ("1.cls", b"3"), ("1.jpg", jpeg()), ("2.CLS", b"4"), ("2.jpg", jpeg())]
    write_tar(tmp_path / "a.tar", [*members, ("3.jpg", jpeg()), ("3.JSON", b'{"label": 5}')])
    source = open_source(tmp_path / "a.tar")
    assert listed(source) == {"1": 3, "2": 4, "3": 5} and source.notes == ()


def test_class_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 0}))
    with pytest.raises(SourceError, match="pickles can run code"):
        read_class_list(tmp_path / "x.pkl")
    (tmp_path / "x.txt").write_text("a\nb\n", encoding="utf-16")
    with pytest.raises(SourceError, match="is not UTF-8"):
        read_class_list(tmp_path / "x.txt")


def test_two_classes_of_one_name_are_fine_but_for_folders(tmp_path):
    """ImageNet has two cranes and two maillots."""
    (tmp_path / "classes.txt").write_text("crane\ncrane\ncat\n")
    write_tar(tmp_path / "a.tar", [("1.jpg", jpeg()), ("1.cls", b"1"), ("2.jpg", jpeg()), ("2.cls", b"cat")])
    source = open_source(tmp_path / "a.tar", classes=tmp_path / "classes.txt")
    assert listed(source) == {"1": 1, "2": 2} and source.class_names == ("crane", "crane", "cat")
    put(tmp_path, "images/cat/1.jpg")
    with pytest.raises(SourceError, match="lists 'crane' as class 0 and again as class 1"):
        open_source(tmp_path / "images", classes=tmp_path / "classes.txt")


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "photos/cat/1.jpg")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert listed(open_source("~/photos", classes=Path("~/classes.txt"))) == {"cat/1": 1}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("VAL", "validation"),
        ("test_images", "test"),
        ("train-2", "train"),
        ("trains", None),
        ("tv", None),
    ],
)
def test_folders_that_are_splits(name, split):
    assert split_of_folder(name) == split


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00005.parquet", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("unlabeled-00000-of-00001.parquet", "unlabeled"),
        ("0000.parquet", None),
        ("imagenet-val-000012.tar", "validation"),
        ("latest/contest.tar", None),
    ],
)
def test_files_that_are_of_splits(path, split):
    assert split_of_file(path) == split


def test_names_of_systems():
    assert skip_reason("Photo.jpg") is None and skip_reason(".x") == "hidden" and skip_reason("THUMBS.DB") == "system"


def test_tables_of_numbers_do_not_matter(tmp_path):
    """A folder of photos with a table beside it stays a folder of photos."""
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    pq.write_table(pa.table({"file": ["a/1.jpg"], "mean": np.ones(1)}), tmp_path / "metadata.parquet")
    source = open_source(tmp_path)
    assert listed(source) == {"a/1": 0, "b/2": 1} and source.left_out.counts == {".parquet": 1}
