"""Recordings made without a device: a key in software stands for the token that certifies, time is what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hwlicense.core.auditing import Audit, Licensed
from hwlicense.core.chain import (
    NOTHING,
    Chain,
    Checkpoint,
    Output,
    Start,
    Statement,
    TokenCertificate,
    certified_bytes,
    parse,
)
from hwlicense.core.documents import Endorsement, License, TokenBinding
from hwlicense.core.limits import Use
from tests.metered import grant

if TYPE_CHECKING:
    from hwlicense.core.auditing import Recorded

SECOND = 1_000_000
WALL = 1_780_315_200 * SECOND


class Signer:
    """A token that is none."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.public = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def certify(self, statement) -> TokenCertificate:
        signature = self._key.sign(certified_bytes(statement), ec.ECDSA(hashes.SHA256()))
        return TokenCertificate(self.public, signature)

    def license(self, **more) -> License:
        trust = Endorsement("recorded", "", "unknown")
        binding = TokenBinding("pkcs11:", self.public, "ecdh", trust, bytes(65), bytes(16), pin=True)
        return License(1, grant(Use(), **more), [binding], 1, [], [], [])


SIGNER = Signer()


class Log:
    """A log that grows in memory: `lines` of the recording under way, each a second after the one before."""

    def __init__(self, signer: Signer = SIGNER, name: str = "alerts") -> None:
        self.signer, self.name, self.boot, self.recording, self.head = signer, name, 30 * SECOND, 0, NOTHING

    def now(self) -> tuple[int, int]:
        self.boot += SECOND
        return WALL + self.boot, self.boot

    def begin(self, **more) -> Chain:
        self.recording += 1
        self.chain = chain = Chain(self.head)
        said: dict[str, Any] = {
            "schema": 1,
            "vendor": "0" * 64,
            "license": "0" * 32,
            "revision": 1,
            "package": "0" * 32,
            "log": self.name,
            "recording": self.recording,
            "previous": self.head,
            "key": chain.key,
            "boot": "0" * 32,
            "heartbeat": 10,
            "steps": None,
            "sensors": {},
        } | more
        statement = Statement(**said)
        chain.begin(statement, self.signer.certify(statement), *self.now())
        return chain

    def add(self, payload: bytes) -> None:
        self.chain.add(Output, *self.now(), json=payload)

    def checkpoint(self) -> None:
        self.chain.close_until_now(Checkpoint, *self.now())

    def end(self) -> None:
        self.chain.end(self.signer.certify(self.chain.closing()), None, *self.now())

    def lines(self) -> list[bytes]:
        taken = self.chain.take()
        self.head = self.chain.last.head
        return [link.line for link in taken]

    def record(self, count: int, every: int = 50) -> list[bytes]:
        """A whole recording with so many records in all."""
        self.begin()
        while self.chain.last.number < count - 1:
            number = self.chain.last.number
            self.checkpoint() if number % every == 0 else self.add(b'{"alert":%d}' % number)
        self.end()
        return self.lines()


def licensed(*signers: Signer) -> Licensed:
    found = [signer.license() for signer in signers or (SIGNER,)]
    return Licensed({(o.grant.license, o.grant.revision): o for o in found}, set())


def audited(lines: list[bytes], known: Licensed | None = None, watched=()) -> Recorded:
    first = parse(lines[0])
    assert isinstance(first, Start)
    audit = Audit(first, lines[0], "line 1", known or licensed(), watched)
    for number, line in enumerate(lines[1:], 2):
        audit.add(line, f"line {number}")
    return audit.finish(f"line {len(lines)}")


def severities(lines: list[bytes]) -> set[str]:
    return {fault.severity for fault in audited(lines).faults}


__all__ = ["SIGNER", "Log", "Signer", "audited", "licensed", "severities"]
