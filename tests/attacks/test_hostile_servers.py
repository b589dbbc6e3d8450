"""A label set on a hostile server cannot reach this host's files, other servers, or more disk than it announced."""

from __future__ import annotations

import http.server
import shutil
import threading

import pytest
from label_sets import edit_manifest
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import ManifestError, RemoteError, UsageError
from ferkd_data.label_set import opening


@pytest.fixture
def copy(label_set, tmp_path):
    return shutil.copytree(label_set, tmp_path / "www")


PATHS = [
    "../outside.parquet",
    "labels/../../outside.parquet",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x",
    "s3://bucket/x",
    "pipe:touch x",
    "labels\\..\\x",
    "labels/\0x",
    "",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("use", ["open", "pull", "verify"])
def test_paths_that_lead_elsewhere(copy, tmp_path, path, use):
    edit_manifest(copy, lambda m: m["shards"][0]["files"][0].update(path=path))
    with serve(copy) as server:
        with pytest.raises(ManifestError, match=r"shards\.0\.files\.0\.path"):
            if use == "open":
                fd.open_labels(server.url, cache_dir=tmp_path / "cache")
            elif use == "pull":
                fd.pull(server.url, tmp_path / "mine")
            else:
                fd.verify(copy)
        assert {name for _, name, _ in server.requests} <= {"manifest.json"}
    assert not (tmp_path / "mine").exists()


def test_a_rejects_path_that_leads_elsewhere(copy, tmp_path):
    edit_manifest(copy, lambda m: m["rejects"].update(path="../../evil.parquet"))
    with serve(copy) as server, pytest.raises(ManifestError, match=r"rejects\.path"):
        fd.pull(server.url, tmp_path / "mine")


@pytest.mark.parametrize("name", ["manifest.json", "README.md", ".build/lock", "labels"])
def test_pull_never_lets_a_shard_take_another_files_place(copy, tmp_path, name):
    edit_manifest(copy, lambda m: m["shards"][0]["files"][0].update(path=name))
    with serve(copy) as server, pytest.raises(ManifestError, match="is not where shard files lie"):
        fd.pull(server.url, tmp_path / "mine")


def test_a_link_waiting_in_the_folder_is_not_followed(copy, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/labels").symlink_to(outside)
    with serve(copy) as server, pytest.raises(fd.FerkdError, match="leads outside"):
        fd.pull(server.url, tmp_path / "mine")
    assert not list(outside.iterdir())


def test_a_manifest_without_end(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_MANIFEST_BYTES", 1000)
    with serve(copy) as server:
        with pytest.raises(RemoteError, match="more than 1000 bytes"):
            fd.open_labels(server.url, cache_dir=tmp_path / "cache")
        with pytest.raises(RemoteError, match="more than 1000 bytes"):
            fd.pull(server.url, tmp_path / "mine")


def test_a_shard_with_another_digest(copy, tmp_path):
    shard = copy / "labels/00000-000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with serve(copy) as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path / "cache")
        with pytest.raises(RemoteError, match="is not the file that the manifest lists"):
            labels.shard(0)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and "locks" not in path.parts]


class Elsewhere(http.server.BaseHTTPRequestHandler):
    target = ""

    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/again/and/again"])
def test_redirects_to_files_or_in_circles(target):
    handler = type("To", (Elsewhere,), {"target": target})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises((RemoteError, UsageError)):
                fd.open_labels(f"http://127.0.0.1:{server.server_address[1]}/x")
        finally:
            server.shutdown()
            thread.join()
