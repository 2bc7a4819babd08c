"""Whether a license is in force, by its days."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwlicense.core.errors import Reason, RefusedError
from hwlicense.core.wording import quantity

if TYPE_CHECKING:
    import datetime

    from hwlicense.core.documents import Grant


def check_validity(grant: Grant, today: datetime.date, first_used: datetime.date | None = None) -> None:
    """Raises RefusedError LICENSE_NOT_YET_VALID or LICENSE_EXPIRED. Days are in UTC; `first_used` as far as known."""
    if grant.not_before and today < grant.not_before:
        what = f"The license for {grant.product!r} is valid from {grant.not_before}; today is {today} (UTC)."
        raise RefusedError(Reason.LICENSE_NOT_YET_VALID, what, "Check the device's date, or wait until then.")
    if grant.not_after and today > grant.not_after:
        what = f"The license for {grant.product!r} was valid until {grant.not_after}; today is {today} (UTC)."
        raise RefusedError(Reason.LICENSE_EXPIRED, what, "Ask the vendor for a new license.")
    days = grant.terms_of_use.days
    if days and first_used and (today - first_used).days > days:
        what = f"The license for {grant.product!r} is for {quantity(days, 'day')}; it was first used on {first_used}."
        raise RefusedError(Reason.LICENSE_EXPIRED, what, "Ask the vendor for a new license.")
