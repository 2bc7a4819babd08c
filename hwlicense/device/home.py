"""The device's home: what it trusts, what is installed, and what the hardware gave for it.

    device.json                             how the device was enrolled
    trust.json                              vendors, for the command line only: applications bring their own
    licenses/ID/license.hwlic               the file as the vendor sent it; its arrival completes an installation
    licenses/ID/pending.hwlic               one whose installation has begun in a TPM that counts it
    counters/HANDLE                         what the TPM's counters take to be used; mode 0600
    licenses/ID/held/KIND-DIGEST            what a binder keeps for the binding with this digest; mode 0600
    licenses/ID/approvals/POLICY.hwapp      platform states approved since

What is written after a license was installed (approvals, and what a binder makes of them) goes to the state folder,
which is the home itself unless another is given: the home may then be read-only.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, TypeVar

import msgspec

from hwlicense import storage
from hwlicense.core.documents import Approval, License, TpmBinding, UsbBinding, VendorPublic
from hwlicense.core.dongle import answer_count
from hwlicense.core.envelope import classical_verifier, ml_dsa_verifier, unverified, verified
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, RefusedError
from hwlicense.core.schema import FILE_LIMIT, SCHEMA, decode, encode, prepare
from hwlicense.core.wording import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hwlicense.core.documents import Binding

HELD_LIMIT: Final = 256 << 10


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`device.json`: what `device enroll` was given, for later commands.

    The TPM (a TCTI string) and its PCRs; tokens (PKCS#11 URIs with the path of a module); dongles (selectors).
    """

    schema: int
    tpm: str | None
    pcrs: str
    tokens: Annotated[list[str], msgspec.Meta(max_length=8)] = []
    dongles: Annotated[list[str], msgspec.Meta(max_length=8)] = []


class Trust(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`trust.json`."""

    schema: int
    vendors: Annotated[list[VendorPublic], msgspec.Meta(max_length=100)]


prepare(Enrolled, Trust)
T = TypeVar("T", bound=msgspec.Struct)


class Installed(NamedTuple):
    """A license as it lies in the home: verified, for the vendor that was asked for."""

    license: License
    vendor: VendorPublic


class Home:
    """A device's home and state folder. Nothing is created before something is written."""

    def __init__(self, path: Path, state: Path | None = None) -> None:
        self.path = path
        self.state = state or path

    # ---- device and trust

    def enrolled(self) -> Enrolled | None:
        """How the device was enrolled, if it was."""
        return self._read("device.json", Enrolled, "Run `hwlicense device enroll --tpm TCTI` again.")

    def keep_enrolled(
        self, tpm: str | None, pcrs: str, tokens: Sequence[str] = (), dongles: Sequence[str] = ()
    ) -> None:
        """Remember what an enrolment was given."""
        self._write("device.json", Enrolled(SCHEMA, tpm, pcrs, list(tokens), list(dongles)))

    def trusted(self) -> list[VendorPublic]:
        """The vendors that the command line trusts here."""
        trust = self._read("trust.json", Trust, "Remove the file and run `hwlicense device trust` again.")
        return trust.vendors if trust else []

    def trust(self, vendor: VendorPublic) -> None:
        """Add a vendor for the command line's commands. Doing it twice changes nothing."""
        vendors = self.trusted()
        if vendor not in vendors:
            self._write("trust.json", Trust(SCHEMA, [*vendors, vendor]))

    # ---- licenses

    def licenses(self, vendors: Sequence[VendorPublic]) -> tuple[list[Installed], list[HwlicenseError]]:
        """Installed licenses of these vendors, the latest issued first, and what is wrong with others of theirs."""
        found: list[Installed] = []
        problems: list[HwlicenseError] = []
        for folder in self._folders():
            try:
                raw = storage.read_limited(folder / "license.hwlic", FILE_LIMIT)
                installed = verified_by_any(raw, License, vendors)
            except RefusedError:
                continue  # another vendor's license lies beside ours, by right
            except DamagedError as error:
                what = f"{folder / 'license.hwlic'}: {error.what}"
                problems.append(DamagedError(error.reason, what, "Install the license file again as it was sent."))
            except HwlicenseError as error:
                problems.append(error)
            else:
                found.append(Installed(*installed))
        return sorted(found, key=lambda i: (i.license.grant.issued, i.license.grant.revision), reverse=True), problems

    def keep_license(self, licensed: License, raw: bytes, held: Sequence[bytes | None]) -> None:
        """Install: what the binders hold first and the license last, so that a cut leaves the former state whole.

        `held` is None for hardware that was not here; what was kept of it before stays.
        """
        self._keep_all_held(licensed, held)
        folder = self.path / "licenses" / licensed.grant.license
        storage.atomic_write(folder / "license.hwlic", raw, 0o600)
        self.forget_pending(licensed)
        current = {_held_name(binding) for binding in licensed.bindings}
        for stale in (folder / "held").iterdir():
            if stale.name not in current:
                storage.remove(stale)
        if self.state != self.path:  # whose copy would be read in place of the new one
            for name in current:
                storage.remove(self.state / "licenses" / licensed.grant.license / "held" / name)

    def holder(self, identifier: str) -> str | None:
        """The fingerprint of the vendor whose license has this identifier here; None where none has."""
        path = self.path / "licenses" / identifier / "license.hwlic"
        if not _exists(path):
            return None
        try:
            return unverified(storage.read_limited(path, FILE_LIMIT), License)[0].grant.vendor
        except DamagedError:  # it may be replaced
            return None

    def prepare_license(self, licensed: License, raw: bytes, held: Sequence[bytes | None]) -> None:
        """Keep what the binders hold, beside the license that is in force still; and that this one's counter is taken.

        So no enrolment uses it where the installation is cut off before `keep_license`.
        """
        self._keep_all_held(licensed, held)
        storage.atomic_write(self.path / "licenses" / licensed.grant.license / "pending.hwlic", raw, 0o600)

    def forget_pending(self, licensed: License) -> None:
        """Its installation is complete, or can never be."""
        storage.remove(self.path / "licenses" / licensed.grant.license / "pending.hwlic")

    def counters_in_use(self) -> set[int]:
        """Handles of the TPM's counters that licenses name, installed ones or pending, whoever signed them.

        Raises DamagedError for a license that cannot be read: it may use any.
        """
        found: set[int] = set()
        root = self.path / "licenses"
        with storage.reporting(root):
            paths = [*root.glob("*/license.hwlic"), *root.glob("*/pending.hwlic")]
        for path in paths:
            licensed = unverified(storage.read_limited(path, FILE_LIMIT), License)[0]
            bindings = (binding for binding in licensed.bindings if isinstance(binding, TpmBinding))
            found |= {binding.counter.handle for binding in bindings if binding.counter}
        return found

    def held(self, licensed: License, binding: Binding) -> bytes:
        """What the binder kept at installation: nothing, for tokens and dongles.

        Raises DamagedError HOME_DAMAGED where it is gone.
        """
        if not isinstance(binding, TpmBinding):
            return b""
        for base in (self.state, self.path):
            path = base / "licenses" / licensed.grant.license / "held" / _held_name(binding)
            if _exists(path):
                return storage.read_limited(path, HELD_LIMIT)
        raise DamagedError(
            Reason.HOME_DAMAGED,
            f"The home {self.path} lacks what the hardware gave for the license {licensed.grant.license}.",
            "Install the license file again: `hwlicense device install`.",
        )

    def _keep_all_held(self, licensed: License, held: Sequence[bytes | None]) -> None:
        folder = self.path / "licenses" / licensed.grant.license / "held"
        storage.make_folders(folder, 0o700)
        for binding, content in zip(licensed.bindings, held, strict=True):
            if content:
                storage.atomic_write(folder / _held_name(binding), content, 0o600)

    def keep_held(self, licensed: License, binding: Binding, content: bytes) -> None:
        """Replace what the binder kept, in the state folder."""
        folder = self.state / "licenses" / licensed.grant.license / "held"
        storage.make_folders(folder, 0o700)
        storage.atomic_write(folder / _held_name(binding), content, 0o600)

    # ---- approvals

    def approvals(self, licensed: License, vendor: VendorPublic) -> list[Approval]:
        """Those that this license accepts, the latest installed first: it is the likeliest to be of this state.

        Raises RefusedError APPROVAL_WITHDRAWN where the license asks for one and has none, or DamagedError HOME_DAMAGED
        where those that it may have had cannot be read.
        """
        bases = [base / "licenses" / licensed.grant.license / "approvals" for base in {self.state, self.path}]
        with storage.reporting(bases[0]):
            paths = [path for base in bases for path in base.glob("*.hwapp")]
            paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        found: list[Approval] = []
        problems: list[HwlicenseError] = []
        for path in paths:
            try:
                found.append(_approval(path, vendor))
            except HwlicenseError as error:
                problems.append(error)  # the others may still do
        wanted = licensed.grant.product, licensed.grant.generation
        accepted: dict[bytes, Approval] = {}
        for approval in (*found, *licensed.approvals):
            if (approval.product, approval.generation) == wanted:
                accepted.setdefault(approval.policy, approval)
        if licensed.grant.pcrs and not accepted:
            if problems:
                raise problems[0]
            what = f"The license asks for an approval of generation {wanted[1]}; this device has only others."
            hint = "Install the vendor's current approval: `hwlicense device install`."
            raise RefusedError(Reason.APPROVAL_WITHDRAWN, what, hint)
        return list(accepted.values())

    def keep_approval(self, licensed: License, approval: Approval, raw: bytes) -> None:
        """Keep an approval for a license, in the state folder."""
        folder = self.state / "licenses" / licensed.grant.license / "approvals"
        storage.make_folders(folder, 0o700)
        storage.atomic_write(folder / f"g{approval.generation}-{approval.policy.hex()[:32]}.hwapp", raw, 0o600)

    # ---- files

    def _folders(self) -> Iterator[Path]:
        root = self.path / "licenses"
        with storage.reporting(root):
            entries = sorted(root.iterdir()) if root.is_dir() else []
        yield from [entry for entry in entries if _exists(entry / "license.hwlic")]

    def _read(self, name: str, kind: type[T], mend: str) -> T | None:
        path = self.path / name
        if not _exists(path):
            return None
        try:
            return decode(storage.read_limited(path, FILE_LIMIT), kind, spaced=True)
        except DamagedError as error:
            raise DamagedError(Reason.HOME_DAMAGED, f"{path} is damaged. {error.what}", mend) from error

    def _write(self, name: str, document: msgspec.Struct) -> None:
        storage.make_folders(self.path, 0o700)
        storage.atomic_write(self.path / name, encode(document) + b"\n", 0o600)


D = TypeVar("D", License, Approval)
R = TypeVar("R")


def by_any(
    vendors: Sequence[VendorPublic], attempt: Callable[[VendorPublic], R], home: Path | None = None
) -> tuple[R, VendorPublic]:
    """What `attempt` gives for the vendor that signed, and that vendor. Raises RefusedError VENDOR_UNTRUSTED."""
    for vendor in vendors:
        try:
            return attempt(vendor), vendor
        except RefusedError:
            continue  # not signed by this one; the next may have
    names = ", ".join(repr(vendor.name) for vendor in vendors) or "none yet"
    whose = f"the home {home}{'' if home.exists() else ', which does not exist,'}" if home else "this device"
    what = f"The file is not signed by a vendor that {whose} trusts ({names})."
    hint = "If you know the vendor, run `hwlicense device trust` with its vendor.pub.json."
    raise RefusedError(Reason.VENDOR_UNTRUSTED, what, hint)


def verified_by_any(raw: bytes, kind: type[D], vendors: Sequence[VendorPublic]) -> tuple[D, VendorPublic]:
    """The document, and which of `vendors` signed it. Raises RefusedError VENDOR_UNTRUSTED, DamagedError."""
    try:
        return by_any(vendors, lambda vendor: verified(raw, kind, vendor))
    except RefusedError:
        unverified(raw, kind)  # where it is no such document at all, that is the thing to say
        raise


def read_vendor(text: bytes) -> VendorPublic:
    """The text of a vendor.pub.json. Raises DamagedError, also for keys of a wrong kind."""
    vendor = decode(text, VendorPublic, spaced=True)
    classical_verifier(vendor.classical)
    ml_dsa_verifier(vendor.ml_dsa_65)
    return vendor


def check_license(licensed: License, vendor: VendorPublic) -> None:
    """That its signer also granted it, and that it agrees with itself on how many bindings it takes.

    Raises RefusedError WRONG_VENDOR, DamagedError LICENSE_DAMAGED.
    """
    if licensed.grant.vendor != vendor.fingerprint:
        what = f"The license {licensed.grant.license} was granted by another vendor than the one that signed it."
        raise RefusedError(Reason.WRONG_VENDOR, what, "Ask the vendor for a license that its own keys sign.")
    count = len(licensed.bindings)
    fitting = licensed.need <= count and all(place < count for wrap in licensed.wraps for place in wrap.members)
    for binding in licensed.bindings:
        if isinstance(binding, UsbBinding):
            answer_count(binding)
    if not fitting or any(len(set(wrap.members)) != licensed.need for wrap in licensed.wraps):
        needs = quantity(licensed.need, "binding")
        what = f"The license {licensed.grant.license} says that it needs {needs}, and then others."
        raise DamagedError(Reason.LICENSE_DAMAGED, what, "Ask the vendor for the license again.")


def _approval(path: Path, vendor: VendorPublic) -> Approval:
    try:
        return verified(storage.read_limited(path, FILE_LIMIT), Approval, vendor)
    except (DamagedError, RefusedError) as error:
        hint = "Remove the file; if the present system needs this approval, install it again."
        raise DamagedError(Reason.HOME_DAMAGED, f"{path} is damaged. {error.what}", hint) from error


def _exists(path: Path) -> bool:
    with storage.reporting(path):
        return path.exists()


def _held_name(binding: Binding) -> str:
    kind = str(binding.__struct_config__.tag)
    return f"{kind}-{hashlib.sha256(encode(binding)).hexdigest()[:32]}"
