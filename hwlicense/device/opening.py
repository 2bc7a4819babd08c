"""Opening a package: the vendor's signatures, a license that fits, the hardware, and only then the keys."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Final, TypeVar

from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, RefusedError, StorageError, UsageError
from hwlicense.core.keys import unwrap_content_key, unwrap_license_secret
from hwlicense.core.terms import check_validity
from hwlicense.device.home import Home, Installed, check_license
from hwlicense.device.memory import forbid_dumps
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hwlicense.core.documents import Grant, Manifest, VendorPublic
    from hwlicense.core.hardware import Hardware, PinSource
    from hwlicense.core.secret import Secret


def open_package(
    path: Path,
    vendor: VendorPublic,
    home: Home,
    connect: Callable[[], Hardware],
    pin: PinSource | None = None,
    today: datetime.date | None = None,
) -> Model:
    """The model in `path`, if a license in `home` and the hardware allow it. See `hwlicense.open`."""
    forbid_dumps()  # from here on: PIN, license secret and content key pass through ordinary memory on their way
    package = PackageFile(path, vendor)
    try:
        key, grant = content_key(package.manifest, vendor, home, connect, pin, today or utc_today())
        with key:
            return Model(package, key, grant)
    except BaseException:
        package.close()
        raise


def content_key(
    manifest: Manifest,
    vendor: VendorPublic,
    home: Home,
    connect: Callable[[], Hardware],
    pin: PinSource | None,
    today: datetime.date,
) -> tuple[Secret, Grant]:
    """The package's content key, and the grant of the first license that gives it. Raises the first one's refusal."""

    def attempt(installed: Installed) -> tuple[Secret, Grant]:
        check_validity(installed.license.grant, today)
        return _unwrapped(installed, manifest, home, connect, pin), installed.license.grant

    return _first(fitting_licenses(manifest, vendor, home), attempt)


def fitting_licenses(manifest: Manifest, vendor: VendorPublic, home: Home) -> Sequence[Installed]:
    """Installed licenses that name this package: those without a PIN first, and then the latest issued.

    Raises RefusedError LICENSE_ABSENT or WRONG_PACKAGE, or what is wrong with the only license there is.
    """
    licenses, problems = home.licenses([vendor])
    fitting = [i for i in licenses if any(p.content_key == manifest.content_key for p in i.license.grant.packages)]
    if fitting:
        return sorted(fitting, key=lambda installed: any(binding.pin for binding in installed.license.bindings))
    if problems:
        raise problems[0]
    named = f"the package {manifest.name!r}, version {manifest.version}"
    others = [p for i in licenses for p in i.license.grant.packages if p.name == manifest.name]
    if others:
        versions = ", ".join(sorted({p.version for p in others}))
        what = f"No license here opens {named}; those installed are for another build of it (version {versions})."
        hint = "Use the package that the license was issued for, or ask for a license."
        raise RefusedError(Reason.WRONG_PACKAGE, what, hint)
    what = f"No license for {named} is installed in {home.path}."
    hint = "Install one with `hwlicense device install`, or give the right home (--home, home=)."
    raise RefusedError(Reason.LICENSE_ABSENT, what, hint)


def first_valid(licenses: Sequence[Installed], today: datetime.date) -> Installed:
    """The first license in force. Raises the refusal of the first one where none is."""

    def attempt(installed: Installed) -> Installed:
        check_validity(installed.license.grant, today)
        return installed

    return _first(licenses, attempt)


def utc_today() -> datetime.date:
    """The date by which licenses begin and end."""
    return datetime.datetime.now(datetime.UTC).date()


R = TypeVar("R")


def _first(licenses: Sequence[Installed], attempt: Callable[[Installed], R]) -> R:
    """What the first license gives that does not refuse. Raises the first refusal, or any failure of the hardware.

    A wrong PIN ends it: offered to a second license, a PIN that is right for the first would count as a wrong try.
    """
    refusals: list[HwlicenseError] = []
    for installed in licenses:
        try:
            return attempt(installed)
        except (RefusedError, DamagedError, StorageError, UsageError) as error:
            if error.reason in _FINAL:
                raise
            refusals.append(error)  # the next license may still say yes
    raise refusals[0]


_FINAL: Final = {Reason.PIN_WRONG, Reason.EXTRA_MISSING, Reason.USAGE}


def _unwrapped(
    installed: Installed,
    manifest: Manifest,
    home: Home,
    connect: Callable[[], Hardware],
    pin: PinSource | None,
) -> Secret:
    licensed, vendor = installed
    check_license(licensed, vendor)
    approvals = home.approvals(licensed, vendor)
    grant = licensed.grant
    whose = f"of the license {grant.license[:8]} ({grant.product}, {grant.licensee})"
    asked = None if pin is None else lambda prompt: pin(f"{prompt} {whose}")
    members: dict[int, Secret] = {}
    try:
        with connect() as hardware:
            for place, binding in enumerate(licensed.bindings):
                members[place] = hardware.unwrap(binding, home.held(licensed, binding), approvals, asked).secret
        with unwrap_license_secret(licensed.wraps, members) as secret:
            return unwrap_content_key(secret, licensed, manifest.content_key)
    finally:
        for member in members.values():
            member.wipe()
