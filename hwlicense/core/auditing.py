"""Whether a recording is what a device wrote: its hardware's word, its signatures, its chain, its times.

An audit is fed the lines of one recording in order, and goes on after a fault: it says for each where and what. What
is `forged` does not come of a crash; what is `unjudged` takes a license that was not given; what is `cut` may come of a
crash; a `note` is for a person to judge.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature

from hwlicense.core.chain import (
    NOTHING,
    Checkpoint,
    Closing,
    End,
    Gap,
    Heartbeat,
    Input,
    Output,
    Part,
    Sensor,
    Start,
    TpmCertificate,
    certified_bytes,
    check_signature,
    digest,
    parse,
)
from hwlicense.core.documents import TokenBinding, TpmBinding
from hwlicense.core.envelope import classical_verifier
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.schema import SCHEMA
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.quote import check_quote
from hwlicense.core.tpm.structures import Public
from hwlicense.core.wording import quantity

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from hwlicense.core.chain import AnyRecord, Certificate, Statement
    from hwlicense.core.documents import License, Pcr
    from hwlicense.core.tpm.quote import Quoted

Severity = Literal["forged", "unjudged", "cut", "note"]

FAULT_LIMIT: Final = 100
"""Faults that are told of one recording."""

_SET: Final = 2_000_000  # microseconds by which a wall clock may drift between two records
_LATE: Final = 5_000_000
_SECOND: Final = 1_000_000
_TPM_DRIFT: Final = 1.3  # a TPM's clock may be 15 % off (Part 1, 36.3), and so may what it is compared with
_LAPSE: Final = 4_200_000  # milliseconds of TPM clock that a power cut may cost: an update of NV is due each 2^22
_NOTHING_HOLDS: Final = "nothing that holds"
_ADDED: Final = "What is here, after the end, was added."


class Fault(NamedTuple):
    """What is wrong, and where. `record` is None where it is about the whole recording."""

    severity: Severity
    recording: int
    record: int | None
    where: str
    what: str


class Licensed(NamedTuple):
    """What recordings are checked against: licenses by (identifier, revision), and approved states of platforms."""

    licenses: Mapping[tuple[str, int], License]
    approved: Collection[frozenset[Pcr]]


class Recorded(NamedTuple):
    """What a recording came to. `signed` records are under a signature; `quotes` are those of a TPM."""

    statement: Statement
    start: bytes
    head: bytes
    hardware: str
    first_wall: int
    last_wall: int
    records: int
    signed: int
    outputs: int
    inputs: int
    dropped: int
    ended: bool
    quotes: list[Quoted]
    seen: frozenset[bytes]
    faults: list[Fault]


class Audit:
    """One recording. `watched` are digests of records that a later recording may name."""

    def __init__(
        self, start: Start, line: bytes, where: str, licensed: Licensed, watched: Collection[bytes] = ()
    ) -> None:
        self._statement, self._licensed, self._watched = start.statement, licensed, watched
        self._start = self._head = digest(line)
        self._follows: bytes | None = self._head
        self._key = start.statement.key
        self._expected = self._signed = self._records = 1
        self._outputs = self._inputs = self._dropped = 0
        self._part, self._ended = 1, False
        self._first: AnyRecord = start
        self._last: AnyRecord = start
        self._seen: set[bytes] = {self._head} & set(watched)
        self._quotes: list[Quoted] = []
        self._faults: list[Fault] = []
        self._sensors = {}
        for name, key in start.statement.sensors.items():
            try:
                self._sensors[name] = Sensor(name, key)
            except HwlicenseError as error:
                self._fault("forged", 0, where, error.what)
        self._hardware = _NOTHING_HOLDS
        self._check_start(start, where)

    @property
    def certified(self) -> bool:
        """Whether hardware that the license is bound to has certified the recording's start, or its end."""
        return self._hardware != _NOTHING_HOLDS

    def add(self, line: bytes, where: str) -> None:
        """The next line, without its newline."""
        try:
            record = parse(line)
        except HwlicenseError as error:
            self._fault("forged", self._expected, where, f"{_ADDED} {error.what}" if self._ended else error.what)
            self._expected, self._follows = self._expected + 1, None
            return
        self._records += 1
        self._check_place(record, where)
        self._check_times(record, where)
        self._expected, self._follows = record.number + 1, digest(line)
        self._head = self._follows
        if self._head in self._watched:
            self._seen.add(self._head)
        self._check_kind(record, where)
        self._last = record

    def torn(self, where: str) -> None:
        """The file ends in the middle of a record."""
        if self._ended:  # what makes recordings writes nothing more by then, and so no crash tears it
            self._fault("forged", self._expected, where, _ADDED)
        else:
            self._fault("cut", self._expected, where, "The file ends in the middle of a record.")

    def finish(self, where: str) -> Recorded:
        """After the last line."""
        if not self._ended:
            left = self._expected - self._signed
            what = f"The recording has no end: nothing is known after {moment(self._last.wall)}."
            if left:
                what += f" No signature covers the last {quantity(left, 'record')}: anyone may have written that."
            self._fault("cut", self._expected - 1, where, what)
        return Recorded(
            statement=self._statement,
            start=self._start,
            head=self._head,
            hardware=self._hardware,
            first_wall=self._first.wall,
            last_wall=self._last.wall,
            records=self._records,
            signed=self._signed,
            outputs=self._outputs,
            inputs=self._inputs,
            dropped=self._dropped,
            ended=self._ended,
            quotes=self._quotes,
            seen=frozenset(self._seen),
            faults=self._faults,
        )

    # ---- the start

    def _check_start(self, start: Start, where: str) -> None:
        said = start.statement
        if start.number or start.previous != said.previous:
            self._fault("forged", 0, where, "The start contradicts itself.")
        if (said.recording == 1) != (said.previous == NOTHING):
            self._fault("forged", 0, where, "The start does not say what it follows.")
        self._check_signed(start, where)
        licensed = self._licensed.licenses.get((said.license, said.revision))
        if licensed is None:
            what = f"It is of license {said.license}, revision {said.revision}, which was not given."
            self._fault("unjudged", 0, where, what)
            return
        grant = licensed.grant
        if said.vendor != grant.vendor or said.package not in [p.content_key for p in grant.packages]:
            self._fault("forged", 0, where, "It names a vendor or a package that the license does not.")
        if quoted := self._certified(start.certificate, certified_bytes(said), 0, where):
            self._quotes.append(quoted)

    def _certified(self, certificate: Certificate, statement: bytes, number: int, where: str) -> Quoted | None:
        """Check the hardware's word; what a TPM quoted."""
        licensed = self._licensed.licenses[self._statement.license, self._statement.revision]
        try:
            if isinstance(certificate, TpmCertificate):
                return self._quoted(certificate, licensed, statement, number, where)
            keys = [binding.key for binding in licensed.bindings if isinstance(binding, TokenBinding)]
            if certificate.key not in keys:
                self._fault("forged", number, where, "It is certified by a token that the license is not bound to.")
                return None
            classical_verifier(certificate.key)(certificate.signature, statement)
            self._hardware = "token"
        except HwlicenseError as error:
            self._fault("forged", number, where, f"The hardware's certificate is wrong: {error.what}")
        except InvalidSignature:
            self._fault("forged", number, where, "The token's signature is not over what the recording says.")
        return None

    def _quoted(
        self, certificate: TpmCertificate, licensed: License, statement: bytes, number: int, where: str
    ) -> Quoted | None:
        key = Public.parse(certificate.attestation_key)
        if key.name not in [b.attestation_key for b in licensed.bindings if isinstance(b, TpmBinding)]:
            self._fault("forged", number, where, "It is certified by a TPM that the license is not bound to.")
            return None
        quoted = check_quote(key, certificate.quote, statement, certificate.pcrs)
        self._hardware = "TPM"
        if Selection.of(certificate.pcrs) != Selection.parse(*licensed.grant.pcrs):
            self._fault("forged", number, where, "The quote is of other PCRs than the license names.")
        elif certificate.pcrs and frozenset(certificate.pcrs) not in self._licensed.approved:
            self._fault("note", number, where, "The platform was in a state that no approval given here is for.")
        return quoted

    # ---- every record

    def _check_place(self, record: AnyRecord, where: str) -> None:
        number, expected = record.number, self._expected
        what = ""
        if self._ended:
            what = _ADDED
        elif number > expected:
            what = f"Missing before this one: {quantity(number - expected, 'record')}."
        elif number < expected:
            what = "This record comes again, or in a wrong place."
        elif self._follows is not None and record.previous != self._follows:
            what = f"Record {number - 1} is not the one that this one follows: one of the two was changed or put in."
        if what:
            self._fault("forged", number, where, what)

    def _check_times(self, record: AnyRecord, where: str) -> None:
        passed, shown = record.boot - self._last.boot, record.wall - self._last.wall
        if passed < 0:
            self._fault("forged", record.number, where, "Its time since the boot is before that of the last record.")
        elif passed > 2 * self._statement.heartbeat * _SECOND + _LATE:
            self._fault("note", record.number, where, f"There was silence for {passed / _SECOND:,.0f} s.")
        if abs(shown - passed) > _SET:
            self._fault(
                "note", record.number, where, f"The wall clock was moved by {(shown - passed) / _SECOND:+,.1f} s."
            )

    def _check_kind(self, record: AnyRecord, where: str) -> None:
        match record:
            case Output() | Input():
                self._outputs += isinstance(record, Output)
                self._inputs += isinstance(record, Input)
                self._check_sensor(record, where)
            case Checkpoint() | Heartbeat():
                self._check_signed(record, where)
                self._key = record.key
            case Gap():
                self._dropped += record.dropped
                self._fault(
                    "note", record.number, where, f"Dropped for lack of room: {quantity(record.dropped, 'record')}."
                )
            case Part():
                if (record.part, record.start) != (self._part + 1, self._start):
                    self._fault("forged", record.number, where, "The file is of another recording, or another part.")
                self._part = record.part
            case End():
                self._check_end(record, where)
            case Start():
                self._fault("forged", record.number, where, "A recording begins within another one.")

    def _check_signed(self, record: Start | Checkpoint | Heartbeat | End, where: str) -> None:
        try:
            check_signature(self._key, record)
        except (InvalidSignature, ValueError):
            self._fault("forged", record.number, where, "Its signature is not by the key that is due.")
        else:
            self._signed = record.number + 1

    def _check_sensor(self, record: Output | Input, where: str) -> None:
        if record.sensor is None or record.input is None:
            return
        sensor = self._sensors.get(record.sensor.sensor)
        if sensor is None or sensor.checked_again(record.input, record.sensor.signature) is False:
            self._fault("forged", record.number, where, "It has a signature that is not of the sensor that it names.")

    def _check_end(self, record: End, where: str) -> None:
        self._check_signed(record, where)
        self._ended = True
        if record.certificate is None:
            what = f"The hardware did not certify the end ({record.refusal}): records before it may be missing."
            self._fault("cut", record.number, where, what)
            return
        if (self._statement.license, self._statement.revision) not in self._licensed.licenses or not record.number:
            return
        closing = Closing(SCHEMA, self._start, record.previous, record.number)
        quoted = self._certified(record.certificate, certified_bytes(closing), record.number, where)
        if quoted:
            if self._quotes:
                self._check_clock(self._quotes[0], quoted, record, where)
            self._quotes.append(quoted)

    def _check_clock(self, begun: Quoted, ended: Quoted, record: End, where: str) -> None:
        passed = (record.boot - self._first.boot) / 1000
        measured = ended.clock - begun.clock
        if measured < 0 or ended.reset_count < begun.reset_count:
            self._fault("forged", record.number, where, "The TPM's clock at the end is before that at the start.")
        elif measured > passed * _TPM_DRIFT + _LATE / 1000:
            what = f"The TPM counted {measured / 1000:,.0f} s, and the records cover {passed / 1000:,.0f} s."
            self._fault("note", record.number, where, what)

    def _fault(self, severity: Severity, record: int | None, where: str, what: str) -> None:
        # Of each severity by itself: no number of lesser faults hides a worse one
        if sum(fault.severity == severity for fault in self._faults) < FAULT_LIMIT:
            self._faults.append(Fault(severity, self._statement.recording, record, where, what))


def moment(wall: int) -> str:
    """A time of the wall clock, in UTC; as a number where no calendar has it."""
    try:
        return f"{datetime.datetime.fromtimestamp(wall / 1e6, datetime.UTC):%Y-%m-%d %H:%M:%S.%f} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{wall} us"


def check_order(recordings: Sequence[Recorded], first: int) -> list[Fault]:
    """What is wrong between the recordings of one log, which are sorted by their numbers; `first` is due first.

    Whether one of a lower number is the one that was verified then, nothing here can tell.
    """
    faults: list[Fault] = []
    before: Recorded | None = None
    for each in recordings:
        number, where = each.statement.recording, f"recording {each.statement.recording}"

        def fault(severity: Severity, what: str, number: int = number, where: str = where) -> None:
            faults.append(Fault(severity, number, None, where, what))

        if number < first:
            what = "Its number is below the first that is due: what was verified before, or a number that came twice."
            fault("forged", what)
        if before is None:
            if number > first:
                fault("cut", f"Not given: {_numbers(first, number - 1)}.")
        elif number == before.statement.recording:
            fault("forged", "There are two recordings with this number: the device's state was set back.")
        elif number > before.statement.recording + 1:
            fault("forged", f"Missing: {_numbers(before.statement.recording + 1, number - 1)}.")
        else:
            _check_link(before, each, fault)
        if before is not None:
            _check_succession(before, each, fault)
        before = each
    if before is not None and before.statement.recording < first:
        last = before.statement.recording
        faults.append(Fault("cut", last, None, f"recording {last}", f"Recording {first}, which is due, was not given."))
    return faults


def _numbers(first: int, last: int) -> str:
    return f"recording {first}" if first == last else f"recordings {first} to {last}"


class _Fault(Protocol):
    def __call__(self, severity: Severity, what: str) -> None: ...


def _check_link(before: Recorded, each: Recorded, fault: _Fault) -> None:
    named = each.statement.previous
    if named not in before.seen:
        fault("forged", "It follows a record that the recording before it does not have: records are missing there.")
    elif named not in (before.head, before.start):
        fault("forged", "The recording before it has records that were added when this one had begun.")


def _check_succession(before: Recorded, each: Recorded, fault: _Fault) -> None:
    if before.quotes and each.quotes:
        last, first = before.quotes[-1], each.quotes[0]
        same = first.reset_count == last.reset_count
        if first.reset_count < last.reset_count or first.clock < last.clock - (0 if same else _LAPSE):
            fault("forged", "By the TPM's clock it began before the recording before it ended.")
    steps, earlier = each.statement.steps, before.statement.steps
    if each.statement.revision == before.statement.revision and steps is not None and steps < (earlier or 0):
        fault("forged", "The count of the license's anchor is less than in the recording before it.")
    if each.statement.revision < before.statement.revision:
        fault("forged", "It is of an earlier revision of the license than the recording before it.")
