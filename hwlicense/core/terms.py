"""The terms of a license as people write them (TOML), checked before anything is issued.

A term that this release cannot enforce is an error here: a license never says more than is held.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec

from hwlicense.core import documents
from hwlicense.core.durations import parse_milliseconds, parse_rate, parse_seconds
from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.limits import (
    LONGEST_WINDOW,
    RATE_LIMIT,
    Action,
    Distances,
    Feature,
    Limits,
    Monitor,
    Rate,
    Regularity,
    Use,
)
from hwlicense.core.process import CHECKS, FILE_LIMIT, LONGEST_INTERVAL, Application, Check, File, Guard
from hwlicense.core.schema import Name, Positive  # noqa: TC001  # msgspec reads the annotations at run time
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.wording import TOML, in_words, mend

if TYPE_CHECKING:
    from collections.abc import Iterator


_T = TypeVar("_T")

SIZE_LIMIT: Final = 1 << 20

LONGEST_SESSION: Final = 366 * 86400
"""Seconds of the longest session that a license keeps from interruption."""


class Validity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First and last day, in UTC, both included; and days from the first opening on."""

    not_before: datetime.date | None = None
    not_after: datetime.date | None = None
    days_from_first_use: Annotated[int, msgspec.Meta(ge=1, le=36500)] | None = None


class Require(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`pcrs`: what of the platform's measured state must be approved; `bindings`: how many bindings it takes.

    `anchor`: the ledger must be anchored in a TPM; `revocable`: a new revision must end the old one in hardware;
    `cap_pcr`: a free PCR, which lets sessions that were prepared in a write window not be used.
    """

    pcrs: Annotated[list[str], msgspec.Meta(max_length=8)] | None = None
    bindings: int | str = "all"
    anchor: bool = False
    revocable: bool = False
    cap_pcr: Annotated[int, msgspec.Meta(ge=0, le=15)] | None = None

    def need(self, count: int) -> int:
        """How many of `count` bindings open the license. Raises UsageError TERM_INVALID where there are too few."""
        need = {"all": count, "any": 1}.get(str(self.bindings), self.bindings)
        if isinstance(need, str) or not 1 <= need <= count:
            what = f"The terms require {self.bindings} of the bindings; the requests name {count}."
            raise UsageError(Reason.TERM_INVALID, what, "Enroll more hardware, or mend require.bindings.")
        return need


class Present(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often the hardware must prove that it is here; durations as people write them, such as "10s"."""

    interval: str
    grace: str = "0s"
    regain: str | None = None
    answers: Annotated[int, msgspec.Meta(ge=1, le=documents.ANSWER_LIMIT)] = 1000
    repeat: bool = True


class Continuity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`session`: the longest procedure that is kept from interruption."""

    session: str


class Limited(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[limits]`: how much use, in all and in time frames such as "100/hour"; how many instances at once."""

    opens: Annotated[int, msgspec.Meta(ge=1, lt=2**32)] | None = None
    inferences: Positive | None = None
    rates: Annotated[list[str], msgspec.Meta(max_length=RATE_LIMIT)] | None = None
    powered_on_hours: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    instances: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None


class Regular(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[monitor.regularity]`. `pause` may be short, such as "500ms": see docs/monitor.md."""

    action: Action = "flag"
    calls: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 500
    variation: Annotated[float, msgspec.Meta(ge=0.001, le=1)] = 0.25
    pause: str = "30s"


class Distant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[monitor.distances]`. `features` is the number of values of an input's feature vector."""

    features: Annotated[int, msgspec.Meta(ge=1, le=256)]
    action: Action = "flag"
    queries: Annotated[int, msgspec.Meta(ge=20, le=4096)] = 100
    normality: Annotated[float, msgspec.Meta(ge=0.001, le=1)] = 0.95


class Monitored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[monitor]`: detectors, what they do, and for how long."""

    lasting: str = "1h"
    throttled: str | None = None
    regularity: Regular | None = None
    distances: Distant | None = None


class Guarded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[guard]`: checks whose findings are refused, and how often the running process is looked at."""

    refuse: Literal["all"] | Annotated[list[Check], msgspec.Meta(min_length=1, max_length=len(CHECKS))]
    interval: str = "5s"


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[application]`, as `vendor measure` writes it: SHA-256 in hexadecimal by name, and names that must be loaded."""

    files: Annotated[
        dict[
            Annotated[str, msgspec.Meta(min_length=1, max_length=500)],
            str,
        ],
        msgspec.Meta(min_length=1, max_length=FILE_LIMIT),
    ]
    required: list[str] = []

    @property
    def granted(self) -> Application:
        """As the grant has it. Raises UsageError TERM_INVALID."""
        if unknown := sorted(set(self.required) - self.files.keys()):
            what = f"application.required names {unknown[0]!r}, which application.files does not."
            raise UsageError(Reason.TERM_INVALID, what, "Use the names as `vendor measure` wrote them.")
        for name, digest in self.files.items():
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                what = f"application.files has {name!r}, which is no SHA-256 of a file in hexadecimal."
                hint = "All that follows [application.files] belongs to it: put other terms before what was measured."
                raise UsageError(Reason.TERM_INVALID, what, hint)
        files = sorted(self.files.items())
        return Application([File(name, bytes.fromhex(digest), name in self.required) for name, digest in files])


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a license allows."""

    licensee: Name
    product: Name
    validity: Validity = Validity()
    require: Require = Require()
    limits: Limited = Limited()
    presence: Present | None = None
    continuity: Continuity | None = None
    features: Annotated[dict[Name, Feature], msgspec.Meta(max_length=100)] | None = None
    monitor: Monitored | None = None
    guard: Guarded | None = None
    application: Measured | None = None

    @property
    def granted_use(self) -> Use | None:
        """All that limits use, as the grant has it; None where nothing does. Raises UsageError TERM_INVALID."""
        asked = self.limits
        use = Use(
            limits=Limits(
                opens=asked.opens,
                inferences=asked.inferences,
                rates=parse_rates(asked.rates or []),
                hours=asked.powered_on_hours,
                instances=asked.instances,
            ),
            days=self.validity.days_from_first_use,
            features=self.features or {},
            monitor=_monitor(self.monitor) if self.monitor else None,
            anchor=self.require.anchor,
            revocable=self.require.revocable,
            cap=self.require.cap_pcr,
        )
        return None if use == Use() else use

    @property
    def granted_presence(self) -> documents.Presence | None:
        """`presence` in seconds, as the grant has it."""
        if self.presence is None:
            return None
        asked = self.presence
        return documents.Presence(
            interval=parse_seconds("presence.interval", asked.interval, 1, 86400),
            grace=parse_seconds("presence.grace", asked.grace, 0, 31 * 86400),
            regain=None if asked.regain is None else parse_seconds("presence.regain", asked.regain, 1, 2**40),
            repeat=asked.repeat,
        )

    @property
    def granted_continuity(self) -> int | None:
        """`continuity.session` in seconds."""
        return (
            parse_seconds("continuity.session", self.continuity.session, 1, LONGEST_SESSION)
            if self.continuity
            else None
        )

    @property
    def granted_guard(self) -> Guard | None:
        """`guard`, with every check by its name. Raises UsageError TERM_INVALID."""
        if self.guard is None:
            return None
        named = CHECKS if self.guard.refuse == "all" else self.guard.refuse
        refuse = [check for check in CHECKS if check in named]
        return Guard(refuse, parse_seconds("guard.interval", self.guard.interval, 1, LONGEST_INTERVAL))

    @property
    def granted_application(self) -> Application | None:
        """`application`, as the grant has it. Raises UsageError TERM_INVALID where what is required is not among it."""
        return self.application.granted if self.application else None

    @property
    def selection(self) -> Selection:
        """The PCRs of `require.pcrs`."""
        return Selection.parse(*self.require.pcrs or ())


def parse_terms(text: str) -> Terms:
    """Raises UsageError: TERM_UNKNOWN, TERM_INVALID."""
    terms = _converted(_table(text), Terms)
    _check(terms)
    return terms


def parse_measured(text: str) -> Application:
    """`[application]` alone, of terms or as it was measured. Raises UsageError: TERM_UNKNOWN, TERM_INVALID."""
    return _converted({"application": None} | _table(text), _MeasuredAlone).application.granted


class _MeasuredAlone(msgspec.Struct):
    application: Measured


def _table(text: str) -> dict[str, Any]:
    import tomllib  # noqa: PLC0415  # the vendor's need alone, and not to be paid for at each opening

    if len(text) > SIZE_LIMIT:
        raise UsageError(
            Reason.TERM_INVALID, f"The terms are longer than {SIZE_LIMIT:,} characters.", "Check the file's name."
        )
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # beside TOML's own, numbers too long for Python to read
        raise UsageError(Reason.TERM_INVALID, f"The terms are not TOML: {error}.", TOML) from None


def _converted(table: dict[str, Any], kind: type[_T]) -> _T:
    try:
        return msgspec.convert(table, kind, builtin_types=(datetime.date, datetime.datetime))  # a day, not text
    except msgspec.ValidationError as error:
        unknown = "unknown field" in str(error)
        reason = Reason.TERM_UNKNOWN if unknown else Reason.TERM_INVALID
        what = f"The terms cannot be used: {in_words(str(error))}."
        raise UsageError(reason, what, mend(str(error), list(_names("", Terms)), dict(_choices("", Terms)))) from None


def _names(path: str, kind: type[msgspec.Struct]) -> Iterator[str]:
    """The terms of a table; that of a table in it ends with a dot."""
    for field in msgspec.structs.fields(kind):
        inner = [each for each in (field.type, *get_args(field.type)) if isinstance(each, type)]
        tables = [each for each in inner if issubclass(each, msgspec.Struct)]
        yield f"{path}{field.name}{'.' if tables else ''}"
        for table in tables:
            yield from _names(f"{path}{field.name}.", table)


def _choices(path: str, kind: type[msgspec.Struct]) -> Iterator[tuple[str, str]]:
    """Terms that take no words but some, and these in a sentence."""
    for field in msgspec.structs.fields(kind):
        words, listed, parts = list[str](), list[str](), [(field.type, False)]
        while parts:
            part, within = parts.pop(0)
            if get_origin(part) is Literal:
                (listed if within else words).extend(f'"{word}"' for word in get_args(part))
            elif isinstance(part, type) and issubclass(part, msgspec.Struct):
                yield from _choices(f"{path}{field.name}.", part)
            else:
                parts += [(inner, within or get_origin(part) is list) for inner in get_args(part)]
        if listed:
            words.append(f"a list of {', '.join(listed)}")
        if words:
            yield f"{path}{field.name}", " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _check(terms: Terms) -> None:
    first, last = terms.validity.not_before, terms.validity.not_after
    if first and last and last < first:
        what = f"The license would end ({last}) before it begins ({first})."
        raise UsageError(Reason.TERM_INVALID, what, "Mend validity.not_before or validity.not_after.")
    wanted = terms.require.bindings
    if wanted not in ("all", "any") and not (isinstance(wanted, int) and 1 <= wanted <= documents.BINDING_LIMIT):
        what = f"require.bindings is {wanted!r}."
        hint = f'Write "all", "any" or a number from 1 to {documents.BINDING_LIMIT}.'
        raise UsageError(Reason.TERM_INVALID, what, hint)
    presence = terms.granted_presence
    if presence and presence.regain and not presence.grace:
        what = "presence.regain gives back a grace, and there is none."
        raise UsageError(Reason.TERM_INVALID, what, "Set presence.grace, or leave presence.regain out.")
    _ = terms.granted_continuity, terms.granted_guard, terms.granted_application
    use = terms.granted_use
    if use and use.cap is not None and not use.limits.opens and not use.anchor:
        what = "require.cap_pcr caps sessions that are prepared to write an index, and the terms ask for none."
        raise UsageError(Reason.TERM_INVALID, what, "Set limits.opens or require.anchor, or leave it out.")
    if use and use.cap is not None and ("sha256", use.cap) in set(terms.selection):
        what = f"require.cap_pcr is {use.cap}, which require.pcrs has too: it cannot be both free and of a fixed value."
        raise UsageError(Reason.TERM_INVALID, what, "Choose a PCR that nothing else extends.")
    _ = terms.selection


def parse_rates(texts: list[str]) -> list[Rate]:
    """The rates, of which each must be able to say no. Raises UsageError TERM_INVALID."""
    rates = [parse_rate("limits.rates", text) for text in texts]
    for one, text in zip(rates, texts, strict=True):
        for other, against in zip(rates, texts, strict=True):
            # So many of the shorter frames cover the longer: together they allow no more than that does.
            full = other.count * -(-one.seconds // other.seconds)
            # And a longer frame with no more in it says no first, each time.
            longer = one.seconds <= other.seconds and one.count >= other.count
            if one is not other and (longer or (one.seconds > other.seconds and one.count >= full)):
                what = f"limits.rates: {text!r} never limits anything beside {against!r}."
                raise UsageError(Reason.TERM_INVALID, what, "Leave one of them out, or mend the numbers.")
    return rates


def _monitor(asked: Monitored) -> Monitor:
    if not asked.regularity and not asked.distances:
        what = "[monitor] names no detector."
        raise UsageError(Reason.TERM_INVALID, what, "Add [monitor.regularity] or [monitor.distances].")
    actions = {detector.action for detector in (asked.regularity, asked.distances) if detector}
    if ("throttle" in actions) != (asked.throttled is not None):
        what = 'monitor.throttled is the rate of the action "throttle": neither goes without the other.'
        raise UsageError(Reason.TERM_INVALID, what, 'Set monitor.throttled = "10/minute", or choose another action.')
    regular, distant = asked.regularity, asked.distances
    return Monitor(
        lasting=parse_seconds("monitor.lasting", asked.lasting, 1, LONGEST_WINDOW),
        regularity=None
        if regular is None
        else Regularity(
            regular.calls,
            round(regular.variation * 1000),
            parse_milliseconds("monitor.regularity.pause", regular.pause),
            regular.action,
        ),
        distances=None
        if distant is None
        else Distances(distant.queries, round(distant.normality * 1000), distant.features, distant.action),
        throttled=parse_rate("monitor.throttled", asked.throttled) if asked.throttled is not None else None,
    )
