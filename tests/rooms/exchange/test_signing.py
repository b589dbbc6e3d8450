"""Signatures of a manifest, made and checked by the real ssh-keygen."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import RemoteError, SignatureError, UsageError
from ferkd_data.exchange import signing
from ferkd_data_cli.main import run

CARD = fd.CardFields(name="tiny labels", license="cc-by-4.0")
pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")


def make_key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def key(tmp_path):
    return make_key(tmp_path / "key")


@pytest.fixture
def allowed(tmp_path, key):
    """Two names: of the key, and of another one."""
    other = make_key(tmp_path / "other")
    ours, others = (file.with_name(f"{file.name}.pub").read_text() for file in (key, other))
    (tmp_path / "allowed").write_text(f"lab@x {ours}eve@x {others}")
    return tmp_path / "allowed"


@pytest.fixture
def public(label_set, key, tmp_path):
    fd.publish(label_set, str(tmp_path / "public"), card=CARD, sign_with=key)
    return tmp_path / "public"


def test_a_signed_set_in_a_folder_on_a_server_and_pulled(public, allowed, tmp_path):
    assert fd.verify(public, signed_by=allowed).signer == "lab@x"
    assert fd.verify(public, signed_by=allowed, signer="lab@x").ok
    with serve(public) as server:
        assert fd.verify(server.url, signed_by=allowed).signer == "lab@x"
        fd.pull(server.url, tmp_path / "mine")
        fd.pull(server.url, tmp_path / "part", crops=4)
    report = fd.verify(tmp_path / "mine", signed_by=allowed)
    assert report.ok and report.signer == "lab@x" and not report.warnings
    with pytest.raises(SignatureError, match="did not sign it"):
        fd.verify(tmp_path / "part", signed_by=allowed)
    fd.publish(tmp_path / "mine", str(tmp_path / "again"), card=CARD)
    assert fd.verify(tmp_path / "again", signed_by=allowed).signer == "lab@x"


def test_pulling_what_is_signed(public, allowed, tmp_path):
    """A part too: its manifest is its own, but what it lists is what the signed one of the whole lists."""
    with serve(public) as server:
        whole = fd.pull(server.url, tmp_path / "mine", signed_by=allowed, signer="lab@x")
        part = fd.pull(server.url, tmp_path / "part", crops=4, signed_by=allowed)
        assert [name for _, name, _ in server.requests].count("manifest.json.sig") == 2
    assert whole.signer == part.signer == "lab@x" and fd.verify(tmp_path / "part").ok
    assert fd.verify(tmp_path / "mine", signed_by=allowed).signer == "lab@x"
    assert fd.pull(str(public), tmp_path / "mine", signed_by=allowed).fetched == 0
    assert fd.pull(str(public), tmp_path / "mine").signer is None


def test_nothing_is_fetched_of_what_is_not_signed_by_whom_it_should_be(public, allowed, tmp_path):
    with serve(public) as server:
        with pytest.raises(SignatureError, match="not by signer 'eve@x', or"):
            fd.pull(server.url, tmp_path / "mine", signed_by=allowed, signer="eve@x")
        text = (public / "manifest.json").read_text()
        (public / "manifest.json").write_text(text + " ")
        with pytest.raises(SignatureError, match="or the manifest was changed since"):
            fd.pull(server.url, tmp_path / "mine", signed_by=allowed)
        (public / "manifest.json.sig").unlink()
        with pytest.raises(SignatureError, match=rf"{server.url}: holds no manifest\.json\.sig"):
            fd.pull(server.url, tmp_path / "mine", signed_by=allowed)
        with pytest.raises(UsageError, match="signer needs signed_by"):
            fd.pull(server.url, tmp_path / "mine", signer="lab@x")
        assert {name for _, name, _ in server.requests} == {"manifest.json", "manifest.json.sig"}
    assert not (tmp_path / "mine").exists()


def test_the_signature_that_was_checked_is_the_one_that_is_kept(public, allowed, tmp_path):
    """The server may give another one the next time."""

    def swap(name):
        if name.startswith("labels/"):
            (public / "manifest.json.sig").write_bytes(b"another one")

    with serve(public) as server:
        server.before_body = swap
        fd.pull(server.url, tmp_path / "mine", signed_by=allowed)
    assert fd.verify(tmp_path / "mine", signed_by=allowed).signer == "lab@x"


def test_the_signature_arrives_before_the_manifest(label_set, key, tmp_path, monkeypatch):
    sent = []
    upload = fd.publish.__globals__["Remote"].upload
    monkeypatch.setattr(
        "ferkd_data.remote.Remote.upload",
        lambda self, file, name, **more: (sent.append(name), upload(self, file, name, **more))[1],
    )
    fd.publish(label_set, str(tmp_path / "public"), card=CARD, sign_with=key, threads=1)
    assert sent[-2:] == ["manifest.json.sig", "manifest.json"]


def test_a_set_that_is_sent_unsigned_keeps_no_others_signature(public, label_set, tar_label_set, allowed):
    fd.publish(label_set, str(public), card=CARD)
    assert fd.verify(public, signed_by=allowed).signer == "lab@x", "the same set, signed before"
    card = fd.CardFields(name="tars", license="mit", image_license="mit")
    fd.publish(tar_label_set, str(public), card=card, overwrite=True)
    with pytest.raises(SignatureError, match="did not sign it"):
        fd.verify(public, signed_by=allowed)


def test_what_is_not_what_was_signed(public, allowed, key, tmp_path):
    with pytest.raises(SignatureError, match="not by signer 'eve@x', or"):
        fd.verify(public, signed_by=allowed, signer="eve@x")
    (tmp_path / "others").write_text(allowed.read_text().splitlines()[1])
    with pytest.raises(SignatureError, match=r"signed with a key that .*others does not know"):
        fd.verify(public, signed_by=tmp_path / "others")
    manifest = public / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text + " ")
    with pytest.raises(SignatureError, match="or the manifest was changed since"):
        fd.verify(public, signed_by=allowed)
    manifest.write_text(text)
    command = ["ssh-keygen", "-Y", "sign", "-q", "-f", key, "-n", "email"]
    of_mail = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    (public / "manifest.json.sig").write_bytes(of_mail.stdout)
    with pytest.raises(SignatureError, match="its signature is not by any signer"):
        fd.verify(public, signed_by=allowed)
    (public / "manifest.json.sig").write_bytes(b"x" * 10**6)
    with pytest.raises(SignatureError, match="1000000 bytes are no signature"):
        fd.verify(public, signed_by=allowed)
    with serve(public) as server, pytest.raises(RemoteError, match="more than 65536 bytes"):
        fd.verify(server.url, signed_by=allowed)
    (public / "manifest.json.sig").write_bytes(b"-----BEGIN SSH SIGNATURE-----\nAAAA\n")
    with pytest.raises(SignatureError):
        fd.verify(public, signed_by=allowed)


def test_a_manifest_that_changes_while_it_is_read(public, allowed):
    labels = fd.open_labels(public)
    (public / "manifest.json").write_text((public / "manifest.json").read_text() + " ")
    with pytest.raises(SignatureError, match="changed while it was read"):
        signing.check_signature(labels, allowed)


def test_what_is_missing(label_set, public, allowed, key, tmp_path, monkeypatch):
    with pytest.raises(SignatureError, match=r"holds no manifest\.json\.sig"):
        fd.verify(label_set, signed_by=allowed)
    with serve(label_set) as server, pytest.raises(SignatureError, match=r"holds no manifest\.json\.sig"):
        fd.verify(server.url, signed_by=allowed)
    with pytest.raises(SignatureError, match="no such file of allowed signers"):
        fd.verify(public, signed_by=tmp_path / "nowhere")
    with pytest.raises(SignatureError, match="could not sign with this key"):
        fd.publish(label_set, str(tmp_path / "b"), card=CARD, sign_with=tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SignatureError, match="need ssh-keygen"):
        fd.verify(public, signed_by=allowed)
    with pytest.raises(SignatureError, match="need ssh-keygen"):
        fd.publish(label_set, str(tmp_path / "b"), card=CARD, sign_with=key)
    assert not (tmp_path / "b/manifest.json").exists()


def test_names_and_paths_are_never_a_shells(public, allowed, tmp_path):
    place = tmp_path / "$(touch owned);`touch owned`"
    shutil.copytree(public, place)
    with pytest.raises(SignatureError, match="not by signer"):
        fd.verify(place, signed_by=allowed, signer="$(touch owned)")
    assert fd.verify(place, signed_by=allowed).signer == "lab@x"
    assert not list(tmp_path.rglob("owned"))


def test_the_commands(label_set, key, allowed, tmp_path, capsys):
    place = str(tmp_path / "public")
    assert run(["publish", str(label_set), place, "--license", "cc0-1.0", "--sign", str(key)]) == 0
    assert run(["verify", place, "--signed-by", str(allowed), "--signer", "lab@x"]) == 0
    assert "signed by lab@x" in capsys.readouterr().out
    with serve(tmp_path / "public") as server:
        assert run(["verify", server.url, "--signed-by", str(allowed)]) == 0
    assert run(["verify", place, "--signed-by", str(allowed), "--signer", "eve@x"]) == 1
    mine = ["pull", place, str(tmp_path / "mine"), "--signed-by", str(allowed)]
    capsys.readouterr()
    assert run([*mine, "--signer", "eve@x"]) == 1
    assert run([*mine, "--crops", "4"]) == 0
    assert capsys.readouterr().out.endswith("\nthe manifest of the whole label set is signed by lab@x\n")
    for command in (["verify", place], ["pull", place, str(tmp_path / "x")]):
        assert run([*command, "--signer", "eve@x"]) == 2
        assert "--signer needs --signed-by" in capsys.readouterr().err
