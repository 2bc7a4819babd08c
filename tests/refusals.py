"""What attackers of tokens and dongles are told, and what they need for trying: spies, CAs, time."""

from __future__ import annotations

import datetime
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import HwlicenseError
from tests.forging import now, refused, signed_anew

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense.core.errors import Reason
    from hwlicense.core.secret import Secret
    from tests.pieces import Kit
    from tests.world import Vendor


@contextmanager
def refusal(kind: type[HwlicenseError], *reasons: Reason | str, words: str = "") -> Iterator[None]:
    """As `refused`, by this kind of error, which stands for an exit status."""
    with refused(*reasons, words=words):
        try:
            yield
        except HwlicenseError as error:
            assert type(error) is kind, repr(error)  # noqa: PT017  # `refused` is what expects it
            raise


def nobody(_prompt: str, **_options: object) -> Secret:
    pytest.fail("a PIN was asked for")


def until(true: Callable[[], object], seconds: float = 10.0) -> float:
    """Wait for it; how long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it never came"
        time.sleep(0.01)
    return time.monotonic() - began


# ---- licenses -----------------------------------------------------------------------------------------------


def sent(raw: bytes) -> Any:
    """The license in an envelope. A test knows of which kind its bindings are."""
    return unverified(raw, License)[0]


def lay(kit: Kit, licensed: License, vendor: Vendor) -> bytes:
    """A license that an attacker writes into the home, signed by stolen document keys. The bytes."""
    raw = signed_anew(licensed, vendor)
    folder = kit.home.path / "licenses" / licensed.grant.license
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "license.hwlic").write_bytes(raw)
    return raw


# ---- modules ------------------------------------------------------------------------------------------------

_SPY = """
#include <fcntl.h>
__attribute__((constructor)) static void loaded(void) { open("%s", O_CREAT | O_WRONLY, 0600); }
"""


def spying_module(folder: Path) -> tuple[Path, Path]:
    """A shared library that leaves a mark when it is loaded, and the mark."""
    library, mark = folder / "spy.so", folder / "loaded"
    command: list[str | Path] = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=_SPY % mark, text=True, check=True)
    return library, mark


# ---- certificates -------------------------------------------------------------------------------------------


class Authority:
    """A CA for token keys. `issuer` is None for a root."""

    def __init__(
        self,
        name: str = "maker",
        issuer: Authority | None = None,
        *,
        ca: bool | None = True,
        signs: bool | None = None,
        path_length: int | None = None,
        days: tuple[int, int] = (-10, 3650),
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> None:
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        options: dict[str, Any] = {"ca": ca, "signs": signs, "path_length": path_length, "days": days}
        self.certificate = (issuer or self).certify(self.key.public_key(), name, **options)

    def certify(
        self,
        public: object,
        name: str = "token key",
        *,
        ca: bool | None = False,
        signs: bool | None = None,
        path_length: int | None = None,
        days: tuple[int, int] = (-10, 3650),
    ) -> bytes:
        """A certificate, DER. `ca` and `signs` of None leave these extensions out."""
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.subject)
            .public_key(public)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() + datetime.timedelta(days[0]))
            .not_valid_after(now() + datetime.timedelta(days[1]))
        )
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
        if signs is not None:
            usage = dict.fromkeys(
                ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
            ) | {"encipher_only": False, "decipher_only": False}
            usage_of_key = x509.KeyUsage(digital_signature=True, key_cert_sign=signs, **usage)
            builder = builder.add_extension(usage_of_key, critical=True)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)

    @property
    def root(self) -> x509.Certificate:
        return x509.load_der_x509_certificate(self.certificate)

    def pem(self) -> bytes:
        return self.root.public_bytes(Encoding.PEM)
