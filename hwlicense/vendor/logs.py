"""Checking the files of signed logs, offline: which belong together, and whether they are what a device wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hwlicense import storage
from hwlicense.core.auditing import Audit, Fault, Licensed, Recorded, check_order
from hwlicense.core.chain import LINE_LIMIT, Part, Start, digest, parse
from hwlicense.core.documents import License
from hwlicense.core.envelope import verified
from hwlicense.core.errors import DamagedError, Reason, UsageError
from hwlicense.core.schema import FILE_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hwlicense.core.auditing import Severity
    from hwlicense.core.documents import VendorPublic
    from hwlicense.vendor.folder import Folder

_CHUNK: Final = 1 << 20


class Checked(NamedTuple):
    """Recordings by log and number, and all that is wrong with them or between them."""

    recordings: list[Recorded]
    faults: list[Fault]

    def has(self, severity: Severity) -> bool:
        """Whether there is a fault that weighs so much."""
        return any(fault.severity == severity for fault in self.faults)


class _File(NamedTuple):
    path: Path
    part: int
    first: Start | Part
    line: bytes


def licenses(paths: Sequence[Path], vendor: VendorPublic, folder: Folder | None = None) -> Licensed:
    """The licenses in files, all of this vendor, and states that they or its folder say are approved.

    Raises DamagedError, RefusedError WRONG_VENDOR, UsageError.
    """
    found = [verified(storage.read_limited(path, FILE_LIMIT), License, vendor) for path in paths]
    states = [approval.pcrs for licensed in found for approval in licensed.approvals]
    if folder:
        products = {licensed.grant.product for licensed in found}
        states += [approval.pcrs for product in products for approval in folder.approvals(product)]
    return Licensed({(o.grant.license, o.grant.revision): o for o in found}, {frozenset(pcrs) for pcrs in states})


def check(paths: Sequence[Path], licensed: Licensed, first: int = 1) -> Checked:
    """Check all files of one or more logs. Recording `first` of each is the first that is due.

    Raises UsageError FILE_ABSENT or for a file given twice, StorageError.
    """
    faults: list[Fault] = []
    groups = _grouped(paths, faults)
    watched = {files[0].first.statement.previous for files in groups if isinstance(files[0].first, Start)}
    recordings = []
    for files in groups:
        if isinstance(files[0].first, Start):
            recordings.append(_audited(files, files[0].first, licensed, watched))
        else:
            what = "The file goes on a recording whose start was not given."
            faults += [Fault("forged", 0, file.first.number, str(file.path), what) for file in files]
    recordings.sort(key=lambda each: (_log(each), each.statement.recording, each.first_wall))
    for log in dict.fromkeys(map(_log, recordings)):
        faults += check_order([each for each in recordings if _log(each) == log], first)
    return Checked(recordings, [fault for each in recordings for fault in each.faults] + faults)


def _log(recorded: Recorded) -> tuple[str, str]:
    return recorded.statement.license, recorded.statement.log


def _grouped(paths: Sequence[Path], faults: list[Fault]) -> list[list[_File]]:
    """Files by recording, each in the order of its parts."""
    if len({path.resolve() for path in paths}) != len(paths):
        raise UsageError(Reason.USAGE, "A file is given twice.", "Give each file once.")
    groups: dict[bytes, list[_File]] = {}
    for path in paths:
        first = next(lines(path), None)
        if first is None or not first[2]:
            faults.append(Fault("cut", 0, None, str(path), "The file has not one whole record."))
            continue
        try:
            record = parse(first[1])
        except DamagedError as error:
            faults.append(Fault("forged", 0, None, f"{path}, line 1", error.what))
            continue
        if isinstance(record, Start):
            groups.setdefault(digest(first[1]), []).append(_File(path, 1, record, first[1]))
        elif isinstance(record, Part):
            groups.setdefault(record.start, []).append(_File(path, record.part, record, first[1]))
        else:
            what = "The file begins with neither a recording nor a part of one: its first records are missing."
            faults.append(Fault("forged", 0, record.number, f"{path}, line 1", what))
    return [sorted(files, key=lambda file: file.part) for files in groups.values()]


def _audited(files: list[_File], start: Start, licensed: Licensed, watched: set[bytes]) -> Recorded:
    audit = Audit(start, files[0].line, f"{files[0].path}, line 1", licensed, watched)
    where = str(files[0].path)
    for place, file in enumerate(files):
        for number, line, whole in lines(file.path):
            where = f"{file.path}, line {number}"
            if not whole:
                audit.torn(where)
            elif place or number > 1:
                audit.add(line, where)
    return audit.finish(where)


def lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, content without newline, and whether there was one. What is too long for a line comes as it is found.

    Raises UsageError, StorageError.
    """
    number, rest, offset = 1, b"", 0
    with storage.OpenFile(path) as file:
        while chunk := file.read(_CHUNK, offset):
            offset += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield number, line, True
                number += 1
            if len(rest) > LINE_LIMIT:
                yield number, rest[: LINE_LIMIT + 1], True
                return
        if rest:
            yield number, rest, False
