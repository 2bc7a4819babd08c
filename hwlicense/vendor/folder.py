"""The vendor's folder: public keys, private keys, what was approved and what was issued.

vendor.pub.json                     the root of trust for applications and devices
keys/{classical,mldsa,policy,content}.pem, keys/salt    mode 0600; the salt is there where a passphrase is
approvals/PRODUCT-gG-POLICY.hwapp   approved platform states (PRODUCT and POLICY are digests, shortened)
issued/LICENSE-rR.hwlic             every license, as it was sent
issued/LICENSE-rR.json              its basis: what it was made from, for the revision that follows
hardware/token-FINGERPRINT.json     tokens whose keys the vendor saw being made
hardware/dongle-ID.json             dongles: the secret of one, or answers of it, sealed to the content key
"""

from __future__ import annotations

import hashlib
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self, TypeVar

import msgspec

from hwlicense import storage
from hwlicense.core.documents import Approval, License, Product, Serial, TpmBinding, Uri, VendorPublic
from hwlicense.core.envelope import unverified, verified
from hwlicense.core.errors import DamagedError, Reason, RefusedError, UsageError
from hwlicense.core.schema import FILE_LIMIT, Blob, Count, Digest, Identifier, check, decode, encode
from hwlicense.core.tpm.structures import Public
from hwlicense.vendor import signing
from hwlicense.vendor.basis import Basis, TpmBasis

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.core.secret import Secret

PUBLIC: Final = "vendor.pub.json"
KEYS: Final = "keys"
KEY_FILES: Final = ("classical", "mldsa", "policy", "content")
HARDWARE: Final = "hardware"


class TokenRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token whose key the vendor saw: the key as SubjectPublicKeyInfo (DER)."""

    schema: int
    uri: Uri
    key: Blob


class DongleRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dongle that the vendor programmed or enrolled.

    Programmed: `sealed` holds its secret (20 bytes) and access code (6 bytes), and `mode` how it reads challenges.
    Enrolled: `sealed` holds its answers (20 bytes each) to challenges of `seed`, of which `used` have gone into
    licenses; mode is null.
    """

    schema: int
    dongle: Identifier
    product: Product
    serial: Serial | None
    slot: Literal[1, 2]
    touch: bool
    mode: Literal["less-than-64", "fixed-64"] | None
    sealed: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    seed: Digest | None
    answers: Count
    used: Count


class Folder:
    """A vendor's folder. Its public half is read at once, its keys only by `unlock`."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError FILE_ABSENT where `path` is no vendor folder."""
        with storage.reporting(path):
            found = (path / PUBLIC).is_file()
        if not found:
            what = f"{path} is not a vendor folder: it has no {PUBLIC}."
            raise UsageError(Reason.FILE_ABSENT, what, "Make one with `hwlicense vendor init`.")
        self.path = path
        self.public = decode(storage.read_limited(path / PUBLIC, FILE_LIMIT), VendorPublic, spaced=True)

    @classmethod
    def create(cls, path: Path, name: str, passphrase: Secret | None, classical: str = "ed25519") -> Self:
        """New keys in a new folder, which appears whole or not at all. Raises UsageError FILE_EXISTS."""
        with storage.new_folder(path) as building:
            keys = signing.generate(classical)
            public = signing.public_part(name, keys)
            check(public)
            salt = secrets.token_bytes(signing.SALT_SIZE)
            password = signing.stretched(passphrase, salt) if passphrase else None
            for folder in (KEYS, "approvals", "issued", HARDWARE):
                (building / folder).mkdir(mode=0o700)
            for which in KEY_FILES:
                storage.atomic_write(building / KEYS / f"{which}.pem", signing.to_pem(keys[which], password), 0o600)
            if password:
                storage.atomic_write(building / KEYS / "salt", salt, 0o600)
                password.wipe()
            storage.atomic_write(building / PUBLIC, encode(public) + b"\n", 0o644)
        return cls(path)

    @property
    def locked(self) -> bool:
        """Whether the keys are under a passphrase."""
        with storage.reporting(self.path / KEYS):
            return (self.path / KEYS / "salt").exists()

    def unlock(self, passphrase: Secret | None) -> signing.Keys:
        """The private keys. Raises RefusedError PASSPHRASE_NEEDED or PASSPHRASE_WRONG."""
        password = None
        if self.locked:
            if passphrase is None:
                what = f"The keys in {self.path} are under a passphrase."
                raise RefusedError(Reason.PASSPHRASE_NEEDED, what, "Type it at the prompt, or give --passphrase-file.")
            password = signing.stretched(passphrase, storage.read_limited(self.path / KEYS / "salt", signing.SALT_SIZE))
        pems = {which: storage.read_limited(self.path / KEYS / f"{which}.pem", 64 << 10) for which in KEY_FILES}
        return signing.assembled({which: signing.from_pem(pem, password) for which, pem in pems.items()}, self.public)

    def approvals(self, product: str) -> list[Approval]:
        """Every approved state of a product line, of all generations."""
        try:
            slug = _slug(product)
        except UnicodeEncodeError:
            raise UsageError(Reason.USAGE, "The product's name is not in UTF-8.", "Write it in UTF-8.") from None
        found = sorted((self.path / "approvals").glob(f"{slug}-g*.hwapp"))
        return [self._approval(path) for path in found]

    def _approval(self, path: Path) -> Approval:
        try:
            return verified(storage.read_limited(path, FILE_LIMIT), Approval, self.public)
        except (DamagedError, RefusedError) as error:
            hint = "Restore the folder from its backup; a vendor folder's files belong together."
            raise DamagedError(error.reason, f"{path}: {error.what}", hint) from error

    def keep_approval(self, approval: Approval, raw: bytes) -> None:
        """Record an approval, so that later licenses carry it."""
        name = f"{_slug(approval.product)}-g{approval.generation}-{approval.policy.hex()[:16]}.hwapp"
        storage.atomic_write(self.path / "approvals" / name, raw, 0o600)

    # ---- licenses

    def keep_license(self, issued: License, raw: bytes, basis: Basis) -> None:
        """Record a license as it was sent, and what it was made from, which is there when the license is."""
        place = self._issued(issued.grant.license, issued.grant.revision)
        storage.atomic_write(place.with_suffix(".json"), encode(basis) + b"\n", 0o600)
        storage.atomic_write(place, raw, 0o600)

    def latest_revision(self, identifier: str) -> int:
        """Of a license that was issued; 0 where none was."""
        with storage.reporting(self.path / "issued"):
            found = [path.stem.rpartition("-r")[2] for path in (self.path / "issued").glob(f"{identifier}-r*.hwlic")]
        return max((int(number) for number in found if number.isdecimal()), default=0)

    def issued(self, raw: bytes) -> License:
        """The license in a file, if it is one that this folder issued, and the latest revision of it.

        Raises RefusedError WRONG_VENDOR, LICENSE_ABSENT, LICENSE_SUPERSEDED; DamagedError.
        """
        licensed = verified(raw, License, self.public)
        identifier, revision = licensed.grant.license, licensed.grant.revision
        latest = self.latest_revision(identifier)
        place = self._issued(identifier, latest)
        if latest > revision:
            what = f"Revision {latest} of the license {identifier} was issued; the file is revision {revision}."
            raise RefusedError(Reason.LICENSE_SUPERSEDED, what, f"Give the latest revision, which is in {place}.")
        if latest < revision or storage.read_limited(place, FILE_LIMIT) != raw:
            what = f"{self.path} has no record of having issued this file, revision {revision} of {identifier}."
            hint = "Use the vendor folder that issued it; folders that were copied go different ways."
            raise RefusedError(Reason.LICENSE_ABSENT, what, hint)
        return licensed

    def basis(self, licensed: License) -> Basis | None:
        """What an issued license was made from; None where an earlier release issued it. Raises DamagedError."""
        path = self._issued(licensed.grant.license, licensed.grant.revision).with_suffix(".json")
        with storage.reporting(path):
            found = path.is_file()
        return self._record(path, Basis) if found else None

    def of_one_counter(self, licensed: License) -> list[str]:
        """Other licenses that a TPM counts, made from a request with the counter of this one: it serves one of them."""
        ours = next((each for each in licensed.bindings if isinstance(each, TpmBinding) and each.counter), None)
        found = set[str]()
        for path in sorted((self.path / "issued").glob("*-r*.json")) if ours else ():
            identifier = path.stem.rpartition("-r")[0]
            if identifier == licensed.grant.license or identifier in found:
                continue
            # A damaged record is said where it is needed, for a revision: no other license suffers from it.
            with suppress(DamagedError):
                if _names_counter(self._record(path, Basis), ours) and self._counted(path.with_suffix(".hwlic")):
                    found.add(identifier)
        return sorted(found)

    @staticmethod
    def _counted(path: Path) -> bool:
        other = unverified(storage.read_limited(path, FILE_LIMIT), License)[0]
        return any(isinstance(each, TpmBinding) and each.counter for each in other.bindings)

    def _issued(self, identifier: str, revision: int) -> Path:
        return self.path / "issued" / f"{identifier}-r{revision}.hwlic"

    # ---- hardware that the vendor prepared

    def tokens(self) -> list[TokenRecord]:
        """Every token that was recorded."""
        return [self._record(path, TokenRecord) for path in sorted((self.path / HARDWARE).glob("token-*.json"))]

    def keep_token(self, fingerprint: bytes, record: TokenRecord) -> None:
        """Record a token by the fingerprint of its key."""
        self._keep(f"token-{fingerprint.hex()}.json", record)

    def knows_dongle(self, identifier: str) -> bool:
        """Whether there is a record of it."""
        path = self._dongle_path(identifier)
        with storage.reporting(path):
            return path.is_file()

    def dongle(self, identifier: str) -> DongleRecord:
        """The record of a dongle. Raises RefusedError DONGLE_UNKNOWN, DamagedError."""
        if not self.knows_dongle(identifier):
            what = f"This vendor has not programmed or enrolled the dongle {identifier}."
            hint = "Plug it in here and run `hwlicense vendor dongle program` or `hwlicense vendor dongle enroll`."
            raise RefusedError(Reason.DONGLE_UNKNOWN, what, hint)
        path = self._dongle_path(identifier)
        record = self._record(path, DongleRecord)
        if record.dongle != identifier:
            what = f"{path} is the record of another dongle, {record.dongle}."
            hint = "Restore the folder from its backup; a vendor folder's files belong together."
            raise DamagedError(Reason.DOCUMENT_MALFORMED, what, hint)
        return record

    def dongles(self) -> list[DongleRecord]:
        """Every dongle that was recorded."""
        return [self._record(path, DongleRecord) for path in sorted((self.path / HARDWARE).glob("dongle-*.json"))]

    def keep_dongle(self, record: DongleRecord) -> None:
        """Record a dongle, in place of what was recorded of it."""
        self._keep(self._dongle_path(record.dongle).name, record)

    def _dongle_path(self, identifier: str) -> Path:
        return self.path / HARDWARE / f"dongle-{identifier}.json"

    def _keep(self, name: str, record: msgspec.Struct) -> None:
        storage.make_folders(self.path / HARDWARE)
        storage.atomic_write(self.path / HARDWARE / name, encode(record) + b"\n", 0o600)

    def _record(self, path: Path, kind: type[R]) -> R:
        try:
            return decode(storage.read_limited(path, FILE_LIMIT), kind, spaced=True)
        except DamagedError as error:
            hint = "Restore the folder from its backup; a vendor folder's files belong together."
            raise DamagedError(error.reason, f"{path}: {error.what}", hint) from error


R = TypeVar("R", TokenRecord, DongleRecord, Basis)


def _names_counter(basis: Basis, binding: TpmBinding | None) -> bool:
    """Whether the request that a license was made from has the counter of `binding`, a new license's, at its value."""
    if binding is None or binding.counter is None:
        return False
    handle, value = binding.counter.handle, binding.counter.value - 1
    return any(
        part.evidence.counter is not None
        and (part.evidence.counter.handle, part.evidence.counter.value) == (handle, value)
        and Public.parse(part.evidence.storage_root_key).name == binding.storage_root_key
        for part in basis.parts
        if isinstance(part, TpmBasis)
    )


def _slug(product: str) -> str:
    return hashlib.sha256(product.encode()).hexdigest()[:16]
