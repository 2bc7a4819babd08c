"""What attackers make: documents signed anew, requests without a TPM, certificates, and files with one flaw."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from hwlicense.core.documents import Pcr, Request
from hwlicense.core.envelope import Signature, assemble, seal, statement, unverified
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.core.tpm.pcrs import BANKS
from hwlicense.core.tpm.quote import quote_data
from hwlicense.core.tpm.signatures import sign_approval
from hwlicense.core.tpm.structures import ATTESTATION_TEMPLATE, STORAGE_ROOT_TEMPLATE, Public
from hwlicense.core.tpm.wire import number, sized

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hwlicense.core.schema import Document
    from tests.world import Vendor

replace = msgspec.structs.replace


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@contextmanager
def refused(*reasons: Reason | str, words: str = "") -> Iterator[None]:
    """The block ends in one of our errors with one of these reasons, which says what to do."""
    with pytest.raises(HwlicenseError) as caught:
        yield
    assert caught.value.reason in reasons, f"{caught.value.reason}: {caught.value}"
    assert words in caught.value.what, caught.value
    assert caught.value.what.endswith(".")
    assert 1 <= caught.value.exit_status <= 4
    assert caught.value.hint, caught.value


def flipped(raw: bytes, place: int, mask: int = 1) -> bytes:
    return raw[:place] + bytes([raw[place] ^ mask]) + raw[place + 1 :]


def listing(*folders: Path) -> dict[str, tuple[int, str]]:
    """Every file below, with mode and digest, to be compared before and after."""
    found = {}
    for folder in folders:
        for path in sorted([folder, *folder.rglob("*")]):
            if path.is_file() and not path.is_symlink():
                found[str(path)] = path.stat().st_mode & 0o7777, hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = path.lstat().st_mode & 0o7777, ""
    return found


# ---- documents --------------------------------------------------------------------------------------------


def signed_anew(document: Document, vendor: Vendor, *, which: slice = slice(None)) -> bytes:
    """By the vendor's document keys, or by one of them: what who has stolen those can make."""
    return seal(document, vendor.keys.signers[which])


def edited(raw: bytes, document: Document) -> bytes:
    """Another payload under the old signatures."""
    return assemble(document, unverified(raw, type(document))[1].signatures)


def rejoined(raw: bytes, **changes: object) -> bytes:
    """An envelope with other fields, in its one encoding."""
    envelope = msgspec.json.decode(raw)
    return msgspec.json.encode({**envelope, **changes}) + b"\n"


def payload(raw: bytes) -> bytes:
    return base64.b64decode(msgspec.json.decode(raw)["payload"])


# ---- requests ---------------------------------------------------------------------------------------------


class SoftwareKey:
    """A key that an attacker holds in software, with the public area of a key in a TPM."""

    def __init__(self, template: Public = ATTESTATION_TEMPLATE, **changes: object) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        point = self.private.public_key().public_numbers()
        unique = number(point.x, 32), number(point.y, 32)
        fields = {name: getattr(template, name) for name in Public.__struct_fields__}
        self.public = Public(**{**fields, "unique": unique, **changes})

    def quote(
        self, data: bytes, pcrs: list[Pcr], selected: list[Pcr] | None = None, start: bytes = b"\xffTCG\x80\x18"
    ) -> bytes:
        """As TPM2_Quote makes it, of values that no TPM has seen. `data` is its extra data."""
        selection = b""
        chosen = pcrs if selected is None else selected
        banks = [bank for bank in BANKS if any(pcr.bank == bank for pcr in chosen)]
        for bank in banks:
            bitmap = sum({1 << pcr.index for pcr in chosen if pcr.bank == bank})
            selection += number(BANKS[bank], 2) + b"\3" + bitmap.to_bytes(3, "little")
        ordered = sorted(pcrs, key=lambda pcr: (list(BANKS).index(pcr.bank), pcr.index))
        digest = hashlib.sha256(b"".join(pcr.value for pcr in ordered)).digest()
        attest = start + sized(self.public.name) + sized(data) + bytes(16) + b"\1" + bytes(8)
        attest += number(len(banks), 4) + selection + sized(digest)
        return sized(attest) + sign_approval(self.private, attest, b"")


def software_request(request: bytes, key: SoftwareKey | None = None, **evidence: object) -> bytes:
    """`request` with another attestation key and other evidence, quoted by that key: all that needs no TPM."""
    key = key or SoftwareKey()
    honest = unverified(request, Request)[0]
    changed = replace(honest.hardware[0], attestation_key=key.public.raw, **evidence)
    forged = replace(honest, hardware=[changed])
    quote = key.quote(quote_data(statement(forged)), changed.pcrs)
    return assemble(forged, [Signature(key.public.name.hex(), quote)])


def software_storage_key() -> SoftwareKey:
    return SoftwareKey(STORAGE_ROOT_TEMPLATE)


# ---- certificates -----------------------------------------------------------------------------------------

EK_USAGE = x509.ObjectIdentifier("2.23.133.8.1")
TLS_SERVER = ExtendedKeyUsageOID.SERVER_AUTH


class Maker:
    """A TPM maker's authority, in the hands of who can make it certify what it should not."""

    def __init__(self, folder: Path) -> None:
        self.issuer = x509.load_pem_x509_certificate((folder / "issuer.pem").read_bytes())
        self.key = load_pem_private_key((folder / "key.pem").read_bytes(), None)

    def certify(
        self,
        public: object,
        *,
        usages: tuple[x509.ObjectIdentifier, ...] = (EK_USAGE,),
        ca: bool = False,
        days: tuple[int, int] = (-10, 3650),
    ) -> bytes:
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.issuer.subject)
            .public_key(public)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() + datetime.timedelta(days[0]))
            .not_valid_after(now() + datetime.timedelta(days[1]))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),  # type: ignore[arg-type]
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("tpm.example")]), critical=True)
        )
        if usages:
            certificate = certificate.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return certificate.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)  # type: ignore[arg-type]


def as_root() -> bool:
    return os.geteuid() == 0


def another_user() -> list[str]:
    """The words before a command that make it another user's, without any right. Fails where only root could."""
    if not as_root():
        pytest.fail("Only root can be another user as well: run this test as root.")
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
