"""OpenSSH signatures of a manifest, which holds the SHA-256 of every other file: they say who published a label set.

`ssh-keygen` makes and checks them, with the keys and the files of allowed signers that people have for Git already. It
is started directly, never through a shell.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ferkd_data.errors import RemoteError, SignatureError, UsageError
from ferkd_data.format.manifest_file import FILE_NAME, identity_of, read_manifest_bytes
from ferkd_data.label_set import LabelSet, read_remote_manifest
from ferkd_data.remote import Remote, is_remote, open_remote
from ferkd_data.scratch import Scratch
from ferkd_data.storage import inside

SIGNATURE = f"{FILE_NAME}.sig"
NAMESPACE = "ferkd-data"
"""Purpose of a signature: one that was made for Git or mail does not count for a label set."""
MAX_SIGNATURE_BYTES = 65536


def sign(manifest: Path, key: Path, to: Path) -> None:
    """Sign with a private key, or with the agent's key that a public key file names. May ask for a passphrase.

    Raises SignatureError when there is no ssh-keygen or it cannot sign.
    """
    made = _ssh_keygen(["sign", "-q", "-f", str(key.absolute()), "-n", NAMESPACE], manifest.read_bytes())
    if made.returncode or b"SSH SIGNATURE" not in made.stdout:
        raise SignatureError(f"{key}: ssh-keygen could not sign with this key ({_said(made)})")
    to.write_bytes(made.stdout)


def require_signers(signed_by: str | Path | None, signer: str | None) -> None:
    """Raise UsageError for a signer without a file of allowed signers."""
    if signer is not None and signed_by is None:
        raise UsageError("signer needs signed_by, a file of allowed signers (--signer needs --signed-by)")


def check_signature(labels: LabelSet, allowed_signers: Path, signer: str | None = None) -> str:
    """Check an open label set as `check_signed` does. Raises SignatureError also where it holds no signature."""
    manifest, signature = _signed(labels)
    where = f"{labels.location}/{FILE_NAME}"
    # The set was opened from bytes read earlier: those, and no others, must be what is signed.
    if identity_of(manifest) != labels.identity:
        raise SignatureError(f"{where}: changed while it was read; open the label set again")
    return check_signed(manifest, signature, where, allowed_signers, signer)


def check_signed(manifest: bytes, signature: bytes, where: str, allowed_signers: Path, signer: str | None) -> str:
    """Return the name under which `allowed_signers` (see ssh-keygen's manual) lists the signer of this manifest.

    With `signer`, only that name is accepted.

    Raises SignatureError when the signature is not of an allowed signer, or the manifest is not what was signed.
    """
    if not allowed_signers.is_file():
        raise SignatureError(f"{allowed_signers}: no such file of allowed signers")
    with Scratch("signature") as folder:
        # ssh-keygen reads the signed content from stdin, and the signature only from a file.
        file = folder / SIGNATURE
        file.write_bytes(signature)
        known = ["-f", str(allowed_signers.absolute()), "-s", str(file)]
        # `verify` wants to be told a name. find-principals lists those of the key, without looking at the content.
        for name in [signer] if signer else _names(known, where, allowed_signers):
            found = _ssh_keygen(["verify", "-n", NAMESPACE, "-I", name, *known], manifest)
            if found.returncode == 0:
                return name
    who = f"signer {signer!r}" if signer else f"any signer of {allowed_signers}"
    raise SignatureError(f"{where}: its signature is not by {who}, or the manifest was changed since ({_said(found)})")


def read_remote_signature(remote: Remote) -> bytes:
    """Read a published signature. Raises SignatureError where there is none, RemoteError."""
    try:
        return remote.read(SIGNATURE, max_bytes=MAX_SIGNATURE_BYTES)
    except RemoteError as error:
        if error.status == 404:
            raise SignatureError(_unsigned(remote.url)) from error
        raise


def _names(known: list[str], where: str, allowed_signers: Path) -> list[str]:
    """Return the names that the signature's key is allowed for."""
    found = _ssh_keygen(["find-principals", *known], b"")
    names = found.stdout.decode("utf-8", "replace").splitlines()
    if found.returncode or not names:
        raise SignatureError(f"{where}: signed with a key that {allowed_signers} does not know ({_said(found)})")
    return names


def _signed(labels: LabelSet) -> tuple[bytes, bytes]:
    """Read the manifest and its signature, unparsed."""
    location = labels.location
    if is_remote(location):
        remote = open_remote(location)
        return read_remote_manifest(remote), read_remote_signature(remote)
    file = inside(Path(location), SIGNATURE)
    if not file.is_file():
        raise SignatureError(_unsigned(location))
    if file.stat().st_size > MAX_SIGNATURE_BYTES:
        raise SignatureError(f"{file}: {file.stat().st_size} bytes are no signature")
    return read_manifest_bytes(Path(location)), file.read_bytes()


def _unsigned(location: str) -> str:
    return f"{location}: holds no {SIGNATURE}; its publisher did not sign it (publish --sign)"


def _ssh_keygen(arguments: list[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise SignatureError("signatures need ssh-keygen (OpenSSH 8.2 or newer), which is not installed")
    # A list of arguments and no shell: names of signers and files cannot become commands.
    return subprocess.run([program, "-Y", *arguments], input=stdin, capture_output=True, check=False)


def _said(result: subprocess.CompletedProcess[bytes]) -> str:
    text = (result.stderr or result.stdout).decode("utf-8", "replace")
    return " ".join(text.split()) or f"ssh-keygen ended with status {result.returncode}"
