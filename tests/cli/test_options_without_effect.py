"""An option that the rest of the command makes ineffective is an error that names it; a dry run only mentions it."""

from __future__ import annotations

import json

import pytest

import ferkd_data as fd

TINY = ("--teacher", "python:ferkd_tiny_teachers:first", "--crops", "4", "--top-k", "3", "--device", "cpu")
KINDS = ("--crop-kinds", "far:n=4,scale=0.5..1", "--crop-kinds", "near:n=8,scale=0.1..0.2,hflip=0")
USELESS = {
    "scale beside kinds": (["build", "PHOTOS", "OUT", *TINY[:2], *KINDS, "--scale", "0.3", "1"], "scale (--scale)"),
    "a GPU's share on a CPU": (
        ["build", "PHOTOS", "OUT", *TINY, "--engine", "ray", "--gpus-per-teacher", "0.5"],
        "--gpus-per-teacher",
    ),
    "images for labels alone": (["convert", "LABELS", "OUT", "--layout", "parquet", "--images", "PHOTOS"], "--images"),
    "images for tars with images": (
        ["convert", "TARS", "OUT", "--layout", "webdataset", "--images", "PHOTOS"],
        "--images",
    ),
    "blocks of converted tars": (
        ["convert", "LABELS", "OUT", "--layout", "webdataset", "--images", "PHOTOS", "--crops-per-block", "2"],
        "--crops-per-block",
    ),
    "a device for an export": (["bench", *TINY[:2], "--export", "OUT", "--device", "cpu"], "--device"),
    "sizes for an export": (
        ["bench", *TINY[:2], "--export", "OUT", "--batch-sizes", "4", "--threads", "1", "--seconds", "2"],
        "--batch-sizes and --threads and --seconds",
    ),
    "no compiling for an export": (["bench", *TINY[:2], "--export", "OUT", "--no-compile"], "--compile"),
    "a licence's name beside a known licence": (
        ["publish", "LABELS", "OUT", "--license", "mit", "--license-name", "ours"],
        "--license-name",
    ),
    "a licence's address beside a known licence": (
        ["publish", "LABELS", "OUT", "--license", "mit", "--license-link", "https://example.org/licence"],
        "--license-link",
    ),
}


@pytest.mark.parametrize("case", USELESS)
def test_it_is_refused_and_nothing_is_written(case, call, label_set, tar_label_set, photos, tmp_path, tiny_teachers):
    command, named = USELESS[case]
    places = {"LABELS": label_set, "TARS": tar_label_set, "PHOTOS": photos, "OUT": tmp_path / "out"}
    status, out, err = call(*(places.get(word, word) for word in command))
    assert (status, out) == (2, "") and named in err
    assert not list(tmp_path.iterdir())


def test_an_option_that_some_kinds_leave_open_is_used(call, photos, tmp_path, tiny_teachers):
    assert call("build", photos, tmp_path / "out", *TINY[:2], *KINDS, "--hflip", "1", "--device", "cpu")[0] == 0
    kinds = fd.open_labels(tmp_path / "out").crop_kinds
    assert [kind.distribution.hflip for kind in kinds] == [1, 0]


def test_a_dry_run_says_which_options_it_does_not_use(call, photos, tmp_path, tiny_teachers):
    command = ("build", photos, tmp_path / "out", *TINY, "--dry-run")
    files = ("--report", tmp_path / "a.html", "--log-json", tmp_path / "a.jsonl", "--metrics", tmp_path / "a.prom")
    status, _, err = call(*command, *files, "--overwrite")
    assert status == 0 and "note: --dry-run does not use --log-json and --metrics and --report and --overwrite" in err
    assert not list(tmp_path.iterdir())
    assert "does not use" not in call(*command)[2]


def test_a_dry_run_stops_where_the_build_would(call, make_photos, tmp_path, tiny_teachers):
    folder = make_photos(tmp_path / "photos")
    (folder / "class0/photo0000.jpg").write_bytes(b"broken")
    command = ("build", folder, tmp_path / "out", *TINY, "--dry-run")
    assert call(*command)[0] == 0
    status, _, err = call(*command, "--on-error", "fail")
    assert status == 1 and "class0/photo0000" in err


def test_the_files_of_watchers_are_written_for_a_build_that_had_ended(call, photos, tmp_path, tiny_teachers):
    """The report was missing, the log was empty, and the metrics said for ever that the build runs."""
    command = ("build", photos, tmp_path / "out", *TINY)
    assert call(*command)[0] == 0
    page, log, metrics = (tmp_path / name for name in ("report.html", "log.jsonl", "build.prom"))
    status, out, _ = call(*command, "--report", page, "--log-json", log, "--metrics", metrics)
    assert status == 0 and "already finished" in out
    assert page.stat().st_size > 10_000
    assert "ferkd_build_running 0" in metrics.read_text()
    (line,) = log.read_text().splitlines()
    event = json.loads(line)
    assert (event["event"], event["out"], event["images"]) == ("build_finished", str(tmp_path / "out"), 20)


def test_the_same_for_a_part_of_a_build_that_had_ended(call, photos, tmp_path, tiny_teachers):
    command = ("build", photos, tmp_path / "out", *TINY)
    metrics = tmp_path / "build.prom"
    assert call(*command)[0] == 0
    assert call(*command, "--part", "1/2", "--metrics", metrics)[0] == 0
    assert "ferkd_build_running 0" in metrics.read_text()


def test_fields_that_the_publisher_s_own_text_leaves_out_are_named(call, copy, tmp_path):
    (copy / "README.md").write_text("# Ours\n")
    command = ("publish", copy, tmp_path / "public", "--license", "mit", "--author", "Lab")
    status, _, err = call(*command, "--source-dataset", "imagenet-1k", "--dry-run")
    assert status == 0 and "source_datasets will be read nowhere" in err
    # The others stand in croissant.json.
    assert "read nowhere" not in call(*command)[2]


def test_top_k_of_an_import_is_mentioned_where_the_files_have_their_own(call, label_set, photos, tmp_path):
    fd.export_fkd(label_set, tmp_path / "fkd")
    command = (
        "convert",
        tmp_path / "fkd",
        tmp_path / "out",
        "--from",
        "fkd",
        "--images",
        photos,
        "--num-classes",
        "10",
    )
    status, _, err = call(*command, "--teacher", "x", "--top-k", "3")
    assert status == 0 and "note: --top-k 3 is for full distributions; these files hold 4 classes" in err


def test_a_range_of_shards_that_ends_before_it_begins_is_refused(call, label_set, tmp_path):
    """It named no shard, and beside others it was ignored."""
    status, _, err = call("pull", label_set, tmp_path / "part", "--shards", "2-1,0")
    assert status == 2 and "--shards has the range 2-1, which ends before it begins; write 1-2" in err
    assert not (tmp_path / "part").exists()


def test_a_manifest_given_for_its_folder_is_no_folder_without_one(call, label_set, tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))
    status, _, err = call("info", label_set / "manifest.json")
    assert status == 1 and "manifest.json: is a file; give the folder of a label set" in err
    status, _, err = call("pull", label_set / "manifest.json", tmp_path / "part")
    assert status == 1 and "is a file; give" in err


def test_a_report_replaces_no_file_of_another_kind(call, copy, photos, tmp_path, tiny_teachers):
    """`report LABELS SOURCE.tar` replaced the tar with a page."""
    tar, page, listed = tmp_path / "photos.tar", tmp_path / "page.html", tmp_path / "list.csv"
    tar.write_bytes(b"photos" * 1000)
    for command in (
        ("report", copy, tar),
        ("report", copy, page, "--csv", tar),
        ("build", photos, tmp_path / "out", *TINY, "--report", tar),
        ("build", photos, tmp_path / "out", *TINY, "--metrics", tar),
        ("bench", *TINY[:2], "--export", tar),
    ):
        status, _, err = call(*command)
        assert status == 2 and "photos.tar: exists and is no " in err
    assert tar.read_bytes() == b"photos" * 1000 and not page.exists() and not (tmp_path / "out").exists()
    # Its own it replaces.
    for _ in range(2):
        assert call("report", copy, page, "--csv", listed)[0] == 0
    assert call("build", photos, tmp_path / "out", *TINY, "--report", page, "--metrics", tmp_path / "m.prom")[0] == 0
    assert call("build", photos, tmp_path / "out", *TINY, "--report", page, "--metrics", tmp_path / "m.prom")[0] == 0


@pytest.mark.parametrize("text", ["MIT License", "CC BY 4.0", "see LICENSE", "mit\nlicense: x"])
def test_a_licence_that_is_no_identifier_is_refused(text, call, label_set, tmp_path):
    """The hub takes identifiers alone, and says so once everything has been sent."""
    status, _, err = call("publish", label_set, tmp_path / "public", "--license", text)
    assert status == 2 and "must be an identifier" in err and "--license other and --license-name" in err
    assert not (tmp_path / "public").exists()
    assert call("publish", label_set, tmp_path / "public", "--license", "CC-BY-4.0", "--dry-run")[0] == 0
