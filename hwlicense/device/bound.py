"""The hardware that one license is bound to: as many pieces of it as the license takes, wherever they are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Self

from hwlicense.core.documents import TpmBinding, UsbBinding
from hwlicense.core.errors import AbsentError, HardwareError, HwlicenseError, Reason, RefusedError, UsageError
from hwlicense.core.hardware import Certifying, Counting, PinPrompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwlicense.core.chain import Certificate
    from hwlicense.core.documents import Approval, Binding, License
    from hwlicense.core.hardware import Anchor, AnyHardware, PinSource
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.pcrs import Selection
    from hwlicense.device.home import Home

    Connect = Callable[[str], AnyHardware]
    """Gives the hardware for a kind of binding: tpm, pkcs11, usb."""

_KEPT: Final = {"pkcs11", "usb"}
"""Kinds whose objects are kept between proofs: for a token's login, and for where a dongle was last."""

FINAL: Final = {Reason.PIN_WRONG, Reason.PIN_LAST_TRY}
"""Where no other hardware, and no other license, is tried: a PIN offered to a second one would be a wrong try there."""

_UNUSABLE: Final = {Reason.TOKEN_UNCONFIGURED, Reason.EXTRA_MISSING}
"""Wrong usage where all hardware is needed; where the rest suffices, hardware that is not for this device."""


def kind_of(binding: Binding) -> str:
    """tpm, pkcs11 or usb."""
    return str(binding.__struct_config__.tag)


class Bound:
    """The bindings of one license with the hardware behind them. A context manager that releases what it kept open.

    `anchor` is the ledger's, once `members` has met hardware that has one.
    """

    def __init__(self, connect: Connect, licensed: License, home: Home, approvals: Sequence[Approval]) -> None:
        self._connect, self._licensed, self._home, self._approvals = connect, licensed, home, approvals
        self._kept: dict[str, AnyHardware] = {}
        self._answered: set[int] = set()
        self.anchor: Anchor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Log out of tokens and let go of everything."""
        while self._kept:
            self._kept.popitem()[1].__exit__(None, None, None)

    def members(self, pin: PinSource | None) -> dict[int, Secret]:
        """Member secrets of as many bindings as the license takes, by their places; for whoever asked to wipe.

        Those without a PIN are tried first, and one that counts opens last. Raises what the most telling of the others
        said.
        """
        found: dict[int, Secret] = {}

        def unwrap(place: int, hardware: AnyHardware) -> None:
            binding = self._licensed.bindings[place]
            held = self._home.held(self._licensed, binding)
            asked = self._asking(pin, binding) if pin else None
            unwrapped = hardware.unwrap(binding, held, self._approvals, asked)
            found[place], self.anchor = unwrapped.secret, unwrapped.anchor or self.anchor

        try:
            self._enough(unwrap)
        except BaseException:
            for secret in found.values():
                secret.wipe()
            raise
        return found

    def _asking(self, pin: PinSource, binding: Binding) -> PinSource:
        """`pin`, told what it is for."""
        grant, kind = self._licensed.grant, kind_of(binding)
        kinds = [kind_of(other) for other in self._licensed.bindings if other.pin]

        def ask(prompt: str, /, *, last_try: bool = False) -> Secret:
            text = f"License {grant.license[:8]} ({grant.product}, {grant.licensee}): {prompt}"
            return pin(PinPrompt(text, kind, len(kinds), kinds.count(kind)), last_try=last_try)

        return ask

    def present(self, number: int | None) -> None:
        """That as much hardware as the license takes is here, by proofs of this number; None: no dongle has any left.

        Raises AbsentError and HardwareError; RefusedError PIN_NEEDED where a token was logged out, ANSWERS_EXHAUSTED.
        """

        def present(place: int, hardware: AnyHardware) -> None:
            binding = self._licensed.bindings[place]
            if isinstance(binding, UsbBinding) and number is None:
                raise exhausted()
            hardware.present(binding, self._home.held(self._licensed, binding), number or 0)

        self._enough(present)

    def certify(self, selection: Selection, statement: bytes, pin: PinSource | None) -> Certificate:
        """The word of the license's TPM for `statement`; where there is none, of a token. Raises as `Certifying` does.

        A PIN is asked for where a token is not logged in to. HardwareError CERTIFYING_UNSUPPORTED for dongles alone.
        """
        made: list[Certificate] = []

        def certify(binding: Binding, hardware: AnyHardware) -> None:
            if isinstance(hardware, Certifying):
                asked = self._asking(pin, binding) if pin else None
                made.append(hardware.certify(binding, selection, statement, asked))

        problems = list[HwlicenseError]()
        for binding in sorted(self._licensed.bindings, key=lambda binding: not isinstance(binding, TpmBinding)):
            try:
                self._with(kind_of(binding), partial(certify, binding))
            except HwlicenseError as error:
                problems.append(error)
                if error.reason in FINAL:
                    break
            if made:
                return made[0]
        if problems:
            raise problems[0]
        what = "The license is bound to USB dongles, which cannot sign: their answers prove nothing to others."
        hint = "Bind the license to a TPM, or to a token with a P-256 key, besides."
        raise HardwareError(Reason.CERTIFYING_UNSUPPORTED, what, hint)

    @property
    def spends_proofs(self) -> bool:
        """Whether proofs of presence come from a store."""
        return any(isinstance(binding, UsbBinding) for binding in self._licensed.bindings)

    def _enough(self, act: Callable[[int, AnyHardware], None]) -> None:
        bindings, need = self._licensed.bindings, self._licensed.need

        def order(place: int) -> tuple[bool, bool, bool]:
            """What counts goes last: an open is not given back where another piece is missing. Then those that answered
            last go first: none that is away or busy is waited for while they suffice.
            """
            return _counts_opens(bindings[place]), place not in self._answered, bindings[place].pin

        places = sorted(range(len(bindings)), key=order)
        done, problems = list[int](), list[HwlicenseError]()
        for place in places:
            try:
                self._with(kind_of(bindings[place]), partial(act, place))
            except HwlicenseError as error:
                problems.append(error)
                if error.reason in FINAL or len(bindings) - len(problems) < need:
                    break
            else:
                done.append(place)
                if len(done) == need:
                    self._answered = set(done)
                    return
        raise _lacking(problems, len(done), need, len(bindings))

    def _with(self, kind: str, act: Callable[[AnyHardware], None]) -> None:
        if kind in self._kept:
            act(self._kept[kind])
        elif kind in _KEPT:
            self._kept[kind] = self._connect(kind).__enter__()
            act(self._kept[kind])
        else:
            with self._connect(kind) as hardware:
                act(hardware)


def _counts_opens(binding: Binding) -> bool:
    return isinstance(binding, TpmBinding) and any(index.purpose == "opens" for index in binding.indexes)


def exhausted() -> RefusedError:
    """What is said where no recorded answer of a dongle is left and none may serve twice."""
    what = "The recorded answers of the license's dongle are used up, and none may serve twice."
    return RefusedError(Reason.ANSWERS_EXHAUSTED, what, "Ask the vendor for a new license.")


def install(
    connect: Connect, licensed: License, approvals: Sequence[Approval]
) -> tuple[list[bytes | None], list[HwlicenseError]]:
    """What hardware gives for each binding, None for what is not here or cannot be used; and what was said of that.

    Raises an error unless as much as the license takes is here and right.
    """
    held: list[bytes | None] = []
    problems: list[HwlicenseError] = []
    for binding in licensed.bindings:
        try:
            with connect(kind_of(binding)) as hardware:
                held.append(hardware.install(binding, approvals))
        except (HardwareError, UsageError) as error:
            if isinstance(error, UsageError) and error.reason not in _UNUSABLE:
                raise
            held.append(None)
            problems.append(error)
            if len(licensed.bindings) - len(problems) < licensed.need:
                done = len(held) - len(problems)
                raise _lacking(problems, done, licensed.need, len(licensed.bindings)) from error
    return held, problems


def commit(connect: Connect, licensed: License, held: Sequence[bytes | None], approvals: Sequence[Approval]) -> None:
    """Put a revision in force that its hardware counts: older ones end here. Raises as `Counting.commit`."""
    for binding, kept in zip(licensed.bindings, held, strict=True):
        if kept is not None and isinstance(binding, TpmBinding) and binding.counter:
            with connect("tpm") as hardware:
                if isinstance(hardware, Counting):
                    hardware.commit(binding, kept, approvals)


def retire(connect: Connect, binding: TpmBinding) -> None:
    """Take away the counter of a binding that nothing uses any more."""
    with connect("tpm") as hardware:
        if isinstance(hardware, Counting):
            hardware.retire(binding)


def _lacking(problems: list[HwlicenseError], done: int, need: int, count: int) -> HwlicenseError:
    """The most telling problem: what ends the search, then a refusal, then failing hardware, then absent hardware."""

    def rank(error: HwlicenseError) -> int:
        if error.reason in FINAL:
            return 0
        return 1 if isinstance(error, RefusedError) else 3 if isinstance(error, AbsentError) else 2

    chosen = min(problems, key=rank)
    if need == count or chosen.reason in FINAL:
        return chosen
    said = " ".join(dict.fromkeys(error.what for error in problems))
    what = f"This license takes {need} of {count} pieces of hardware; {done} answered. {said}"
    return type(chosen)(chosen.reason, what, chosen.hint)
