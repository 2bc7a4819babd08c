"""Dongles at the order desk: programmed with a secret that the vendor draws, or enrolled by recording their answers.

A programmed dongle answers any number of licenses. An enrolled one, whose secret nobody here knows, answers until what
was recorded is used up: no challenge serves two licenses, so that no answer heard for one opens another.
"""

from __future__ import annotations

import secrets
from itertools import chain
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec
from cryptography.exceptions import InvalidTag

from hwlicense.core import dongle
from hwlicense.core.documents import UsbBinding, UsbEvidence
from hwlicense.core.errors import DamagedError, HardwareError, Reason, RefusedError, UsageError
from hwlicense.core.keys import open_for_vendor, seal_for_vendor
from hwlicense.core.schema import SCHEMA
from hwlicense.core.secret import Secret, joined
from hwlicense.vendor.folder import DongleRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwlicense.binders.usb import Dongle
    from hwlicense.vendor.folder import Folder
    from hwlicense.vendor.signing import Keys

ACCESS_CODE_SIZE: Final = 6
POOL_LIMIT: Final = 35_000
"""Answers that a record can hold."""

_PURPOSE: Final = b"dongle"


class Programmed(NamedTuple):
    """A dongle as it was found or made: what names it, and its record."""

    evidence: UsbEvidence
    record: DongleRecord


def program(
    folder: Folder, keys: Keys, device: Dongle, slot: int, *, touch: bool, mode: dongle.Mode, overwrite: bool
) -> Programmed:
    """Write a fresh secret under a fresh access code into a slot. The record is kept before the dongle is written.

    Raises UsageError SLOT_IN_USE, unless `overwrite`; HardwareError, AbsentError.
    """
    if device.configured(slot) and not overwrite:
        what = f"Slot {slot} of this dongle is in use; licenses for what is in it would end with it."
        hint = "For a further request of a dongle that is ready: `vendor dongle enroll -o`. Else give the other slot "
        raise UsageError(Reason.SLOT_IN_USE, what, hint + "(,slot=1), or --replace-slot.")
    with Secret.random(dongle.SECRET_SIZE) as secret, Secret.random(ACCESS_CODE_SIZE) as access_code:
        with dongle.answer(secret, mode, dongle.identity_challenge()) as answer:
            identifier = dongle.identifier(answer)
        evidence = UsbEvidence(identifier, device.product, device.serial(), device.firmware, _slot(slot), touch)
        with joined(secret, access_code) as both:
            sealed = seal_for_vendor(both, _PURPOSE, identifier, keys.content.public_key())
        record = DongleRecord(
            SCHEMA, identifier, device.product, evidence.serial, _slot(slot), touch, mode, sealed, None, 0, 0
        )
        folder.keep_dongle(record)  # first: a dongle whose access code nobody knows could never be written again
        protected: HardwareError | None = None
        for current in chain([None], _access_codes(folder, keys, evidence)):  # each is wiped as the next one comes
            try:
                device.program(slot, secret, touch=touch, mode=mode, access_code=access_code, current=current)
            except HardwareError as error:
                if error.reason != Reason.DONGLE_PROTECTED:
                    raise
                protected = error
            else:
                return Programmed(evidence, record)
    assert protected is not None  # noqa: S101  # the loop ran
    raise protected


def enroll(
    folder: Folder, keys: Keys, device: Dongle, slot: int, count: int, ask: Callable[[bytes], Secret]
) -> Programmed:
    """Record `count` answers of a dongle that someone else programmed. `ask` puts a challenge to it.

    One that this vendor programmed stays as it is: its record knows all answers. Raises HardwareError, AbsentError.
    """
    with ask(dongle.identity_challenge()) as answer:
        identifier = dongle.identifier(answer)
    if folder.knows_dongle(identifier) and folder.dongle(identifier).mode:  # its record has the only access code
        record = folder.dongle(identifier)
        known = UsbEvidence(identifier, device.product, device.serial(), device.firmware, _slot(slot), record.touch)
        return Programmed(known, record)
    seed = secrets.token_bytes(32)
    pool = Secret(bytearray(dongle.ANSWER_SIZE * count))
    with pool:
        for number in range(count):
            with ask(dongle.challenge(seed, number)) as answer:
                pool.buffer[number * dongle.ANSWER_SIZE : (number + 1) * dongle.ANSWER_SIZE] = answer.buffer
        sealed = seal_for_vendor(pool, _PURPOSE, identifier, keys.content.public_key())
    touch = device.touch_wanted(slot)
    evidence = UsbEvidence(identifier, device.product, device.serial(), device.firmware, _slot(slot), touch)
    record = DongleRecord(
        SCHEMA, identifier, device.product, evidence.serial, _slot(slot), touch, None, sealed, seed, count, 0
    )
    folder.keep_dongle(record)
    return Programmed(evidence, record)


def bind(folder: Folder, keys: Keys, evidence: UsbEvidence, answers: int) -> tuple[UsbBinding, Secret]:
    """A binding to a recorded dongle with so many recorded answers, and its member secret.

    Answers of an enrolled dongle are crossed out before they are used. Raises RefusedError DONGLE_UNKNOWN,
    ANSWERS_EXHAUSTED; UsageError TERM_INVALID for proofs of a dongle that waits for a touch; DamagedError.
    """
    record = folder.dongle(evidence.dongle)
    if answers and record.touch:  # whatever the request says of it
        what = f"The terms ask for proofs of presence, and the dongle {record.dongle} answers only when it is touched."
        raise UsageError(Reason.TERM_INVALID, what, "Program the dongle without touch, or leave [presence] out.")
    with _opened(record, keys) as content:
        if record.seed is None:
            seed, first = secrets.token_bytes(32), 0
        else:
            seed, first = record.seed, record.used
            if first + 1 + answers > record.answers:
                left = record.answers - record.used
                what = f"Of the dongle {record.dongle}, {left:,} recorded answers are left; this license takes "
                hint = "Plug it in and run `hwlicense vendor dongle enroll` again, or ask for fewer (presence.answers)."
                raise RefusedError(Reason.ANSWERS_EXHAUSTED, f"{what}{1 + answers:,}.", hint)
            folder.keep_dongle(msgspec.structs.replace(record, used=first + 1 + answers))

        def given(number: int) -> Secret:
            if record.mode is not None:
                with Secret(content.buffer[: dongle.SECRET_SIZE]) as secret:
                    return dongle.answer(secret, record.mode, dongle.challenge(seed, number))
            return Secret(content.buffer[number * dongle.ANSWER_SIZE : (number + 1) * dongle.ANSWER_SIZE])

        verifiers = bytearray()
        for number in range(first + 1, first + 1 + answers):
            with given(number) as answer:
                verifiers += dongle.verifier(answer, dongle.challenge(seed, number))
        with given(first) as answer:
            asked = dongle.challenge(seed, first)
            check, member = dongle.check_value(answer, asked), dongle.member_secret(answer, asked)
    binding = UsbBinding(
        dongle=record.dongle,
        product=record.product,
        serial=record.serial,
        slot=record.slot,
        touch=record.touch,
        seed=seed,
        first=first,
        check=check,
        answers=bytes(verifiers),
    )
    return binding, member


def _access_codes(folder: Folder, keys: Keys, evidence: UsbEvidence) -> Iterator[Secret]:
    """Access codes that this vendor set for the slot before: any of them may be in force, if a writing was cut off."""
    for record in folder.dongles():
        same = record.serial == evidence.serial and record.slot == evidence.slot
        if evidence.serial is None:  # with one, the product may differ: it changes with the dongle's settings
            same = same and record.product == evidence.product
        if same and record.mode and record.dongle != evidence.dongle:
            with _opened(record, keys) as content, Secret(content.buffer[dongle.SECRET_SIZE :]) as code:
                yield code


def _opened(record: DongleRecord, keys: Keys) -> Secret:
    try:
        content = open_for_vendor(record.sealed, _PURPOSE, record.dongle, keys.content)
    except (InvalidTag, ValueError):
        content = Secret(bytearray())
    size = dongle.SECRET_SIZE + ACCESS_CODE_SIZE if record.mode else dongle.ANSWER_SIZE * record.answers
    if len(content) != size or (record.mode is None) != (record.seed is not None) or not size:
        what = f"The record of the dongle {record.dongle} is damaged, or of another vendor folder."
        raise DamagedError(Reason.DOCUMENT_MALFORMED, what, "Restore the folder from its backup, or enroll it again.")
    return content


def _slot(slot: int) -> Literal[1, 2]:
    return 1 if slot == 1 else 2
