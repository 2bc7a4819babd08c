"""An open model: its members, decrypted in memory."""

from __future__ import annotations

import os
import posixpath
import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NoReturn, Self

from hwlicense.core.errors import ClosedError, DamagedError, HwlicenseError, Reason, UsageError, memory_needed
from hwlicense.device.keyring import Keyring
from hwlicense.device.licensed import Conditions, Licensed
from hwlicense.device.memory import Memory, Protection, SealedFile, lend, protection
from hwlicense.device.starting import Session, Standing, check_count, foremost, too_long
from hwlicense.device.streaming import MemberReader
from hwlicense.threads import threads_for

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterator, Sequence

    from _typeshed import WriteableBuffer

    from hwlicense.core import package
    from hwlicense.core.documents import Member
    from hwlicense.core.keys import Content
    from hwlicense.device.bound import Bound
    from hwlicense.device.reading import PackageFile
    from hwlicense.device.sealed_code import Importer

_NONE: Final = Conditions()


class Model(Licensed):
    """The decrypted members of a package, until `close`. Threads share it, and so do forked processes.

    Closing wipes the keys at once, and so does the loss of hardware whose presence the license asks for. A buffer that
    `read` lent lives on as long as someone holds it, whatever happens to model and keys, and is zeroed the moment
    nobody does. Threads inside a call finish with ClosedError, or with what became of the hardware. `grant` is what the
    license says.
    """

    def __init__(self, file: PackageFile, content: Content, conditions: Conditions = _NONE) -> None:
        """Takes all but the content over if this succeeds. Raises DamagedError, StorageError."""
        super().__init__(conditions)
        self.name, self.version = file.manifest.name, file.manifest.version
        self._file, self._layout = file, file.layout
        self._keys = self._keyring(content)
        self._refusal: HwlicenseError | None = None
        self._ended = False
        self._closed = False
        self._users: Counter[int] = Counter()  # calls under way, by thread
        self._lent: weakref.WeakValueDictionary[str, ctypes.Array[ctypes.c_ubyte]] = weakref.WeakValueDictionary()
        self._sealed: dict[str, SealedFile] = {}
        self._readers: weakref.WeakSet[MemberReader] = weakref.WeakSet()
        self.after_fork()
        _models.add(self)
        if self._watch:
            self._watch.guard(self)
        if self._presence:
            self._presence.guard(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The members' relative paths, as packed."""
        self._check_open()
        return self._layout.names

    def size(self, name: str | os.PathLike[str]) -> int:
        """Bytes of a member. Raises UsageError MEMBER_ABSENT."""
        return self._member(name).size

    def read(self, name: str | os.PathLike[str]) -> memoryview:
        """The whole of a member, verified, as a read-only buffer. Who holds the same member shares one buffer.

        Raises UsageError MEMBER_ABSENT, DamagedError PACKAGE_DAMAGED, StorageError, ClosedError.
        """
        member = self._member(name)
        if not member.size:
            return memoryview(b"")
        with self._using(), self._turn(member.name):
            array = self._lent.get(member.name)
            if array is None:
                memory = Memory(member.size)
                try:
                    self._decrypt(member, memory.view)
                except BaseException:
                    memory.wipe()
                    raise
                array = self._lent[member.name] = lend(memory)
            return memoryview(array).cast("B").toreadonly()

    def readinto(self, name: str | os.PathLike[str], buffer: WriteableBuffer) -> None:
        """The whole of a member, verified, into a buffer of the caller's and of the member's size. Raises as `read`.

        Raises UsageError where the size is another. What failed leaves nothing certain in the buffer.
        """
        member = self._member(name)
        with memoryview(buffer).cast("B") as out:
            if len(out) != member.size:
                what = f"The member {member.name!r} has {member.size:,} bytes, and the buffer {len(out):,}."
                raise UsageError(Reason.USAGE, what, "Give a buffer of `model.size(name)` bytes.")
            with self._using():
                self._decrypt(member, out)

    def open(self, name: str | os.PathLike[str]) -> MemberReader:
        """A member as a binary file that is decrypted as it is read, in little memory. Raises as `read`."""
        member = self._member(name)
        # For ciphertext. It never grows: a thread that a fork lost, or an error's traceback, may have views of it.
        with memory_needed():
            buffer = bytearray(self._layout.chunk(member, 0).sealed_size)

        def open_chunks(first: int, count: int, out: memoryview) -> None:
            if count > 1:
                self._decrypt(member, out, range(first, first + count))
                return
            chunk = self._layout.chunk(member, first)
            self._open(chunk, self._file.sealed(chunk, buffer), out)

        with self._lock:
            self._check()
            reader = MemberReader(member.size, self._layout.manifest.chunk_size, open_chunks, self._using)
            self._readers.add(reader)
        return reader

    def path(self, name: str | os.PathLike[str]) -> str:
        """A path to a member for libraries that take nothing else; valid in this process until `close`.

        It leads to memory, sealed against change, and is no file on any disk. Raises as `read`.
        """
        member = self._member(name)
        with self._using(), self._turn(member.name):
            if member.name not in self._sealed:
                self._sealed[member.name] = SealedFile(member.size, lambda view: self._decrypt(member, view))
            return self._sealed[member.name].path

    def importer(self) -> Importer:
        """What imports the package's code while it is installed, as in a `with` block. Raises UsageError."""
        from hwlicense.device import sealed_code  # noqa: PLC0415  # most packages hold no code

        return sealed_code.Importer(sealed_code.ModelCode(self, self._layout.manifest))

    @property
    def enclosure(self) -> memoryview:
        """What the license encloses for the application, read-only: up to 64 KiB, empty where it encloses nothing.

        Zeroed when nobody holds it. Raises as `read`.
        """
        self._check_present()
        with self._using():
            keys = self._keys
            copy = keys.enclosure()
            self._check()  # keys that were wiped meanwhile enclose zeros
            return copy if keys is self._keys else self.enclosure

    @property
    def protection(self) -> Protection:
        """How well this process guards keys and plaintext now: bytes held, bytes locked out of swap, and more.

        An application that must not be swapped out checks `locked == held` when it has read what it needs.
        """
        return protection()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def spend(self, count: int = 1, features: Sequence[float] | None = None, label: int = 0) -> None:
        """Spend `count` inferences of the license's, or none. Well under a microsecond; touches no hardware.

        `features`, a short vector that tells inputs apart, and `label`, the class that the model gave, are for the
        license's monitor. Without limits of use, nothing is spent. Safe for threads and in forked processes.
        Raises ExceededError (RATE_EXCEEDED, INFERENCES_EXHAUSTED, LEASE_PENDING, ABNORMAL_USE) with the seconds to
        `wait`, StorageError, UsageError, ClosedError.
        """
        if self._metering is not None:
            self._metering.spend(count, features, label)
            return
        self._check_open()
        if self._instance and (refusal := self._instance.refusal()):
            raise refusal

    @contextmanager
    def session(self, inferences: int = 0) -> Iterator[Session]:
        """A procedure that is refused at its start or not at all: nothing that is lost meanwhile interrupts it.

        `inferences` are reserved for it, within all limits: where this thread's `spend` would be refused meanwhile, it
        takes from them. Those that are not used are given back at the end. Read what the procedure needs before it
        begins: where hardware is lost or the guard finds something, its keys are gone at once, and only buffers and
        paths that were given out stay. Touches no hardware; a lease that must be renewed for the reserved ones is
        waited for, two seconds at the most.
        Raises UsageError, ClosedError; RefusedError and HardwareError where `standing` says no.
        """
        check_count(inferences, least=0)
        if refusal := self._denial(0, wait=True):
            raise refusal.again()
        continuity = self.grant.continuity if self.grant else None
        if not (self._metering and inferences):
            yield Session(continuity, inferences)
            return
        held = self._metering.hold(inferences, continuity)
        try:
            yield Session(continuity, inferences)
        finally:
            held.finish()

    def standing(self, horizon: float = 0.0, inferences: int = 0) -> Standing:
        """Whether a session of `horizon` seconds and so many inferences may start now, and if not, why.

        Touches no hardware, waits for none. Raises UsageError, ClosedError.
        """
        check_count(inferences, least=0)
        longer = too_long(horizon, self.grant.continuity if self.grant else None)
        refusal = foremost(self._denial(inferences), longer)
        here = self._presence.here if self._presence else True
        return Standing(refusal, here, self._presence.bridged_left if self._presence else 0.0)

    def _denial(self, inferences: int, *, wait: bool = False) -> HwlicenseError | None:
        """Why no session of so many inferences may start now; None if it may."""
        self._check_open()
        absent = (self._presence.refusal(wait=wait) if self._presence else None) or self._refusal
        if self._metering:
            return foremost(absent, self._metering.may_start(inferences))
        return foremost(absent, self._instance.refusal() if self._instance else None)

    def close(self) -> None:
        """Wipe the keys and close the package; lent buffers stay. Doing it again changes nothing."""
        with self._lock:
            self._closed = True
            self._release_if_unused()
        if self._presence:
            self._presence.close()
        if held := self._metering or self._instance:
            held.close()

    # ---- what presence does with a model

    @property
    def locked(self) -> bool:
        """Whether the keys are gone, as the hardware is."""
        return self._refusal is not None

    def lose_keys(self, refusal: HwlicenseError) -> None:
        """Wipe the keys and what readers keep of plaintext. Buffers in use stay as they are."""
        if not self._ended:
            self._refusal = refusal.again()
        self._forget_keys()

    def end(self, refusal: HwlicenseError) -> None:
        """As `lose_keys`, for good: no hardware gives them back."""
        with self._lock:
            self.lose_keys(refusal)
            self._ended = True

    def reopen(self, bound: Bound, *, ask: bool) -> Keyring:
        """The keys anew; `ask` for a PIN where the hardware takes one. Raises HwlicenseError."""
        if self._ended and self._refusal:
            raise self._refusal.again()
        assert self._content is not None  # noqa: S101  # it comes with the presence, which alone asks
        with self._content(bound, ask) as content:
            return self._keyring(content)

    def regain_keys(self, keys: Keyring) -> None:
        """Take them into use, unless the model was closed or its use ended meanwhile."""
        with self._lock:
            if self._closed or self._ended:
                keys.wipe()
                return
            before, self._keys, self._refusal = self._keys, keys, None
            before.wipe()

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open model cannot be copied or pickled; open it again, or fork")

    def __repr__(self) -> str:
        return f"<Model {self.name!r} {self.version!r}{', closed' if self._closed else ''}>"

    def _forget_keys(self) -> None:
        self._keys.zero()
        for reader in list(self._readers):
            reader.forget_soon()

    def _check_present(self) -> None:
        self._check_open()
        if self._presence and (refusal := self._presence.refusal(wait=True)):  # before any lock of this object is taken
            raise refusal
        if self._watch:
            self._watch.look_at_caller()
        self._check()

    def _member(self, name: str | os.PathLike[str]) -> Member:
        self._check_present()
        member = self._layout.members.get(posixpath.normpath(os.fspath(name)))
        if member is None:
            what = f"The package {self.name!r} has no member {os.fspath(name)!r}."
            raise UsageError(Reason.MEMBER_ABSENT, what, "`hwlicense inspect` and `model.names` list the members.")
        return member

    def _check(self) -> None:
        self._check_open()
        if refusal := self._refusal or (self._presence.peek() if self._presence else None):
            raise refusal.again()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(Reason.MODEL_CLOSED, f"The model {self.name!r} was closed.", "Open it again.")

    def _keyring(self, content: Content) -> Keyring:
        return Keyring(content, self._file.table(), self._layout.chunk_count)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keep keys and file for a call that runs while another thread closes: the last one out wipes."""
        thread = threading.get_ident()
        with self._lock:
            self._check()
            self._users[thread] += 1
        try:
            with memory_needed():
                yield
        finally:
            with self._lock:
                self._users[thread] -= 1
                if not self._users[thread]:
                    del self._users[thread]
                if self._refusal:  # set during the call, which may have left plaintext in a reader
                    self._forget_keys()
                self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self._users or not self._closed:
            return
        self._keys.wipe()
        for reader in list(self._readers):
            reader.forget()
        while self._sealed:
            self._sealed.popitem()[1].close()
        self._file.close()

    def _turn(self, name: str) -> threading.RLock:
        """Two threads that want one member: the second waits and gets what the first made."""
        with self._lock:
            return self._turns.setdefault(name, threading.RLock())

    def _decrypt(self, member: Member, out: memoryview, places: range | None = None) -> None:
        """The chunks at `places`, or all, into `out`."""
        step = self._layout.manifest.chunk_size
        places = range(self._layout.count(member)) if places is None else places
        first = self._layout.chunk(member, places[0]).key if places else 0

        def handle(chunk: package.Chunk, sealed: memoryview) -> None:
            start = (chunk.key - first) * step
            self._open(chunk, sealed, out[start : start + chunk.size])

        chunks = (self._layout.chunk(member, place) for place in places)
        self._file.scan(chunks, handle, threads_for(len(places) * step))

    def _open(self, chunk: package.Chunk, sealed: memoryview, out: memoryview) -> None:
        self._check()
        keys = self._keys
        try:
            keys.open_chunk(chunk, sealed, out)
        except DamagedError:
            self._check()  # keys that were wiped meanwhile open nothing
            if keys is self._keys:
                raise
            self._open(chunk, sealed, out)

    def after_fork(self) -> None:
        """New locks: in a forked child, threads that are not there may have held the old ones."""
        self._lock = threading.RLock()  # reentrant: a signal handler or the collector may close within a call
        self._turns: dict[str, threading.RLock] = {}
        for thread in self._users.keys() - {threading.get_ident()}:  # the one that forked may be within a call
            del self._users[thread]
        if self._refusal:
            self._forget_keys()  # the parent may have been about to
        if self._presence:
            self._presence.after_fork()
        for reader in list(self._readers):
            reader.after_fork()


_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    for model in list(_models):
        model.after_fork()


os.register_at_fork(after_in_child=_after_fork)
