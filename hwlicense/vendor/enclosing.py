"""What a license encloses for the application: a watermark's seed, calibration. Sealed to the device, as its keys are.

The vendor's folder keeps it under the vendor's own content key, so that a revision encloses it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag

from hwlicense.core.documents import ENCLOSURE_LIMIT
from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.keys import open_for_vendor, seal_for_vendor
from hwlicense.core.secret import Secret
from hwlicense.storage import OpenFile

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.vendor.basis import Basis
    from hwlicense.vendor.signing import Keys

_PURPOSE: Final = b"enclosure"


def read(path: Path) -> Secret:
    """A file of 1 byte to 64 KiB. Raises UsageError FILE_ABSENT, USAGE; StorageError."""
    with OpenFile(path) as file:
        if not 1 <= file.size <= ENCLOSURE_LIMIT:
            what = f"{path} has {file.size:,} bytes; a license encloses 1 to {ENCLOSURE_LIMIT:,}."
            hint = "Pack larger files into a package, which licenses can share."
            raise UsageError(Reason.USAGE, what, hint if file.size else "Give the file that is meant.")
        content = bytearray(file.size)
        file.read_into(memoryview(content), 0)
    return Secret(content)


def recorded(enclosure: Secret, license_id: str, keys: Keys) -> bytes:
    """For the folder; nothing for none."""
    return seal_for_vendor(enclosure, _PURPOSE, license_id, keys.content.public_key()) if len(enclosure) else b""


def kept(basis: Basis | None, keys: Keys) -> Secret:
    """What a license has enclosed so far; empty for none. Raises DamagedError DOCUMENT_MALFORMED."""
    if basis is None or not basis.enclosure:
        return Secret(bytearray())
    try:
        return open_for_vendor(basis.enclosure, _PURPOSE, basis.license, keys.content)
    except (InvalidTag, ValueError):
        what = "The vendor folder's record of what the license encloses cannot be opened."
        hint = "Restore the folder from its backup; or give --enclose, or --no-enclosure."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, hint) from None
