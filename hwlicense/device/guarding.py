"""Holding the process to what the terms say of it: refused at opening, and looked at while the model is open.

Without such terms nothing here runs, and nothing is refused: `Model.findings` says what there is.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Final, Protocol

from hwlicense import loaded
from hwlicense.core.errors import Reason, RefusedError, StorageError
from hwlicense.device.checks import findings
from hwlicense.device.memory import sealed_inodes
from hwlicense.threads import begin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.core.documents import Grant
    from hwlicense.core.errors import HwlicenseError
    from hwlicense.core.process import Application, Guard

_SHOWN: Final = 3
"""Differences and findings that a refusal names; it counts the rest."""


class Guarded(Protocol):
    """What a guard stands before: an open model."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""

    def end(self, refusal: HwlicenseError) -> None:
        """Wipe the keys at once, for good."""


def admit(grant: Grant) -> None:
    """Raises RefusedError GUARD or APPLICATION_CHANGED where the terms refuse this process. Asks no hardware."""
    if refusal := _refusal(grant, (), anew=True):
        raise refusal


class Watch:
    """Looks at the process again at each interval of the terms, on a thread of its own, until the model is closed.

    What it finds ends the use of the model for good: only opening it again gives other keys.
    """

    def __init__(self, grant: Grant, guard: Guard) -> None:
        self._grant, self._interval = grant, guard.interval
        self._tracing = "tracing" in guard.refuse
        self._ended = threading.Event()

    def guard(self, guarded: Guarded) -> None:
        """Start. The model is not kept alive by this. Raises StorageError where the system gives no thread."""
        self._guarded = weakref.ref(guarded, lambda _: self._ended.set())
        self._start()
        _watches.add(self)

    def _start(self) -> None:
        begin("guard", self._run)

    def after_fork(self) -> None:
        """In a forked child, whose thread is the parent's."""
        ended, self._ended = self._ended.is_set(), threading.Event()
        guarded = self._guarded()
        if guarded is not None and not ended:
            try:
                self._start()
            except StorageError as error:  # nobody would look any more
                guarded.end(error)

    def look_at_caller(self) -> None:
        """End the use where the thread that asks for plaintext is traced: no other thread can tell for sure."""
        if self._tracing and (sys.gettrace() or sys.getprofile()):
            refusal, guarded = _refusal(self._grant, (), anew=False), self._guarded()
            if refusal and guarded is not None:
                guarded.end(refusal)
                self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            guarded = self._guarded()
            if guarded is None or guarded.closed:
                break
            try:
                refusal = _refusal(self._grant, (guarded,), anew=False)
            except Exception as error:  # noqa: BLE001  # who cannot look must not go on as if all were well
                what = f"The guard could not look at the process ({type(error).__name__})."
                refusal = RefusedError(Reason.GUARD, what, "Open the model again; if it comes back, report it.")
            if refusal:
                guarded.end(refusal)
                break
            del guarded  # it must be free to go while this thread waits
        self._ended.set()


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


def _after_fork() -> None:
    for watch in list(_watches):
        watch.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _refusal(grant: Grant, objects: Sequence[object], *, anew: bool) -> RefusedError | None:
    if grant.guard and (found := findings(grant.guard.refuse, objects)):
        hint = "Start the application without it. docs/guard.md says what each check finds, harmless causes too."
        texts = [f"{one.check}: {one.what}" for one in found]
        return _naming(texts, Reason.GUARD, "The license refuses this process", hint)
    if grant.application and (differing := list(differences(grant.application, anew=anew))):
        hint = "Start the application as it was installed; after an update, ask the vendor for a revision."
        what = "The process has not loaded what the license names"
        return _naming(differing, Reason.APPLICATION_CHANGED, what, hint)
    return None


def differences(application: Application, *, anew: bool = True) -> Iterator[str]:
    """What the terms require and is not loaded, and what is loaded and not among their files; a changed file once."""
    named = {file.digest for file in application.files}
    names = {_last(file.name) for file in application.files}
    try:
        here = list(loaded.everything(sealed_inodes(), anew=anew))
    except OSError as error:
        yield f"what is loaded cannot be looked at ({error.strerror}): is /proc mounted?"
        return
    digests = {one.digest for one in here}
    others = {_last(one.name) for one in here if one.digest not in named}  # and these are told below
    for file in application.files:
        if file.required and file.digest not in digests and _last(file.name) not in others:
            yield f"{file.name} is missing"
    for one in here:
        if one.problem:
            yield f"{one.name} {one.problem}"
        elif one.digest not in named:
            yield f"{one.name} is {'another than measured' if _last(one.name) in names else 'not among the measured'}"


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _naming(texts: list[str], reason: Reason, what: str, hint: str) -> RefusedError:
    rest = len(texts) - _SHOWN
    counted = f"; and {rest} more" if rest > 0 else ""
    error = RefusedError(reason, f"{what}: {'; '.join(texts[:_SHOWN])}{counted}.", hint)
    for each in texts if rest > 0 else ():
        error.add_note(each)
    return error
