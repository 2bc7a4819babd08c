"""What terms say in vain: whoever issues them should know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hwlicense.core.durations import parse_rate
from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.terms import parse_rates

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterator

    from hwlicense.core.terms import Terms


def oddities(terms: Terms, today: datetime.date) -> list[str]:
    """In sentences.

    Raises UsageError TERM_INVALID where the last day is past and days from first use never begin.
    """
    odd, validity, limits = list[str](), terms.validity, terms.limits
    days, last, total = validity.days_from_first_use, validity.not_after, limits.inferences
    if last and days and last < today:
        what = f"validity.not_after ({last}) is past, so that validity.days_from_first_use never begins."
        hint = "Mend validity.not_after; to end a license by a revision, leave days_from_first_use out."
        raise UsageError(Reason.TERM_INVALID, what, hint)
    if last and last < today:
        odd.append(f"this license ends before it is issued ({last}).")
    if last and days and (last - max(today, validity.not_before or today)).days <= days:
        odd.append(f"validity.days_from_first_use ({days}) never ends before validity.not_after ({last}).")
    if total:
        for rate, text in zip(parse_rates(limits.rates or []), limits.rates or [], strict=True):
            if rate.count >= total:
                odd.append(f"limits.rates: {text!r} never limits anything beside limits.inferences = {total}.")
    if limits.opens and limits.instances and limits.instances > limits.opens:
        odd.append(f"limits.instances = {limits.instances} are never reached by limits.opens = {limits.opens}.")
    odd += [f"{name} is empty: {means}." for name, given, means in _lists(terms) if given is not None and not given]
    return [*odd, *_monitored_in_vain(terms), *_longer_than_it_lasts(terms, today)]


def _lists(terms: Terms) -> Iterator[tuple[str, list[str] | dict[str, Any] | None, str]]:
    yield "limits.rates", terms.limits.rates, "no time frame limits use"
    yield "features", terms.features, "the application finds none"
    yield "require.pcrs", terms.require.pcrs, "the license opens in any state of the platform"


def _monitored_in_vain(terms: Terms) -> Iterator[str]:
    asked, total, texts = terms.monitor, terms.limits.inferences, terms.limits.rates or []
    if asked is None:
        return
    looked = {
        "monitor.regularity.calls": asked.regularity.calls if asked.regularity else 0,
        "monitor.distances.queries": asked.distances.queries if asked.distances else 0,
    }
    for name, count in looked.items():
        if total and count > total:
            yield f"{name} = {count} are never reached by limits.inferences = {total}."
    if asked.throttled is not None:
        throttled = parse_rate("monitor.throttled", asked.throttled)
        for other, text in zip(parse_rates(texts), texts, strict=True):
            if other.seconds >= throttled.seconds and other.count <= throttled.count:
                yield f"monitor.throttled: {asked.throttled!r} never limits anything beside {text!r} in limits.rates."


def _longer_than_it_lasts(terms: Terms, today: datetime.date) -> Iterator[str]:
    """A session that runs to its end when the license's time is over before."""
    session, validity, hours = terms.granted_continuity, terms.validity, terms.limits.powered_on_hours
    if session is None or terms.continuity is None:
        return
    lasting = {"limits.powered_on_hours": (hours or 0) * 3600}
    if days := validity.days_from_first_use:
        lasting["validity.days_from_first_use"] = (days + 1) * 86400  # the first is not one of them
    if last := validity.not_after:
        lasting["validity.not_after"] = ((last - max(today, validity.not_before or today)).days + 1) * 86400
    for name, time in lasting.items():
        if 0 < time < session:
            yield f"continuity.session ({terms.continuity.session!r}) is longer than the license lasts by {name}."
