"""What is left of a license's limits, who holds them, and when more is allowed: for reports.

The account of use is read as it lies in the state folder. Only an open license can check it: what it says here is its
own word, and may be of a copy that was put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from hwlicense.core import calendar, leases, monitoring
from hwlicense.core.account import Account, Field
from hwlicense.core.durations import of_rate, spelled
from hwlicense.core.errors import HwlicenseError, RefusedError
from hwlicense.core.validity import check_validity
from hwlicense.device import clock, instances, ledger, recovering, watching
from hwlicense.device.plugged import Finding
from hwlicense.device.starting import used_up
from hwlicense.device.tending import longest_session

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterator
    from pathlib import Path

    from hwlicense.core.documents import ClockReset, Grant, License
    from hwlicense.core.hardware import Counted
    from hwlicense.core.limits import Limits

_HOUR: Final = 3_600_000
_MILLION: Final = 1_000_000
_SPENT: Final = ("opens", "inferences", "powered_on_hours", "days_from_first_use")
_FEW: Final = 10  # of which less than one part is left
_NOT_ANCHORED: Final = "runtime, not anchored"
_EVER: Final = 1 << 62  # milliseconds


class Seen(NamedTuple):
    """The account as it says itself, brought up to now; None where there is none that can be read.

    `state`: read but not verified; there and not to be read; not there, or not there though the TPM has counted opens;
    never begun, as the TPM has counted none. `refusal`: why nothing would start, by clock, dates and account. `open`:
    whether a process has the license open, as far as that can be read.
    """

    folder: Path
    state: Literal["unverified", "unreadable", "absent", "missing", "unused"]
    account: Account | None
    verdict: monitoring.Verdict
    refusal: RefusedError | None
    open: bool


def read(state: Path, grant: Grant, counted: Counted | None, reset: ClockReset | None, today: datetime.date) -> Seen:
    """The account in a state folder. `counted` is what the TPM says, None where it was not asked; `today` serves where
    no account says what day it is.
    """
    folder, verdict = recovering.account_folder(state, grant), monitoring.Verdict()
    like, is_open = Account(grant.terms_of_use.limits, recovering.throttle(grant)), ledger.is_open(folder)
    try:
        found = recovering.latest(folder, like)
        refusal = _brought_up(found, grant, counted, reset) if found else _outside(grant, today)
        if found:
            verdict = _verdict(folder, grant, found)
    except (ValueError, OverflowError, OSError):  # numbers that nobody wrote: it opens as one that is damaged
        found, refusal = None, _outside(grant, today)
    if found:
        return Seen(folder, "unverified", found, verdict, refusal, is_open)
    if ledger.begun(folder):
        return Seen(folder, "unreadable", None, verdict, refusal, is_open)
    if counted is None or counted.opens is None:
        return Seen(folder, "absent", None, verdict, refusal, is_open)
    return Seen(folder, "missing" if counted.opens else "unused", None, verdict, refusal, is_open)


def over(grant: Grant, seen: Seen) -> RefusedError | None:
    """Why an open model would refuse all use, by the account's own word; None if it would not."""
    total, account = grant.terms_of_use.limits.inferences, seen.account
    if account is None:
        return None
    if total and not account.remaining:
        return used_up(total)
    return watching.denied(seen.verdict, account.words[Field.NEWEST_NS] // _MILLION)


class Uncharged(NamedTuple):
    """How many inferences the next opening charges, as the account was left open: if it is `now`, and at `most`.

    `now` is None where that is not known: after a restart. By the account's own word, which the TPM may know better.
    `kept_free_for` is for how many seconds from then on frames of rates have no room for it, before it counts in them;
    None without rates.
    """

    now: int | None
    most: int
    kept_free_for: int | None


def uncharged(grant: Grant, seen: Seen, *, with_anchor: bool) -> Uncharged | None:
    """What is charged beside what the account says; None where nothing is, or a process has it open."""
    limited, account = grant.terms_of_use.limits, seen.account
    counts = [rate.count for rate in limited.rates]
    if account is None or seen.open or not (limited.inferences or counts):
        return None
    bound = max(counts) if account.remaining is None else account.remaining
    most = min(bound, leases.unsettled(account, _EVER))
    if most <= 0:
        return None
    words = account.words
    if (words[Field.BOOT_HIGH], words[Field.BOOT_LOW]) != clock.boot_identifier():
        return Uncharged(None, most, 0 if counts else None)
    doubted = (leases.LASTING + longest_session(grant)) // 10**9 if with_anchor else 0
    passed = (clock.running_time() - words[Field.RAISED_NS]) // _MILLION
    return Uncharged(min(bound, leases.unsettled(account, passed)), most, doubted if counts else None)


def left_open(now: int | None, most: int, kept_free_for: int | None) -> str:
    """What `Uncharged` means."""
    text = f"charges up to {most:,} more" if now is None else f"now charges about {now:,} more, later up to {most:,}"
    if kept_free_for:
        text += f"; frames of rates have no room for these for {spelled(kept_free_for)}, and count them from then on"
    elif kept_free_for is not None:
        text += "; frames of rates count these from then on"
    return f"it was not closed: opening it {text}"


def doubts(entry: dict[str, Any]) -> Iterator[Finding]:
    """What a person should know of the use of a license before it is refused. `entry` is as in a report."""
    subject, rows, folder = f"use of {entry['license'][:8]}", entry.get("limits", []), entry.get("account_folder", "")
    if entry.get("account") == "unreadable":
        text = f"its account of use in {folder} cannot be read: if it is damaged, opening charges all that is left"
        yield Finding("note", subject, text, "Look as the application's user; see docs/limits.md (what a crash costs).")
    if entry.get("account") == "missing":
        text = f"its account of use is not in {folder}, though it was opened: opening it here charges all that is left"
        yield Finding("note", subject, text, "Give --state as the application does, or put the folder back before.")
    if "uncharged" in entry:
        yield Finding(
            "note", subject, left_open(**entry["uncharged"]), "Open it soon, and close it when a process ends."
        )
    few = [row for row in rows if row["limit"] in _SPENT and row["left"] and row["left"] * _FEW < row["of"]]
    if few:
        text = "; ".join(f"{row['limit']}: {row['left']:,} of {row['of']:,} left" for row in few)
        yield Finding("note", subject, text, "Ask the vendor for a revision before they are used up.")
    if any(row["enforced_by"] == _NOT_ANCHORED for row in rows):
        text = "its account is not anchored in a TPM: a copy that is put back is not found out"
        yield Finding("note", subject, text, "Where that matters, ask for a license for a request made with --counted.")


def limits(licensed: License, counted: Counted | None, seen: Seen) -> tuple[dict[str, Any], list[HwlicenseError]]:
    """The entries of a report, and what could not be told.

    Every limit has what is `left` (None where that is not known), whether that is `verified`, and `enforced_by`; a
    rate, the `seconds` of its frame and `refills_in` in seconds.
    """
    use, account, problems = licensed.grant.terms_of_use, seen.account, list[HwlicenseError]()
    runtime = "runtime, anchored in the TPM" if anchored(licensed) else _NOT_ANCHORED
    rows = [*_of_the_tpm(use.limits, counted), *_metered(use.limits, seen, runtime)]
    if of := use.limits.instances:
        left = None
        try:
            left = of - instances.running(seen.folder, of)
        except HwlicenseError as error:
            problems.append(error)
        rows.append(_row("instances", of, left, "runtime", verified=left is not None))
    if use.days:
        rows.append(_row("days_from_first_use", use.days, _days(use.days, seen), runtime))
    found: dict[str, Any] = {"limits": rows} if rows else {}
    if use.metered or use.days:
        found |= {"account": seen.state, "account_folder": str(seen.folder)}
    if use.features:
        found["features"] = dict(use.features)
    if use.monitor:
        found["monitor"] = _monitor(seen)
    if account and use.metered:
        found["charged_in_doubt"] = account.words[Field.LOST]
    if more := uncharged(licensed.grant, seen, with_anchor=anchored(licensed)):
        found["uncharged"] = more._asdict()
    if account and account.words[Field.UNSET]:
        found["clock"] = "not set: time goes on from when the license was issued"
    return found, problems


def anchored(licensed: License) -> bool:
    """Whether a TPM anchors the account."""
    return any(index.purpose == "anchor" for binding in licensed.bindings for index in getattr(binding, "indexes", ()))


def counts(licensed: License) -> bool:
    """Whether the TPM knows what is left of something."""
    use = licensed.grant.terms_of_use
    return bool(use.limits.opens or use.limits.hours)


def _brought_up(
    account: Account, grant: Grant, counted: Counted | None, reset: ClockReset | None
) -> RefusedError | None:
    """Let the account's time go on to now, as opening does. What the license says to the day."""
    words, refusal = account.words, None
    same_boot = (words[Field.BOOT_HIGH], words[Field.BOOT_LOW]) == clock.boot_identifier()
    clocks = calendar.Clocks(clock.wall(), clock.boot_time(), same_boot, counted.clock if counted else None)
    before = words[Field.MARK]
    if reset and calendar.reset(words, clocks, reset.time):
        before = 0  # how long it was off is not known
    try:
        now, first = calendar.present(words, clocks, calendar.seconds(grant.issued)), words[Field.FIRST]
        check_validity(grant, calendar.day(now), calendar.day(first) if first else None)
    except RefusedError as error:
        refusal = error
    if same_boot:
        account.advance(clock.boot_time() + words[Field.OFFSET_NS])
    else:
        off = max(0, words[Field.MARK] - before) if before and not refusal else 0
        account.advance(words[Field.NEWEST_NS] + off * 10**9)
    return refusal


def _outside(grant: Grant, today: datetime.date) -> RefusedError | None:
    """What the license says to `today`, or to its day of issue where the clock was never set."""
    never = calendar.unset(clock.wall(), calendar.seconds(grant.issued))
    try:
        check_validity(grant, max(today, grant.issued) if never else today)
    except RefusedError as error:
        return error
    return None


def _row(limit: str, of: int, left: float | None, by: str, *, verified: bool = False) -> dict[str, Any]:
    return {"limit": limit, "of": of, "left": left, "verified": verified, "enforced_by": by}


def _of_the_tpm(limited: Limits, counted: Counted | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if limited.opens:
        left = None if counted is None or counted.opens is None else max(0, limited.opens - counted.opens)
        rows.append(_row("opens", limited.opens, left, "TPM", verified=left is not None))
    if limited.hours:
        hours = _hours(counted)
        rows.append(_row("powered_on_hours", limited.hours, hours, "TPM", verified=hours is not None))
    return rows


def _days(of: int, seen: Seen) -> int | None:
    account = seen.account
    if account is None:
        return of if seen.state == "unused" else None
    first = account.words[Field.FIRST]
    return max(0, of - (account.words[Field.MARK] // calendar.DAY - first // calendar.DAY)) if first else of


def _metered(limited: Limits, seen: Seen, runtime: str) -> list[dict[str, Any]]:
    account, unused = seen.account, seen.state == "unused"
    rows: list[dict[str, Any]] = []
    if total := limited.inferences:
        left = min(total, account.remaining or 0) if account else total if unused else None
        rows.append(_row("inferences", total, left, runtime, verified=unused))
    rooms = (
        {rate: (room, wait) for rate, room, wait in account.rooms(account.words[Field.NEWEST_NS])} if account else {}
    )
    for rate in limited.rates:
        left, wait = rooms.get(rate, (rate.count if unused else None, 0))
        row = _row(of_rate(rate), rate.count, left, runtime, verified=unused) | {"seconds": rate.seconds}
        rows.append(row | {"refills_in": round(wait / 1e9, 1)} if left is not None and left < rate.count else row)
    return rows


def _hours(counted: Counted | None) -> float | None:
    if counted is None or counted.deadline is None:
        return None
    return round(max(0, counted.deadline - counted.clock) / _HOUR, 2)


def _verdict(folder: Path, grant: Grant, account: Account) -> monitoring.Verdict:
    if (terms := grant.terms_of_use.monitor) is None:
        return monitoring.Verdict()
    now = account.words[Field.NEWEST_NS] // _MILLION
    state = watching.recorded(folder / "monitor", terms, account.words[Field.MONITOR], now)
    return monitoring.verdict(terms, state, now)


def _monitor(seen: Seen) -> dict[str, Any]:
    """`in_force` and `found_by` are None where that is not known."""
    verdict, account = seen.verdict, seen.account
    if account is None and seen.state != "unused":
        return {"in_force": None, "found_by": None}
    found: dict[str, Any] = {"in_force": verdict.action, "found_by": list(verdict.detectors)}
    if account and verdict.until is not None:
        now = account.words[Field.NEWEST_NS]
        lasting = round((verdict.until - now // _MILLION) / 1000, 1)
        if verdict.action == "throttle":
            rate, room, wait = list(account.rooms(now, throttled=True))[-1]
            found |= {"throttled": of_rate(rate), "left": room}
            if room < rate.count:
                found["refills_in"] = min(round(wait / 1e9, 1), lasting)
        found["for_seconds"] = lasting
    return found
