"""Publishing to the hub with its own client library, against a stand-in of the endpoints it uses."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hub_stand_in import stand_in_hub
from label_sets import same_label_sets

import ferkd_data as fd
from ferkd_data.errors import MissingExtraError, PublishError, RemoteError
from ferkd_data.exchange import destinations
from ferkd_data_cli.main import run

CARD = fd.CardFields(name="tiny labels", license="cc-by-4.0", image_license="cc0-1.0", published="2026-11-24")
URL = "hf://datasets/org/name"

# Of the library's own way to call its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch):
    with stand_in_hub(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_to_the_hub_and_back(layout, request, hub, tmp_path):
    folder = request.getfixturevalue(layout)
    told = []
    result = fd.publish(folder, URL, card=CARD, on_progress=told.append)
    assert [len(names) for names in hub.commits] == [len(result.sent) - 1, 1]
    assert hub.commits[-1] == ["manifest.json"]
    assert [progress.files for progress in told] == list(range(len(result.sent)))
    assert (told[-1].files, told[-1].bytes) == (told[-1].files_total, told[-1].bytes_total)
    labels = fd.open_labels(URL)
    assert labels.identity == fd.open_labels(folder).identity
    assert np.array_equal(labels.shard(1).class_prob, fd.open_labels(folder).shard(1).class_prob)
    fd.pull(URL, tmp_path / "mine")
    assert same_label_sets(folder, tmp_path / "mine")
    again = fd.publish(folder, URL, card=CARD)
    assert not again.sent and again.skipped == len(result.sent) and len(hub.commits) == 2


def test_into_a_folder_of_a_repository(label_set, hub):
    fd.publish(label_set, f"{URL}/sets/tiny", card=CARD)
    assert all(name.startswith("sets/tiny/") for name in hub.files)
    assert fd.open_labels(f"{URL}/sets/tiny").identity == fd.open_labels(label_set).identity


def test_many_files_are_few_commits(label_set, hub, monkeypatch):
    monkeypatch.setattr(destinations, "COMMIT_FILES", 5)
    fd.publish(label_set, URL, card=CARD)
    assert [len(names) for names in hub.commits] == [5, 5, 2, 1]
    monkeypatch.setattr(destinations, "MAX_COMMITS", 2)
    hub.files.clear()
    hub.commits.clear()
    fd.publish(label_set, URL, card=CARD)
    assert [len(names) for names in hub.commits] == [6, 6, 1]


def test_what_arrived_before_an_interruption_is_not_sent_again(label_set, hub):
    hub.objects_left = 4
    with pytest.raises(RemoteError, match=r"hf://datasets/org/name: .*run the same command again"):
        fd.publish(label_set, URL, card=CARD, threads=1)
    assert not hub.files and len(hub.objects) == 4
    hub.objects_left = 10 - 4
    fd.publish(label_set, URL, card=CARD)
    assert fd.open_labels(URL).identity == fd.open_labels(label_set).identity
    damaged = "labels/00001-001.parquet"
    hub.files[damaged] = b"?" + hub.files[damaged][1:]
    result = fd.publish(label_set, URL, card=CARD)
    assert [file.name for file in result.sent] == [damaged]


def test_files_that_arrived_damaged_are_found(label_set, hub):
    hub.rotten = True
    with pytest.raises(RemoteError, match=r"parquet: what arrived is not what was sent"):
        fd.publish(label_set, URL, card=CARD)
    assert "manifest.json" not in hub.files


def test_a_place_that_is_taken(label_set, tar_label_set, hub):
    fd.publish(label_set, URL, card=CARD)
    with pytest.raises(PublishError, match="holds another label set"):
        fd.publish(tar_label_set, URL, card=CARD)
    fd.publish(tar_label_set, URL, card=CARD, overwrite=True)
    assert fd.open_labels(URL).identity == fd.open_labels(tar_label_set).identity


@pytest.mark.parametrize("folder", ["", "/sets/tiny"])
def test_an_old_manifest_goes_in_the_commit_that_brings_the_first_new_files(
    label_set, tar_label_set, hub, monkeypatch, folder
):
    monkeypatch.setattr(destinations, "COMMIT_FILES", 4)
    fd.publish(label_set, f"{URL}{folder}", card=CARD)
    below = folder[1:] + "/" * bool(folder)
    hub.files[f"{below}manifest.json.sig"] = b"of the old one"
    hub.commits.clear()
    fd.publish(tar_label_set, f"{URL}{folder}", card=CARD, overwrite=True)
    first, *between, last = [[name.replace(below, "") for name in names] for names in hub.commits]
    assert first[:2] == ["-manifest.json", "-manifest.json.sig"] and len(first) == 2 + 4
    assert between and not any("manifest.json" in name for names in between for name in names)
    assert last == ["manifest.json"] and f"{below}manifest.json.sig" not in hub.files


def test_only_the_manifest_is_another(label_set, hub, tmp_path):
    """Nothing is sent before it, and a signature of the old one goes all the same."""
    fd.publish(label_set, URL, card=CARD)
    hub.files["manifest.json"] += b" "
    hub.files["manifest.json.sig"] = b"of the old one"
    result = fd.publish(label_set, URL, card=CARD, overwrite=True)
    assert [file.name for file in result.sent] == ["manifest.json"]
    assert hub.commits[2:] == [["-manifest.json", "-manifest.json.sig"], ["manifest.json"]]


def test_a_token_that_may_not_write(label_set, monkeypatch):
    with stand_in_hub(monkeypatch, token="hf_wrong") as hub:
        with pytest.raises(RemoteError, match=r"access denied \(401\); the token must be allowed .*HF_TOKEN") as caught:
            fd.publish(label_set, URL, card=CARD)
        assert caught.value.status == 401 and not hub.files


def test_the_library_is_missing(label_set, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"publishing to the hub needs .* pip install 'ferkd-data\[hub\]'"):
        fd.publish(label_set, URL, card=CARD)


def test_the_command(label_set, hub, capsys):
    assert run(["publish", str(label_set), URL, "--license", "mit", "--dry-run"]) == 0
    assert "labels/00000-000.parquet" in capsys.readouterr().out
    assert not hub.exists and not hub.objects
    assert run(["publish", str(label_set), URL, "--license", "mit"]) == 0
    assert f"{URL}: 13 files" in capsys.readouterr().out
    assert b"hf://datasets/org/name" in hub.files["README.md"]
