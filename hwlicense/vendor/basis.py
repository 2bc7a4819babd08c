"""What a license was made from, kept beside it in the vendor's folder, so that a revision asks nobody for it again.

A basis is the vendor's own record and is not signed. What it says of hardware must be what the license says, which is
signed: who can write to the folder, without the vendor's keys, cannot have the next revision made for other hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from hwlicense.core.documents import (
    BINDING_LIMIT,
    ENCLOSURE_LIMIT,
    Endorsement,
    PackageReference,
    TokenBinding,
    TokenEvidence,
    TpmBinding,
    TpmEvidence,
    UsbBinding,
    UsbEvidence,
)
from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.schema import SCHEMA, Blob, Count, Document, Identifier, Positive, prepare
from hwlicense.core.tpm.structures import Public
from hwlicense.vendor.evidence import DonglePart, TokenPart, TpmPart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hwlicense.core.documents import Binding, License, Manifest
    from hwlicense.vendor.evidence import Part


class TpmBasis(Document, frozen=True, tag="tpm", tag_field="kind"):
    """A TPM that was believed: which of its EKs (TPMT_PUBLIC), why, and the clock that it quoted, in milliseconds."""

    evidence: TpmEvidence
    endorsement_key: Blob
    endorsement: Endorsement
    clock: Count


class TokenBasis(Document, frozen=True, tag="pkcs11", tag_field="kind"):
    """A token that was believed, and why."""

    evidence: TokenEvidence
    endorsement: Endorsement


class DongleBasis(Document, frozen=True, tag="usb", tag_field="kind"):
    """A dongle; its answers have a record of their own."""

    evidence: UsbEvidence


class PackageBasis(Document, frozen=True):
    """A package, with its content key as the manifest has it: wrapped for the vendor."""

    reference: PackageReference
    wrapped_content_key: Blob


class Basis(Document, frozen=True, omit_defaults=True):
    """`issued/LICENSE-rR.json`. `since` is the revision that the parts first came into, from a request.

    `enclosure` is what the license encloses, sealed for the vendor.
    """

    schema: int
    license: Identifier
    revision: Positive
    since: Positive
    parts: Annotated[list[TpmBasis | TokenBasis | DongleBasis], msgspec.Meta(min_length=1, max_length=BINDING_LIMIT)]
    packages: Annotated[list[PackageBasis], msgspec.Meta(min_length=1, max_length=100)]
    enclosure: Annotated[bytes, msgspec.Meta(max_length=ENCLOSURE_LIMIT + 4096)] = b""


prepare(Basis)


def recorded(
    licensed: License, parts: Iterable[Part], packages: Iterable[PackageBasis], since: int = 1, enclosure: bytes = b""
) -> Basis:
    """The basis of a license that was made from `parts`, which came in with the revision `since`."""
    return Basis(
        schema=SCHEMA,
        license=licensed.grant.license,
        revision=licensed.grant.revision,
        since=since,
        parts=[_recorded(part) for part in parts],
        packages=list(packages),
        enclosure=enclosure,
    )


def packaged(manifest: Manifest) -> PackageBasis:
    """What of a package's manifest is kept."""
    reference = PackageReference(manifest.name, manifest.version, manifest.content_key)
    return PackageBasis(reference, manifest.wrapped_content_key)


def parts_of(basis: Basis, licensed: License) -> list[Part]:
    """The parts of a basis, as they were when `licensed` was made. Raises DamagedError where it is not of this license.

    `licensed` has been verified. Nothing is believed of the basis's hardware but what the license's bindings say.
    """
    parts = [_restored(part) for part in basis.parts]
    named = (basis.license, basis.revision, [package.reference for package in basis.packages])
    if named != (licensed.grant.license, licensed.grant.revision, licensed.grant.packages):
        raise _damaged("it is of another license")
    if len(parts) != len(licensed.bindings) or not 1 <= basis.since <= basis.revision:
        raise _damaged("it does not fit the license")
    for part, binding in zip(parts, licensed.bindings, strict=True):
        if not _of_one_piece(part, binding):
            raise _damaged("it names other hardware than the license")
    return parts


def _recorded(part: Part) -> TpmBasis | TokenBasis | DongleBasis:
    match part:
        case TpmPart():
            return TpmBasis(part.evidence, part.endorsement_key.raw, part.endorsement, part.clock)
        case TokenPart():
            return TokenBasis(part.evidence, part.endorsement)
        case DonglePart():
            return DongleBasis(part.evidence)


def _restored(basis: TpmBasis | TokenBasis | DongleBasis) -> Part:
    match basis:
        case TpmBasis(evidence, endorsement_key, endorsement, clock):
            return TpmPart(
                evidence=evidence,
                endorsement_key=Public.parse(endorsement_key),
                storage_root_key=Public.parse(evidence.storage_root_key),
                attestation_key=Public.parse(evidence.attestation_key),
                endorsement=endorsement,
                clock=clock,
            )
        case TokenBasis(token, endorsement):
            return TokenPart(token, endorsement)
        case DongleBasis(usb):
            return DonglePart(usb)


def _of_one_piece(part: Part, binding: Binding) -> bool:
    match part, binding:
        case TpmPart(), TpmBinding():
            keys = part.endorsement_key, part.storage_root_key, part.attestation_key
            names = binding.endorsement_key, binding.storage_root_key, binding.attestation_key
            return tuple(key.name for key in keys) == names and part.endorsement == binding.endorsement
        case TokenPart(), TokenBinding():
            return (part.evidence.key, part.evidence.mechanism) == (binding.key, binding.mechanism)
        case DonglePart(), UsbBinding():
            return part.evidence.dongle == binding.dongle
        case _:
            return False


def _damaged(why: str) -> DamagedError:
    what = f"The vendor folder's record of what the license was made from cannot be used: {why}."
    hint = "Restore the folder from its backup; or give a new --request of the device, and the --package files."
    return DamagedError(Reason.DOCUMENT_MALFORMED, what, hint)
