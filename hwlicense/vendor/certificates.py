"""Chains of X.509 certificates that makers of TPMs and tokens give their keys, against roots that the vendor chose."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    import datetime
    from collections.abc import Sequence

    from cryptography.x509.verification import Policy

EK_CERTIFICATE_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate (TCG EK Credential Profile, 3.2.16)."""

_YUBIHSM: Final = "1.3.6.1.4.1.41482.4."

# All that reading a certificate raises: whoever made the request chose its bytes
BAD_CERTIFICATE: Final = (
    VerificationError,
    UnsupportedAlgorithm,
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def read_pem(pem: bytes, whose: str) -> list[x509.Certificate]:
    """Every certificate of a PEM file. Raises UsageError; `whose` says in it what they should be."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        what = f"The file of {whose} roots holds no certificate in PEM."
        raise UsageError(Reason.USAGE, what, f"Give the {whose} maker's CA certificates as PEM.") from None


def load(der: bytes) -> x509.Certificate:
    """A certificate from a request. Raises one of BAD_CERTIFICATE."""
    with warnings.catch_warnings():  # real makers' certificates are odd in ways that concern nobody here
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return x509.load_der_x509_certificate(der)


def public_key_of(certificate: x509.Certificate) -> bytes:
    """SubjectPublicKeyInfo, DER. Raises one of BAD_CERTIFICATE."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def root_of(
    certificate: x509.Certificate,
    between: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    now: datetime.datetime,
    policy: ExtensionPolicy,
) -> x509.Certificate:
    """The one of `roots` that `certificate` leads to, by way of `between`. Raises one of BAD_CERTIFICATE."""
    verifier = (
        PolicyBuilder()
        .store(Store(list(roots)))
        .time(now)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=policy)
        .build_client_verifier()
    )
    return verifier.verify(certificate, list(between)).chain[-1]


def check_attests_generation(certificate: x509.Certificate) -> None:
    """Raises ValueError for attestations that a maker gives imported keys as well, such as those of a YubiHSM 2."""
    if any(extension.oid.dotted_string.startswith(_YUBIHSM) for extension in certificate.extensions):
        msg = "a YubiHSM attests keys that were imported, too, so its word does not say that a key was made in it"
        raise ValueError(msg)


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
        msg = "the certificate is a CA's"
        raise ValueError(msg)


def _is_for_an_ek(_policy: Policy, _certificate: x509.Certificate, extension: x509.ExtendedKeyUsage | None) -> None:
    if extension is not None and EK_CERTIFICATE_USAGE not in extension:
        msg = "the certificate is not for an EK"
        raise ValueError(msg)


# These certificates carry critical extensions that web PKI does not know (a directory name with the TPM's model, a
# token's firmware), so every extension is let through but those that say what a certificate may be used for.
_CA_POLICY: Final = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _is_ca)
    .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _signs_certificates)
)
ATTESTED_POLICY: Final = ExtensionPolicy.permit_all().may_be_present(
    x509.BasicConstraints, Criticality.AGNOSTIC, _is_no_ca
)
EK_POLICY: Final = ATTESTED_POLICY.may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _is_for_an_ek)
