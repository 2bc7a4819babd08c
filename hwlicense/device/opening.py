"""Opening a package: the vendor's signatures, a license that fits, the hardware, and only then the keys."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, RefusedError
from hwlicense.core.keys import unwrap_content_key, unwrap_license_secret
from hwlicense.core.terms import check_validity
from hwlicense.device.home import Home, Installed, check_known, check_vendor
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hwlicense.core.documents import Manifest, VendorPublic
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
    package = PackageFile(path, vendor)
    try:
        with content_key(package.manifest, vendor, home, connect, pin, today or utc_today()) as key:
            return Model(package, key)
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
) -> Secret:
    """The package's content key, by the first license that gives it. Raises the refusal of the most promising one."""
    refusals: list[HwlicenseError] = []
    for installed in fitting_licenses(manifest, vendor, home):
        try:
            check_validity(installed.license.grant, today)
            return _unwrapped(installed, manifest, home, connect, pin)
        except (RefusedError, DamagedError) as error:
            refusals.append(error)  # the next license may still say yes
    raise refusals[0]


def fitting_licenses(manifest: Manifest, vendor: VendorPublic, home: Home) -> Sequence[Installed]:
    """Installed licenses that name this package, newest first. Raises RefusedError LICENSE_ABSENT or WRONG_PACKAGE."""
    licenses, problems = home.licenses([vendor])
    fitting = [i for i in licenses if any(p.content_key == manifest.content_key for p in i.license.grant.packages)]
    if fitting:
        return fitting
    if problems:
        raise problems[0]
    named = f"the package {manifest.name!r}, version {manifest.version}"
    others = [p for i in licenses for p in i.license.grant.packages if p.name == manifest.name]
    if others:
        versions = ", ".join(sorted({p.version for p in others}))
        what = f"No license here opens {named}; those installed are for another build of it (version {versions})."
        raise RefusedError(
            Reason.WRONG_PACKAGE, what, "Use the package that the license was issued for, or ask for a license."
        )
    what = f"No license for {named} is installed in {home.path}."
    raise RefusedError(
        Reason.LICENSE_ABSENT, what, "Install one with `hwlicense device install`, or give the right --home."
    )


def first_valid(licenses: Sequence[Installed], today: datetime.date) -> Installed:
    """The first license in force. Raises the refusal of the newest one where none is."""
    refusals: list[RefusedError] = []
    for installed in licenses:
        try:
            check_validity(installed.license.grant, today)
        except RefusedError as error:
            refusals.append(error)
        else:
            return installed
    raise refusals[0]


def utc_today() -> datetime.date:
    """The date by which licenses begin and end."""
    return datetime.datetime.now(datetime.UTC).date()


def _unwrapped(
    installed: Installed,
    manifest: Manifest,
    home: Home,
    connect: Callable[[], Hardware],
    pin: PinSource | None,
) -> Secret:
    licensed, vendor = installed
    check_vendor(licensed, vendor)
    approvals = check_known(home.approvals(licensed, vendor), licensed)
    members: dict[int, Secret] = {}
    try:
        with connect() as hardware:
            for place, binding in enumerate(licensed.bindings):
                members[place] = hardware.unwrap(binding, home.held(licensed, binding), approvals, pin).secret
        with unwrap_license_secret(licensed.wraps, members) as secret:
            return unwrap_content_key(secret, licensed, manifest.content_key)
    finally:
        for member in members.values():
            member.wipe()
