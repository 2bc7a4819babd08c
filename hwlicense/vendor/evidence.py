"""Whether a request tells the truth: certificates against chosen roots, key templates, and the TPM's quote.

Activation at the device proves the rest: shares of the license secret are encrypted to the EK for the SRK and the AK
of the request, so keys that do not live in that EK's TPM give a license that never opens. A token or dongle proves
nothing in a request. What is wrapped for a token's key opens only where that key is, in hardware or not: so the vendor
must know the key, by its maker's attestation or because the vendor recorded it. A dongle's answers the vendor has.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

from hwlicense.core import token
from hwlicense.core.documents import Endorsement, Request, TokenEvidence, TpmEvidence, UsbEvidence  # NamedTuple fields
from hwlicense.core.envelope import statement, unverified
from hwlicense.core.errors import DamagedError, Reason, RefusedError, UsageError
from hwlicense.core.tpm.nv import check_counter
from hwlicense.core.tpm.quote import check_quote
from hwlicense.core.tpm.structures import Public, check_endorsement_key, check_storage_root_key
from hwlicense.core.uri import TokenUri
from hwlicense.vendor import certificates

if TYPE_CHECKING:
    import datetime
    from collections.abc import Collection, Sequence

    from cryptography import x509

    from hwlicense.core.documents import Evidence, Pcr
    from hwlicense.core.envelope import Envelope

RootClass = Literal["discrete", "firmware", "virtual", "unknown"]
ROOT_CLASSES: Final[dict[str, RootClass]] = {name: name for name in get_args(RootClass)}

_ENROLL_AGAIN: Final = "Enroll the device again (`hwlicense device enroll`); a request must not be edited."


class Root(NamedTuple):
    """A certificate that the vendor chose to trust, and what kind of TPM it stands for."""

    certificate: x509.Certificate
    root_class: RootClass


class Trusted(NamedTuple):
    """What the vendor believes: CAs of TPMs, Names of EKs, CAs of tokens, fingerprints of token keys (32 bytes)."""

    roots: Sequence[Root] = ()
    recorded: Collection[bytes] = ()
    token_roots: Sequence[x509.Certificate] = ()
    tokens: Collection[bytes] = ()


class TpmPart(NamedTuple):
    """A TPM of a request that holds, with the EK that the license will be bound to.

    `clock` is what the TPM quoted: milliseconds of powered-on time, from which hours of powered-on time count.
    """

    evidence: TpmEvidence
    endorsement_key: Public
    storage_root_key: Public
    attestation_key: Public
    endorsement: Endorsement
    clock: int


class TokenPart(NamedTuple):
    """A token of a request, and why the vendor believes its key."""

    evidence: TokenEvidence
    endorsement: Endorsement


class DonglePart(NamedTuple):
    """A dongle of a request. Whether its answers are known is seen when the license is made."""

    evidence: UsbEvidence


Part = TpmPart | TokenPart | DonglePart


class Examined(NamedTuple):
    """A request that holds, and what the license can be bound to, in its order."""

    request: Request
    parts: list[Part]

    @property
    def tpm(self) -> TpmPart | None:
        """The TPM among the parts."""
        return next((part for part in self.parts if isinstance(part, TpmPart)), None)

    @property
    def pcrs(self) -> list[Pcr]:
        """The platform's state; empty without a TPM."""
        return self.tpm.evidence.pcrs if self.tpm else []


def read_roots(pem: bytes, root_class: RootClass) -> list[Root]:
    """Every certificate of a PEM file; each becomes a root of its own. Raises UsageError."""
    return [Root(certificate, root_class) for certificate in certificates.read_pem(pem, "TPM")]


def fingerprint(key: bytes) -> bytes:
    """What a token's key is recorded by: SHA-256 of its SubjectPublicKeyInfo, 32 bytes."""
    return hashlib.sha256(key).digest()


def examine(raw: bytes, trusted: Trusted, now: datetime.datetime) -> Examined:
    """Check a request. `now` is in UTC.

    Raises RefusedError EK_UNTRUSTED, TOKEN_UNTRUSTED or PCR_UNUSABLE, DamagedError QUOTE_INVALID, EVIDENCE_INVALID or a
    decoder's.
    """
    try:
        return _examined(raw, trusted, now)
    except UsageError as error:  # what would be a slip in arguments is forged in a request
        raise DamagedError(Reason.EVIDENCE_INVALID, error.what, _ENROLL_AGAIN) from error
    except (DamagedError, RefusedError) as error:
        raise type(error)(error.reason, error.what, error.hint or _ENROLL_AGAIN) from error


def _examined(raw: bytes, trusted: Trusted, now: datetime.datetime) -> Examined:
    request, envelope = unverified(raw, Request)
    if len({identity(evidence) for evidence in request.hardware}) != len(request.hardware):
        raise DamagedError(Reason.EVIDENCE_INVALID, "The request names one piece of hardware twice, or two TPMs.")
    parts: list[Part] = []
    for evidence in request.hardware:
        match evidence:
            case TpmEvidence():
                parts.append(_tpm(evidence, request, envelope, trusted, now))
            case TokenEvidence():
                parts.append(_token(evidence, trusted, now))
            case UsbEvidence():
                parts.append(DonglePart(evidence))
    return Examined(request, parts)


def identity(evidence: Evidence) -> bytes:
    """What tells one piece of hardware from another."""
    match evidence:
        case TpmEvidence():
            return b"tpm"  # a license binds to one at the most: its device's
        case TokenEvidence():
            return evidence.key
        case UsbEvidence():
            return evidence.dongle.encode()


def _tpm(
    evidence: TpmEvidence, request: Request, envelope: Envelope, trusted: Trusted, now: datetime.datetime
) -> TpmPart:
    storage_root_key = Public.parse(evidence.storage_root_key)
    attestation_key = Public.parse(evidence.attestation_key)
    check_storage_root_key(storage_root_key)
    signatures = {signature.keyid: signature.sig for signature in envelope.signatures}
    quote = signatures.get(attestation_key.name.hex())
    if quote is None:
        raise DamagedError(Reason.QUOTE_INVALID, "The request carries no quote by its attestation key.")
    quoted = check_quote(attestation_key, quote, statement(request), evidence.pcrs)
    if evidence.counter:
        check_counter(evidence.counter)
    endorsement_key, endorsement = _endorsed(evidence, trusted, now)
    return TpmPart(evidence, endorsement_key, storage_root_key, attestation_key, endorsement, quoted.clock)


def _endorsed(evidence: TpmEvidence, trusted: Trusted, now: datetime.datetime) -> tuple[Public, Endorsement]:
    """The first EK that was recorded by hand, or whose certificate leads to a root."""
    problems = []
    for key in evidence.endorsement_keys:
        public = Public.parse(key.public)
        check_endorsement_key(public)
        if public.name in trusted.recorded:
            return public, Endorsement("recorded", "", "unknown")
        if key.certificate is None:
            problems.append("one EK has no certificate")
            continue
        try:
            root = _verified_root(key.certificate, public, trusted.roots, now)
        except certificates.BAD_CERTIFICATE as error:
            problems.append(str(error))
        else:
            return public, Endorsement("certificate", root.certificate.subject.rfc4514_string()[:500], root.root_class)
    if trusted.recorded:
        problems.append("none has a Name that was recorded")
    raise RefusedError(
        Reason.EK_UNTRUSTED,
        f"No endorsement key of the request is trusted: {'; '.join(dict.fromkeys(problems))}.",
        "Give the TPM maker's CA with --ek-root, or an EK's Name that you recorded yourself with --ek "
        "(`hwlicense inspect` shows the Names; trust only one that you saw on the device).",
    )


def _verified_root(der: bytes, public: Public, roots: Sequence[Root], now: datetime.datetime) -> Root:
    if not roots:
        msg = "no EK root was given"
        raise ValueError(msg)
    certificate = certificates.load(der)
    if certificates.public_key_of(certificate) != token.spki(public.key()):
        msg = "an EK certificate is for another key than the EK beside it"
        raise ValueError(msg)
    issuer = certificate.issuer.rfc4514_string()[:200]
    if all(root.certificate.subject != certificate.issuer for root in roots):
        msg = f"the CA {issuer!r}, which issued an EK certificate, is not among the EK roots"
        raise ValueError(msg)
    chosen = [root.certificate for root in roots]
    anchor = certificates.root_of(certificate, [], chosen, now, certificates.EK_POLICY)
    return next(root for root in roots if root.certificate == anchor)


def _token(evidence: TokenEvidence, trusted: Trusted, now: datetime.datetime) -> TokenPart:
    token.public_key(evidence.key)
    TokenUri.parse_hint(evidence.uri)
    if fingerprint(evidence.key) in trusted.tokens:
        return TokenPart(evidence, Endorsement("recorded", "", "unknown"))
    try:
        root = _attesting_root(evidence, trusted.token_roots, now)
    except certificates.BAD_CERTIFICATE as error:
        raise RefusedError(
            Reason.TOKEN_UNTRUSTED,
            f"The key of the token in the request is not trusted: {error}.",
            "Give the token maker's attestation CA with --token-root; or prepare tokens yourself (`vendor token "
            "enroll`); or give the fingerprint of a key that you saw being made on the token, with --token.",
        ) from None
    return TokenPart(evidence, Endorsement("certificate", root.subject.rfc4514_string()[:500], "unknown"))


def _attesting_root(
    evidence: TokenEvidence, roots: Sequence[x509.Certificate], now: datetime.datetime
) -> x509.Certificate:
    """The root of an attestation of the token's key: who could make keys outside a token gets no such certificate."""
    if not roots:
        msg = "no attestation root was given, and the key is not recorded"
        raise ValueError(msg)
    found = [certificates.load(der) for der in evidence.certificates]
    problem = "no certificate in the request attests it"
    for certificate in found:
        if certificates.public_key_of(certificate) == evidence.key:
            between = [other for other in found if other != certificate]
            try:
                certificates.check_attests_generation(certificate)
                return certificates.root_of(certificate, between, roots, now, certificates.ATTESTED_POLICY)
            except certificates.BAD_CERTIFICATE as error:
                problem = str(error)
    raise ValueError(problem)
