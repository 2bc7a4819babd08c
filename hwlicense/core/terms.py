"""The terms of a license as people write them (TOML), checked before anything is issued.

A term that this release cannot enforce is an error here: a license never says more than is held.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from hwlicense.core.documents import Name  # noqa: TC001  # msgspec reads the annotations at run time
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.tpm.pcrs import Selection

if TYPE_CHECKING:
    from hwlicense.core.documents import Grant

SIZE_LIMIT: Final = 64 << 10

_PLANNED: Final = {
    "validity": {"days_from_first_use"},
    "limits": {"opens", "inferences", "rates", "powered_on_hours", "instances"},
    "require": {"anchor"},
    "presence": {"interval", "grace"},
    "continuity": {"session"},
    "features": None,
    "monitor": None,
    "guard": None,
}
"""Terms that the format foresees and this release does not enforce; None stands for any key of the table."""


class Validity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First and last day, in UTC, both included."""

    not_before: datetime.date | None = None
    not_after: datetime.date | None = None


class Require(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`pcrs`: what of the platform's measured state must be approved; `bindings`: how many bindings it takes."""

    pcrs: Annotated[list[str], msgspec.Meta(max_length=8)] = []
    bindings: str = "all"


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a license allows."""

    licensee: Name
    product: Name
    validity: Validity = Validity()
    require: Require = Require()

    @property
    def selection(self) -> Selection:
        """The PCRs of `require.pcrs`."""
        return Selection.parse(*self.require.pcrs)


def parse_terms(text: str) -> Terms:
    """Raises UsageError: TERM_UNKNOWN, TERM_INVALID, TERM_UNSUPPORTED."""
    import tomllib  # noqa: PLC0415  # the vendor's need alone, and not to be paid for at each opening

    if len(text) > SIZE_LIMIT:
        raise UsageError(
            Reason.TERM_INVALID, f"The terms are longer than {SIZE_LIMIT:,} characters.", "Check the file's name."
        )
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # beside TOML's own, numbers too long for Python to read
        raise UsageError(Reason.TERM_INVALID, f"The terms are not TOML: {error}.", "Mend the terms file.") from None
    _refuse_unsupported(table)
    try:
        terms = msgspec.convert(table, Terms, builtin_types=(datetime.date, datetime.datetime))  # a day, not text
    except msgspec.ValidationError as error:
        unknown = "unknown field" in str(error)
        reason = Reason.TERM_UNKNOWN if unknown else Reason.TERM_INVALID
        hint = "See the list of terms in docs/terms.md; a term that is not known is never ignored."
        raise UsageError(reason, f"The terms cannot be used: {error}.", hint) from None
    _check(terms)
    return terms


def check_validity(grant: Grant, today: datetime.date) -> None:
    """Raises RefusedError LICENSE_NOT_YET_VALID or LICENSE_EXPIRED. `today` is the date in UTC."""
    if grant.not_before and today < grant.not_before:
        what = f"The license for {grant.product!r} is valid from {grant.not_before}; today is {today} (UTC)."
        raise RefusedError(Reason.LICENSE_NOT_YET_VALID, what, "Check the device's date, or wait until then.")
    if grant.not_after and today > grant.not_after:
        what = f"The license for {grant.product!r} was valid until {grant.not_after}; today is {today} (UTC)."
        raise RefusedError(Reason.LICENSE_EXPIRED, what, "Ask the vendor for a new license.")


def _refuse_unsupported(table: dict[str, Any]) -> None:
    for name, keys in _PLANNED.items():
        given = table.get(name)
        if given is None:
            continue
        found = {name} if keys is None or not isinstance(given, dict) else {f"{name}.{k}" for k in keys & given.keys()}
        if found and (keys is None or isinstance(given, dict)):
            which = ", ".join(sorted(found))
            what = f"This release does not enforce the term {which}, so it issues no license with it."
            raise UsageError(Reason.TERM_UNSUPPORTED, what, "Leave the term out, or use a release that enforces it.")


def _check(terms: Terms) -> None:
    first, last = terms.validity.not_before, terms.validity.not_after
    if first and last and last < first:
        what = f"The license would end ({last}) before it begins ({first})."
        raise UsageError(Reason.TERM_INVALID, what, "Mend validity.not_before or validity.not_after.")
    if terms.require.bindings != "all":
        what = f'This release enforces require.bindings = "all" only, not {terms.require.bindings!r}.'
        raise UsageError(Reason.TERM_UNSUPPORTED, what, "Leave the term out, or use a release that enforces it.")
    Selection.parse(*terms.require.pcrs)
