"""From a folder to a store and back, with interruptions, and read there by clients that know nothing of ferkd-data."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import yaml
from label_sets import SMALL, same_label_sets
from servers import s3_store, serve

import ferkd_data as fd
from ferkd_data.errors import ManifestError, PublishError, RemoteError, UsageError
from ferkd_data.exchange.destinations import Store
from ferkd_data.format.manifest_file import read_manifest
from ferkd_data.labels import rows
from ferkd_data.remote import Remote, Retries, part_of
from ferkd_data.storage import sha256_file
from ferkd_data_cli.main import run

CARD = fd.CardFields(name="tiny labels", license="cc-by-4.0", image_license="cc0-1.0", published="2026-11-24")
QUICK = Retries(attempts=2, first_wait=0.001, timeout=5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_a_folder_and_back(layout, request, tmp_path):
    folder = request.getfixturevalue(layout)
    result = fd.publish(folder, str(tmp_path / "public"), card=CARD)
    files = len(list(folder.rglob("*.*")))
    assert (len(result.sent), result.skipped) == (files + 2, 0)
    assert same_label_sets(folder, tmp_path / "public")
    assert fd.verify(tmp_path / "public").ok
    again = fd.publish(folder, str(tmp_path / "public"), card=CARD)
    assert (len(again.sent), again.skipped) == (0, files + 2)
    with serve(tmp_path / "public") as server:
        pulled = fd.pull(server.url, tmp_path / "mine")
    assert pulled.manifest == read_manifest(folder)
    assert fd.open_labels(tmp_path / "mine").identity == fd.open_labels(folder).identity
    assert fd.pull(f"file://{folder}", tmp_path / "mine").fetched == 0
    assert (tmp_path / "mine/README.md").read_text() == (tmp_path / "public/README.md").read_text()


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_an_s3_store_and_back(layout, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(layout)
    with s3_store(monkeypatch, "bucket"):
        fd.publish(folder, "s3://bucket/sets/tiny", card=CARD)
        labels = fd.open_labels("s3://bucket/sets/tiny")
        assert labels.identity == fd.open_labels(folder).identity
        assert np.array_equal(labels.shard(0).class_prob, fd.open_labels(folder).shard(0).class_prob)
        fd.pull("s3://bucket/sets/tiny", tmp_path / "mine")
        assert same_label_sets(folder, tmp_path / "mine")
        with pytest.raises(ManifestError, match="is this the URL of a published label set"):
            fd.open_labels("s3://bucket/nothing")
        with pytest.raises((ManifestError, RemoteError), match="s3://nowhere/x"):
            fd.open_labels("s3://nowhere/x")


class Cut(Exception):
    pass


def test_what_arrived_before_an_interruption_is_not_sent_again(label_set, tmp_path, monkeypatch):
    place = str(tmp_path / "public")
    sent = []
    upload = Remote.upload

    def cut(self, file, name, **digest):
        if len(sent) == 4:
            raise Cut
        upload(self, file, name, **digest)
        sent.append(name)

    monkeypatch.setattr(Remote, "upload", cut)
    with pytest.raises(Cut):
        fd.publish(label_set, place, card=CARD, threads=1)
    assert not (tmp_path / "public/manifest.json").exists()
    monkeypatch.setattr(Remote, "upload", upload)
    (tmp_path / "public" / sent[0]).write_bytes(b"damaged since")
    result = fd.publish(label_set, place, card=CARD)
    assert result.skipped == 3
    assert same_label_sets(label_set, tmp_path / "public")


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_an_overwriting_that_is_killed_leaves_no_manifest_over_new_files(
    label_set, tar_label_set, tmp_path, monkeypatch, kind
):
    """The old one goes first, so that nobody reads it together with new files."""
    upload, seen = Remote.upload, []

    def cut(self, file, name, **digest):
        seen.append(self.size("manifest.json"))
        if len(seen) >= 4:
            raise Cut
        upload(self, file, name, **digest)

    with s3_store(monkeypatch, "bucket") if kind == "s3" else nullcontext():
        place = "s3://bucket/public" if kind == "s3" else str(tmp_path / "public")
        fd.publish(tar_label_set, place, card=CARD)
        fd.publish(label_set, place, card=CARD, overwrite=True, dry_run=True)
        assert fd.open_labels(place).identity == fd.open_labels(tar_label_set).identity
        with monkeypatch.context() as patch:
            patch.setattr(Remote, "upload", cut)
            with pytest.raises(Cut):
                fd.publish(label_set, place, card=CARD, overwrite=True, threads=1)
        assert set(seen) == {None}
        message = "it comes last" if kind == "s3" else "interrupted here.* run the same command again"
        for read in (fd.open_labels, fd.verify):
            with pytest.raises(ManifestError, match=message):
                read(place)
        assert fd.publish(label_set, place, card=CARD).skipped == 3 + 1, "and the rejects, of which neither has any"
        assert fd.open_labels(place).identity == fd.open_labels(label_set).identity


def test_who_reads_a_folder_that_is_overwritten_keeps_the_old_file(label_set, tar_label_set, tmp_path):
    """As a loader that has it mapped: written over in place, it would change or end under its reader."""
    fd.publish(tar_label_set, str(tmp_path / "public"), card=CARD)
    with (tmp_path / "public/README.md").open("rb") as reader:
        old = (tmp_path / "public/README.md").read_bytes()
        fd.publish(label_set, str(tmp_path / "public"), card=CARD, overwrite=True)
        assert reader.read() == old != (tmp_path / "public/README.md").read_bytes()
    assert not list((tmp_path / "public").rglob("*.tmp"))


def test_what_another_label_set_was_sent_over_is_sent_again(tar_label_set, tmp_path, monkeypatch):
    """Tars of the same images have the same size, whatever their labels are."""
    place, other = str(tmp_path / "public"), shutil.copytree(tar_label_set, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    for entry in (file for shard in manifest["shards"] for file in shard["files"]):
        tar = other / entry["path"]
        tar.write_bytes(tar.read_bytes()[:-1] + b"?")
        entry["sha256"] = sha256_file(tar)
    (other / "manifest.json").write_text(json.dumps(manifest))

    def stop_before_the_manifest(label_set):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "finish", lambda store: None)
            patch.setattr(Store, "missing", no_manifest)
            fd.publish(label_set, place, card=CARD)

    real = Store.missing

    def no_manifest(store, files):
        return [file for file in real(store, files) if file.name != "manifest.json"]

    stop_before_the_manifest(tar_label_set)
    stop_before_the_manifest(other)
    fd.publish(tar_label_set, place, card=CARD)
    assert same_label_sets(tar_label_set, tmp_path / "public")


def test_files_that_arrived_damaged_are_found(label_set, tmp_path, monkeypatch):
    real = Remote.transport.fget

    def damaging(self):
        transport = real(self)
        write = transport.write

        def rotten(name, file):
            write(name, file)
            there = tmp_path / "public" / name
            there.write_bytes(there.read_bytes()[:-1] + b"?")

        transport.write = rotten
        return transport

    monkeypatch.setattr(Remote, "transport", property(damaging))
    with pytest.raises(RemoteError, match="what arrived is not what was sent"):
        fd.publish(label_set, str(tmp_path / "public"), card=CARD, retries=QUICK)
    assert not (tmp_path / "public/manifest.json").exists()


def test_what_is_refused(label_set, tar_label_set, tmp_path):
    damaged = shutil.copytree(label_set, tmp_path / "damaged")
    shard = damaged / "labels/00001-001.parquet"
    shard.write_bytes(shard.read_bytes()[:-4] + b"1RAP")
    with pytest.raises(PublishError, match=r"1 fault, the first is: labels/00001-001.parquet: the bytes are not those"):
        fd.publish(damaged, str(tmp_path / "public"), card=CARD)
    with pytest.raises(ManifestError, match=r"no manifest.json"):
        fd.publish(tmp_path, str(tmp_path / "public"), card=CARD)
    with pytest.raises(UsageError, match="HTTP servers are read only"):
        fd.publish(label_set, "http://127.0.0.1/x", card=CARD)
    fd.publish(label_set, str(tmp_path / "public"), card=CARD)
    with pytest.raises(PublishError, match="holds another label set"):
        fd.publish(tar_label_set, str(tmp_path / "public"), card=CARD)
    with pytest.raises(UsageError, match="--image-license"):
        fd.publish(tar_label_set, str(tmp_path / "tars"), card=fd.CardFields(name="x", license="mit"))


def test_pull_the_first_crop_blocks_and_some_shards(label_set, tmp_path):
    result = fd.pull(str(label_set), tmp_path / "part", crops=3, shards=[0, 2])
    assert (result.manifest.num_crops, result.manifest.num_images) == (4, 12)
    assert fd.verify(tmp_path / "part").ok
    whole, part = fd.open_labels(label_set), fd.open_labels(tmp_path / "part")
    assert part.shard(1).keys == whole.shard(2).keys
    assert np.array_equal(part.shard(1).class_prob, whole.shard(2).class_prob[:, :4])
    assert part.statistics.crops == 48
    assert fd.pull(str(label_set), tmp_path / "part", crops=3, shards=[0, 2]).fetched == 0
    with pytest.raises(PublishError, match="holds another label set"):
        fd.pull(str(label_set), tmp_path / "part")
    for wrong in ({"crops": 11}, {"shards": [3]}):
        with pytest.raises(UsageError):
            fd.pull(str(label_set), tmp_path / "other", **wrong)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html>\n<html><body>Hello", b"\n <html lang='en'>", b"<!doctype HTML>"])
def test_a_servers_start_page_is_no_card_no_licence_and_no_signature(label_set, tmp_path, page):
    """Published again, it would be a licence and a signature of nothing."""
    with serve(label_set) as server:
        server.start_page = page
        for name, part in {"whole": {}, "part": {"shards": [0]}}.items():
            fd.pull(server.url, tmp_path / name, retries=QUICK, **part)
            there = {path.name for path in (tmp_path / name).iterdir()}
            assert there == {"labels", "manifest.json", "rejects.parquet"}
            assert not any(page in path.read_bytes() for path in (tmp_path / name).rglob("*.*"))


def test_a_pull_goes_on_after_dropped_connections_and_a_kill(label_set, tmp_path):
    with serve(label_set) as server:
        server.drop_after = 1000
        server.refuse["labels/00002-002.parquet"] = 403
        with pytest.raises(RemoteError, match="access denied"):
            fd.pull(server.url, tmp_path / "mine", retries=QUICK, threads=1)
        assert not (tmp_path / "mine/manifest.json").exists()
        server.refuse.clear()
        before = sum(server.sent.values())
        fd.pull(server.url, tmp_path / "mine", retries=QUICK)
        once = sum(path.stat().st_size for path in label_set.rglob("*") if path.is_file())
        assert sum(server.sent.values()) <= once + 2 * (label_set / "manifest.json").stat().st_size
        assert sum(server.sent.values()) - before < once / 2
    assert same_label_sets(label_set, tmp_path / "mine")


def pull_until_killed(url, out):
    fd.pull(url, out, threads=1, retries=QUICK)


def test_of_two_pulls_into_one_folder_the_second_is_told(label_set, tmp_path, quick_process):
    """Until the first one dies; then the next goes on where it was, also in the file that it was in."""
    out, last = tmp_path / "mine", "labels/00002-002.parquet"
    half, asked, dead = (label_set / last).stat().st_size // 2, threading.Event(), threading.Event()

    def keep_waiting(name):
        """With the rest of the last file, once."""
        if name == last and [path for _, path, _ in server.requests].count(last) == 2 and not asked.is_set():
            asked.set()
            dead.wait(60)

    with serve(label_set) as server:
        server.drop_after, server.before_body = half, keep_waiting
        process = quick_process.Process(target=pull_until_killed, args=(server.url, out))
        process.start()
        try:
            assert asked.wait(60)
            with pytest.raises(PublishError, match=rf"mine: another pull works here \(process {process.pid}\); wait"):
                fd.pull(server.url, out, retries=QUICK)
        finally:
            process.kill()
            process.join()
            dead.set()
        assert not (out / "manifest.json").exists() and part_of(out / last).stat().st_size == half
        server.drop_after = None
        assert fd.pull(server.url, out, retries=QUICK).fetched == 2
        assert [asked for _, name, asked in server.requests if name == last][-1] == f"bytes={half}-"
    assert same_label_sets(label_set, out) and not fd.verify(out).warnings


def test_more_shards_than_a_folder_takes(photos, tiny_teachers, tmp_path, monkeypatch):
    """Built, extended, verified, published, pulled and converted with files in several folders."""
    monkeypatch.setattr(rows, "SHARDS_PER_FOLDER", 2)
    settings = {"teachers": [tiny_teachers], "images_per_shard": 4, "device": "cpu", "top_k": 4}
    fd.build(photos, tmp_path / "set", crops=2, crops_per_block=2, **settings)
    fd.build(photos, tmp_path / "set", crops=4, extend=True, **settings)
    paths = [file.path for shard in read_manifest(tmp_path / "set").shards for file in shard.files]
    assert paths[:4] == ["labels/00000-000.parquet", "labels/00000-001.parquet", *paths[2:4]]
    assert paths[4:6] == ["labels/001/00002-000.parquet", "labels/001/00002-001.parquet"]
    fd.publish(tmp_path / "set", str(tmp_path / "public"), card=CARD)
    fd.pull(str(tmp_path / "public"), tmp_path / "mine")
    fd.convert(tmp_path / "mine", tmp_path / "tars", layout="webdataset", images=photos)
    assert (tmp_path / "tars/shards/002/00004.tar").exists()
    for folder in ("mine", "tars"):
        assert fd.verify(tmp_path / folder).ok and same_label_sets(tmp_path / "set", tmp_path / folder)


def test_a_pull_into_a_file(label_set, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UsageError, match="notes: is a file; give a folder"):
        fd.pull(str(label_set), tmp_path / "notes")


def test_the_card(label_set, tmp_path):
    fd.publish(label_set, str(tmp_path / "public"), card=CARD)
    text = (tmp_path / "public/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    assert [config["config_name"] for config in front["configs"]] == ["crops-000", "crops-001", "crops-002"]
    for expected in ("20 images", "200 crops", "p_max", "extreme_hard", "open_labels", "Licence", "Citation"):
        assert expected in text
    own = shutil.copytree(label_set, tmp_path / "own")
    (own / "README.md").write_text("our own words")
    fd.publish(own, str(tmp_path / "public2"), card=CARD)
    assert (tmp_path / "public2/README.md").read_text() == "our own words"


@pytest.mark.filterwarnings("ignore")
def test_mlcroissant_validates_and_loads(label_set, tmp_path):
    import mlcroissant

    fd.publish(label_set, str(tmp_path / "public"), card=CARD)
    dataset = mlcroissant.Dataset(jsonld=str(tmp_path / "public/croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    records = list(dataset.records("labels-00000"))
    assert len(records) == 8
    assert records[0]["labels-00000/key"].decode() == fd.open_labels(label_set).shard(0).keys[0]
    assert (
        list(records[0]["labels-00000/class_index"])[:4]
        == fd.open_labels(label_set).shard(0).class_index[0, 0].tolist()
    )


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets_reads_the_files(label_set, tmp_path):
    import datasets

    fd.publish(label_set, str(tmp_path / "public"), card=CARD)
    files = sorted(str(path) for path in (tmp_path / "public/labels").glob("*-000.parquet"))
    table = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))["train"]
    assert table["key"][:] == list(fd.open_labels(label_set).keys())


def test_stock_webdataset_streams_over_http(tar_label_set, tmp_path):
    import webdataset

    with serve(tar_label_set) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = webdataset.WebDataset(f"{server.url}/shards/00000.tar", shardshuffle=False, empty_check=False)
        keys = [sample["__key__"] for sample in stream]
    assert keys == fd.open_labels(tar_label_set).shard(0).keys


def test_the_commands(label_set, tmp_path, capsys):
    place = str(tmp_path / "public")
    assert run(["publish", str(label_set), place]) == 2
    assert "give the licence of the labels, such as --license" in capsys.readouterr().err
    assert run(["publish", str(label_set), place, "--license", "mit", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "labels/00000-000.parquet" in listed
    assert "would be sent" in listed
    assert not (tmp_path / "public").exists()
    assert run(["publish", str(label_set), place, "--license", "mit"]) == 0
    assert "13 files" in capsys.readouterr().out
    assert run(["publish", str(label_set), place]) == 0
    assert "already published, all 13 files" in capsys.readouterr().out
    for said in ("3 files fetched", "already complete"):
        assert run(["pull", place, str(tmp_path / "mine"), "--crops", "4", "--shards", "0-1"]) == 0
        out = capsys.readouterr().out
        assert "16 images with 4 crops" in out and said in out
    assert run(["verify", str(tmp_path / "mine")]) == 0
    for shards in ("one", "0-", "\u00b2", "0-99999999999"):
        assert run(["pull", place, str(tmp_path / "x"), "--shards", shards]) == 2
    assert json.loads((tmp_path / "mine/manifest.json").read_text())["pulled_from"]["shards"] == [0, 1]


def card_of(label_set, out):
    fd.publish(label_set, str(out), card=fd.CardFields(license="mit"))
    return (out / "README.md").read_text()


def test_a_part_that_was_added_to_is_called_no_part(label_set, photos, tiny_teachers, tmp_path):
    """Neither after a merge nor after an extension: the card would say that it holds more crops than the whole."""
    part, second = tmp_path / "part", tmp_path / "second"
    fd.pull(str(label_set), part, crops=4)
    card = card_of(part, tmp_path / "0")
    note = "This is a part of a larger label set"
    assert f"**{note}**: {len(fd.open_labels(part))} images with 4 crops each, out of" in card
    assert str(tmp_path) not in card and str(label_set) not in card, "nobody can use a path on this disk"
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    fd.build(photos, second, teachers=teachers, **{**SMALL, "seed": 5})
    fd.merge([part, second], tmp_path / "merged")
    assert note not in card_of(tmp_path / "merged", tmp_path / "1")
    fd.build(photos, part, teachers=teachers, crops=12, extend=True, device="cpu")
    assert fd.open_labels(part).num_crops == 12
    assert note not in card_of(part, tmp_path / "2")


def test_a_card_that_was_edited_is_its_authors_text(label_set, tmp_path):
    """People edit the card on the hub, or pull, edit and publish: their text must not vanish at the next publish."""
    source, public = shutil.copytree(label_set, tmp_path / "source"), tmp_path / "public"
    fd.publish(source, str(public), card=CARD)
    card = (public / "README.md").read_text()
    edited = card.replace("## Uses and limits", "## Our results\n\n75 %\n\n## Uses and limits")
    (public / "README.md").write_text(edited)
    assert fd.publish(source, str(public)).sent == ()
    assert (public / "README.md").read_text() == edited
    with pytest.raises(PublishError, match=r"README.md is not the generated one, or was edited, so author cannot be"):
        fd.publish(source, str(public), card=fd.CardFields(author="Lab"))
    same = replace(CARD, license="CC-BY-4.0")
    assert fd.publish(source, str(public), card=same).sent == (), "what it says already is no change"
    for own in (edited, card + "\nMore.\n", "Mine"):
        (source / "README.md").write_text(own)
        fd.publish(source, str(public), card=fd.CardFields(license="mit"))
        assert (public / "README.md").read_text() == own
    (source / "README.md").write_bytes(card.replace("\n", "\r\n").encode())
    fd.publish(source, str(public), card=CARD, overwrite=True)
    assert (public / "README.md").read_text() == card, "other line ends are no edit"
