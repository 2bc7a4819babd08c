"""Root in an approved state keeps sessions that have passed their policy: what that gives, and what ends it.

The TPM checks a policy when its commands run, not when the session is used. The threat model says so; here it is
counted.
"""

from contextlib import contextmanager, suppress

import pytest
from tpm2_pytss import TPM2_CC, TSS2_Exception

from hwlicense.core.errors import HardwareError
from tests.counted import Customer, limited
from tests.forging import refused

LIMIT = 2


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as wire:
        yield Customer(own_vendor, tmp_path, tpm, wire)


def restarted(customer):
    """TPM Restart: its state was saved, and it started anew all the same."""
    customer.tpm.suspend()
    customer.tpm.start()


def suspended(customer):
    customer.tpm.suspend()
    customer.tpm.resume()


def extended(customer):
    customer.tpm.extend(10, b"a PCR that no license asks for")


ENDS = {
    "a PCR extended": extended,
    "suspend": suspended,
    "restart": restarted,
    "reset": lambda customer: customer.tpm.reboot(),
    "power cut": lambda customer: customer.tpm.power_cut(),
}


@contextmanager
def kept_writers(customer, terms):
    """Write sessions that root made in the window of a revision, one of which is used as it should be."""
    raw = customer.revise(terms)
    customer.wire.cut(TPM2_CC.NV_Write)
    with pytest.raises(HardwareError):
        customer.install(raw)
    with customer.root(raw) as root:
        kept = root.kept(root.writer)
        assert len(kept) > 50
        root.write(root.e.context_load(kept.pop()))
        root.increment()
    customer.install(raw)
    assert customer.drain() == LIMIT
    yield kept


def replay(customer, kept):
    """Opens beyond the limit."""
    extra = 0
    for context in kept:
        with customer.root() as root:
            root.redefine(root.asked.public(root.opens))
            try:
                root.write(root.e.context_load(context))
            except TSS2_Exception:
                continue
        extra += customer.drain()
    return extra


def test_write_sessions_kept_in_one_boot_give_more_opens(customer):
    """Disclosed: some 60 sessions of a window, each of which gives the limit once more."""
    customer.sell(limited(LIMIT))
    with kept_writers(customer, limited(LIMIT)) as kept:
        assert replay(customer, kept) == len(kept) * LIMIT


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_ends_kept_write_sessions(customer, end):
    """Holds: PolicyPCR is their first step, so that they end with the boot, and when a PCR is extended."""
    customer.sell(limited(LIMIT))
    with kept_writers(customer, limited(LIMIT)) as kept:
        end(customer)
        assert customer.drain() == 0
        assert replay(customer, kept) == 0


def test_without_pcrs_a_restart_ends_them_too(customer):
    """Holds: PolicyPCR of no PCR at all is the first step where no platform is asked for."""
    terms = 'licensee = "a"\nproduct = "b"\n[limits]\nopens = 2\n'
    customer.sell(terms)
    with kept_writers(customer, terms) as kept:
        restarted(customer)
        assert replay(customer, kept) == 0


CAP = limited(LIMIT, require="cap_pcr = 15\n")


def test_with_a_cap_kept_write_sessions_give_nothing(customer):
    """Holds: the window is open before PCR 15 is extended, and the license opens only after that."""
    customer.sell(CAP)
    assert customer.drain() == LIMIT
    customer.tpm.reboot()
    with kept_writers(customer, CAP) as kept:
        assert replay(customer, kept) == 0


def test_with_a_cap_the_window_is_shut_for_root_too_once_something_was_opened(customer):
    """Holds: the write's policy asks for PCR 15 as it is after the boot."""
    customer.sell(CAP)
    customer.open()
    with customer.root(customer.revise(CAP)) as root:
        root.increment()
        root.redefine(root.asked.public(root.opens))
        with pytest.raises(TSS2_Exception):
            root.writer()
        customer.tpm.reboot()
        root.write(root.writer())  # and that was what was missing


def test_two_programs_that_open_at_once_extend_the_cap_once(customer):
    customer.sell(CAP)

    def meanwhile(command):
        if int.from_bytes(command[6:10], "big") == TPM2_CC.PCR_Read:
            customer.wire.on_command = None
            customer.tpm.extend(15, b"hwlicense cap")
        return command

    customer.wire.on_command = meanwhile
    assert customer.drain() == LIMIT


def test_the_cap_is_extended_once_in_a_boot_and_asks_for_a_reboot_before_a_revision(customer):
    customer.sell(limited(5, require="cap_pcr = 15\n"))
    for _ in range(2):
        assert not any(customer.tpm.pcr(15))
        customer.wire.forget()
        customer.open()
        customer.open()
        assert customer.wire.commands.count(TPM2_CC.PCR_Extend) == 1
        with refused("REBOOT_NEEDED"):
            customer.install(customer.revise(CAP))
        assert customer.use.state == "current"
        customer.tpm.reboot()
    assert customer.opens == 4
    customer.tpm.extend(15, b"something else")
    with refused("PCR_MISMATCH", words="PCR 15"):
        customer.open()
    assert customer.opens == 4
    with refused("REBOOT_NEEDED"):
        customer.install(customer.revise(CAP))
    customer.tpm.reboot()
    customer.install(customer.files[-1])
    assert customer.drain() == LIMIT


HOURS = limited(0, hours=1)


@contextmanager
def kept_unsealers(customer):
    """Sessions that passed the policy of a license with hours, which a revision has ended since; and root with them."""
    customer.sell(HOURS)
    old = customer.files[-1]
    with customer.root() as root:
        private, kept = root.held.private, root.kept(root.ready)
    assert len(kept) > 50
    customer.install(customer.revise(HOURS))

    def opened():
        number = 0
        with customer.root(old) as root:
            for context in kept:
                with suppress(TSS2_Exception):
                    root.unseal(root.e.context_load(context), private)
                    number += 1
        return number

    yield len(kept), opened


def test_unseal_sessions_kept_in_one_boot_outlive_deadline_and_revision(customer):
    """Disclosed: of a license without a limit of opens, as many as the TPM keeps."""
    with kept_unsealers(customer) as (number, opened):
        with customer.root() as root:
            root.e.clock_set(root.binding.deadline)
        with refused("HOURS_EXHAUSTED"):
            customer.open()
        assert opened() == number


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_ends_kept_unseal_sessions(customer, end):
    with kept_unsealers(customer) as (_, opened):
        end(customer)
        assert opened() == 0


def test_a_kept_unseal_session_has_paid_its_open(customer):
    """Holds: PolicySecret comes last, and without it there is no session that unseals."""
    customer.sell(limited(3))
    with customer.root() as root:
        session = root.session()
        root.platform(session)
        root.run(session, root.asked.sealed[:-1])
        with pytest.raises(TSS2_Exception):
            root.unseal(session)
        kept = [root.ready() for _ in range(2)]
        for each in kept:
            root.unseal(each)
    assert customer.opens == 2
    assert customer.drain() == 1
