"""Downloads from nginx, as strangers run it: with and without ranges, killed halfway, busy, redirecting."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import urllib.request

import numpy as np
import pytest
from servers import NGINX, nginx

import ferkd_data as fd
from ferkd_data.errors import RemoteError
from ferkd_data.remote import Retries, open_remote, part_of

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")

PATIENT = Retries(attempts=200, first_wait=0.01, longest_wait=0.05, timeout=5)
DATA = np.random.default_rng(0).integers(0, 4, 2_000_000, np.uint8).tobytes()


@pytest.fixture
def server(tmp_path):
    folder, scratch = tmp_path / "www", tmp_path / "nginx"
    for path in (folder, scratch):
        path.mkdir()
    (folder / "a.parquet").write_bytes(DATA)
    with nginx(folder, scratch) as running:
        yield running


def download(server, place, to, data=DATA):
    remote = open_remote(f"{server.url}/{place}", PATIENT)
    remote.download("a.parquet", to, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert to.read_bytes() == data


@pytest.mark.parametrize("place", ["plain", "whole", "moved"])
def test_a_download_and_what_a_killed_one_left(server, tmp_path, place):
    download(server, place, tmp_path / "a")
    part_of(tmp_path / "b").write_bytes(DATA[:1_500_000])
    download(server, place, tmp_path / "b")


def test_it_would_compress_if_it_were_let(server):
    asked = urllib.request.Request(f"{server.url}/plain/a.parquet", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(asked) as response:
        assert response.headers["Content-Encoding"] == "gzip" and len(response.read()) < len(DATA)


def when_half_is_there(part, action):
    def watch():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if part.exists() and part.stat().st_size > 200_000:
                return action()
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_server_that_dies_halfway_and_comes_back(server, tmp_path):
    sizes = []

    def restart():
        server.kill()
        sizes.append(part_of(tmp_path / "a").stat().st_size)
        server.start()

    thread = when_half_is_there(part_of(tmp_path / "a"), restart)
    download(server, "slow", tmp_path / "a")
    thread.join()
    assert len(sizes) == 1 and 0 < sizes[0] < len(DATA)


def test_a_file_replaced_meanwhile_is_taken_from_its_start(server, tmp_path, monkeypatch):
    """nginx gives ETags and obeys If-Range: the new version comes whole, and is hashed once."""
    new = DATA[::-1]
    starts = []
    read = type(open_remote(server.url).transport).read

    def watched(self, name, start):
        first, chunks = read(self, name, start)
        starts.append((start, first))
        return first, chunks

    monkeypatch.setattr(type(open_remote(server.url).transport), "read", watched)

    def replace():
        server.kill()
        (tmp_path / "www/a.parquet").write_bytes(new)
        # nginx makes the ETag of the size and the second.
        os.utime(tmp_path / "www/a.parquet", (1e9, 1e9))
        server.start()

    thread = when_half_is_there(part_of(tmp_path / "a"), replace)
    download(server, "slow", tmp_path / "a", new)
    thread.join()
    (first, (asked, came)) = starts
    assert first == (0, 0) and asked > 0 and came == 0


def test_a_server_that_is_busy_for_a_while(server, tmp_path):
    server.busy.touch()
    timer = threading.Timer(0.3, server.busy.unlink)
    timer.start()
    download(server, "busy", tmp_path / "a")
    timer.join()


def test_what_is_refused(server, tmp_path):
    for place, status in (("secret", 403), ("nowhere", 404)):
        with pytest.raises(RemoteError) as caught:
            download(server, place, tmp_path / "a")
        assert caught.value.status == status


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_a_label_set_read_and_pulled(layout, request, tmp_path):
    folder = request.getfixturevalue(layout)
    (tmp_path / "nginx").mkdir()
    with nginx(folder, tmp_path / "nginx") as server:
        labels = fd.open_labels(f"{server.url}/moved", cache_dir=tmp_path / "cache")
        assert np.array_equal(labels.shard(1).class_prob, fd.open_labels(folder).shard(1).class_prob)
        fd.pull(f"{server.url}/whole", tmp_path / "mine")
        assert fd.verify(tmp_path / "mine").ok
