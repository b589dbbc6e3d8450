"""Bombs, special files, and words that would control a terminal or a web page: one error each, and little memory."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from label_sets import edit_manifest, relist

import ferkd_data as fd
from ferkd_data.errors import LabelSetError, ManifestError, ShardError
from ferkd_data.exchange.card import render_card
from ferkd_data.format import parquet
from ferkd_data_cli.main import run
from ferkd_data_cli.terminal import printable

GOLDEN = Path(__file__).parent.parent / "golden" / "version-1"
HARMLESS = {("reason_bomb", use) for use in ("open", "keys", "convert", "export", "pull")} | {("npy_bomb", "keys")}
"""Uses that do not touch what the bomb is in."""


def test_bombs_take_no_memory_whatever_is_done_with_them(tmp_path):
    script = Path(__file__).parent / "bombs.py"
    (tmp_path / "sets").mkdir()
    shutil.copytree(GOLDEN / "parquet", tmp_path / "plain")
    subprocess.run([sys.executable, script, "make", GOLDEN, tmp_path / "sets"], check=True)
    met = subprocess.run(
        [sys.executable, script, "meet", tmp_path / "sets"], check=True, capture_output=True, text=True
    )
    start, *lines = [line.split() for line in met.stdout.splitlines()]
    assert len(lines) == 8 * 8
    for bomb, use, outcome, peak in lines:
        if (bomb, use) not in HARMLESS:
            assert outcome in ("faults", "ManifestError", "ShardError", "LabelSetError", "UsageError"), (
                bomb,
                use,
                outcome,
            )
        assert int(peak) < int(start[3]) + 100, (bomb, use, peak)


def test_a_block_that_would_be_far_larger_in_memory(copy, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_DECODED_BYTES", 1000)
    assert len(fd.open_labels(copy).shard(0)) == 8
    monkeypatch.setattr(parquet, "MAX_EXPANSION", 0.1)
    with pytest.raises(ShardError, match=r"bytes that would become \d+ in memory"):
        fd.open_labels(copy).shard(0)


def replaced(folder, name, make, block="labels/00000-000.parquet"):
    """Put another column in a block, with a manifest that agrees on its size."""
    table = pq.read_table(folder / block)
    at = table.schema.get_field_index(name)
    kind = table.schema.field(at).type
    table = table.set_column(at, pa.field(name, kind), make(table.column(at).combine_chunks()))
    pq.write_table(table, folder / block)
    relist(folder)


@pytest.mark.parametrize("name", ["key", "height", "image_digest", "flip", "class_prob", "bucket"])
def test_nulls_where_none_may_be(copy, name):
    replaced(copy, name, lambda column: pa.concat_arrays([pa.nulls(1, column.type), column.slice(1)]))
    with pytest.raises(ShardError, match=rf"column '{name}' (holds nulls|claims \d+ values)"):
        fd.open_labels(copy).shard(0)


def test_nulls_inside_a_list(copy):
    def make(column):
        flat = column.flatten()
        return pa.FixedSizeListArray.from_arrays(
            pa.concat_arrays([pa.nulls(1, flat.type), flat.slice(1)]), type=column.type
        )

    replaced(copy, "class_prob", make)
    with pytest.raises(ShardError, match="column 'class_prob' holds nulls"):
        fd.open_labels(copy).shard(0)


def test_more_row_groups_than_rows(copy):
    table = pq.read_table(copy / "labels/00000-000.parquet")
    with pq.ParquetWriter(copy / "labels/00000-000.parquet", table.schema) as writer:
        writer.write_table(table)
        for _ in range(8):
            writer.write_table(table.slice(0, 0))
    relist(copy)
    with pytest.raises(ShardError, match="9 row groups for 8 rows"):
        fd.open_labels(copy).shard(0)


def claimed_rows(content):
    """A thousand million rows in a file of some kilobytes, and all other counts to fit."""
    more = 10**9 - content["shards"][0]["rows"]
    content["shards"][0]["rows"] += more
    content["num_images"] += more
    content["source"]["images_seen"] += more


def claimed_crops(content):
    content.update(num_crops=10**6, crops_per_block=10**6, num_images=8)
    content["source"]["images_seen"] = 8 + content["rejects"]["rows"]
    content["shards"] = content["shards"][:1]
    content["shards"][0]["files"] = content["shards"][0]["files"][:1]


def claimed_rejects(content):
    content["rejects"]["rows"] += 10**9
    content["source"]["images_seen"] += 10**9


NUMBERS = {
    "rows that no file holds": claimed_rows,
    "crops that no file holds": claimed_crops,
    "rejects that no file holds": claimed_rejects,
    "more classes kept than there are": lambda m: m.update(top_k=11),
    "a name that no file system takes": lambda m: m["rejects"].update(path="x" * 300 + ".parquet"),
    "a name that no file system takes, in other letters": lambda m: m["rejects"].update(path="é" * 128 + ".parquet"),
    "an unfinished file": lambda m: m["shards"][0]["files"][0].update(path="labels/.00000-000.parquet"),
    "a file in a file": lambda m: m["shards"][0]["files"][0].update(
        path=m["shards"][0]["files"][1]["path"] + "/x.parquet"
    ),
    "a file twice, in capitals": lambda m: (
        m["shards"][0]["files"][0].update(
            path=m["shards"][0]["files"][1]["path"].replace("labels/", "labels/A"),
        )
        or m["shards"][0]["files"][1].update(path=m["shards"][0]["files"][1]["path"].replace("labels/", "labels/a"))
    ),
    "padding": lambda m: m.update(more="x" * 34_000_000),
    "rows without end": lambda m: m["shards"][0].update(rows=10**30),
    "a size without end": lambda m: m["shards"][0]["files"][0].update(bytes=10**30),
    "images without end": lambda m: m.update(num_images=2**53 + 1),
    "classes without end": lambda m: m.update(num_classes=10**9),
    "statistics of other teachers": lambda m: m["statistics"].update(teacher_top1_matches_target=[1]),
    "statistics of ragged bins": lambda m: m["statistics"].update(teacher_bin_crops=[[1, 2], [3, 4]]),
    "statistics of ragged teachers": lambda m: m["statistics"].update(teacher_agreement=[[1, 2], [3]]),
    "counts without end": lambda m: m["statistics"].update(crops=10**30),
    "a file twice": lambda m: m["shards"][0]["files"][1].update(path=m["shards"][0]["files"][0]["path"]),
    "the rejects as a shard": lambda m: m["rejects"].update(path=m["shards"][0]["files"][0]["path"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_manifests_that_claim_too_much(copy, name):
    edit_manifest(copy, NUMBERS[name])
    with pytest.raises(ManifestError):
        fd.open_labels(copy)


@pytest.mark.parametrize("name", ["manifest.json", "labels/00000-000.parquet", "rejects.parquet"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_special_files_in_a_files_place(copy, name, kind):
    path = copy / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    edited = copy / "manifest.json"
    if name != "manifest.json":
        content = json.loads(edited.read_text())
        for entry in [content["shards"][0]["files"][0], content["rejects"]]:
            if entry["path"] == name:
                entry["bytes"] = path.stat().st_size
        edited.write_text(json.dumps(content))
    if name == "rejects.parquet":
        report = fd.verify(copy)
        assert [fault.file for fault in report.faults] == ["rejects.parquet"]
    else:
        with pytest.raises(LabelSetError, match=r"not a regular file|leads outside"):
            fd.open_labels(copy).shard(0)


def retyped(folder, change):
    """Rewrite the first tar, header by header."""
    path = folder / "shards/00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    out = io.BytesIO()
    for number, (member, data) in enumerate(members):
        change(number, member)
        out.write(member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    path.write_bytes(out.getvalue() + bytes(1024))
    relist(folder)


@pytest.mark.parametrize(
    "kind",
    [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
     tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE],
)  # fmt: skip
def test_members_that_are_no_files(tar_copy, kind):
    retyped(tar_copy, lambda number, member: setattr(member, "type", kind if number == 0 else member.type))
    with pytest.raises(ShardError, match=r"links and devices are refused|cannot be read as a tar"):
        fd.open_labels(tar_copy).shard(0)


def test_a_sparse_member_by_its_extended_header(tar_copy):
    path = tar_copy / "shards/00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**15)}
            tar.addfile(member, io.BytesIO(data))
    relist(tar_copy)
    with pytest.raises(ShardError, match="links and devices are refused"):
        fd.open_labels(tar_copy).shard(0)


EVIL = "bald\x1b]0;owned\x07\x9b2J eagle \u202e`|<script>alert(1)</script>\n# heading"


def evil_names(content):
    content["class_names"] = [f"{EVIL}{number}" for number in range(10)]
    content["source"]["description"] = EVIL
    content["created_by"]["name"] = EVIL
    for teacher in content["teachers"]:
        teacher["name"] = EVIL


def rekeyed(folder, change):
    """Give the images of the first shard other keys, in all its blocks."""
    for block in sorted((folder / "labels").glob("00000-*.parquet")):
        replaced(folder, "key", lambda column: pa.array(map(change, column.to_pylist())), f"labels/{block.name}")


def test_strangers_words_do_not_reach_the_terminal(copy, capsys):
    edit_manifest(copy, evil_names)
    rekeyed(copy, lambda key: f"{EVIL}/{key}")
    (copy / f"stray\x1b[2J{EVIL[:9]}").touch()
    edit_manifest(copy, lambda m: m["shards"][1]["files"][0].update(path="labels/\x1b[31mx.parquet"))
    commands = [["info"], ["info", "--json"], ["show"], ["show", "--json"], ["verify"], ["verify", "--json"], ["stats"]]
    said = ""
    for name, *options in commands:
        run([name, str(copy), *options])
        captured = capsys.readouterr()
        said += captured.out + captured.err
        if "--json" in options:
            json.loads(captured.out)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)
    assert said.count("\\u001b") > 20 and "\\u009b2J" in said and "\\u202e" in said


def test_what_is_printable():
    assert printable("naïve 日本 a\tb\n") == "naïve 日本 a\tb\n"
    assert printable("\x1b[2J\r\x00\x85\u2066\ud800") == r"\u001b[2J\u000d\u0000\u0085\u2066\ud800"


def test_strangers_words_stay_words_in_the_card(copy):
    edit_manifest(copy, evil_names)
    card = render_card(fd.open_labels(copy), fd.CardFields(name='a "name": x\n---', license="cc0-1.0"), "s3://b/x")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["pretty_name"] == 'a "name": x\n---'
    shown = "`bald ]0;owned 2J eagle '\\|<script>alert(1)</script> # heading`"
    assert body.count(shown) == 3 and "<script>" in body
    assert "<script>" not in re.sub("`[^`\n]*`", "", body)
    assert "\x1b" not in body and "\n# heading" not in body.split("## Use")[1]


def test_publish_sends_no_file_that_a_link_leads_to(copy, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (copy / "README.md").symlink_to(secret)
    with pytest.raises(LabelSetError, match="leads outside"):
        fd.publish(copy, str(tmp_path / "public"), card=fd.CardFields(name="x", license="cc0-1.0"))
    assert not (tmp_path / "public/README.md").exists()


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "manifest.json.sig"])
def test_pull_copies_no_file_that_a_link_leads_to(copy, tmp_path, name):
    (tmp_path / "secret").write_text("mine")
    (copy / name).symlink_to(tmp_path / "secret")
    for place in (str(copy), f"file://{copy}"):
        with pytest.raises(LabelSetError, match="leads outside"):
            fd.pull(place, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / name).exists() and not (tmp_path / "pulled/manifest.json").exists()


def test_keys_that_would_escape_are_written_nowhere(copy, tmp_path):
    rekeyed(copy, lambda key: f"../../{key}")
    faults = {fault.message for fault in fd.verify(copy).faults if fault.field == "key"}
    assert any("climbs out of its folder" in message for message in faults)
    with pytest.raises(LabelSetError, match="not a path inside"):
        fd.export_fkd(copy, tmp_path / "deep/fkd")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("deep/*.tar"))


@pytest.mark.parametrize("size", [-1024, 10**15])
def test_members_of_sizes_that_cannot_be(tar_copy, size):
    """A negative size leads older tarfiles back to where they were."""
    retyped(tar_copy, lambda number, member: setattr(member, "size", size if number == 0 else member.size))
    with pytest.raises(ShardError, match=f"member '.*' claims {size}"):
        fd.open_labels(tar_copy).shard(0)


def test_the_card_says_what_strangers_need(label_set):
    labels = fd.open_labels(label_set)
    fields = fd.CardFields(name="Tiny labels", license="cc0-1.0", author="Lab", published="2026-11-25")
    card = render_card(labels, fields, "s3://bucket/tiny")
    for said in (
        f"the SHA-256 of `manifest.json`, is `{labels.identity}`",
        "@misc{tiny-labels2026,\n  title = {Tiny labels},\n  author = {Lab},\n  year = {2026},\n  url = {s3://bucket/tiny}",
        "ECCV 2022 (FKD)",
        "FerKD: Surgical Label Adaptation",
        "| 0.95-1.00 |",
        "Buckets by p_max: below 0.15 extreme hard",
        "of the probability on average",
        "seed 0; in blocks of 4",
    ):
        assert said in card, said
    assert len(card.split("```python\n")[1].split("```")[0].strip().splitlines()) == 6
