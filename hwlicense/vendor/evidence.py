"""Whether a request tells the truth: EK certificates against chosen roots, key templates, and the quote.

Activation at the device proves the rest: shares of the license secret are encrypted to the EK for the SRK and the AK
of the request, so keys that do not live in that EK's TPM give a license that never opens.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from hwlicense.core.documents import Endorsement, Request, TpmEvidence  # NamedTuple fields
from hwlicense.core.envelope import statement, unverified
from hwlicense.core.errors import DamagedError, Reason, RefusedError, UsageError
from hwlicense.core.tpm.quote import check_quote
from hwlicense.core.tpm.structures import Public, check_endorsement_key, check_storage_root_key

if TYPE_CHECKING:
    import datetime
    from collections.abc import Collection, Sequence

    from cryptography.x509.verification import Policy

RootClass = Literal["discrete", "firmware", "virtual", "unknown"]
ROOT_CLASSES: Final[dict[str, RootClass]] = {name: name for name in get_args(RootClass)}
EK_CERTIFICATE_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate (TCG EK Credential Profile, 3.2.16)."""


_ENROLL_AGAIN: Final = "Enroll the device again (`hwlicense device enroll`); a request must not be edited."


class Root(NamedTuple):
    """A certificate that the vendor chose to trust, and what kind of TPM it stands for."""

    certificate: x509.Certificate
    root_class: RootClass


class Examined(NamedTuple):
    """A request that holds: its evidence, and the EK that the license will be bound to."""

    request: Request
    evidence: TpmEvidence
    endorsement_key: Public
    storage_root_key: Public
    attestation_key: Public
    endorsement: Endorsement


def read_roots(pem: bytes, root_class: RootClass) -> list[Root]:
    """Every certificate of a PEM file; each becomes a root of its own. Raises UsageError."""
    try:
        return [Root(certificate, root_class) for certificate in x509.load_pem_x509_certificates(pem)]
    except ValueError:
        what = "The file of EK roots holds no certificate in PEM."
        raise UsageError(Reason.USAGE, what, "Give the TPM maker's CA certificates as PEM.") from None


def examine(raw: bytes, roots: Sequence[Root], recorded: Collection[bytes], now: datetime.datetime) -> Examined:
    """Check a request. `recorded` holds Names of EKs that the vendor recorded by hand; `now` is in UTC.

    Raises RefusedError EK_UNTRUSTED or PCR_UNUSABLE, DamagedError QUOTE_INVALID, EVIDENCE_INVALID or a decoder's.
    """
    try:
        return _examined(raw, roots, recorded, now)
    except UsageError as error:  # what would be a slip in arguments is forged in a request
        raise DamagedError(Reason.EVIDENCE_INVALID, error.what, _ENROLL_AGAIN) from error
    except (DamagedError, RefusedError) as error:
        raise type(error)(error.reason, error.what, error.hint or _ENROLL_AGAIN) from error


def _examined(raw: bytes, roots: Sequence[Root], recorded: Collection[bytes], now: datetime.datetime) -> Examined:
    request, envelope = unverified(raw, Request)
    if len(request.hardware) != 1:
        raise DamagedError(Reason.EVIDENCE_INVALID, "The request names more than one piece of hardware.")
    (evidence,) = request.hardware
    storage_root_key = Public.parse(evidence.storage_root_key)
    attestation_key = Public.parse(evidence.attestation_key)
    check_storage_root_key(storage_root_key)
    signatures = {signature.keyid: signature.sig for signature in envelope.signatures}
    quote = signatures.get(attestation_key.name.hex())
    if quote is None:
        raise DamagedError(Reason.QUOTE_INVALID, "The request carries no quote by its attestation key.")
    check_quote(attestation_key, quote, statement(request), evidence.pcrs)
    endorsement_key, endorsement = _endorsed(evidence, roots, recorded, now)
    return Examined(request, evidence, endorsement_key, storage_root_key, attestation_key, endorsement)


def _endorsed(
    evidence: TpmEvidence, roots: Sequence[Root], recorded: Collection[bytes], now: datetime.datetime
) -> tuple[Public, Endorsement]:
    """The first EK that was recorded by hand, or whose certificate leads to a root."""
    problems = []
    for key in evidence.endorsement_keys:
        public = Public.parse(key.public)
        check_endorsement_key(public)
        if public.name in recorded:
            return public, Endorsement("recorded", "", "unknown")
        if key.certificate is None:
            problems.append("one EK has no certificate")
            continue
        try:
            root = _verified_root(key.certificate, public, roots, now)
        except _BAD_CERTIFICATE as error:
            problems.append(str(error))
        else:
            return public, Endorsement("certificate", root.certificate.subject.rfc4514_string()[:500], root.root_class)
    if recorded:
        problems.append("none has a Name that was recorded")
    raise RefusedError(
        Reason.EK_UNTRUSTED,
        f"No endorsement key of the request is trusted: {'; '.join(dict.fromkeys(problems))}.",
        "Give the TPM maker's CA with --ek-root, or an EK's Name that you recorded yourself with --ek "
        "(`hwlicense inspect` shows the Names; trust only one that you saw on the device).",
    )


# All that reading a certificate raises: whoever made the request chose its bytes
_BAD_CERTIFICATE: Final = (
    VerificationError,
    UnsupportedAlgorithm,
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def _verified_root(der: bytes, public: Public, roots: Sequence[Root], now: datetime.datetime) -> Root:
    if not roots:
        msg = "no EK root was given"
        raise ValueError(msg)
    with warnings.catch_warnings():  # real makers' certificates are odd in ways that concern nobody here
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        certificate = x509.load_der_x509_certificate(der)
    certified = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if certified != public.key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
        msg = "an EK certificate is for another key than the EK beside it"
        raise ValueError(msg)
    issuer = certificate.issuer.rfc4514_string()[:200]
    if all(root.certificate.subject != certificate.issuer for root in roots):
        msg = f"the CA {issuer!r}, which issued an EK certificate, is not among the EK roots"
        raise ValueError(msg)
    verifier = (
        PolicyBuilder()
        .store(Store([root.certificate for root in roots]))
        .time(now)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_EK_POLICY)
        .build_client_verifier()
    )
    anchor = verifier.verify(certificate, []).chain[-1]
    return next(root for root in roots if root.certificate == anchor)


def _is_ca(_policy: Policy, _certificate: x509.Certificate, extension: x509.BasicConstraints) -> None:
    if not extension.ca:
        msg = "a certificate on the way to the root is not a CA"
        raise ValueError(msg)


def _signs_certificates(_policy: Policy, _certificate: x509.Certificate, extension: x509.KeyUsage | None) -> None:
    if extension is not None and not extension.key_cert_sign:
        msg = "a certificate on the way to the root may not sign certificates"
        raise ValueError(msg)


def _is_no_ca(_policy: Policy, _certificate: x509.Certificate, extension: x509.BasicConstraints | None) -> None:
    if extension is not None and extension.ca:
        msg = "the EK certificate is a CA's"
        raise ValueError(msg)


def _is_for_an_ek(_policy: Policy, _certificate: x509.Certificate, extension: x509.ExtendedKeyUsage | None) -> None:
    if extension is not None and EK_CERTIFICATE_USAGE not in extension:
        msg = "the certificate is not for an EK"
        raise ValueError(msg)


# EK certificates carry critical extensions that web PKI does not know (a directory name with the TPM's model), so every
# extension is let through but those that say what a certificate may be used for.
_CA_POLICY: Final = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _is_ca)
    .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _signs_certificates)
)
_EK_POLICY: Final = (
    ExtensionPolicy.permit_all()
    .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, _is_no_ca)
    .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _is_for_an_ek)
)
