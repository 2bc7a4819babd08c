"""USB dongles as `Hardware`: enrolling, installing and opening licenses, and proving that the dongle is here."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, Self, TypeVar

from hwlicense.binders.usb.dongle import PATIENCE
from hwlicense.binders.usb.finding import ANY, Selector, find, find_one
from hwlicense.core import dongle as challenges
from hwlicense.core.documents import UsbEvidence
from hwlicense.core.errors import AbsentError, HardwareError, Reason
from hwlicense.core.hardware import Unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from hwlicense.binders.usb.dongle import Dongle
    from hwlicense.core.documents import Approval, UsbBinding
    from hwlicense.core.hardware import PinSource, TouchRequest
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.pcrs import Selection

T = TypeVar("T")


class UsbHardware:
    """The dongles of this machine; `selector` says which one `describe` is about. Safe for use by several threads.

    Nothing is held between calls, so threads and processes share a dongle: the kernel lets one claim it, and the others
    wait a little. Forked children need nothing special. `touch` is
    called when a dongle waits for a finger, `backend` is pyusb's. Raises UsageError for a selector that is none.
    """

    def __init__(
        self, selector: str | None = None, *, touch: TouchRequest | None = None, backend: object | None = None
    ) -> None:
        self._selector = Selector.parse(selector) if selector is not None else ANY
        self._touch, self._backend = touch, backend
        self._last: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """There is nothing to release."""

    def describe(self, selection: Selection) -> UsbEvidence:  # noqa: ARG002  a dongle has no PCRs
        """What names the one dongle that is selected, by its answer to the identity challenge.

        Raises AbsentError where there is none, UsageError where there are several, and HardwareError.
        """
        chosen = find_one(self._selector, self._backend)
        slot = self._selector.slot
        with chosen:
            serial = chosen.serial()
            with chosen.ask(slot, challenges.identity_challenge(), self._touch) as answer:
                name = challenges.identifier(answer)
            return UsbEvidence(name, chosen.product, serial, chosen.firmware, slot, chosen.touch_wanted(slot))

    def prove(self, evidence: UsbEvidence, statement: bytes) -> bytes:  # noqa: ARG002  dongles do not sign
        """Nothing: what the vendor wraps for a dongle is opened by no other, whoever wrote the request."""
        return b""

    def install(self, binding: UsbBinding, approvals: Sequence[Approval]) -> bytes:
        """Nothing to keep, once the dongle has given the answer that opens. Raises AbsentError, and HardwareError."""
        self.unwrap(binding, b"", approvals, None).secret.wipe()
        return b""

    def admit(self, binding: UsbBinding, held: bytes, approval: Approval) -> bytes:  # noqa: ARG002  no platform state
        """`held` as it is."""
        return held

    def unwrap(
        self,
        binding: UsbBinding,
        held: bytes,  # noqa: ARG002  nothing is held for a dongle
        approvals: Sequence[Approval],  # noqa: ARG002  of platform states, which it does not see
        pin: PinSource | None,  # noqa: ARG002  it has none
    ) -> Unwrapped:
        """The member secret, from the answer to the challenge that opens. Raises AbsentError, and HardwareError."""
        asked = challenges.challenge(binding.seed, binding.first)
        return Unwrapped(self._judged(binding, asked, lambda given: challenges.unwrap(given, binding)))

    def present(self, binding: UsbBinding, held: bytes, number: int = 0) -> None:  # noqa: ARG002  nothing is held
        """Have the dongle answer one of the challenges whose answers are recorded, a different one each time.

        When all have served, any may serve again: whoever listened in knows some by then. Where none are recorded it is
        the challenge that opens. Raises AbsentError, HardwareError, and DamagedError.
        """
        count = challenges.answer_count(binding)
        if count == 0:
            self.install(binding, ())
            return
        place = number if number < count else secrets.randbelow(count)
        asked = challenges.presence_challenge(binding, place)
        self._judged(binding, asked, lambda given: challenges.check_presence(given, binding, place))

    def _judged(self, binding: UsbBinding, asked: bytes, judge: Callable[[Secret], T]) -> T:
        """What `judge` makes of the right dongle's answer; it raises AbsentError for another's.

        Every dongle is tried: a serial number is a hint, and can be hidden, and products change with their settings.
        Why one could not be asked is raised only if no other is right, so that what is forbidden does not read as
        absent, nor an unrelated dongle keep the right one from being used.
        """
        failure: HardwareError | None = None
        others: list[str] = []
        for dongle in self._candidates(binding):
            own = False
            try:
                with dongle:
                    own = _is_named(dongle, binding)
                    given = self._asked(dongle, binding, asked)
            except AbsentError:
                continue  # pulled out meanwhile
            except HardwareError as error:
                if error.reason in _ANOTHERS and not own:
                    others.append(str(dongle))
                elif failure is None or own:
                    failure = error
                continue
            try:
                with given:
                    found = judge(given)
            except AbsentError:
                others.append(str(dongle))
            else:
                self._last = dongle.place
                return found
        raise failure or _absent(binding, others)

    def _candidates(self, binding: UsbBinding) -> list[Dongle]:
        """All dongles, those first that the license names, unless it is known where the right one was last."""
        found = sorted(find(ANY, self._backend), key=lambda d: (d.place != self._last, d.product != binding.product))
        if len(found) < _SEVERAL or found[0].place == self._last:
            return found
        return sorted(found, key=lambda dongle: not _glanced(dongle, binding))

    def _asked(self, dongle: Dongle, binding: UsbBinding, asked: bytes) -> Secret:
        """A dongle's answer. Nobody is asked to touch one that is known to be another, nor one that is not to wait."""
        foreign = None not in (binding.serial, dongle.serial()) or dongle.product != binding.product
        wait = _is_named(dongle, binding) or not foreign
        if not wait and dongle.touch_wanted(binding.slot):
            raise HardwareError(Reason.DONGLE_UNTOUCHED, f"The dongle {dongle} is another one, and not to be touched.")
        try:
            return dongle.ask(binding.slot, asked, self._touch, wait=wait)
        except HardwareError as error:
            if error.reason != Reason.DONGLE_UNPROGRAMMED or not (binding.touch and dongle.configured(binding.slot)):
                raise
            # Some give up without ever saying that they wait; the license says that this one does
            what = f"Nobody touched the dongle {dongle} in time."
            raise HardwareError(Reason.DONGLE_UNTOUCHED, what, "Try again, and touch it when it blinks.") from error


_SEVERAL: Final = 2
_GLANCE: Final = 0.2
"""Seconds to wait for a dongle that others are at, where it may be any."""

_ANOTHERS: Final = (Reason.DONGLE_UNPROGRAMMED, Reason.DONGLE_UNTOUCHED)


def _is_named(dongle: Dongle, binding: UsbBinding) -> bool:
    """Whether the license names this dongle, as far as it can: one without a serial number it names by its product."""
    serial = dongle.serial()
    return serial == binding.serial and (serial is not None or dongle.product == binding.product)


def _glanced(dongle: Dongle, binding: UsbBinding) -> bool:
    dongle.patience = _GLANCE
    try:
        with dongle:
            return _is_named(dongle, binding)
    except HardwareError:  # it is asked later, if none of the others is right
        return False
    finally:
        dongle.patience = PATIENCE


def _absent(binding: UsbBinding, others: list[str]) -> AbsentError:
    name = f"{binding.product}, serial number {binding.serial}" if binding.serial else binding.product
    if binding.serial and any(other.split(",")[0].endswith(f":{binding.serial}") for other in others):
        what = f"A dongle with the serial number of the license's ({name}) is here, but it answers by another secret."
        hint = "If it was programmed again since, ask the vendor for a new license."
        return AbsentError(Reason.DONGLE_ABSENT, what, hint)
    if others:
        what = f"Another dongle is plugged in, not the license's ({name}): {', '.join(others)}."
        return AbsentError(Reason.DONGLE_ABSENT, what, "Plug in the license's own dongle.")
    what = f"The license's dongle is not plugged in ({name})."
    return AbsentError(Reason.DONGLE_ABSENT, what, "Plug it in.")
