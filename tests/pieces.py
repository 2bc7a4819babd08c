"""Pieces of hardware that a license can be bound to, each simulated, and a device that has some of them."""

from __future__ import annotations

import datetime
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import hwlicense
from hwlicense.binders.pkcs11 import TokenHardware
from hwlicense.binders.tpm import TpmHardware
from hwlicense.binders.usb import UsbHardware, find_one
from hwlicense.binders.usb.finding import Selector
from hwlicense.core.secret import Secret
from hwlicense.core.terms import parse_terms
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.uri import TokenUri
from hwlicense.device import selecting
from hwlicense.device.enrolling import enroll
from hwlicense.device.home import Home
from hwlicense.device.installing import install
from hwlicense.vendor import dongles, evidence, issuing
from hwlicense_simulators import Bus, Dongle, Reader, Tpm
from tests.world import NOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense.core.dongle import Mode
    from hwlicense.core.hardware import AnyHardware
    from hwlicense_simulators import Token
    from tests.world import Vendor

PIN = "123456"


def pin(_prompt: str = "", /, *, last_try: bool = False) -> Secret:
    assert not last_try
    return Secret(bytearray(PIN.encode()))


class Bench:
    """Where all pieces are plugged in: one reader of tokens, one USB bus, one TPM maker. A context manager."""

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self.reader = self._stack.enter_context(Reader())
        self.bus = Bus()
        self._stack.enter_context(self.bus.installed())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def enter(self, simulator):
        return self._stack.enter_context(simulator)


class Piece:
    """One piece: it enrolls, and can be taken away and brought back."""

    kind: str

    @contextmanager
    def hardware(self) -> Iterator[AnyHardware]:
        raise NotImplementedError

    def pull(self) -> None:
        raise NotImplementedError

    def plug(self) -> None:
        raise NotImplementedError

    def prepare(self, vendor: Vendor) -> None:
        """What the vendor does with it before a license is issued."""

    def trusted(self) -> evidence.Trusted:
        return evidence.Trusted()


class TpmPiece(Piece):
    kind, absent = "tpm", "TPM_ABSENT"

    def __init__(self, bench: Bench) -> None:
        self.tpm = bench.enter(Tpm())

    @contextmanager
    def hardware(self):
        with TpmHardware(self.tpm.tcti) as hardware:
            yield hardware

    def pull(self):
        self.tpm.power_cut(restart=False)

    def plug(self):
        self.tpm.start()

    def trusted(self):
        return evidence.Trusted(evidence.read_roots(self.tpm.ek_root.read_bytes(), "virtual"))


class TokenPiece(Piece):
    kind, absent = "pkcs11", "TOKEN_ABSENT"

    def __init__(self, bench: Bench, new_key: Literal["p256", "rsa2048"] = "p256", label: str = "hwlicense") -> None:
        self.reader = bench.reader
        self.token: Token = bench.reader.token(label, PIN)
        self.new_key = new_key
        self.key = b""

    @contextmanager
    def hardware(self):
        with TokenHardware([str(self.reader.module)], TokenUri.parse(self.token.uri)) as hardware:
            hardware.enroll(pin, self.new_key if not self.key else None, "hwlicense")
            self.key = hardware.describe(Selection()).key
            yield hardware

    def pull(self):
        self.token.pull()

    def plug(self):
        self.token.plug()

    def trusted(self):
        return evidence.Trusted(tokens={evidence.fingerprint(self.key)})


class DonglePiece(Piece):
    kind, absent = "usb", "DONGLE_ABSENT"
    _serial = 7_000_000

    def __init__(self, bench: Bench, mode: Mode = "less-than-64", *, enrolled: int = 0, touch: bool = False) -> None:
        DonglePiece._serial += 1
        self.mode, self.enrolled, self.touch = mode, enrolled, touch
        self.dongle = bench.enter(
            Dongle(bus=bench.bus, serial=self._serial, mode=mode, programmed=bool(enrolled), touch=touch)
        )
        self.folder = None

    def selector(self) -> str:
        return f"1050:0407:{self.dongle.serial}"

    def prepare(self, vendor):
        if self.folder == vendor.place.path:
            return
        self.folder = vendor.place.path
        with find_one(Selector.parse(self.selector())) as device:
            if self.enrolled:
                dongles.enroll(vendor.place, vendor.keys, device, 2, self.enrolled, partial(device.ask, 2, touch=None))
            else:
                dongles.program(vendor.place, vendor.keys, device, 2, touch=self.touch, mode=self.mode, overwrite=True)

    @contextmanager
    def hardware(self):
        with UsbHardware(self.selector()) as hardware:
            yield hardware

    def pull(self):
        self.dongle.pull()

    def plug(self):
        self.dongle.plug()


PIECES: dict[str, Callable[[Bench], Any]] = {
    "TPM": TpmPiece,
    "token, P-256": TokenPiece,
    "token, RSA": partial(TokenPiece, new_key="rsa2048"),
    "dongle, less than 64": DonglePiece,
    "dongle, fixed 64": partial(DonglePiece, mode="fixed-64"),
    "dongle, enrolled": partial(DonglePiece, enrolled=64),
}


class Kit:
    """A device with pieces, and a home."""

    def __init__(self, bench: Bench, home: Path, pieces: list[Piece]) -> None:
        self.bench, self.home, self.pieces = bench, Home(home), pieces

    @property
    def tcti(self) -> str:
        """Of the piece that is a TPM; else of one that is not there, so that no test asks the machine's own."""
        return next((p.tpm.tcti for p in self.pieces if isinstance(p, TpmPiece)), "swtpm:path=/nonexistent/tpm")

    @property
    def token(self) -> str:
        return f"pkcs11:?module-path={self.bench.reader.module}"

    def connect(self, kind: str) -> AnyHardware:
        return selecting.hardware(self.home, self.tcti, [self.token])(kind)

    def request(self, vendor: Vendor, selection: Selection | None = None) -> bytes:
        with ExitStack() as stack:
            for piece in self.pieces:
                piece.prepare(vendor)
            hardware = [stack.enter_context(piece.hardware()) for piece in self.pieces]
            return enroll(hardware, selection or Selection(), "kit", NOW.date())

    def issue(self, vendor: Vendor, terms: str, request: bytes | None = None) -> bytes:
        raw = request or self.request(vendor)
        trusts = [piece.trusted() for piece in self.pieces]
        trusted = evidence.Trusted(
            [root for trust in trusts for root in trust.roots], (), (), {t for trust in trusts for t in trust.tokens}
        )
        examined = evidence.examine(raw, trusted, datetime.datetime.now(datetime.UTC))
        issued = issuing.issue(
            vendor.public,
            vendor.keys,
            examined.parts,
            [vendor.manifest],
            parse_terms(terms),
            [],
            today=NOW.date(),
            bind_dongle=partial(dongles.bind, vendor.place, vendor.keys),
        )
        return issued.raw

    def license(self, vendor: Vendor, terms: str) -> bytes:
        """Request, license, installation."""
        raw = self.issue(vendor, terms)
        self.install(raw, vendor)
        return raw

    def install(self, raw: bytes, vendor: Vendor, **options):
        self.home.trust(vendor.public)
        return install(self.home, raw, self.connect, **options)

    def open(self, vendor: Vendor, **chosen):
        options: dict[str, Any] = {"tpm": self.tcti, "token": self.token, "pin": lambda _prompt: PIN} | chosen
        return hwlicense.open(vendor.package, vendor=vendor.text, home=self.home.path, **options)
