"""Reading from servers that are slow, forgetful, down for a while or wrong, over real connections."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import time
from dataclasses import replace as replace_fields
from types import SimpleNamespace

import numpy as np
import pytest
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import ManifestError, RemoteError, StorageFullError, UsageError
from ferkd_data.format.manifest import FileEntry
from ferkd_data.label_set import files as shard_cache
from ferkd_data.label_set.files import ShardCache
from ferkd_data.remote import Remote, Retries, hub_headers, open_remote, part_of

# Newer Pythons warn of a fork beside threads, such as the test server's; DataLoaders fork all the same.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
QUICK = Retries(attempts=3, first_wait=0.001, timeout=5)
DATA = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "www"
    (folder / "labels").mkdir(parents=True)
    (folder / "labels/a.parquet").write_bytes(DATA)
    with serve(folder) as running:
        yield running


def download(server, to, **changes):
    asked = {"size": len(DATA), "sha256": DIGEST, **changes}
    open_remote(server.url, QUICK).download("labels/a.parquet", to, **asked)


def test_a_plain_download(server, tmp_path):
    download(server, tmp_path / "x/a")
    assert (tmp_path / "x/a").read_bytes() == DATA
    assert server.sent["labels/a.parquet"] == len(DATA)


def test_a_dropped_connection_is_continued_not_started_again(server, tmp_path):
    server.drop_after = 1_000_000
    download(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA
    assert server.sent["labels/a.parquet"] == len(DATA)
    assert [asked for _, _, asked in server.requests] == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_killed_download_is_continued(server, tmp_path):
    part_of(tmp_path / "a").write_bytes(DATA[:2_900_000])
    download(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA
    assert server.sent["labels/a.parquet"] == 100_000


def test_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    part_of(tmp_path / "a").write_bytes(b"?" * 2_900_000)
    download(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


def test_a_server_that_is_down_for_a_while(server, tmp_path):
    server.unavailable = 2
    download(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA
    server.unavailable = 100
    with pytest.raises(RemoteError, match="the server answered 503, also after 3 attempts"):
        download(server, tmp_path / "b")


def test_rubbish_left_from_another_file_is_dropped(server, tmp_path):
    part_of(tmp_path / "a").write_bytes(b"?" * 2_000_000)
    download(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA
    part_of(tmp_path / "b").write_bytes(b"?" * 5_000_000)
    download(server, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == DATA


def test_a_file_that_changes_under_us(server, tmp_path):
    file = server.folder / "labels/a.parquet"
    server.drop_after, server.etags = 1_500_000, False
    server.before_body = lambda _: file.write_bytes(DATA if file.read_bytes() != DATA else DATA[::-1])
    with pytest.raises(RemoteError, match=r"is not the file that the manifest lists \(SHA-256 differs, twice\)"):
        download(server, tmp_path / "a")
    assert not list(tmp_path.glob("*a*"))


@pytest.mark.parametrize("etags", [True, "stubborn"])
def test_halves_of_two_versions_are_never_joined(server, tmp_path, etags):
    """The new version comes from its start, also from a server that pays no heed to If-Range; nothing is wasted."""
    file, new = server.folder / "labels/a.parquet", DATA[::-1]
    server.drop_after, server.etags = 1_500_000, etags

    def replace(_):
        server.before_body = None
        file.write_bytes(new)

    server.before_body = replace
    download(server, tmp_path / "a", sha256=hashlib.sha256(new).hexdigest())
    assert (tmp_path / "a").read_bytes() == new
    assert server.sent["labels/a.parquet"] <= 1_500_000 + len(new) + (etags == "stubborn") * 1_500_000


def test_nor_when_the_server_is_away_in_between(server):
    """Of a small file nobody knows the digest: only the server's ETag keeps two versions of a manifest apart."""
    file, new = server.folder / "labels/a.parquet", DATA[::-1]
    server.drop_after = 1_500_000

    def replace(_):
        server.before_body, server.unavailable = None, 1
        file.write_bytes(new)

    server.before_body = replace
    patient = replace_fields(QUICK, attempts=6)
    assert open_remote(server.url, patient).read("labels/a.parquet", max_bytes=len(new)) == new


def test_a_file_that_is_longer_than_promised_takes_no_disk(server, tmp_path):
    with pytest.raises(RemoteError, match="has more than the 10 bytes that the manifest lists"):
        download(server, tmp_path / "a", size=10)
    assert not list(tmp_path.glob("*a*"))


@pytest.mark.parametrize(
    ("status", "message"), [(403, r"access denied \(403\)"), (404, "no such file on the server"), (418, "refused")]
)
def test_what_will_not_pass_is_not_tried_again(server, tmp_path, status, message):
    server.refuse["labels/a.parquet"] = status
    with pytest.raises(RemoteError, match=message) as caught:
        download(server, tmp_path / "a")
    assert caught.value.status == status
    assert len(server.requests) == 1


def test_one_connection_serves_one_request_after_the_other(server, tmp_path):
    remote = open_remote(server.url, QUICK)
    for number in range(3):
        assert remote.size("labels/a.parquet") == len(DATA)
        assert remote.size("labels/b.parquet") is None
        assert remote.read("labels/a.parquet", max_bytes=len(DATA)) == DATA
        remote.download("labels/a.parquet", tmp_path / str(number), size=len(DATA), sha256=DIGEST)
        assert remote.holds("labels/a.parquet", size=len(DATA), sha256=DIGEST)
    assert server.connections == 1


@pytest.mark.parametrize("use", ["read", "download"])
def test_a_connection_that_gives_too_much_is_closed_at_once(tmp_path, monkeypatch, use):
    """And not when Python happens to collect what nobody uses."""
    closed = []

    def chunks():
        try:
            yield from [b"x" * 10] * 10
        finally:
            closed.append(True)

    stub = SimpleNamespace(read=lambda name, start: (0, chunks()))
    monkeypatch.setattr(Remote, "transport", stub)
    remote = open_remote("http://127.0.0.1:9", QUICK)
    with pytest.raises(RemoteError, match="more than") as caught:
        if use == "read":
            remote.read("a", max_bytes=15)
        else:
            remote.download("a", tmp_path / "a", size=15, sha256=DIGEST)
    assert closed and caught.tb is not None, "the traceback holds whatever was not closed"


def test_nobody_listens(tmp_path):
    with pytest.raises(RemoteError, match="cannot be reached"):
        open_remote("http://127.0.0.1:9", QUICK).read("x", max_bytes=1)


@pytest.mark.parametrize(("status", "message"), [(401, "access denied"), (403, "access denied"), (404, "no manifest")])
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_stores_that_refuse(tmp_path, monkeypatch, scheme, status, message):
    """A stand-in of the two stores that answers every request alike. What will not pass is asked once."""
    with serve(tmp_path) as server:
        server.refuse_all = status
        host = server.url.removeprefix("http://")
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE"):
            monkeypatch.delenv(f"AWS_{name}", raising=False)
        for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        url = "s3://bucket/x" if scheme == "s3" else f"gs://anonymous@bucket/x?scheme=http&endpoint_override={host}"
        with pytest.raises((RemoteError, ManifestError), match=message) as caught:
            fd.open_labels(url)
        if status != 404:
            assert {"s3": "AWS_ACCESS_KEY_ID", "gs": "gcloud auth"}[scheme] in str(caught.value)
        assert len(server.requests) == 1


def test_the_hub_says_how_to_log_in(tmp_path, monkeypatch):
    with serve(tmp_path) as server:
        server.refuse_all = 401
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(RemoteError, match=r"access denied \(401\); is it private\? set HF_TOKEN"):
            fd.open_labels("hf://datasets/org/name")


@pytest.mark.parametrize("url", ["pipe://touch x", "ftp://127.0.0.1/x", "s3::http://x/y", "zip://a.zip::http://x"])
def test_other_schemes_are_refused(url):
    with pytest.raises(UsageError, match="URLs only"):
        open_remote(url)
    with pytest.raises(UsageError, match="URLs only"):
        fd.open_labels(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:geheim@example.org/labels",
        "https://geheim@example.org/labels",
        "http://me:p@geheim@example.org/labels",
        "s3://KEY:geheim@bucket/labels",
        "s3://KEY:geh/eim@bucket/labels",
        "gs://me:geheim@bucket/labels",
        "https://example.org/labels?sig=geheim",
        "https://example.org/labels#geheim",
    ],
)
@pytest.mark.parametrize("use", ["open", "pull", "publish", "part"])
def test_credentials_in_a_url_are_refused_and_never_shown(url, use, label_set, tmp_path):
    """A part's manifest and card name the URL that it came from, and are published again."""
    uses = {
        "open": lambda: fd.open_labels(url),
        "pull": lambda: fd.pull(url, tmp_path / "out", retries=QUICK),
        "part": lambda: fd.pull(url, tmp_path / "out", shards=[0], retries=QUICK),
        "publish": lambda: fd.publish(label_set, url, card=fd.CardFields(license="mit"), retries=QUICK),
    }
    with pytest.raises(UsageError, match=r"credentials in a URL|cannot end in a query") as refusal:
        uses[use]()
    assert "geh" not in str(refusal.value) and "eim" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_urls_that_only_look_like_credentials_are_taken():
    for url in ("gs://anonymous@bucket/x", "https://example.org:8080/a@b:c/x", "s3://bucket/a:b@c?region=eu-west-1"):
        assert open_remote(url).url == url


def test_the_hub(label_set, tmp_path, monkeypatch):
    """Against a stand-in of the hub's file addresses; the real one cannot be had here."""
    place = tmp_path / "www/datasets/org/tiny/resolve/v1/sub"
    shutil.copytree(label_set, place)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serve(tmp_path / "www") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        labels = fd.open_labels("hf://datasets/org/tiny@v1/sub", cache_dir=tmp_path / "cache")
        assert list(labels.keys()) == list(fd.open_labels(label_set).keys())
        assert server.authorizations == {"Bearer secret"}
        with pytest.raises(ManifestError, match="is this the URL"):
            fd.open_labels("hf://datasets/org/tiny", cache_dir=tmp_path / "cache")
    for wrong in (
        "hf://models/org/name",
        "hf://datasets/org",
        "hf://datasets/org/name/../x",
        "hf://datasets/o/n@a/b?c",
    ):
        with pytest.raises(UsageError, match="is not of the form"):
            open_remote(wrong)


@pytest.mark.parametrize(
    ("variable", "sent"),
    [(" secret\n", "secret"), ("", "of the file"), (None, "of the file")],
    ids=["a newline at the end", "empty", "none"],
)
def test_the_token_is_found_as_the_hubs_library_finds_it(tmp_path, monkeypatch, variable, sent):
    """An empty variable used to hide the token of `hf auth login`, and a newline ended in an error about the header."""
    (tmp_path / "token").write_text("of the file\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if variable is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", variable)
    assert hub_headers() == {"Authorization": f"Bearer {sent}"}


def test_trying_again_draws_nothing_from_the_trainings_generator(server, tmp_path):
    before = random.getstate()
    server.unavailable = 2
    download(server, tmp_path / "a.parquet")
    assert random.getstate() == before


def test_a_remote_can_be_pickled(server):
    remote = pickle.loads(pickle.dumps(open_remote(server.url, QUICK)))
    assert remote.read("labels/a.parquet", max_bytes=10**7) == DATA
    with pytest.raises(RemoteError, match="more than 100 bytes"):
        remote.read("labels/a.parquet", max_bytes=100)


def in_a_fork(action):
    """Start `action` in a forked child; returns what waits for its end and gives its status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            action()
            status = 0
        finally:
            # Not back into pytest.
            os._exit(status)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@FORKS
def test_forked_processes_have_connections_of_their_own(server):
    """On one connection, a process reads the answer to another one's request: here halves of other files."""
    for number in range(4):
        (server.folder / f"labels/{number}").write_bytes(DATA[number : number + 100_000])
    remote = open_remote(server.url, QUICK)
    remote.size("labels/a.parquet")

    def read(first):
        for number in [*range(first, 4), *range(first)] * 5:
            assert remote.read(f"labels/{number}", max_bytes=10**7) == DATA[number : number + 100_000]

    children = [in_a_fork(lambda first=first: read(first)) for first in range(4)]
    assert [wait() for wait in children] == [0] * 4
    read(0)
    assert server.connections == 5


@FORKS
def test_a_forked_process_knows_that_the_server_has_answered(server):
    """And waits for one that restarts, instead of taking its URL for a mistake."""
    remote = open_remote(server.url, QUICK)
    remote.size("labels/a.parquet")
    server.shutdown()
    server.socket.close()

    def read():
        with pytest.raises(RemoteError, match="also after 3 attempts"):
            remote.read("labels/a.parquet", max_bytes=10)

    assert in_a_fork(read)() == 0


def entry(server, name, data):
    (server.folder / name).write_bytes(data)
    return FileEntry(path=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def fetched(cache, remote, file):
    """Where the cache keeps a file that is closed again."""
    with cache.fetch(remote, file) as opened:
        return opened.path


def test_the_cache_keeps_what_was_used_last(server, tmp_path):
    cache, remote = ShardCache(tmp_path / "cache", 2500), open_remote(server.url, QUICK)
    files = [entry(server, f"{i}.parquet", bytes([i]) * 1000) for i in range(3)]
    paths = []
    for age, file in zip((300, 200), files[:2], strict=True):
        paths.append(fetched(cache, remote, file))
        os.utime(paths[-1], (time.time() - age,) * 2)
    assert fetched(cache, remote, files[0]) == paths[0]
    paths.append(fetched(cache, remote, files[2]))
    assert [path.exists() for path in paths] == [True, False, True]
    assert len(server.requests) == 3
    assert fetched(cache, remote, files[1]).read_bytes() == b"\1" * 1000


def test_what_is_open_is_never_removed_and_what_is_closed_goes(server, tmp_path):
    cache, remote = ShardCache(tmp_path / "cache", 1), open_remote(server.url, QUICK)
    files = [entry(server, f"{i}.parquet", bytes([i]) * 1000) for i in range(3)]
    opened = [cache.fetch(remote, file) for file in files]
    assert all(file.path.exists() for file in opened)
    mapped = opened[1].map()
    for file in opened:
        file.close()
    fetched(cache, remote, entry(server, "3.parquet", b"3" * 1000))
    assert [file.path.exists() for file in opened] == [False, True, False], "a map counts as open"
    assert mapped[:3] == b"\1\1\1"
    mapped.close()


def test_a_file_damaged_in_the_cache_is_fetched_again(server, tmp_path):
    cache, remote = ShardCache(tmp_path / "cache"), open_remote(server.url, QUICK)
    file = entry(server, "a.parquet", b"a" * 1000)
    fetched(cache, remote, file).write_bytes(b"a" * 999)
    assert fetched(cache, remote, file).read_bytes() == b"a" * 1000


def test_half_written_files_go_when_nobody_can_be_writing_them(server, tmp_path):
    cache, remote = ShardCache(tmp_path / "cache", 1), open_remote(server.url, QUICK)
    fresh, old = tmp_path / "cache/ab/.new.parquet.part", tmp_path / "cache/ab/.old.parquet.part"
    for path in (fresh, old):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * shard_cache.LEFTOVER_SECONDS,) * 2)
    fetched(cache, remote, entry(server, "a.parquet", b"a" * 1000))
    assert fresh.exists() and not old.exists()


def test_no_room_for_the_cache(server, tmp_path, monkeypatch):
    free = shard_cache.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(StorageFullError, match="1000 bytes are needed for a shard, 10 are free"):
        ShardCache(tmp_path / "c").fetch(open_remote(server.url, QUICK), entry(server, "x", b"x" * 1000))


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_a_label_set_over_http_is_the_same(layout, request, tmp_path):
    folder = request.getfixturevalue(layout)
    local = fd.open_labels(folder)
    with serve(folder) as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path)
        assert labels.identity == local.identity
        assert list(labels.keys()) == list(local.keys())
        assert np.array_equal(labels.shard(1).class_prob, local.shard(1).class_prob)
        list(labels.shards())
        requests = len(server.requests)
        list(fd.open_labels(server.url, cache_dir=tmp_path).shards())
        assert len(server.requests) == requests + 1, "the second time only the manifest is asked for"


def test_only_the_blocks_that_are_needed_come(label_set, tmp_path):
    with serve(label_set) as server:
        list(fd.open_labels(server.url, cache_dir=tmp_path, crops=3).shards())
        assert sorted(name for _, name, _ in server.requests) == [
            *(f"labels/0000{i}-000.parquet" for i in range(3)),
            "manifest.json",
        ]


def test_a_label_set_that_is_not_there(tmp_path):
    with serve(tmp_path) as server, pytest.raises(ManifestError, match="is this the URL of a published label set"):
        fd.open_labels(server.url)


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_a_loader_on_a_remote_set_gives_the_local_batches(layout, request, photos, tmp_path):
    folder = request.getfixturevalue(layout)
    settings = {"images": photos if layout == "label_set" else None, "batch_size": 4, "crops_per_image": 2, "size": 32}
    local = fd.CropLoader(fd.open_labels(folder), cache_dir=tmp_path / "a", **settings)
    with serve(folder) as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path / "b")
        remote = fd.CropLoader(labels, cache_dir=tmp_path / "b", **settings)
        for (images, targets), (expected, expected_targets) in zip(remote, local, strict=True):
            assert images.equal(expected)
            assert targets.dense().equal(expected_targets.dense())


def test_what_only_a_manifest_claims_takes_nobodys_place(server, tmp_path):
    """A shard that claims to be large, and does not come: nothing is removed for it."""
    cache, remote = ShardCache(tmp_path / "cache", 2500), open_remote(server.url, QUICK)
    kept = [fetched(cache, remote, entry(server, f"{i}.parquet", bytes([i]) * 1000)) for i in range(2)]
    (server.folder / "small.parquet").write_bytes(b"x")
    for claimed in (2400, 10**9):
        with pytest.raises(RemoteError, match="small"):
            cache.fetch(remote, FileEntry(path="small.parquet", bytes=claimed, sha256="0" * 64))
    assert all(path.exists() for path in kept)
    with pytest.raises(StorageFullError, match="1000000000000000 bytes are needed"):
        cache.fetch(remote, FileEntry(path="small.parquet", bytes=10**15, sha256="0" * 64))
    assert all(path.exists() for path in kept)


def test_a_disk_that_fills_up_meanwhile_gets_room_for_what_has_arrived(server, small_disk, monkeypatch):
    """4 MiB: two files of 1.5 MB lie there, and 3 MB come."""
    monkeypatch.setattr(shard_cache, "MIN_ROOM", 1)
    cache, remote = ShardCache(small_disk / "cache", 10**8), open_remote(server.url, QUICK)
    old = [fetched(cache, remote, entry(server, f"{i}.parquet", bytes([i]) * 1_500_000)) for i in range(2)]
    os.utime(old[0], (1, 1))
    with cache.fetch(remote, FileEntry(path="labels/a.parquet", bytes=len(DATA), sha256=DIGEST)) as file:
        assert file.path.read_bytes() == DATA
    assert not old[0].exists()


def test_the_cache_of_every_reader_may_begin_with_a_tilde(label_set, photos, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    with serve(label_set) as server:
        labels = fd.open_labels(server.url, cache_dir="~/a")
        next(iter(fd.CropLoader(labels, images=photos, batch_size=4, size=16, cache_dir="~/b")))
        fd.CropDataset(labels, images=photos, size=16, cache_dir="~/c")[0]
        with pytest.raises(UsageError, match=r"s3://bucket/x: is a URL; give a path on this host"):
            fd.open_labels(server.url, cache_dir="s3://bucket/x")
    assert (home / "a").is_dir() and not list(here.iterdir())


@pytest.mark.parametrize("place", ["manifest.json", "manifest.json/below", "loop"])
def test_a_path_that_cannot_be_is_not_tried_again(label_set, tmp_path, place, caplog):
    """Below a file, or behind a link to itself: it took 78 seconds to say so."""
    there = shutil.copytree(label_set, tmp_path / "labels")
    (there / "loop").symlink_to("loop")
    with pytest.raises(fd.FerkdError):
        fd.pull(str(there / place), tmp_path / "out")
    with pytest.raises(fd.FerkdError):
        fd.publish(label_set, str(there / place / "public"), card=fd.CardFields(license="mit"))
    assert not caplog.records
