"""A certificate authority such as TPM makers have, for the EK certificates of simulated TPMs."""

from __future__ import annotations

import datetime as dt
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from hwlicense_simulators.errors import SimulatorError

_ROOT, _ISSUER, _KEY = "root.pem", "issuer.pem", "key.pem"


class CertificateAuthority:
    """Certifies the endorsement keys of any number of TPMs; kept in `folder`, made there at first use.

    With `intermediate`, EK certificates are issued by a second certificate below the root, as with most makers of
    real TPMs. The keys are P-256; the root's own key is thrown away when there is an intermediate.
    """

    def __init__(self, folder: Path | str, *, intermediate: bool = False) -> None:
        self.folder = Path(folder).absolute()
        if not self.folder.exists():
            self._create(intermediate=intermediate)
        if missing := [name for name in (_ROOT, _ISSUER, _KEY) if not (self.folder / name).is_file()]:
            raise SimulatorError(
                f"{self.folder} is not a certificate authority: {missing[0]} is missing", "use a new folder"
            )

    @property
    def root(self) -> Path:
        """PEM file of the self-signed root, for `--ek-root`."""
        return self.folder / _ROOT

    @property
    def issuer(self) -> Path:
        """PEM file of the certificate that signs EK certificates: the intermediate, or else the root."""
        return self.folder / _ISSUER

    def configure(self, folder: Path, link: Path) -> Path:
        """Write the configuration of swtpm_localca into `folder`, naming the authority by `link`; return its path."""
        path = folder / "localca.conf"
        names = {"statedir": "", "signingkey": _KEY, "issuercert": _ISSUER, "certserial": "serial"}
        path.write_text("".join(f"{option} = {link / name}\n" for option, name in names.items()))
        return path

    def _create(self, *, intermediate: bool) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=self.folder.name + ".", dir=self.folder.parent))
        try:
            _write(folder, intermediate=intermediate)
            folder.rename(self.folder)
        except OSError:
            # Another process made it in the meantime, and whole, because a rename is atomic.
            if not self.folder.exists():
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, *, intermediate: bool) -> None:
    token = secrets.token_hex(4)
    root_key = ec.generate_private_key(ec.SECP256R1())
    root_name = _name(f"Simulated TPM root {token}")
    root = issuer = _certificate(root_name, root_key.public_key(), root_name, root_key, path_length=1)
    key = root_key
    if intermediate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"Simulated TPM issuer {token}")
        issuer = _certificate(name, key.public_key(), root_name, root_key, path_length=0)
    (folder / _ROOT).write_bytes(root.public_bytes(Encoding.PEM))
    (folder / _ISSUER).write_bytes(issuer.public_bytes(Encoding.PEM))
    encoded = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with open(folder / _KEY, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(encoded)


def _name(common: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Simulation, not a hardware vendor")
    return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    *,
    path_length: int,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30 * 365))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(
            x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
