"""What a machine in the middle can try between the processor and the TPM."""

import msgspec
import pytest
from tpm2_pytss import TPM2_CC

from hwlicense.binders.tpm.held import Held
from hwlicense.core.errors import HardwareError, HwlicenseError, Reason, RefusedError
from tests.machines import PRODUCT, Machine
from tests.order_desk import secret

ENCRYPT = 0x40


@pytest.fixture
def machine():
    with Machine(storage_key="ecc") as own:
        yield own
        own.heal()
        assert own.loaded() == []


@pytest.fixture
def other():
    with Machine() as another:
        yield another


def installed(machine, **terms):
    approval = machine.desk.approve(machine.evidence.pcrs)
    binding, member = machine.desk.bind(machine.evidence, PRODUCT, **terms)
    return binding, machine.hardware.install(binding, [approval]), [approval], member


def code(command):
    return int.from_bytes(command[6:10], "big")


def attributes_at(command, handles):
    """Where the attributes of the first session stand (Part 1, 18.4)."""
    at = 10 + 4 * handles + 4 + 4
    return at + 2 + int.from_bytes(command[at : at + 2], "big")


def test_dropping_parameter_encryption_is_noticed_by_the_tpm(machine):
    """Holds: the session's attributes are authenticated with a salt that only the TPM's key opens."""
    binding, held, approvals, _ = installed(machine)
    dropped = []

    def drop(command):
        if code(command) not in (TPM2_CC.Unseal, TPM2_CC.GetRandom):
            return command
        at = attributes_at(command, 1 if code(command) == TPM2_CC.Unseal else 0)
        assert command[at] & ENCRYPT
        dropped.append(at)
        return command[:at] + bytes([command[at] & ~ENCRYPT]) + command[at + 1 :]

    machine.wire.on_command = drop
    with pytest.raises(HardwareError) as caught:
        machine.hardware.unwrap(binding, held, approvals, None)
    assert caught.value.reason == Reason.TPM_ANSWER_FORGED
    with pytest.raises(HardwareError):
        machine.hardware.present(binding, held)
    assert len(dropped) == 2
    machine.heal()


def test_shares_are_not_given_out_in_the_clear(machine):
    """Holds: ActivateCredential answers in a session salted to the key that the license pins."""
    binding, _ = machine.desk.bind(machine.evidence)

    def drop(command):
        if code(command) != TPM2_CC.ActivateCredential:
            return command
        changed = bytearray(command)
        end = 22 + int.from_bytes(command[18:22], "big")
        at = 22  # three authorisations: handle, nonce, attributes, HMAC
        while at < end:
            at += 6 + int.from_bytes(command[at + 4 : at + 6], "big")
            changed[at] &= ~ENCRYPT
            at += 3 + int.from_bytes(command[at + 1 : at + 3], "big")
        assert changed != command
        return bytes(changed)

    machine.wire.on_command = drop
    with pytest.raises(HwlicenseError):
        machine.hardware.install(binding, [])
    machine.heal()


def test_no_changed_answer_gives_a_wrong_secret(machine):
    """Holds: answers that matter are authenticated; others lead to an error or to no difference.

    A changed size is left out: whoever waits for bytes that do not come waits for a TPM that is silent.
    """
    binding, held, approvals, member = installed(machine, pin=b"2468")
    for _ in range(2):  # the first use of a PIN makes the TPM ask for a second try of the command
        machine.wire.forget()
        opened = machine.hardware.unwrap(binding, held, approvals, lambda _: secret(b"2468"))
        assert opened.secret == member
    unseal = machine.wire.commands.index(TPM2_CC.Unseal)
    count, unnoticed = len(machine.wire.exchanges), []
    for number in range(count):
        size = len(machine.wire.exchanges[number].answer)
        for at in sorted({0, 6, 9, 10, 12, size // 2, size - 1} & {0, 1, *range(6, size)}):
            seen = iter(range(1000))

            def alter(answer, number=number, at=at, seen=seen):
                if next(seen) != number or at >= len(answer):
                    return answer
                return answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :]

            machine.wire.on_answer = alter
            try:
                again = machine.hardware.unwrap(binding, held, approvals, lambda _: secret(b"2468")).secret
            except HwlicenseError:
                continue
            finally:
                machine.wire.on_answer = None
            assert again == member, (number, at)
            unnoticed.append(number)
    # What is not authenticated is of no consequence: policy commands (without sessions) and the last flush.
    assert unseal not in unnoticed
    assert machine.hardware.unwrap(binding, held, approvals, lambda _: secret(b"2468")).secret == member
    with machine.esapi() as esapi:  # a changed handle is one that the binder cannot know
        for handle in machine.loaded():
            esapi.flush_context(esapi.tr_from_tpmpublic(handle))


def test_a_forged_answer_is_said_and_the_context_is_made_anew(machine):
    """Holds: after a response that fails its HMAC the library's context is useless."""
    binding, held, approvals, member = installed(machine)
    machine.wire.on_answer = lambda answer: (
        answer[:-1] + bytes([answer[-1] ^ 1]) if machine.wire.commands[-1] == TPM2_CC.Unseal else answer
    )
    with pytest.raises(HardwareError) as caught:
        machine.hardware.unwrap(binding, held, approvals, None)
    assert caught.value.reason == Reason.TPM_ANSWER_FORGED
    assert "unseal" in str(caught.value)
    machine.heal()
    assert machine.loaded() == []
    assert machine.hardware.unwrap(binding, held, approvals, None).secret == member


def test_another_storage_root_key_on_the_bus_is_not_trusted(machine, other):
    """Holds: sessions are salted to the key that the license pins; no answer on the bus replaces it."""
    binding, held, approvals, member = installed(other)
    substitute = machine.evidence.storage_root_key

    def swap(answer):
        if other.wire.commands[-1] not in (TPM2_CC.CreatePrimary, TPM2_CC.ReadPublic) or answer[6:10] != bytes(4):
            return answer
        return answer.replace(other.evidence.storage_root_key, substitute)

    other.wire.on_answer = swap
    with pytest.raises(HwlicenseError):
        other.hardware.unwrap(binding, held, approvals, None)
    with pytest.raises(HwlicenseError):
        other.hardware.install(binding, approvals)
    other.heal()
    assert other.hardware.unwrap(binding, held, approvals, None).secret == member


def test_a_storage_root_key_swapped_at_enrolment_gives_a_license_that_never_opens(machine, other):
    """Holds: the share for that name is activated beside the true key, or not at all."""
    swapped = msgspec.structs.replace(machine.evidence, storage_root_key=other.evidence.storage_root_key)
    binding, _ = machine.desk.bind(swapped)
    with pytest.raises(RefusedError) as caught:
        machine.hardware.install(binding, [])
    assert caught.value.reason == Reason.WRONG_DEVICE


def test_a_measurement_between_policy_and_unseal_is_tried_again_and_a_storm_of_them_is_said(machine):
    """Holds: PCR_CHANGED costs nothing and ends in a new session, within bounds."""
    binding, held, approvals, member = installed(machine)
    storms = iter([True])

    def measure(command):
        if code(command) == TPM2_CC.Unseal and next(storms, False):
            machine.tpm.extend(10, b"a file, measured by IMA")
        return command

    machine.wire.on_command = measure
    machine.wire.forget()
    assert machine.hardware.unwrap(binding, held, approvals, None).secret == member
    assert machine.wire.commands.count(TPM2_CC.Unseal) == 2
    storms = iter([True] * 100)
    with pytest.raises(HardwareError, match="keep changing") as caught:
        machine.hardware.unwrap(binding, held, approvals, None)
    assert caught.value.reason == Reason.TPM_BUSY
    machine.heal()


def test_a_change_of_an_approved_pcr_between_policy_and_unseal_is_refused(machine):
    """Holds: the TPM compares the update counter at use; the next session finds the difference."""
    binding, held, approvals, _ = installed(machine)

    def measure(command):
        if code(command) == TPM2_CC.Unseal:
            machine.tpm.extend(7, b"another secure boot policy")
        return command

    machine.wire.on_command = measure
    with pytest.raises(RefusedError, match=r"^PCR 7 \(sha256\) is not") as caught:
        machine.hardware.unwrap(binding, held, approvals, None)
    assert caught.value.reason == Reason.PCR_MISMATCH
    machine.heal()


def test_a_recording_played_back_proves_no_presence(machine):
    """Holds: every proof has fresh nonces on both sides."""
    binding, held, _, _ = installed(machine)
    machine.wire.forget()
    machine.hardware.present(binding, held)
    recorded = [exchange.answer for exchange in machine.wire.exchanges]
    answers = iter(recorded)
    machine.wire.on_answer = lambda answer: next(answers, answer)
    with pytest.raises(HardwareError):
        machine.hardware.present(binding, held)
    machine.heal()
    assert Held.read(held, binding).handle == 0x81000001
    with machine.esapi() as esapi:
        for handle in machine.loaded():
            esapi.flush_context(esapi.tr_from_tpmpublic(handle))
