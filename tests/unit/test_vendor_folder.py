"""The vendor's folder and its keys, with openssl as the second opinion."""

import base64
import json
import stat
import subprocess

import pytest

from hwlicense.core.documents import Pcr
from hwlicense.core.envelope import pre_authentication_encoding
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.core.secret import Secret
from hwlicense.vendor import approving, signing
from hwlicense.vendor.folder import KEY_FILES, Folder


def secret(text):
    return Secret(bytearray(text.encode()))


def refusal(call, *arguments):
    with pytest.raises(HwlicenseError) as caught:
        call(*arguments)
    assert "correct" not in str(caught.value) + caught.value.hint
    return caught.value.reason


@pytest.fixture
def folder(tmp_path):
    return Folder.create(tmp_path / "v", "Acme", secret("correct horse"))


def test_keys_open_with_their_passphrase_alone(folder):
    assert folder.locked
    assert folder.unlock(secret("correct horse")).signers[0].keyid
    assert refusal(folder.unlock, secret("wrong")) == Reason.PASSPHRASE_WRONG
    assert refusal(folder.unlock, None) == Reason.PASSPHRASE_NEEDED


def test_no_key_lies_in_the_clear(folder):
    for name in KEY_FILES:
        path = folder.path / "keys" / f"{name}.pem"
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()
        assert b"BEGIN PRIVATE KEY" not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_openssl_opens_a_key_with_the_stretched_passphrase(folder, tmp_path):
    salt = (folder.path / "keys" / "salt").read_bytes()
    (tmp_path / "password").write_bytes(signing.stretched(secret("correct horse"), salt).buffer)
    command = ["openssl", "pkey", "-in", folder.path / "keys" / "policy.pem", "-pubout", "-outform", "DER"]
    done = subprocess.run([*command, "-passin", f"file:{tmp_path / 'password'}"], capture_output=True, check=True)
    assert done.stdout == folder.public.policy


@pytest.mark.parametrize("classical", signing.CLASSICAL_KINDS)
def test_openssl_verifies_the_classical_signature(classical, tmp_path):
    folder = Folder.create(tmp_path / "v", "Acme", None, classical)
    _, raw = approving.approve(folder.public, folder.unlock(None), "p", 1, [Pcr("sha256", 7, b"\1" * 32)])
    envelope = json.loads(raw)
    message = pre_authentication_encoding(envelope["payloadType"], base64.b64decode(envelope["payload"]))
    (tmp_path / "message").write_bytes(message)
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    (tmp_path / "public").write_bytes(folder.public.classical)
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "public", "-keyform", "DER"]
    command += ["-digest", "sha256"] if classical == "p256" else []
    command += ["-in", "message", "-sigfile", "signature"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "message").write_bytes(message + b" ")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(signing, "to_pem", fail)
    assert refusal(Folder.create, tmp_path / "v", "Acme", None) == Reason.STORAGE
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(folder, tmp_path):
    before = (folder.path / "vendor.pub.json").read_bytes()
    assert refusal(Folder.create, folder.path, "Other", None) == Reason.FILE_EXISTS
    assert (folder.path / "vendor.pub.json").read_bytes() == before
    assert refusal(Folder, tmp_path) == Reason.FILE_ABSENT


def test_keys_of_another_vendor_are_noticed(tmp_path):
    a, b = (Folder.create(tmp_path / name, name, None) for name in "ab")
    for name in ("classical", "mldsa", "policy"):
        kept = (a.path / "keys" / f"{name}.pem").read_bytes()
        (a.path / "keys" / f"{name}.pem").write_bytes((b.path / "keys" / f"{name}.pem").read_bytes())
        assert refusal(a.unlock, None) == Reason.DOCUMENT_MALFORMED
        (a.path / "keys" / f"{name}.pem").write_bytes(kept)
    a.unlock(None)
    (a.path / "keys" / "content.pem").write_bytes(b"")
    assert refusal(a.unlock, None) == Reason.DOCUMENT_MALFORMED
