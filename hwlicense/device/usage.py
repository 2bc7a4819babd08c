"""What is left of a license's limits, who holds them, and when more is allowed: for reports, unchecked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hwlicense.core import calendar, monitoring
from hwlicense.core.account import Account, Field
from hwlicense.device import clock, instances, recovering, watching
from hwlicense.device.ledger import unverified

if TYPE_CHECKING:
    from pathlib import Path

    from hwlicense.core.documents import Grant, License
    from hwlicense.core.hardware import Counted
    from hwlicense.core.limits import Limits, Monitor

_HOUR: Final = 3_600_000
_MILLION: Final = 1_000_000


def limits(state: Path, licensed: License, counted: Counted | None) -> dict[str, Any]:
    """The entries of a report. `counted` is what the TPM says, None where it was not asked.

    Every limit has what is `left` (None where that is not known) and `enforced_by`; a rate, `refills_in` in seconds.
    """
    grant = licensed.grant
    use = grant.terms_of_use
    folder = recovering.account_folder(state, grant)
    account = recorded(folder, grant)
    runtime = "runtime, anchored in the TPM" if anchored(licensed) else "runtime, not anchored"
    rows = [*_of_the_tpm(use.limits, counted), *_metered(use.limits, account, runtime)]
    if of := use.limits.instances:
        left = of - instances.running(folder, of)
        rows.append({"limit": "instances", "of": of, "left": left, "enforced_by": "runtime"})
    if use.days:
        rows.append(
            {"limit": "days_from_first_use", "of": use.days, "left": _days(use.days, account), "enforced_by": runtime}
        )
    found: dict[str, Any] = {"limits": rows} if rows else {}
    if use.features:
        found["features"] = dict(use.features)
    if use.monitor:
        found["monitor"] = _monitor(folder, use.monitor, account)
    if account and use.metered:
        found["lost_to_crashes"] = account.words[Field.LOST]
    if account and account.words[Field.UNSET]:
        found["clock"] = "not set: time goes on from when the license was issued"
    return found


def anchored(licensed: License) -> bool:
    """Whether a TPM anchors the account."""
    return any(index.purpose == "anchor" for binding in licensed.bindings for index in getattr(binding, "indexes", ()))


def counts(licensed: License) -> bool:
    """Whether the TPM knows what is left of something."""
    use = licensed.grant.terms_of_use
    return bool(use.limits.opens or use.limits.hours)


def recorded(folder: Path, grant: Grant) -> Account | None:
    """The account as it was last written down, with the time since; None where there is none."""
    like = Account(grant.terms_of_use.limits, recovering.throttle(grant))
    if account := recovering.seen(folder, like):
        account.advance(clock.boot_time() + account.words[Field.OFFSET_NS])
        return account
    for raw in unverified(folder):
        if len(raw) >= len(like.encode()) and (account := like.copy(raw[: len(like.encode())])).known:
            return account  # of another boot: how long it was off is seen when the license is opened
    return None


def _of_the_tpm(limited: Limits, counted: Counted | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if limited.opens:
        left = None if counted is None or counted.opens is None else max(0, limited.opens - counted.opens)
        rows.append({"limit": "opens", "of": limited.opens, "left": left, "enforced_by": "TPM"})
    if limited.hours:
        left = _hours(counted)
        rows.append({"limit": "powered_on_hours", "of": limited.hours, "left": left, "enforced_by": "TPM"})
    return rows


def _days(of: int, account: Account | None) -> int:
    first = account.words[Field.FIRST] if account else 0
    return max(0, of - (account.words[Field.MARK] - first) // calendar.DAY) if account and first else of


def _metered(limited: Limits, account: Account | None, runtime: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if limited.inferences:
        left = limited.inferences if account is None else account.remaining
        rows.append({"limit": "inferences", "of": limited.inferences, "left": left, "enforced_by": runtime})
    rooms = (
        account.rooms(account.words[Field.NEWEST_NS]) if account else ((rate, rate.count, 0) for rate in limited.rates)
    )
    for rate, left, wait in rooms:
        row = {"limit": f"{rate.count}/{rate.seconds}s", "of": rate.count, "left": left, "enforced_by": runtime}
        rows.append(row | {"refills_in": round(wait / 1e9, 1)} if left < rate.count else row)
    return rows


def _hours(counted: Counted | None) -> Any:  # noqa: ANN401  # a number, or None where it is not known
    if counted is None or counted.deadline is None:
        return None
    return round(max(0, counted.deadline - counted.clock) / _HOUR, 2)


def _monitor(folder: Path, terms: Monitor, account: Account | None) -> dict[str, Any]:
    state = watching.recorded(folder / "monitor")
    now = account.words[Field.NEWEST_NS] // _MILLION if account else 0
    verdict = monitoring.verdict(terms, state or monitoring.State(), now)
    found: dict[str, Any] = {"in_force": verdict.action, "found_by": list(verdict.detectors)}
    if verdict.until is not None:
        found["for_seconds"] = round((verdict.until - now) / 1000, 1)
    return found
