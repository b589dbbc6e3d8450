"""A label set on a hostile server cannot reach this host's files, other servers, or more disk than it announced."""

from __future__ import annotations

import http.server
import pickle
import resource
import shutil
import threading
import time
import warnings

import pytest
from attacks.odd_servers import ODD, odd_server, says, self_signed, trickles
from label_sets import edit_manifest
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import ManifestError, RemoteError, UsageError
from ferkd_data.format import out_folder
from ferkd_data.label_set import opening, read_remote_manifest
from ferkd_data.remote import Retries, open_remote
from ferkd_data_cli.main import run


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
    with serve(copy) as server, pytest.raises(ManifestError, match="is not a path for shard files"):
        fd.pull(server.url, tmp_path / "mine")


def test_a_link_waiting_in_the_folder_is_not_followed(copy, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/labels").symlink_to(outside)
    with serve(copy) as server:
        with pytest.raises(fd.FerkdError, match="holds 'labels'"):
            fd.pull(server.url, tmp_path / "mine")
        # As if a pull had been interrupted there.
        out_folder.write_work(tmp_path / "mine", {"command": "pull"})
        with pytest.raises(fd.FerkdError, match="leads outside"):
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


PATIENT = Retries(timeout=20)
"""As users have it, but for the time that a server may be silent."""


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.parametrize("name", ODD)
def test_a_server_that_does_not_answer_as_it_should_is_asked_once(name, tmp_path):
    """And no more of its answer is read than says what it is."""
    answer, message = ODD[name]
    before = peak_mb()
    with odd_server(answer) as server:
        with pytest.raises((RemoteError, ManifestError), match=message):
            read_remote_manifest(open_remote(f"http://{server.place}/x", PATIENT))
        assert server.connections <= (4 if "redirect" in name else 1)
    assert peak_mb() < before + 50


TRICKLES = {
    "in its file": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
    "in a file without a length": b"HTTP/1.1 200 OK\r\n\r\n",
    "in its headers": b"HTTP/1.1 200 OK\r\nX: ",
    "in its first line": b"HTT",
}


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("name", TRICKLES)
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(name, tls, tmp_path):
    """The time limit of users is 60 s; a byte comes ten times within this one, so that it alone never ends the wait."""
    quick = Retries(attempts=2, first_wait=0.001, timeout=2)
    with odd_server(trickles(TRICKLES[name], 0.2), self_signed(tmp_path) if tls else None) as server:
        remote = open_remote(f"{'https' if tls else 'http'}://{server.place}/x", quick)
        if tls:
            remote.transport._pool.connection_pool_kw["cert_reqs"] = "CERT_NONE"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RemoteError, match=r"also after 2 attempts|does not answer in HTTP"):
                read_remote_manifest(remote)
        assert server.connections <= 2


def test_what_trickled_is_kept_and_a_slow_taker_is_no_stall(label_set, tmp_path):
    with odd_server(trickles(TRICKLES["in its file"], 0.05)) as server:
        remote = open_remote(f"http://{server.place}", Retries(attempts=2, first_wait=0.001, timeout=1))
        with pytest.raises(RemoteError, match=r"the server sent \d+ bytes in \d+ s, also after 2 attempts"):
            remote.fetch("x", tmp_path / "x", size=1_000_000)
    assert (tmp_path / ".x.part").stat().st_size > 0
    with serve(label_set) as server:
        remote = open_remote(server.url, Retries(attempts=1, timeout=0.5))
        _, chunks = remote.transport.read("manifest.json", 0)
        got = b""
        for chunk in chunks:
            got += chunk
            time.sleep(0.7)
        assert got == (label_set / "manifest.json").read_bytes()


def test_a_certificate_that_nobody_vouches_for(tmp_path):
    with odd_server(says(b""), self_signed(tmp_path)) as server:
        with pytest.raises(RemoteError, match=r"the certificate of 127.0.0.1:\d+ is not trusted \(self.signed cert"):
            read_remote_manifest(open_remote(f"https://{server.place}/x", PATIENT))
        assert server.connections == 1


def test_https_where_none_is_spoken():
    with odd_server(says(b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n")) as server:
        with pytest.raises(RemoteError, match="does it speak HTTPS on this port"):
            read_remote_manifest(open_remote(f"https://{server.place}/x", PATIENT))
        assert server.connections == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/x", "127.0.0.1:9 cannot be reached .*refused.*check the URL and the network"),
        ("http://no-such-host.invalid/x", r"no-such-host.invalid cannot be reached \(unknown host"),
        ("http://127.0.0.1:99999/x", "99999"),
        ("http:///x", "http:///x"),
    ],
)
def test_places_where_nobody_is(url, message, caplog):
    with pytest.raises((RemoteError, UsageError), match=message):
        fd.open_labels(url)
    assert not caplog.records, "nothing is tried again"


@pytest.mark.parametrize("scheme", ["s3"])
def test_a_store_that_nobody_serves(scheme, monkeypatch, caplog):
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(RemoteError, match=r"the store cannot be reached .*check the URL and the network"):
        fd.open_labels("s3://bucket/x")
    assert not caplog.records


def test_who_has_answered_once_may_be_restarting(label_set, tmp_path, caplog):
    """A refused connection passes then; and each attempt after the first is announced."""
    quick = Retries(attempts=3, first_wait=0.001, timeout=5)
    with serve(label_set) as server:
        remote = open_remote(server.url, quick)
        read_remote_manifest(remote)
    server.server_close()
    # Its thread would still answer on the connection that is open.
    remote.transport._pool.clear()
    for again in (remote, pickle.loads(pickle.dumps(remote))):
        caplog.clear()
        with pytest.raises(RemoteError, match="also after 3 attempts"):
            again.read("x", max_bytes=1)
        said = [record.getMessage() for record in caplog.records if record.name == "ferkd_data.remote"]
        assert [line.rpartition("; ")[2] for line in said] == ["trying again (2 of 3)", "trying again (3 of 3)"]


def test_the_command_line_says_what_it_tries_again(label_set, tmp_path, capsys):
    with serve(label_set) as server:
        server.unavailable = 1
        assert run(["info", server.url]) == 0
    assert f"ferkd-data: {server.url}/manifest.json: the server answered 503; trying again (2 of 8)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("lost", [1, 1000])
def test_a_file_that_is_shorter_than_listed_is_not_waited_for(copy, tmp_path, ranges, lost, caplog):
    shard = copy / "labels/00000-000.parquet"
    with serve(copy) as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path / "cache")
        shard.write_bytes(shard.read_bytes()[:-lost])
        server.ranges = ranges
        with pytest.raises(RemoteError, match=r"the manifest lists|that the manifest lists"):
            labels.shard(0)
        assert len(server.requests) <= 3


def test_a_token_is_not_sent_to_another_server(label_set, tmp_path, monkeypatch):
    (tmp_path / "www/datasets/org/tiny/resolve").mkdir(parents=True)
    shutil.copytree(label_set, tmp_path / "other")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serve(tmp_path / "other") as other:
        to = f"HTTP/1.1 302 F\r\nContent-Length: 0\r\nLocation: {other.url}/manifest.json\r\n\r\n"
        with odd_server(says(to.encode())) as hub:
            monkeypatch.setenv("HF_ENDPOINT", f"http://{hub.place}")
            assert len(fd.open_labels("hf://datasets/org/tiny", cache_dir=tmp_path / "cache")) == 20
        assert other.authorizations == {None}
