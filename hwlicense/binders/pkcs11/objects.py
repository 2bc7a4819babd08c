"""In the module's process: keys and certificates on a token, read attribute by attribute (PKCS#11 v2.40 base, 4).

Attributes are what the module says. Public keys are put together from them byte by byte and judged by the application.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass, PKCS11Error

from hwlicense.binders.pkcs11 import protocol
from hwlicense.binders.pkcs11.codes import STALE
from hwlicense.binders.pkcs11.protocol import KeyFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11 import Object, Session

    from hwlicense.binders.pkcs11.protocol import NewKey

_MOST_OBJECTS: Final = 1000
_P256: Final = bytes.fromhex("06082a8648ce3d030107")  # prime256v1 (RFC 5480, 2.1.1.1)
_EC_PUBLIC_KEY: Final = bytes.fromhex("06072a8648ce3d0201")  # id-ecPublicKey
_RSA_ENCRYPTION: Final = bytes.fromhex("06092a864886f70d0101010500")  # rsaEncryption, NULL (RFC 3279, 2.3.1)
_POINT: Final = 65
_LONG: Final = 0x80  # what a length in DER begins with where it does not fit into seven bits (X.690, 8.1.3)
_POINT_PREFIXES: Final = (b"", b"\x04\x41", b"\x03\x42\x00")
"""Raw, in the OCTET STRING of the standard, or in a BIT STRING: modules differ."""


class Public(NamedTuple):
    """The public half of a key as it is found: SubjectPublicKeyInfo, and what its private half is found by."""

    key: bytes
    identifier: bytes
    label: str


def publics(session: Session) -> Iterator[Public]:
    """Public keys, then those of certificates."""
    yield from _plain(session)
    yield from _in_certificates(session)


def _plain(session: Session) -> Iterator[Public]:
    for thing in _search(session, {Attribute.CLASS: ObjectClass.PUBLIC_KEY}):
        if key := spki(thing):
            yield Public(key, _bytes(thing, Attribute.ID), _label(thing))


def _in_certificates(session: Session) -> Iterator[Public]:
    for thing in _search(session, {Attribute.CLASS: ObjectClass.CERTIFICATE}):
        if key := _certified(_bytes(thing, Attribute.VALUE)):
            yield Public(key, _bytes(thing, Attribute.ID), _label(thing))


def certificates(session: Session) -> list[bytes]:
    """Those of a size that a request takes, in the token's order."""
    values = (_bytes(thing, Attribute.VALUE) for thing in _search(session, {Attribute.CLASS: ObjectClass.CERTIFICATE}))
    return list(islice((v for v in values if 0 < len(v) <= protocol.CERTIFICATE_SIZE), protocol.CERTIFICATE_LIMIT))


def private(session: Session, public: Public) -> Object | None:
    """The private half, by CKA_ID (PKCS#11 v2.40 base, 4.9), if it shows itself.

    Where several keys share an identifier, the first that can do something for us: what it computes is checked anyway.
    """
    kind = KeyType.EC if is_ec(public.key) else KeyType.RSA
    template: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY}
    if public.identifier:
        template[Attribute.ID] = public.identifier
    found = [thing for thing in _search(session, template) if _read(thing, Attribute.KEY_TYPE) == kind]
    return min(found, key=lambda thing: not usable(thing, public), default=None)


def usable(thing: Object, public: Public) -> bool:
    """Whether a private key may do what is asked of it here. python-pkcs11 gives it the method if so."""
    return hasattr(thing, "derive_key" if is_ec(public.key) else "decrypt")


def each_time(thing: Object) -> bool:
    """Whether it takes the PIN at each use."""
    return _read(thing, Attribute.ALWAYS_AUTHENTICATE) is True


def keys(session: Session, *, login_required: bool) -> list[KeyFound]:
    """All key pairs of a kind that may serve, each once.

    Certificates count where there are no public keys: most are those of CAs.
    """
    found: dict[bytes, KeyFound] = {}
    for public in list(_plain(session)) or _in_certificates(session):
        if public.key in found or len(found) == protocol.KEY_LIMIT:
            continue
        half = private(session, public)
        found[public.key] = KeyFound(
            key=public.key,
            label=public.label,
            identifier=public.identifier if len(public.identifier) <= protocol.IDENTIFIER_LIMIT else b"",
            usable=None if half is None else usable(half, public),
            open=not login_required or (half is not None and _read(half, Attribute.PRIVATE) is False),
            each_time=half is not None and each_time(half),
        )
    return list(found.values())


def is_ec(key: bytes) -> bool:
    """Whether a SubjectPublicKeyInfo is one of the two kinds here; it is of the other if not."""
    return _EC_PUBLIC_KEY in key[:16]


def spki(thing: Object) -> bytes:
    """SubjectPublicKeyInfo of a P-256 or RSA public key; empty for any other."""
    kind = _read(thing, Attribute.KEY_TYPE)
    if kind == KeyType.EC and _bytes(thing, Attribute.EC_PARAMS) == _P256:
        point = _bytes(thing, Attribute.EC_POINT)
        if point[-_POINT : -_POINT + 1] == b"\x04" and point[:-_POINT] in _POINT_PREFIXES:
            return _key_info(_EC_PUBLIC_KEY + _P256, point[-_POINT:])
    if kind == KeyType.RSA:
        modulus, exponent = _bytes(thing, Attribute.MODULUS), _bytes(thing, Attribute.PUBLIC_EXPONENT)
        if modulus and exponent:
            return _key_info(_RSA_ENCRYPTION, _der(0x30, _integer(modulus) + _integer(exponent)))
    return b""


def _key_info(algorithm: bytes, key: bytes) -> bytes:
    info = _der(0x30, _der(0x30, algorithm) + _der(0x03, b"\0" + key))
    return info if len(info) <= protocol.CERTIFICATE_SIZE else b""


def _integer(magnitude: bytes) -> bytes:
    number = int.from_bytes(magnitude, "big")
    return _der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < _LONG:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, _LONG | len(length))) + length + content


def _certified(certificate: bytes) -> bytes:
    """The SubjectPublicKeyInfo of a certificate; empty where there is none."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  # few tokens need it: a sooner start
    from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415
    from cryptography.x509 import load_der_x509_certificate  # noqa: PLC0415

    try:
        key = load_der_x509_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm):
        return b""
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        return b""
    if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(key.curve, ec.SECP256R1):
        return b""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _search(session: Session, template: dict[Attribute, Any]) -> list[Object]:
    """All that matches. In a list: a session has one search at a time."""
    return list(islice(session.get_objects(template), _MOST_OBJECTS))


def _read(thing: Object, attribute: Attribute) -> object:
    """An attribute; None where the object lacks it or it makes no sense. Raises one of STALE."""
    try:
        return thing[attribute]
    except STALE:
        raise
    except (PKCS11Error, ValueError, LookupError, NotImplementedError, struct.error):
        return None


def _bytes(thing: Object, attribute: Attribute) -> bytes:
    value = _read(thing, attribute)
    return value if isinstance(value, bytes) else b""


def _label(thing: Object) -> str:
    value = _read(thing, Attribute.LABEL)
    return value if isinstance(value, str) and len(value) <= protocol.LABEL_LIMIT else ""


def generate(session: Session, kind: NewKey, identifier: bytes, label: str) -> bytes:
    """Make a key pair on the token; its SubjectPublicKeyInfo. The private half stays there.

    A P-256 key derives, and signs what a recording begins with: the two are safe together (Degabriele et al., CT-RSA
    2012). An RSA key decrypts, and nothing else.
    """
    asked: dict[str, Any] = {
        "id": identifier,
        "label": label,
        "store": True,
        "public_template": {Attribute.PRIVATE: False},
        "private_template": {Attribute.PRIVATE: True, Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
    }
    if kind == "p256":
        curve = session.create_domain_parameters(KeyType.EC, {Attribute.EC_PARAMS: _P256}, local=True)
        public, _ = curve.generate_keypair(capabilities=MechanismFlag.DERIVE | MechanismFlag.SIGN, **asked)
    else:
        bits = int(kind.removeprefix("rsa"))
        public, _ = session.generate_keypair(
            KeyType.RSA, bits, capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT, **asked
        )
    if key := spki(public):
        return key
    raise ValueError("the new key cannot be read")
