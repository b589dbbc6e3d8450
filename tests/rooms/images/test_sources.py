from __future__ import annotations

import io
import json
import pickle
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images import ImageRef, Reject, check_key, open_source
from ferkd_data.images.duplicates import DuplicateFilter


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
    assert source.ignored_files == {".txt": 1}


def test_images_beside_folders_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "x.jpg").write_bytes(jpeg())
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


@pytest.mark.parametrize("data", [b"seven", b"-1", b"[" * 5000, b"99999999999"])
def test_a_target_that_is_no_class_number_is_a_reject(tmp_path, data):
    write_tar(tmp_path / "a.tar", [("k.jpg", jpeg()), ("k.cls", data)])
    (item,) = open_source(tmp_path / "a.tar").list_images()
    assert isinstance(item, Reject) and item.reason == "corrupt"


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
        (lambda p: write(p / "x.tar", b"no tar" * 200), "not an uncompressed tar"),
        (lambda p: write(p / "x.tar.gz", b"\x1f\x8b" + bytes(2000)), "unpack compressed tars"),
        (lambda p: write(p / "x.parquet", b"no parquet"), "cannot be read as Parquet"),
        (lambda p: write(p / "x.zip", b""), "neither a folder"),
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
        source = open_source(tmp_path / f"{count}.tar")
        tracemalloc.start()
        assert sum(1 for _ in source.list_images()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@given(st.lists(st.text(max_size=3), max_size=60))
def test_the_duplicate_filter_is_a_set(keys):
    seen: set[str] = set()
    with DuplicateFilter() as duplicates:
        for key in keys:
            assert duplicates.seen(key) == (key in seen)
            seen.add(key)
