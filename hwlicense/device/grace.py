"""What a license's presence has used up, in the state folder: its grace, and proofs that serve once.

Everything is written down before it is used: whoever kills the process, pulls the plug or starts anew loses what was
reserved, and gains nothing. Processes share one account: seconds of absence that one has paid for cost no other. The
file is authenticated by a key that comes from the license secret. It is not anchored in hardware: who restores an
older copy, or deletes it, has its grace back.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from hwlicense import storage
from hwlicense.core.documents import ANSWER_LIMIT
from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, StorageError, UsageError
from hwlicense.core.schema import SCHEMA, Count, decode, encode, prepare
from hwlicense.device import clock
from hwlicense.device.records import CODE, Records, unchecked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hwlicense.core.documents import Grant, Presence
    from hwlicense.core.secret import Secret

LIMIT: Final = 4096
BLOCK: Final = 8
"""Proofs that are reserved by one writing, and lost by a process that is killed."""

PATIENCE: Final = 5.0
"""Seconds to wait for another process that writes in the account."""

_AHEAD: Final = 60_000
"""Milliseconds that no absence is paid for beforehand."""

_PURPOSE: Final = b"presence"
Millis = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Entries(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`used` grace in milliseconds and `proofs` asked for, ever; in the boot `boot`, by its clock, until when absence
    is paid for and presence was credited.
    """

    schema: int
    used: Millis
    proofs: Count
    boot: Annotated[str, msgspec.Meta(max_length=64)]
    bridged_until: Millis
    credited_until: Millis


prepare(Entries)


class PresenceAccount:
    """One license's account. Times are seconds of the system's monotonic clock, which all processes share."""

    def __init__(self, folder: Path, terms: Presence, key: Secret) -> None:
        """Nothing is written yet. `key` is taken over, and wiped by `close`."""
        self._folder, self._path = folder, folder / "presence"
        self._terms, self._records = terms, Records(key)
        self._floor = 0, 0, 0

    def prepare(self) -> None:
        """See that the account can be written. Raises StorageError."""
        storage.make_folders(self._folder, 0o700)
        with self._alone():
            self._write(self._read())

    @property
    def grace_left(self) -> float:
        """Seconds that absence can still be bridged."""
        return max(0.0, self._terms.grace - self._read().used / 1000)

    @property
    def proofs(self) -> int:
        """Proofs that were reserved so far."""
        return self._read().proofs

    def reserve_proofs(self) -> range:
        """Numbers for the next proofs, which no other process gets. Raises StorageError."""
        with self._alone():
            entries = self._read()
            self._write(msgspec.structs.replace(entries, proofs=entries.proofs + BLOCK))
        return range(entries.proofs, entries.proofs + BLOCK)

    def close(self, unused: range) -> None:
        """Give reserved numbers back that nobody used, where no other process has taken later ones; wipe the key."""
        if unused:
            with suppress(StorageError), self._alone():  # they are lost then, no more
                entries = self._read()
                if entries.proofs == unused.stop:
                    self._write(msgspec.structs.replace(entries, proofs=unused.start))
        self._records.close()

    def bridge(self, now: float, seconds: float) -> float:
        """Pay for absence from `now` on for so many seconds, or as far as the grace goes. Returns until when.

        Raises StorageError: what cannot be written down is not granted.
        """
        with self._alone():
            entries = self._read()
            start = max(_millis(now), entries.bridged_until)  # another process has paid until then
            left = max(0, self._terms.grace * 1000 - entries.used)
            until = max(start, min(_millis(now + seconds), start + left))
            if until > start:
                used = entries.used + until - start
                self._write(msgspec.structs.replace(entries, used=used, bridged_until=until))
            return until / 1000

    def credit(self, start: float, end: float) -> None:
        """Give back the grace that proven presence from `start` to `end` earns. Raises StorageError."""
        regain = self._terms.regain
        if not regain:
            return
        with self._alone():
            entries = self._read()
            earned = (_millis(end) - max(_millis(start), entries.credited_until)) * self._terms.grace // regain
            if entries.used and earned > 0:
                used = max(0, entries.used - earned)
                self._write(msgspec.structs.replace(entries, used=used, credited_until=_millis(end)))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other process work in the account. Raises StorageError, also where the folder is gone."""
        try:
            with storage.exclusive(self._folder, PATIENCE):
                yield
        except UsageError as error:  # nobody's slip in arguments, once the license is open
            raise StorageError(Reason.STORAGE, error.what, "Give the state folder back, or open anew.") from error

    def _read(self) -> Entries:
        """The entries; with all of the grace and all recorded answers used where the file was damaged or forged."""
        found, genuine = self._on_disk()
        # What this process has seen used stays used, whatever becomes of the file; less can only be after a credit
        used, proofs, credited = self._floor
        if not genuine or found.credited_until <= credited:
            used = max(used, found.used)
        else:
            used, credited = found.used, found.credited_until
        self._floor = used, max(proofs, found.proofs), credited
        return msgspec.structs.replace(found, used=used, proofs=self._floor[1])

    def _on_disk(self) -> tuple[Entries, bool]:
        """What the file says, and whether it says that of this clock."""
        boot, now = clock.boot_name(), _millis(time.monotonic())
        with storage.reporting(self._path):
            if not self._path.exists():
                return Entries(SCHEMA, 0, 0, boot, 0, now), False
        try:
            record = self._records.opened(_PURPOSE, storage.read_limited(self._path, LIMIT))
            if record is None:
                return self._spent(boot), False
            entries = decode(record[1], Entries)
        except DamagedError:
            return self._spent(boot), False
        if entries.boot != boot or entries.bridged_until > now + _AHEAD or entries.credited_until > now:
            # Another clock: of another boot, or of a time namespace, whose times mean nothing by this one
            return msgspec.structs.replace(entries, boot=boot, bridged_until=0, credited_until=now), False
        return entries, True

    def _spent(self, boot: str) -> Entries:
        return Entries(SCHEMA, self._terms.grace * 1000, ANSWER_LIMIT, boot, 0, _millis(time.monotonic()))

    def _write(self, entries: Entries) -> None:
        self._floor = entries.used, entries.proofs, entries.credited_until
        storage.atomic_write(self._path, self._records.made(_PURPOSE, 0, encode(entries)), 0o600)


def presence_folder(state: Path, grant: Grant) -> Path:
    """Where the account of this revision is kept. Each has its own: the key of one finds another's damaged."""
    folder = state / "licenses" / grant.license
    return folder if grant.revision == 1 else folder / f"presence-{grant.revision}"


def recorded(folder: Path) -> Entries | None:
    """What the account says, unchecked, as only an open license can check it: for reports. None where there is none."""
    try:
        record = unchecked(storage.read_limited(folder / "presence", LIMIT)[:-CODE])
        return decode(record[1], Entries) if record else None
    except HwlicenseError:
        return None


def _millis(seconds: float) -> int:
    return max(0, int(seconds * 1000))
