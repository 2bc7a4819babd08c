"""Opening a package: the vendor's signatures, a license that fits, the hardware, and only then the keys."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hwlicense.core import dongle
from hwlicense.core.documents import UsbBinding
from hwlicense.core.errors import (
    AbsentError,
    DamagedError,
    HwlicenseError,
    Reason,
    RefusedError,
    StorageError,
    UsageError,
)
from hwlicense.core.keys import Content, open_enclosure, unwrap_content_key, unwrap_license_secret
from hwlicense.core.secret import Secret, derive
from hwlicense.core.validity import check_validity
from hwlicense.device import resetting
from hwlicense.device.bound import FINAL, Bound, exhausted
from hwlicense.device.home import Home, Installed, check_license
from hwlicense.device.instances import Instance
from hwlicense.device.licensed import Conditions
from hwlicense.device.memory import forbid_dumps
from hwlicense.device.model import Model
from hwlicense.device.recovering import account_folder, foreseeable, forget_others, kept, open_account, remembered_day

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwlicense.core.documents import License, Manifest, VendorPublic
    from hwlicense.core.hardware import PinSource
    from hwlicense.device.bound import Connect
    from hwlicense.device.metering import Metering
    from hwlicense.device.presence import Presence
    from hwlicense.device.reading import PackageFile
    from hwlicense.device.recorder import Recorder


class Unlocked(NamedTuple):
    """What an opening came to, for whoever asked to wipe and close: what is for the model, and the account's key."""

    content: Content
    account_key: Secret
    installed: Installed
    bound: Bound
    instance: Instance | None

    def close(self) -> None:
        """Let go of all but the content."""
        self.account_key.wipe()
        self.bound.close()
        if self.instance:
            self.instance.close()


def open_package(
    package: PackageFile,
    home: Home,
    connect: Connect,
    pin: PinSource | None = None,
    today: datetime.date | None = None,
) -> Model:
    """The model in `package`, if a license in `home` and the hardware allow it. See `hwlicense.open`.

    The model closes the package; where there is none to be had, so does this.
    """
    forbid_dumps()  # from here on: PIN, license secret and content key pass through ordinary memory on their way
    try:
        unlocked = unlock(package.manifest, package.vendor, home, connect, pin, today)
        with unlocked.content as content:
            try:
                return _model(package, content, unlocked, home, connect, pin)
            except BaseException:
                unlocked.close()
                raise
    except BaseException:
        package.close()
        raise


def unlock(
    manifest: Manifest,
    vendor: VendorPublic,
    home: Home,
    connect: Connect,
    pin: PinSource | None,
    today: datetime.date | None = None,
) -> Unlocked:
    """The package's content key, by the first license that gives it. Raises the first one's refusal.

    All that can be refused without the hardware is refused before it is asked.
    """

    def attempt(installed: Installed) -> Unlocked:
        licensed, signer = installed
        folder = account_folder(home.state, licensed.grant)
        if today:
            check_validity(licensed.grant, today)
        else:
            foreseeable(folder, licensed.grant, resetting.pending(home, licensed, signer))
        check_license(licensed, signer)
        if licensed.grant.guard or licensed.grant.application:
            from hwlicense.device.guarding import admit  # noqa: PLC0415  # most licenses say nothing of the process

            admit(licensed.grant)
        bound = Bound(connect, licensed, home, home.approvals(licensed, signer))
        limit = licensed.grant.terms_of_use.limits.instances
        instance = Instance(folder, limit) if limit else None
        try:
            keys = _unwrapped(bound, licensed, manifest.content_key, pin)
        except BaseException:
            bound.close()
            if instance:
                instance.close()
            raise
        return Unlocked(*keys, installed, bound, instance)

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

    Hardware that is absent is no failure: another license may be bound to what is here. A wrong PIN ends it: offered to
    a second license, a PIN that is right for the first would count as a wrong try.
    """
    refusals: list[HwlicenseError] = []
    for installed in licenses:
        try:
            return attempt(installed)
        except (RefusedError, DamagedError, StorageError, UsageError, AbsentError) as error:
            if error.reason in FINAL | {Reason.USAGE}:
                raise
            refusals.append(error)  # the next license may still say yes
    raise refusals[0]


def _unwrapped(bound: Bound, licensed: License, identifier: str, pin: PinSource | None) -> tuple[Content, Secret]:
    """What is for the model, and the key of the license's account."""
    members = bound.members(pin)
    try:
        with unwrap_license_secret(licensed.wraps, members) as secret:
            content = Content(unwrap_content_key(secret, licensed, identifier), open_enclosure(secret, licensed))
            return content, derive([secret], b"presence account", bytes.fromhex(licensed.grant.license))
    finally:
        for member in members.values():
            member.wipe()


def _model(
    package: PackageFile, content: Content, unlocked: Unlocked, home: Home, connect: Connect, pin: PinSource | None
) -> Model:
    """The open model, held to its license's limits, and watching its hardware where the license asks for that."""
    licensed, identifier, anchor = unlocked.installed.license, package.manifest.content_key, unlocked.bound.anchor

    def recorder() -> Recorder:
        from hwlicense.device.recorder import Recorder  # noqa: PLC0415  # most applications record nothing

        return Recorder(connect, licensed, home, identifier, pin, anchor)

    use, watch, grant = _use(unlocked, home), None, licensed.grant
    try:
        if grant.guard:
            from hwlicense.device.guarding import Watch  # noqa: PLC0415  # most licenses ask for none

            watch = Watch(grant, grant.guard)
        presence = _presence(package, unlocked, home, pin)
        conditions = Conditions(grant, presence, use, None if use else unlocked.instance, watch, recorder)
        return Model(package, content, conditions)
    except BaseException:
        if use:
            use.close()
        raise


def _use(unlocked: Unlocked, home: Home) -> Metering | None:
    """The account of the license's use, where it has one; and whether it is in force today, by a clock of its own."""
    (licensed, vendor), grant = unlocked.installed, unlocked.installed.license.grant
    use, folder = grant.terms_of_use, account_folder(home.state, grant)
    if not (kept(grant) or grant.not_before or grant.not_after):
        return None
    key = derive([unlocked.account_key], b"ledger", bytes.fromhex(grant.license))
    reset = resetting.pending(home, licensed, vendor)
    if not kept(grant):
        remembered_day(folder, grant, key, unlocked.bound.anchor, reset)
        return None
    from hwlicense.device.metering import Metering  # noqa: PLC0415  # most licenses have no account
    from hwlicense.device.watching import Watch  # noqa: PLC0415

    tended = open_account(folder, grant, key, unlocked.bound.anchor, reset)
    try:
        watch = None
        if use.monitor:
            watching = derive([unlocked.account_key], b"monitor", bytes.fromhex(grant.license))
            watch = Watch(folder / "monitor", use.monitor, watching, tended)
        forget_others(folder)
        return Metering(grant, tended, watch, unlocked.instance)
    except BaseException:
        tended.close(lambda _account: None)
        raise


def _presence(
    package: PackageFile, unlocked: Unlocked, home: Home, pin: PinSource | None
) -> tuple[Presence, Callable[[Bound, bool], Content]] | None:
    _, account_key, (licensed, _), bound, _ = unlocked
    terms, identifier = licensed.grant.presence, package.manifest.content_key
    if terms is None:
        account_key.wipe()
        bound.close()
        return None
    from hwlicense.device import grace  # noqa: PLC0415  # most licenses ask for no presence
    from hwlicense.device.presence import Presence  # noqa: PLC0415

    account, answers = None, None
    if terms.grace or bound.spends_proofs:
        account = grace.PresenceAccount(grace.presence_folder(home.state, licensed.grant), terms, account_key)
        account.prepare()
        if not terms.repeat and bound.spends_proofs:
            answers = min(dongle.answer_count(b) for b in licensed.bindings if isinstance(b, UsbBinding))
            if account.proofs >= answers and len(licensed.bindings) == licensed.need:
                raise exhausted()

    def again(bound: Bound, ask: bool) -> Content:  # noqa: FBT001  # called by the open model alone
        once_more, spare = _unwrapped(bound, licensed, identifier, pin if ask else None)
        spare.wipe()
        return once_more

    return Presence(terms, bound, account, answers), again
