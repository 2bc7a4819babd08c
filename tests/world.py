"""A vendor, a package and devices, made by the library's own calls: what most tests start from."""

from __future__ import annotations

import datetime
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hwlicense
from hwlicense import storage
from hwlicense.binders.tpm import TpmHardware
from hwlicense.core.documents import Manifest, Request, VendorPublic
from hwlicense.core.envelope import unverified
from hwlicense.core.terms import parse_terms
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device.counters import Counters
from hwlicense.device.enrolling import enroll
from hwlicense.device.installing import install
from hwlicense.vendor import approving, evidence, issuing, packing, signing
from hwlicense.vendor.folder import Folder

if TYPE_CHECKING:
    from hwlicense.core.secret import Secret
    from hwlicense.device.home import Home
    from hwlicense.vendor.compiling import Compiled
    from hwlicense_simulators import Tpm

NOW = datetime.datetime.now(datetime.UTC)
TERMS = 'licensee = "Acme Robotics"\nproduct = "label-reader"\n'
WITH_PCRS = TERMS + '[require]\npcrs = ["sha256:0,7"]\n'
PCRS = Selection.parse("sha256:0,7")
MEMBERS = {"weights.bin": b"a marker that is in the model" * 9001, "labels/names.txt": b"bolt\nnut\n", "empty": b""}
PROGRAM = Path(sysconfig.get_path("scripts"), "hwlicense")


def run(
    *arguments: str | Path, status: int | None = 0, cwd: Path | None = None, **options
) -> subprocess.CompletedProcess[str]:
    """The installed command line."""
    done = subprocess.run(
        [PROGRAM, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **options
    )
    assert status is None or done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Vendor:
    """A vendor with one package. One that many tests share must not `remember` what one of them had approved."""

    def __init__(
        self, folder: Path, classical: str = "ed25519", chunk_size: int = 64 << 10, *, remember: bool = True
    ) -> None:
        self.remember = remember
        self.folder = folder
        self.place = Folder.create(folder / "vendor", "Acme", None, classical)
        self.keys: signing.Keys = self.place.unlock(None)
        self.public: VendorPublic = self.place.public
        self.text = (folder / "vendor" / "vendor.pub.json").read_text()
        files = folder / "files"
        for name, content in MEMBERS.items():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_bytes(content)
        self.package = folder / "model.hwpkg"
        self.manifest = self.pack(self.package, files, chunk_size=chunk_size)

    def pack(
        self,
        target: Path,
        *inputs: Path,
        name: str = "reader",
        version: str = "1.0",
        compiled: Compiled | None = None,
        **options,
    ) -> Manifest:
        return packing.pack(
            packing.sources(inputs, compiled),
            target,
            name=name,
            version=version,
            vendor=self.public,
            keys=self.keys,
            code=compiled.code if compiled else None,
            **options,
        )

    def issue(
        self,
        request: bytes,
        tpm: Tpm,
        terms: str = WITH_PCRS,
        *,
        pin: Secret | None = None,
        recorded: tuple[bytes, ...] = (),
        roots: list[evidence.Root] | None = None,
        enclosure: Secret | None = None,
    ) -> issuing.Issued:
        chosen = evidence.read_roots(tpm.ek_root.read_bytes(), "virtual") if roots is None else roots
        trusted = evidence.Trusted(chosen, recorded)
        examined = evidence.examine(request, trusted, datetime.datetime.now(datetime.UTC))
        agreed = parse_terms(terms)
        issued = issuing.issue(
            self.public,
            self.keys,
            examined.parts,
            [self.manifest],
            agreed,
            self.place.approvals(agreed.product),
            today=NOW.date(),
            pin=pin,
            enclosure=enclosure,
        )
        if issued.approval and self.remember:
            self.place.keep_approval(*issued.approval)
        return issued

    def approve(self, request: bytes, generation: int = 1, product: str = "label-reader") -> bytes:
        pcrs = unverified(request, Request)[0].hardware[0].pcrs
        approval, raw = approving.approve(self.public, self.keys, product, generation, pcrs)
        if self.remember:
            self.place.keep_approval(approval, raw)
        return raw


class Device(NamedTuple):
    """A device's home and its TPM."""

    home: Home
    tpm: Tpm

    def connect(self, kind: str = "tpm") -> TpmHardware:
        assert kind == "tpm"
        return TpmHardware(self.tpm.tcti, Counters(self.home))

    def request(self, selection: Selection = PCRS, *, counted: bool = False) -> bytes:
        with self.connect() as hardware:
            return enroll([hardware], selection, "controller", NOW.date(), counted=counted)

    def install(self, raw: bytes, vendor: Vendor):
        self.home.trust(vendor.public)
        return install(self.home, raw, self.connect)

    def open(self, vendor: Vendor, package: Path | None = None, **options) -> hwlicense.device.model.Model:
        return hwlicense.open(
            package or vendor.package, vendor=vendor.text, home=self.home.path, tpm=self.tpm.tcti, **options
        )


def licensed(vendor: Vendor, device: Device, terms: str = WITH_PCRS, *, counted: bool = False, **options) -> bytes:
    """The whole way: request, license, installation. The license as it was sent."""
    raw = vendor.issue(device.request(counted=counted), device.tpm, terms, **options).raw
    device.install(raw, vendor)
    return raw


def everything(model) -> dict[str, bytes]:
    return {name: bytes(model.read(name)) for name in model.names}


def write(path: Path, raw: bytes) -> Path:
    storage.atomic_write(path, raw, 0o644)
    return path


__all__ = ["MEMBERS", "PROGRAM", "Device", "Vendor", "everything", "licensed", "run", "write"]
