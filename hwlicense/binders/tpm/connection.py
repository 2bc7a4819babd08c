"""One connection to one TPM: one user at a time, and nothing left loaded in the TPM afterwards."""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_RC,
    TPM2_SE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_SESSION,
    TPMT_SYM_DEF,
    TSS2_Exception,
)
from tpm2_pytss.TCTILdr import TCTILdr

from hwlicense.binders.tpm import answering, failures, turns
from hwlicense.core.errors import HardwareError, Reason, UsageError
from hwlicense.core.tpm.structures import Public
from hwlicense.core.tpm.wire import number, sized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from hwlicense.core.tpm.nv import NvPublic

DEFAULT_TCTI: Final = "device:/dev/tpmrm0"
"""The kernel's resource manager: programs share the TPM, and it flushes what a killed one leaves behind."""

PATIENCE: Final = 20.0
"""Seconds to wait for a TPM that says it is busy; some rate-limit writes for that long."""

_TCTI: Final = re.compile(r"device:/[^:]+|(swtpm|mssim):[^:]*")
_FLUSH_CONTEXT: Final = 0x165
_TRANSIENT, _LOADED_SESSIONS = 0x80000000, 0x02000000
_LOCAL: Final = {"tr_set_auth", "tr_get_name", "tr_deserialize", "tr_serialize", "trsess_set_attributes"}
"""Functions of the library that ask the TPM nothing."""

_LOADS: Final = {"create_primary", "load", "load_external", "start_auth_session"}
_KEY_RESOURCE, _NV_RESOURCE = 1, 2  # IESYSC_KEY_RSRC and IESYSC_NV_RSRC in the metadata that tpm2-tss serializes


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection:
    """Opens when first used, and afresh in a forked child and after anything that left the context unusable."""

    def __init__(self, tcti: str) -> None:
        # No other TCTI: "cmd:" runs programs, and any other name loads a library of that name.
        if not _TCTI.fullmatch(tcti):
            raise UsageError(
                Reason.USAGE,
                f'"{tcti}" does not name a TPM.',
                "Use device:/dev/tpmrm0, swtpm:path=SOCKET or mssim:host=HOST.",
            )
        self.tcti = tcti
        self._lock = threading.RLock()
        self._busy = False
        self._open: tuple[TCTILdr, ESAPI] | None = None
        _connections.add(self)

    @contextmanager
    def work(self) -> Iterator[Work]:
        """Commands of one purpose, without those of another thread in between.

        Raises HardwareError for response codes that the caller has not dealt with, TPM_BUSY within other work of the
        same thread, and TPM_HUNG.
        """
        answering.check(self.tcti)
        with self._alone(), turns.turn(self.tcti):
            opened = self.open()
            work = Work(*opened, self.tcti)
            try:
                yield work
            except TSS2_Exception as error:
                if not failures.from_tpm(error) and self._open is opened:
                    self._drop(work)
                raise failures.hardware_error(error, work.command) from error
            finally:
                # Not so in a child that was forked within the work: what is loaded is the parent's.
                if self._open is opened and not work.flush_all():
                    self._drop(work)
                work.answers.end()

    def open(self) -> tuple[TCTILdr, ESAPI]:
        """Connect, if that is not done yet. Raises HardwareError and AbsentError."""
        if self._open is None:

            def late(made: Future[TCTILdr]) -> None:
                if not made.exception():
                    made.result().close()

            answers = answering.Answers(self.tcti, late)
            try:
                tcti = answers.wait(partial(_connected, self.tcti), "connect")
            finally:
                answers.end()
            try:
                # Here, on a thread that goes on: its buffer, where answers are decrypted, is written over when freed.
                self._open = tcti, ESAPI(tcti)
            except TSS2_Exception as error:
                tcti.close()
                raise failures.connect_error(error, self.tcti) from error
        return self._open

    def close(self) -> None:
        """Disconnect. The next use connects again. Raises HardwareError TPM_BUSY within work of the same thread."""
        with self._alone():
            self._drop(None)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Other threads wait. A signal handler cannot, as it is what its own thread waits for: it is refused."""
        with self._lock:
            if self._busy:
                what = "The TPM is in the middle of a command of this very thread: a signal handler interrupted it."
                hint = "Let the handler set a flag, and use the TPM when it has returned."
                raise HardwareError(Reason.TPM_BUSY, what, hint)
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    def _drop(self, work: Work | None) -> None:
        if work is not None:
            work.flush_all()  # the context may be of no use, but the wire below it may be well
        opened, self._open = self._open, None
        if opened is not None and not (work and work.answers.given_up):
            _close(*opened)

    def forget(self) -> None:
        """In a forked child: the parent's context is neither used nor closed, its lock may be held by no one here."""
        self._lock = threading.RLock()
        self._busy = False
        self._open = None


def _connected(address: str) -> TCTILdr:
    try:
        return TCTILdr.parse(address)
    except TSS2_Exception as error:
        raise failures.connect_error(error, address) from error


def _telling(run: Callable[[], Any], told: Callable[[Any], None]) -> Any:  # noqa: ANN401 - as many types as commands
    """With the command: a signal may come right after it, and what the TPM has done is to be known all the same."""
    answer = run()
    told(answer)
    return answer


def _close(tcti: TCTILdr, esapi: ESAPI) -> None:
    esapi.close()
    tcti.close()


def _forget_all() -> None:
    turns.forget()
    answering.forget()
    for connection in tuple(_connections):
        connection.forget()


os.register_at_fork(after_in_child=_forget_all)


class Work:
    """Sends commands, and knows what they have left in the TPM."""

    def __init__(self, tcti: TCTILdr, esapi: ESAPI, address: str) -> None:
        self._tcti, self._esapi, self._address = tcti, esapi, address
        self.answers = answering.Answers(address, lambda _outcome: _close(tcti, esapi))
        self._live: dict[ESYS_TR, int | None] = {}  # with the TPM's handle, None where nothing is to be flushed
        self._made_again: dict[ESYS_TR, Callable[[], ESYS_TR]] = {}
        self.command = ""

    def call(self, command: str, *arguments: Any, told: Callable[[Any], None] | None = None, **keywords: Any) -> Any:  # noqa: ANN401 - as many types
        """One command by its name in `ESAPI`. Raises TSS2_Exception with the TPM's response code; TPM_HUNG.

        `told` is called with the answer, also with one that comes when the wait for it was given up or interrupted.
        """
        self.command, run = command, partial(getattr(self._esapi, command), *arguments, **keywords)
        if command in _LOCAL:
            return run()
        if command in _LOADS:
            told = self._flush_later
        if told:
            run = partial(_telling, run, told)
        give_up, pause, full = time.monotonic() + PATIENCE, 0.01, False
        while True:
            try:
                return self.answers.wait(run, command)
            except TSS2_Exception as error:
                if failures.code(error) in failures.FULL and not full:
                    full = True
                    self._make_room()
                elif failures.code(error) in failures.BUSY and time.monotonic() < give_up:
                    time.sleep(pause)
                    pause = min(2 * pause, 1.0)
                else:
                    raise

    def exclusive(self) -> AbstractContextManager[None]:
        """For what is done once and by one program alone. Raises HardwareError and AbsentError, as `turns.alone`."""
        return turns.alone(self._address)

    # ---- what is loaded ----

    def _flush_later(self, loaded: Any) -> None:  # noqa: ANN401 - as many types as commands
        """At the end of the work."""
        handle = loaded[0] if isinstance(loaded, tuple) else loaded
        self._live[handle] = int(self._esapi.tr_get_tpm_handle(handle))

    def borrow(self, handle: ESYS_TR) -> ESYS_TR:
        """Forget the library's record of something persistent at the end of the work; the TPM keeps it."""
        self._live[handle] = None
        return handle

    def primary(self, hierarchy: ESYS_TR, template: TPM2B_PUBLIC) -> tuple[ESYS_TR, Public]:
        """A primary key, until the end of the work. Raises DamagedError for one of a kind that `Public` lacks."""
        handle, public, *_ = self.call("create_primary", TPM2B_SENSITIVE_CREATE(), template, hierarchy)
        return handle, Public.parse(public.marshal()[2:])

    def known(self, handle: int, public: Public, again: Callable[[], ESYS_TR] | None = None) -> ESYS_TR:
        """A persistent key whose public area is known, without asking the TPM or anyone between: no command.

        Sessions salted to it reach this key or fail. Where it was evicted since, they are salted to what `again` makes.
        """
        known = self._known(handle, public.name, _KEY_RESOURCE, public.raw)
        if again:
            self._made_again[known] = again
        return known

    def known_index(self, public: NvPublic) -> ESYS_TR:
        """An NV index whose public area is known, as `known`: authorizations by HMAC reach this index or fail."""
        return self._known(public.handle, public.name, _NV_RESOURCE, public.raw)

    def _known(self, handle: int, name: bytes, kind: int, area: bytes) -> ESYS_TR:
        metadata = number(handle, 4) + sized(name) + number(kind, 4) + sized(area)
        known = self.borrow(self.call("tr_deserialize", metadata))
        if bytes(self.call("tr_get_name", known)) != name:
            raise HardwareError(Reason.TPM_UNSUPPORTED, "This release of tpm2-tss keeps metadata in an unknown form.")
        return known

    def session(
        self,
        salt: ESYS_TR,
        kind: TPM2_SE,
        attributes: TPMA_SESSION,
        auth_hash: int = TPM2_ALG.SHA256,
        *,
        bind: ESYS_TR = ESYS_TR.NONE,
    ) -> ESYS_TR:
        """A session salted to a key, with parameter encryption where `attributes` ask for it.

        Bound to an object it also proves that object's authValue, with whatever it authorizes.
        """
        aes = TPMT_SYM_DEF.parse("aes128cfb")
        try:
            handle = self.call("start_auth_session", salt, bind, kind, aes, TPM2_ALG(auth_hash))
        except TSS2_Exception as error:
            if failures.code(error) != TPM2_RC.HANDLE or salt not in self._made_again:
                raise
            made = self._made_again[salt]()
            self._made_again[salt] = lambda: made
            handle = self.call("start_auth_session", made, bind, kind, aes, TPM2_ALG(auth_hash))
        self.call("trsess_set_attributes", handle, attributes)
        return handle

    def ended(self, *handles: ESYS_TR) -> None:
        """The TPM has ended these sessions, or taken away these indexes, with the command that named them."""
        for handle in handles:
            self._live.pop(handle, None)

    def flush(self, *handles: ESYS_TR) -> None:
        """Flush before the end of the work what is not needed any more."""
        for handle in handles:
            self.call("flush_context", handle)
            self._live.pop(handle, None)

    def flush_all(self) -> bool:
        """Flush what is left, on every path. False where the connection must not be used any more."""
        usable = not self.answers.given_up
        while self._live and not self.answers.given_up:
            handle, raw = self._live.popitem()
            try:
                if raw is not None:
                    self._flush_raw(raw)
                self._esapi.tr_close(handle)
            except TSS2_Exception as error:  # of no other consequence: the connection is dropped
                usable = usable and not failures.from_transport(error)
            except HardwareError:  # no answer: the next work says so
                usable = False
        return usable

    def _make_room(self) -> None:
        """Flush what killed processes have left in a TPM without a resource manager.

        Safe, because such a connection has one user: raw devices and simulators are exclusive. Behind a resource
        manager the lists show our own handles alone, so there is nothing to flush here.
        """
        ours = set(self._live.values())
        for first in (_TRANSIENT, _LOADED_SESSIONS):
            get = partial(self._esapi.get_capability, TPM2_CAP.HANDLES, first, 64)
            _, capability = self.answers.wait(get, "get_capability")
            for raw in map(int, capability.data.handles):
                if raw not in ours:
                    self._flush_raw(raw)

    def _flush_raw(self, handle: int) -> None:
        """TPM2_FlushContext, past the library: it refuses to after an answer that it rejected, or for others' handles.

        The answer is not looked at. It says done, or that there is no such handle, which is as good.
        """

        def flush() -> None:
            self._tcti.transmit(number(0x8001, 2) + number(14, 4) + number(_FLUSH_CONTEXT, 4) + number(handle, 4))
            self._tcti.receive()

        self.answers.wait(flush, "flush_context")
