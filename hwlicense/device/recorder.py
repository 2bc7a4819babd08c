"""Beginning a recording: its number, what it follows, and the hardware's word for its key."""

from __future__ import annotations

import fcntl
import hashlib
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Final

from hwlicense import storage
from hwlicense.core.chain import NOTHING, Chain, Sensor, Statement, certified_bytes
from hwlicense.core.errors import DamagedError, Reason, StorageError, UsageError
from hwlicense.core.schema import FILE_LIMIT, SCHEMA, Digest, Document, Identifier, Positive, check, decode, encode
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import clock
from hwlicense.device.bound import Bound
from hwlicense.device.log_files import LogFiles, last_digest, last_recording
from hwlicense.device.recording import Outputs, Policy, now

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from hwlicense.core.chain import Certificate, Closing
    from hwlicense.core.documents import License
    from hwlicense.core.hardware import Anchor, PinSource
    from hwlicense.device.bound import Connect
    from hwlicense.device.home import Home
    from hwlicense.device.log_files import Sync
    from hwlicense.device.recording import Full

_LEAST_BUFFER: Final = 256 << 10


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
    ) -> Outputs:
        """Begin a recording, in new files in `folder`. Waits for the hardware, which certifies its key.

        `name` tells logs of one license apart, by default the folder's; a log has one recording at a time. `sensors`
        are public keys (Ed25519 or P-256, SubjectPublicKeyInfo as DER) by name. A file of `rotate` bytes is followed by
        another. Records are signed after `every` of them or `interval` seconds, and brought to the disk then: `sync` is
        "checkpoint", "always" or "never". After `heartbeat` seconds without a record there is a heartbeat. Where more
        than `buffer` bytes wait for the disk, a record is refused or dropped, as `full` says.

        Raises HardwareError (CERTIFYING_UNSUPPORTED for dongles, and keys that cannot sign), RefusedError, StorageError
        where another process records in this log, UsageError.
        """
        from pathlib import Path  # noqa: PLC0415  # the type is needed above, the module here alone

        place = Path(folder)
        policy = _policy(rotate, every, interval, heartbeat, full, buffer, sync)
        keys = dict(sensors or {})
        known = {sensor: Sensor(sensor, key) for sensor, key in keys.items()}
        log = name if name is not None else place.resolve().name
        with ExitStack() as stack:
            state = self._state(log)
            storage.make_folders(place)
            storage.make_folders(state)
            turn = _turn(state, log)
            stack.callback(turn.close)
            recording, previous = _following(state, place)
            bound = stack.enter_context(Bound(self._connect, self._licensed, self._home, ()))
            chain = Chain(previous)
            grant = self._licensed.grant
            statement = Statement(
                SCHEMA,
                grant.vendor,
                grant.license,
                grant.revision,
                self._package,
                log,
                recording,
                previous,
                chain.key,
                clock.boot_name().replace("-", ""),
                heartbeat,
                self._anchor.read().steps if self._anchor else None,
                keys,
            )
            check(statement)
            certify = partial(self._certify, bound)
            chain.begin(statement, certify(statement), *now())
            files = LogFiles(place, recording, sync)
            stack.callback(files.close)
            files.write(chain.take(0))
            _remember(state, recording, chain.start)
            held = stack.pop_all()
        try:
            return Outputs(chain, files, policy, known, certify, partial(_ended, held, state, recording), turn.close)
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


def _turn(state: Path, log: str) -> BinaryIO:
    """Held for as long as it is open, in this process and none that it forks. Raises StorageError."""
    with storage.reporting(state / "turn"):
        held = (state / "turn").open("ab")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        if not isinstance(error, BlockingIOError):
            hint = "Keep the state folder on a local disk: some network file systems do not lock files."
            raise StorageError(Reason.STORAGE, f"{state} cannot be locked: {error.strerror}.", hint) from error
        what = f"The log {log!r} is being recorded already."
        raise StorageError(
            Reason.STORAGE, what, "Close that recording, or give this one a name of its own (name=)."
        ) from None
    return held


def _following(state: Path, folder: Path) -> tuple[int, bytes]:
    """Number and `previous` of the next recording: by what is remembered, and by what is there."""
    path, there = state / "latest", last_recording(folder)
    with storage.reporting(path):
        found = path.is_file()
    latest = None
    if found:
        try:
            latest = decode(storage.read_limited(path, FILE_LIMIT), Latest)
        except DamagedError as error:
            hint = "Remove it: the log goes on from the files in its folder, and the vendor sees what is missing."
            raise DamagedError(Reason.HOME_DAMAGED, f"{path}: {error.what}", hint) from error
    if latest and latest.recording >= there:
        return latest.recording + 1, last_digest(folder, latest.recording) or latest.digest
    return there + 1, (last_digest(folder, there) if there else None) or NOTHING


def _remember(state: Path, recording: int, digest: bytes) -> None:
    storage.atomic_write(state / "latest", encode(Latest(SCHEMA, recording, digest)))


def _ended(held: ExitStack, state: Path, recording: int, digest: bytes | None) -> None:
    """Let go of log and hardware."""
    with held:
        if digest is not None:
            _remember(state, recording, digest)


def _policy(
    rotate: int | None, every: int, interval: float, heartbeat: int, full: Full, buffer: int, sync: Sync
) -> Policy:
    """Raises UsageError for what makes no sense."""
    sound = (
        (rotate is None or rotate >= _LEAST_BUFFER)
        and every >= 1
        and 0 < interval <= heartbeat
        and 1 <= heartbeat <= 86400  # noqa: PLR2004  # a day
        and full in {"refuse", "drop"}
        and sync in {"never", "checkpoint", "always"}
        and buffer >= _LEAST_BUFFER
    )
    if not sound:
        what = "The recording cannot be kept in this way."
        hint = "rotate and buffer take 262144 bytes at least; every 1; interval at most the heartbeat, that a day."
        raise UsageError(Reason.USAGE, what, hint)
    return Policy(rotate, every, interval, heartbeat, full, buffer)
