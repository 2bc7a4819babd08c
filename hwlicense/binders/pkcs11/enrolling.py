"""Which token and which key are meant, in which way the key works, and what a request says of them."""

from __future__ import annotations

import secrets
import warnings
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning

from hwlicense.binders.pkcs11 import failures, protocol
from hwlicense.binders.pkcs11.answering import Challenge, Modules, Pins
from hwlicense.core import token as wrapping
from hwlicense.core.documents import TokenEvidence
from hwlicense.core.errors import AbsentError, DamagedError, HardwareError, Reason
from hwlicense.core.uri import LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwlicense.binders.pkcs11.protocol import Ability, Inspected, KeyFound, NewKey, TokenState
    from hwlicense.core.documents import Mechanism
    from hwlicense.core.errors import HwlicenseError
    from hwlicense.core.uri import TokenUri

_CERTIFICATES: Final = 8
_IDENTIFIER_SIZE: Final = 16
_MAKING: Final[dict[NewKey, tuple[Ability, Ability]]] = {
    "p256": ("EC_KEY_PAIR_GEN", "ECDH1_DERIVE"),
    "rsa2048": ("RSA_PKCS_KEY_PAIR_GEN", "RSA_PKCS_OAEP"),
    "rsa3072": ("RSA_PKCS_KEY_PAIR_GEN", "RSA_PKCS_OAEP"),
}
_FINAL: Final = (Reason.TOKEN_HUNG, Reason.TOKEN_CRASHED, Reason.TOKEN_LOCKED, Reason.TOKEN_BUSY)
_PURPOSE: Final = b"token trial"


def chosen_token(modules: Modules, uri: TokenUri) -> tuple[str, TokenState]:
    """The one token that `uri` names. Raises AbsentError TOKEN_ABSENT, UsageError where there are several."""
    tokens = list(modules.tokens())
    named = [(path, token) for path, token in tokens if uri.matches(token.place.uri)]
    if not named:
        raise failures.none_named(str(uri._replace(module=None)), (token.place.label for _, token in tokens))
    if len(named) > 1:
        raise failures.several_tokens(str(token.place.uri._replace(module=path)) for path, token in named)
    return named[0]


def chosen_key(inspected: Inspected, uri: TokenUri, made: bytes | None = None) -> KeyFound:
    """The key that was just `made`; else the one usable key, or the one that `uri` names. Raises UsageError."""
    found = [key for key in inspected.keys if _may_serve(inspected.token, key)]
    found = [key for key in found if (_named(uri, key) if made is None else key.key == made)]
    if not found:
        raise failures.no_key(inspected.token)
    if len(found) > 1:
        raise failures.several_keys(found, (key_uri(inspected.token, key) for key in found))
    return found[0]


def make_key(modules: Modules, path: str, token: TokenState, kind: NewKey, label: str) -> bytes:
    """A new key; its SubjectPublicKeyInfo. Raises HardwareError TOKEN_UNSUPPORTED."""
    for ability in _MAKING[kind]:
        if ability not in token.abilities:
            raise failures.refused(protocol.Failed("MECHANISM_INVALID"), path)
    key = modules.generate(path, token.place, kind, label, secrets.token_bytes(_IDENTIFIER_SIZE))
    wrapping.public_key(key)
    return key


def working_mechanism(modules: Modules, token: TokenState, key: KeyFound, pins: Pins) -> Mechanism:
    """The first mechanism with which the token answers a fresh challenge. What modules list proves nothing.

    Raises HardwareError TOKEN_UNSUPPORTED where none does.
    """
    problem: HwlicenseError | None = None
    for mechanism in _mechanisms(key.key):
        challenge = Challenge.fresh(token.place.uri, key.key, mechanism, login=not key.open, purpose=_PURPOSE)
        try:
            modules.answer(challenge, pins).wipe()
        except AbsentError:
            raise
        except HardwareError as error:
            if error.reason in _FINAL:
                raise
            problem = error
        else:
            return mechanism
    assert problem is not None  # noqa: S101  # each kind of key has a mechanism
    raise failures.useless(problem) from problem


def listed_mechanism(token: TokenState, key: KeyFound) -> Mechanism:
    """The mechanism to expect of a key that cannot be tried without a login. Raises RefusedError PIN_NEEDED.

    Only ECDH is told by the module's list: of OAEP it does not say with which hash.
    """
    if "ecdh" not in _mechanisms(key.key):
        raise failures.pin_needed(token)
    return "ecdh"


def evidence(inspected: Inspected, key: KeyFound, mechanism: Mechanism) -> TokenEvidence:
    """What a request says of the key."""
    return TokenEvidence(
        uri=key_uri(inspected.token, key),
        key=key.key,
        mechanism=mechanism,
        pin=not key.open,
        certificates=_attesting(inspected.certificates, key.key),
    )


def key_uri(token: TokenState, key: KeyFound) -> str:
    """Token and key as a URI without a module."""
    label = key.label if key.label and "\0" not in key.label else None
    uri = token.place.uri._replace(object=label, id=key.identifier or None)
    return str(uri) if len(str(uri)) <= LIMIT else str(uri._replace(object=None))


def _named(uri: TokenUri, key: KeyFound) -> bool:
    return uri.id in {None, key.identifier} and uri.object in {None, key.label}


def _may_serve(token: TokenState, key: KeyFound) -> bool:
    try:
        mechanisms = _mechanisms(key.key)
    except DamagedError:
        return False
    ability: Ability = "ECDH1_DERIVE" if "ecdh" in mechanisms else "RSA_PKCS_OAEP"
    shows_all = token.logged_in or not token.flags & protocol.LOGIN_REQUIRED
    return ability in token.abilities and (key.usable is True or (key.usable is None and not shows_all))


def _mechanisms(key: bytes) -> Sequence[Mechanism]:
    """Those that go with a key. Raises DamagedError for a key of another kind."""
    is_ec = isinstance(wrapping.public_key(key), ec.EllipticCurvePublicKey)
    return [mechanism for mechanism in wrapping.MECHANISMS if (mechanism == "ecdh") == is_ec]


def _attesting(certificates: Sequence[bytes], key: bytes) -> list[bytes]:
    """Those of the key itself, then those of CAs: what may lead from the key to its token's maker."""
    own, above = list[bytes](), list[bytes]()
    for der in certificates:
        kind = _kind(der, key)
        if kind is not None:
            (own if kind == "own" else above).append(der)
    return list(dict.fromkeys(own + above))[:_CERTIFICATES]


def _kind(der: bytes, key: bytes) -> str | None:
    try:
        with warnings.catch_warnings():  # real makers' certificates are odd in ways that concern nobody here
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            certificate = x509.load_der_x509_certificate(der)
            public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            if public == key:
                return "own"
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (
        ValueError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.ExtensionNotFound,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ):
        return None  # of no use to the vendor either
    return "CA" if constraints.value.ca else None
