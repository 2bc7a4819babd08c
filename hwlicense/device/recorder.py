"""Beginning a recording: its number, what it follows, and the hardware's word for its key."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final

from hwlicense import storage
from hwlicense.core.auditing import Audit, Licensed
from hwlicense.core.chain import NOTHING, Chain, Part, Sensor, Start, Statement, certified_bytes, digest, parse
from hwlicense.core.errors import DamagedError, Reason, StorageError, UsageError
from hwlicense.core.schema import FILE_LIMIT, SCHEMA, Digest, Document, Identifier, Positive, check, decode, encode
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import clock
from hwlicense.device.bound import Bound
from hwlicense.device.locking import LockedFile
from hwlicense.device.log_files import LogFiles, files_of, first_line, last_digest, path_of
from hwlicense.device.recording import Policy, Recording, now

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hwlicense.core.chain import Certificate, Closing
    from hwlicense.core.documents import License
    from hwlicense.core.hardware import Anchor, PinSource
    from hwlicense.device.bound import Connect
    from hwlicense.device.home import Home
    from hwlicense.device.log_files import Sync
    from hwlicense.device.recording import Full

_LEAST_BUFFER: Final = 256 << 10
_DAY: Final = 86400


class Latest(Document, frozen=True):
    """The latest recording of a log, as the state folder remembers it: its number, and the last digest known of it."""

    schema: int
    recording: Positive
    digest: Digest


class Recorder:
    """Begins recordings of what an open model was given and what it said. `model.outputs` is one."""

    def __init__(
        self,
        connect: Connect,
        licensed: License,
        home: Home,
        package: Identifier,
        pin: PinSource | None,
        anchor: Anchor | None,
    ) -> None:
        """`package` is the identifier of the content key that was opened."""
        self._connect, self._licensed, self._home = connect, licensed, home
        self._package, self._pin, self._anchor = package, pin, anchor

    def __call__(  # noqa: PLR0913  # each way of keeping a log by its name
        self,
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        sensors: Mapping[str, bytes] | None = None,
        rotate: int | None = 64 << 20,
        sync: Sync = "checkpoint",
        every: int = 1000,
        interval: float = 1.0,
        heartbeat: int = 10,
        full: Full = "refuse",
        buffer: int = 16 << 20,
    ) -> Recording:
        """Begin a recording, in new files in `folder`. Waits for the hardware, which certifies its key.

        `name` tells logs of one license apart, by default the folder's; a log has one recording at a time. `sensors`
        are public keys (Ed25519 or P-256, SubjectPublicKeyInfo as DER) by name. A file of `rotate` bytes is followed by
        another. Records are signed after `every` of them or `interval` seconds, and brought to the disk then: `sync` is
        "checkpoint", "always" or "never". After `heartbeat` seconds without a record there is a heartbeat. Where more
        than `buffer` bytes wait for the disk, a record is refused or dropped, as `full` says.

        Raises DamagedError OUTPUTS_DAMAGED for a file that has the name of one of this log and is none, HardwareError
        (CERTIFYING_UNSUPPORTED for dongles, and keys that cannot sign), RefusedError, StorageError where another
        process records in this log, UsageError, also for a folder that has files of another log or license.
        """
        from pathlib import Path  # noqa: PLC0415  # the type is needed above, the module here alone

        _check_names(folder, name, sensors)
        place = Path(folder)
        policy = Policy(rotate=rotate, every=every, interval=interval, heartbeat=heartbeat, full=full, buffer=buffer)
        _check(policy, sync)
        keys = dict(sensors or {})
        known = {sensor: Sensor(sensor, key) for sensor, key in keys.items()}
        log = name if name is not None else place.resolve().name
        with ExitStack() as stack:
            state = self._state(log)
            storage.make_folders(place)
            storage.make_folders(state)
            turn = _turn(state, log)
            stack.callback(turn.close)
            recording, previous = _following(state, place, log, self._licensed)
            bound = stack.enter_context(Bound(self._connect, self._licensed, self._home, ()))
            chain = Chain(previous)
            grant = self._licensed.grant
            statement = Statement(
                schema=SCHEMA,
                vendor=grant.vendor,
                license=grant.license,
                revision=grant.revision,
                package=self._package,
                log=log,
                recording=recording,
                previous=previous,
                key=chain.key,
                boot=clock.boot_name().replace("-", ""),
                heartbeat=heartbeat,
                steps=self._anchor.read().steps if self._anchor else None,
                sensors=keys,
            )
            check(statement)
            certify = partial(self._certify, bound)
            chain.begin(statement, certify(statement), *now())
            files = LogFiles(place, recording, sync)
            stack.callback(files.close)
            files.links += chain.take()
            _begun(files, place, log, self._licensed)
            _remember(state, recording, chain.start)
            held = stack.pop_all()
        try:
            return Recording(chain, files, policy, known, certify, partial(_ended, held, state, recording), turn.close)
        except BaseException:
            held.close()
            raise

    def _certify(self, bound: Bound, statement: Statement | Closing) -> Certificate:
        selection = Selection.parse(*self._licensed.grant.pcrs)
        return bound.certify(selection, certified_bytes(statement), self._pin)

    def _state(self, log: str) -> Path:
        try:
            slug = hashlib.sha256(log.encode()).hexdigest()[:16]
        except UnicodeEncodeError:
            raise UsageError(Reason.USAGE, "The log's name is not in UTF-8.", "Give another: name=.") from None
        return self._home.state / "licenses" / self._licensed.grant.license / "outputs" / slug


def _turn(state: Path, log: str) -> LockedFile:
    """Held for as long as it is open, in this process and none that it forks. Raises StorageError."""
    with ExitStack() as stack:
        turn = LockedFile.opened(state / "turn", 0)
        stack.callback(turn.close)
        if not turn.taken_now():
            raise _already(log)
        stack.pop_all()
    return turn


def _following(state: Path, folder: Path, log: str, licensed: License) -> tuple[int, bytes]:
    """Number and `previous` of the next recording: by what is remembered, and by what is there.

    Numbers go up by one. So a file with the name of a later recording stops the log, and never moves it.
    """
    path, there = state / "latest", files_of(folder)
    _check_others(there, log, licensed)
    with storage.reporting(path):
        found = path.is_file()
    latest = None
    if found:
        try:
            latest = decode(storage.read_limited(path, FILE_LIMIT), Latest)
        except DamagedError as error:
            hint = "Remove it: the log goes on from the files in its folder, and the vendor sees what is missing."
            raise DamagedError(Reason.HOME_DAMAGED, f"{path}: {error.what}", hint) from error
    number, previous = (latest.recording, latest.digest) if latest else (min(there, default=1), NOTHING)
    while number in there:
        previous = _last(there[number], number, log, licensed) or previous
        number += 1
    if latest and number == latest.recording:  # its files were moved away
        number += 1
    for later in there:
        if later > number:
            raise _foreign(there[later][0], f"recording {number} comes next in this log", path if latest else None)
    return number, previous


def _last(files: Sequence[Path], number: int, log: str, licensed: License) -> bytes | None:
    """The digest of the last whole line of a recording. Raises DamagedError where one of its files is not the log's."""
    start = None
    for path in files:
        try:
            line = first_line(path)
            first = parse(line)
        except (DamagedError, UsageError) as error:
            raise _foreign(path, "it is no file of a recording") from error
        part = 1
        if isinstance(first, Start):
            said, start = first.statement, digest(line)
            ours = (said.license, said.log, said.recording) == (licensed.grant.license, log, number)
            ours &= _certified(first, line, path, licensed)
        else:
            ours = isinstance(first, Part) and start in (None, first.start)
            part = first.part if isinstance(first, Part) else part
        if not ours or path != path_of(path.parent, number, part):
            raise _foreign(path, "it is of another log, or was not made by this device")
    return last_digest(files[-1])


def _certified(start: Start, line: bytes, path: Path, licensed: License) -> bool:
    said = start.statement
    known = Licensed({(said.license, said.revision): licensed}, ())  # of another revision, the hardware is it
    return Audit(start, line, str(path), known).certified


def _check_others(there: Mapping[int, Sequence[Path]], log: str, licensed: License) -> None:
    """Raises UsageError where a file is of another log or another license: their numbers would meet."""
    mine = licensed.grant.license
    for path in (path for paths in there.values() for path in paths):
        try:
            line = first_line(path)
            start = parse(line)
        except (DamagedError, UsageError, StorageError):
            continue  # `_following` judges those that matter for the number
        if not isinstance(start, Start) or (start.statement.license, start.statement.log) == (mine, log):
            continue
        said = start.statement
        if said.license != mine or _certified(start, line, path, licensed):
            what = f"{path} is of the log {said.log!r} of license {said.license}; this is {log!r} of license {mine}."
            hint = (
                "Give each log a folder of its own: the first argument, not name= alone. Another license is another "
                "log, on another device or in the place of the one before."
            )
            raise UsageError(Reason.USAGE, what, hint)


def _begun(files: LogFiles, folder: Path, log: str, licensed: License) -> None:
    """Write the start; where another log began in the folder since it was looked at, nothing of this one stays."""
    try:
        files.write()
    except UsageError as error:
        if error.reason != Reason.FILE_EXISTS:
            raise
        _check_others(files_of(folder), log, licensed)
        raise _already(log) from error
    try:
        _check_others(files_of(folder), log, licensed)
    except BaseException:
        files.withdraw()
        raise


def _already(log: str) -> StorageError:
    hint = "Close that recording, or give this one a folder and a name (name=) of its own: each log has both."
    return StorageError(Reason.STORAGE, f"The log {log!r} is being recorded already.", hint)


def _foreign(path: Path, why: str, latest: Path | None = None) -> DamagedError:
    what = f"{path} has the name of a file of this log, and {why}."
    hint = "Move it out of the folder, and ask who put it there; or record in a folder of its own."
    if latest:
        hint += (
            f" If the state folder was restored from a copy, remove {latest} instead: the log goes on from its files."
        )
    return DamagedError(Reason.OUTPUTS_DAMAGED, what, hint)


def _remember(state: Path, recording: int, head: bytes) -> None:
    storage.atomic_write(state / "latest", encode(Latest(schema=SCHEMA, recording=recording, digest=head)))


def _ended(held: ExitStack, state: Path, recording: int, head: bytes | None) -> None:
    """Let go of log and hardware."""
    with held:
        if head is not None:
            _remember(state, recording, head)


def _check(policy: Policy, sync: Sync) -> None:
    """Raises UsageError for what makes no sense."""
    rotate, every, interval, heartbeat, full, buffer = policy
    beat, least = _whole(heartbeat, 1, _DAY), f"a whole number of bytes, {_LEAST_BUFFER} at least"
    limit = heartbeat if beat else _DAY
    for option, value, sound, takes in (
        ("rotate", rotate, rotate is None or _whole(rotate, _LEAST_BUFFER), f"{least}, or None"),
        ("sync", sync, sync in ("never", "checkpoint", "always"), "'checkpoint', 'always' or 'never'"),
        ("every", every, _whole(every, 1), "a whole number of records, 1 at least"),
        ("heartbeat", heartbeat, beat, f"whole seconds, from 1 to {_DAY}"),
        ("interval", interval, _seconds(interval, limit), f"seconds, more than 0 and at most the heartbeat ({limit})"),
        ("full", full, full in ("refuse", "drop"), "'refuse' or 'drop'"),
        ("buffer", buffer, _whole(buffer, _LEAST_BUFFER), least),
    ):
        if not sound:
            raise UsageError(Reason.USAGE, f"{option}={value!r} is no way to keep a recording.", f"It takes {takes}.")


def _check_names(folder: object, name: object, sensors: object) -> None:
    """Raises UsageError for another type than the signature says."""
    sound = isinstance(folder, str | os.PathLike) and isinstance(name, str | None)
    if sensors is not None:
        sound &= isinstance(sensors, Mapping) and all(
            isinstance(sensor, str) and isinstance(key, bytes) for sensor, key in sensors.items()
        )
    if not sound:
        what = "A recording takes the path of a folder; its name is text, its sensors a dict of keys by name."
        raise UsageError(Reason.USAGE, what, "Give model.outputs(folder, name='...', sensors={name: public key}).")


def _whole(value: object, least: int, most: float = inf) -> bool:
    return isinstance(value, int) and least <= value <= most


def _seconds(value: object, most: int) -> bool:
    return isinstance(value, int | float) and 0 < value <= most
