from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import sqlite3
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ferkd_data.errors import ImageError, SourceError, StorageFullError
from ferkd_data.images import ImageRef, Reject, check_key, open_source
from ferkd_data.images.keys import DuplicateFilter
from ferkd_data.images.tars import TarSource


def jpeg(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def refs(source):
    return [item for item in source.list_images() if isinstance(item, ImageRef)]


def test_class_folders_as_image_folder_reads_them(photos):
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(str(photos))
    ours = open_source(photos)
    listed = refs(ours)
    assert ours.class_names == tuple(theirs.classes)
    assert [(str(photos / ref.file), ref.target) for ref in listed] == theirs.samples
    assert listed[0].key == "class0/photo0000"


def test_every_source_gives_the_same_bytes_in_order_alone_and_pickled(photos, tmp_path):
    listed = refs(open_source(photos))[:5]
    images = [(photos / ref.file).read_bytes() for ref in listed]
    write_tar(tmp_path / "a.tar", [(f"k{i}.jpg", data) for i, data in enumerate(images[:3])])
    write_tar(tmp_path / "b.tar", [(f"k{i}.jpg", data) for i, data in enumerate(images[3:], 3)])
    table = pa.table({"image": [{"bytes": data, "path": f"k{i}.jpg"} for i, data in enumerate(images)]})
    (tmp_path / "hf").mkdir()
    pq.write_table(table, tmp_path / "hf/train.parquet", row_group_size=2)
    for spec in (str(tmp_path / "{a,b}.tar"), str(tmp_path / "*.tar"), tmp_path / "hf"):
        source = pickle.loads(pickle.dumps(open_source(spec)))
        found = refs(source)
        assert [ref.key for ref in found] == ["k0", "k1", "k2", "k3", "k4"]
        assert list(source.read(found)) == images
        assert [source.read_one(ref) for ref in reversed(found)] == images[::-1]
        assert list(source.read(found[3:])) == images[3:]


def test_a_flat_folder_is_unlabelled(tmp_path):
    for name in ("b.jpg", "a.PNG", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(jpeg())
    source = open_source(tmp_path)
    assert [(ref.key, ref.target) for ref in refs(source)] == [("a", None), ("b", None)]
    assert source.left_out.counts == {".txt": 1, "hidden": 1}


def test_images_beside_folders_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "x.jpg").write_bytes(jpeg())
    (tmp_path / "a/y.jpg").write_bytes(jpeg())
    with pytest.raises(SourceError, match="beside folders"):
        open_source(tmp_path)


def test_a_link_to_a_folder_above_ends(tmp_path):
    (tmp_path / "c/d").mkdir(parents=True)
    (tmp_path / "c/x.jpg").write_bytes(jpeg())
    (tmp_path / "c/d/up").symlink_to(tmp_path / "c")
    assert [ref.key for ref in refs(open_source(tmp_path))] == ["c/x"]


def test_a_classes_file_numbers_the_folders(photos, tmp_path):
    lines = [f"class{i}\tname {i}" for i in reversed(range(10))]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    source = open_source(photos, classes=tmp_path / "classes.txt")
    assert refs(source)[0].target == 9
    assert source.class_names == tuple(f"name {i}" for i in reversed(range(10)))
    (tmp_path / "classes.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(SourceError, match="'class9' is not in the classes file"):
        open_source(photos, classes=tmp_path / "classes.txt")


@pytest.mark.parametrize(
    ("extra", "target"),
    [
        ([("k.cls", b"7")], 7),
        ([("k.json", b'{"label": 4}')], 4),
        ([("k.json", b'{"caption": "x"}')], None),
        ([], None),
    ],
)
def test_targets_in_tars(tmp_path, extra, target):
    write_tar(tmp_path / "a.tar", [("k.jpg", jpeg()), *extra])
    assert [ref.target for ref in refs(open_source(tmp_path / "a.tar"))] == [target]


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [
        ("k.cls", b"seven", "1 image with labels that need --classes to be numbered, such as 'seven': no ground truth"),
        ("k.cls", b"99999999999", "1 image with labels that name no class, such as 99999999999"),
        ("k.json", b"[" * 5000, "1 image with labels that name no class, such as b'not JSON'"),
        ("k.json", b'{"label": [1, 2]}', "1 image with labels that name no class, such as [1, 2]"),
        ("k.json", b'{"label": 0.5}', "1 image with labels that name no class, such as 0.5"),
        ("k.cls", b"-1", "no ground truth was found: the samples hold cls, jpg"),
        ("k.txt", b"a cat", "no ground truth was found: the samples hold jpg, txt"),
    ],
)
def test_a_label_that_is_no_class_number_leaves_the_image_without_ground_truth_and_says_so(tmp_path, name, data, note):
    write_tar(tmp_path / "a.tar", [("k.jpg", jpeg()), (name, data)])
    source = open_source(tmp_path / "a.tar")
    assert [ref.target for ref in refs(source)] == [None]
    assert source.notes[0].startswith(note)


def test_class_names_and_labels_of_hugging_face_parquet(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": jpeg(), "path": None}] * 3
    table = pa.table({"image": images, "label": [1, 0, -1]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "train.parquet")
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert [(ref.key, ref.target) for ref in refs(source)] == [
        ("train/00000000", 1),
        ("train/00000001", 0),
        ("train/00000002", None),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no such folder or file"),
        (lambda p: p / "*.tar", "no such file"),
        (lambda p: p / "*.parquet", "no such file"),
        (lambda p: p / "x.parquet", "no such file"),
        (lambda p: "https://example.org/x.parquet", "download the files"),
        (lambda p: write(p / "x.tar", b"no tar" * 200), "not an uncompressed tar"),
        (lambda p: write(p / "x.tar.gz", b"\x1f\x8b" + bytes(2000)), "unpack it first"),
        (lambda p: write(p / "x.parquet", b"no parquet"), "cannot be read as Parquet"),
        (lambda p: write(p / "x.zip", b""), "unpack it first"),
        (lambda p: write(p / "x.doc", b""), "neither a folder"),
    ],
)
def test_what_is_no_source_says_so(tmp_path, make, message):
    with pytest.raises(SourceError, match=message):
        list(open_source(make(tmp_path)).list_images())


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "key",
    ["", "a.b", "x/a.b", "/a", "a/../b", "a//b", "a\\b", "a\nb", "__key__", "a/__x__", "k" * 1025, "\udc80", "."],
)
def test_bad_keys(key):
    with pytest.raises(ImageError, match="bad_key"):
        check_key(key)


@given(st.lists(st.text("abcé 日", min_size=1, max_size=9), min_size=1, max_size=4))
def test_keys_that_pass_are_split_by_webdataset_as_we_do(parts):
    from webdataset.tariterators import base_plus_ext

    from ferkd_data.images.tars import split_member

    key = "/".join(parts)
    check_key(key)
    assert split_member(f"{key}.crops.npy") == (key, "crops.npy") == base_plus_ext(f"{key}.crops.npy")


def test_listing_a_tar_takes_the_same_memory_for_ten_times_the_images(tmp_path):
    data = jpeg()
    peaks = []
    for count in (300, 3000):
        write_tar(tmp_path / f"{count}.tar", [(f"k{i:06d}.jpg", data) for i in range(count)])
        peaks.append(peak_of_listing(open_source(tmp_path / f"{count}.tar"), count))
    assert peaks[1] < 1.5 * peaks[0]


def peak_of_listing(source, num_images):
    """Take the lower of two measurements: pathlib interns names, whose table in Python sometimes grows by megabytes."""
    peaks = []
    for _ in range(2):
        tracemalloc.start()
        assert sum(1 for _ in source.list_images()) == num_images
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return min(peaks)


@given(st.lists(st.text(max_size=3), max_size=60))
def test_the_duplicate_filter_is_a_set(keys):
    seen: set[str] = set()
    with DuplicateFilter() as duplicates:
        for key in keys:
            assert duplicates.seen(key) == (key in seen)
            seen.add(key)


def rejected(source):
    return [(item.key, item.reason) for item in source.list_images() if isinstance(item, Reject)]


def test_two_files_with_one_key(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    source = open_source(tmp_path)
    assert [ref.file for ref in refs(source)] == ["a.jpg", "b.jpg"]
    assert rejected(source) == [("a", "duplicate_key")]


def test_one_key_in_two_tars_and_in_two_parquet_files(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("k.jpg", jpeg()), (f"{name}.jpg", jpeg())])
        (tmp_path / "hf").mkdir(exist_ok=True)
        images = [{"bytes": jpeg(), "path": "x/k.jpg"}, {"bytes": jpeg(), "path": f"{name}.jpg"}]
        pq.write_table(pa.table({"image": images, "key": ["k", name]}), tmp_path / f"hf/{name}.parquet")
    for spec in (str(tmp_path / "*.tar"), tmp_path / "hf"):
        source = open_source(spec)
        assert [ref.key for ref in refs(source)] == ["k", "a", "b"]
        assert rejected(source) == [("k", "duplicate_key")]


def test_samples_that_cannot_be_used(tmp_path):
    members = [("two.jpg", jpeg()), ("two.v2.jpg", jpeg()), ("none.cls", b"1"), ("old.tif", b"II*"), ("k.jpg", jpeg())]
    write_tar(tmp_path / "a.tar", members)
    source = open_source(tmp_path / "a.tar")
    assert rejected(source) == [("two", "bad_key"), ("none", "missing_image"), ("old", "unsupported_format")]
    assert [ref.key for ref in refs(source)] == ["k"]


def test_files_of_other_formats_in_folders(tmp_path):
    """Formats are told by their bytes: a JPEG that is called .tif is a JPEG."""
    for name in ("a.tiff", "b.HEIC"):
        (tmp_path / name).write_bytes(b"MM\0*" + bytes(40))
    for name in ("c.jpg", "d.v2.jpg", "e.tif", "f.heic"):
        (tmp_path / name).write_bytes(jpeg())
    assert [ref.key for ref in refs(open_source(tmp_path))] == ["c", "e", "f"]
    assert rejected(open_source(tmp_path)) == [
        ("a", "unsupported_format"),
        ("b", "unsupported_format"),
        ("d.v2", "bad_key"),
    ]
    (tmp_path / "c.jpg").rename(tmp_path / "c.tif")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.jpg").write_bytes(jpeg())
    with pytest.raises(SourceError, match=r"holds images \(a\.tiff\) beside folders"):
        open_source(tmp_path)


@pytest.mark.parametrize("column", ["key", "__key__", "id"])
def test_key_columns_of_parquet(tmp_path, column):
    images = [{"bytes": jpeg(), "path": "ignored.jpg"}] * 2
    pq.write_table(pa.table({"image": images, column: ["a/b", "c"]}), tmp_path / "x.parquet")
    assert [ref.key for ref in refs(open_source(tmp_path / "x.parquet"))] == ["a/b", "c"]


def test_a_row_without_an_image_is_read_as_an_error(tmp_path):
    images = pa.array([{"bytes": None, "path": "a.jpg"}, None], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    source = open_source(tmp_path)
    listed = refs(source)
    assert [error.reason for error in source.read(listed)] == ["missing_image"] * 2
    with pytest.raises(ImageError, match="missing_image"):
        source.read_one(listed[0])


def test_the_order_is_not_that_of_the_file_system(photos, tmp_path, monkeypatch):
    expected = list(open_source(photos).list_images())
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert list(open_source(photos).list_images()) == expected


def test_listing_class_folders_holds_one_folder_at_a_time(tmp_path):
    peaks = []
    for folders in (4, 40):
        for folder in range(folders):
            (tmp_path / f"{folders}/c{folder:03d}").mkdir(parents=True)
            for number in range(100):
                (tmp_path / f"{folders}/c{folder:03d}/k{number}.jpg").touch()
        source = open_source(tmp_path / str(folders))
        peaks.append(peak_of_listing(source, 100 * folders))
    assert peaks[1] < 1.5 * peaks[0]


def test_a_classes_file_with_a_byte_order_mark(photos, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(f"class{i}" for i in range(10)), encoding="utf-8-sig")
    assert open_source(photos, classes=tmp_path / "classes.txt").class_names[0] == "class0"


def test_a_full_disk_while_keys_are_collected():
    with DuplicateFilter() as duplicates:
        duplicates._database.execute("PRAGMA max_page_count = 5")
        with pytest.raises(StorageFullError, match="TMPDIR") as caught:
            for number in range(10_000):
                duplicates.seen(str(number))
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)


def test_control_characters_beyond_ascii_are_no_keys():
    with pytest.raises(ImageError, match="control character"):
        check_key("a\x85b")


def test_single_rows_of_parquet_in_any_order_open_each_file_twice_at_most(tmp_path, monkeypatch):
    for file in range(3):
        images = [{"bytes": f"{file} {row}".encode() * 40_000, "path": None} for row in range(90)]
        table = pa.table({"key": [f"{file}-{row}" for row in range(90)], "image": images})
        pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=40)
    source = open_source(tmp_path)
    refs = {ref.key: ref for ref in source.list_images()}
    opened = []
    real = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened.append(path) or real(path))
    order = np.random.default_rng(0).permutation(sorted(refs)).tolist()
    for key in (*sorted(refs), *order, *sorted(refs, reverse=True)):
        assert source.read_one(refs[key]) == key.replace("-", " ").encode() * 40_000
    # Once for the table of its pages, and once for PyArrow where the pages are not plain, as here.
    assert len(opened) == 6
    assert pickle.loads(pickle.dumps(source)).read_one(refs["1-7"]) == b"1 7" * 40_000
    with pytest.raises(ImageError, match=r"1\.parquet has no row 90; did it change"):
        source.read_one(dataclasses.replace(refs["1-7"], offset=90))


def test_a_manifest_does_not_get_the_signature_of_a_tars_url():
    tars = [f"https://example.org/train-{number}.tar?X-Amz-Signature=geheim/x" for number in (0, 1)]
    assert TarSource(tars[:1], None).description == "tar train-0.tar"
    assert TarSource(tars, None).description == "2 tars, train-0.tar .. train-1.tar"
    assert TarSource(["what?.tar"], None).description == "tar what?.tar", "a file's own name stays as it is"
