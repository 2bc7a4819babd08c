"""What tests of packages share: packing, opening, and a second reader of the format, written from its description."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import tempfile
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hwlicense.core.keys import Content, unwrap_for_vendor
from hwlicense.core.secret import Secret
from hwlicense.device import memory
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense.core.documents import Manifest
    from tests.world import Vendor


def content_key(vendor: Vendor, manifest: Manifest) -> Secret:
    return unwrap_for_vendor(manifest.wrapped_content_key, manifest.content_key, vendor.keys.content)


def nothing_enclosed(key: Secret) -> Content:
    """What a license opens that encloses nothing."""
    return Content(key, Secret(bytearray()))


@contextmanager
def opened(vendor: Vendor, package: Path, key: Secret) -> Iterator[Model]:
    """A model, without license and hardware."""
    with PackageFile(package, vendor.public) as file, Model(file, nothing_enclosed(key)) as model:
        yield model


def pack(vendor: Vendor, folder: Path, members: dict[str, bytes], **options) -> tuple[Path, Secret, Manifest]:
    """A package of `members`, its content key and its manifest."""
    for name, content in members.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    out = folder / "model.hwpkg"
    manifest = vendor.pack(out, folder / "files", **options)
    return out, content_key(vendor, manifest), manifest


def in_child(run: Callable[[], object]) -> None:
    """`run` in a forked child, where it must not raise."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)  # whatever happens: the child has no business in the rest of the test run
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def ordinary_user() -> None:
    """Give up root, and be as dumpable as any process of a user."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        memory._libc.prctl(4, 1, 0, 0, 0)


def reachable(path: Path) -> None:
    """Let an ordinary user reach `path`, below a temporary folder that is its owner's alone."""
    for folder in [path, *path.parents]:
        if folder.stat().st_uid == os.getuid() and folder.is_relative_to(tempfile.gettempdir()) and folder.name:
            folder.chmod(folder.stat().st_mode | (0o755 if folder.is_dir() else 0o644))


def decrypt(raw: bytes, key: bytes) -> dict[str, bytes]:
    """The members of a package (format version 1). Signatures are not its business, digests are."""
    assert raw[:8] == b"hwpkg\0\1\n"
    end = 16 + int.from_bytes(raw[8:16], "little")
    manifest = json.loads(base64.b64decode(json.loads(raw[16:end])["payload"]))
    functions = {"blake3": lambda b: blake3(b).digest(), "sha256": lambda b: hashlib.sha256(b).digest()}
    digest = functions[manifest["algorithm"]]
    digests = {m["name"]: base64.b64decode(m["digests"]) for m in manifest["members"]}
    count = sum(map(len, digests.values())) // 32
    extracted = hmac.digest(bytes(32), key, "sha256")  # RFC 5869, with one block of output
    table_key = hmac.digest(extracted, b"hwlicense 1 " + (9).to_bytes(4, "big") + b"key table" + b"\1", "sha256")
    table = raw[end : end + 32 * count + 16]
    assert digest(table) == base64.b64decode(manifest["table"])
    keys = AESGCM(table_key).decrypt(bytes(12), table, b"hwlicense key table 1" + count.to_bytes(8, "little"))
    at, used, members = end + len(table), 0, {}
    for member in manifest["members"]:
        name, left, parts = member["name"], member["size"], []
        while left:
            size = min(left, manifest["chunk_size"])
            left -= size
            sealed, at = raw[at : at + size + 16], at + size + 16
            assert digest(sealed) == digests[name][:32]
            digests[name] = digests[name][32:]
            data = b"hwlicense chunk 1" + size.to_bytes(4, "little") + (b"\0" if left else b"\1")
            parts.append(AESGCM(keys[32 * used : 32 * used + 32]).decrypt(bytes(12), sealed, data))
            used += 1
        assert digests[name] == b""
        members[name] = b"".join(parts)
    assert (at, used) == (len(raw), count)
    return members
