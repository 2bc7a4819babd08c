"""Counted licenses at a TPM that cannot, or that others use, watch and alter."""

import contextlib
import shutil
import time

import pytest
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CC,
    TPM2_RC,
    TPM2B_NV_PUBLIC,
    TPMA_NV,
    TPMS_NV_PUBLIC,
    TSS2_Exception,
)

from hwlicense.device.home import Home
from tests.counted import Customer, limited
from tests.forging import refused

ANCHORED = limited(2, require="anchor = true\n")


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as wire:
        own = Customer(own_vendor, tmp_path, tpm, wire)
        yield own
        if tpm.running:
            assert own.loaded() == []


# ---- a TPM that does not do it ----


def fill(customer):
    """Other programs take all of NV, and the room that TPMs keep for counters."""
    mine, taken = TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD, 0
    with ESAPI(customer.wire.tcti) as esapi:
        for kind in (TPMA_NV(1 << 4), TPMA_NV(0)):
            with contextlib.suppress(TSS2_Exception):
                while True:
                    area = TPMS_NV_PUBLIC(nameAlg=TPM2_ALG.SHA256, attributes=mine | kind, dataSize=8)
                    area.nvIndex = 0x01810000 + taken
                    esapi.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=area))
                    taken += 1
    assert taken > 10


def test_a_full_nv_is_told_before_anything_ends(customer):
    customer.sell(limited(3))
    customer.open()
    fill(customer)
    with refused("TPM_NV_FULL"):
        customer.device.connect().provide_counter()
    raw = customer.revise(ANCHORED)
    with refused("TPM_NV_FULL"):
        customer.install(raw)
    customer.open()  # the revision in force is alive
    assert customer.opens == 2
    customer.install(customer.revise(limited(2)))  # which needs no more room than the one before
    assert customer.drain() == 2


def test_an_owner_with_a_password_is_told_before_anything_ends(own_vendor, tmp_path, hwlicense_tpms):
    """Where the storage root key is persistent, only what changes NV takes the owner's password."""
    tpm = hwlicense_tpms(storage_key="ecc")
    with tpm.tapped() as wire:
        customer = Customer(own_vendor, tmp_path, tpm, wire).sell(limited(3))
        with ESAPI(wire.tcti) as esapi:
            esapi.hierarchy_change_auth(ESYS_TR.OWNER, b"the owner's")
        for terms in (limited(2), ANCHORED):
            with refused("TPM_AUTHORIZATION"):
                customer.install(customer.revise(terms))
        assert customer.drain() == 3


def test_an_owner_with_a_password_is_no_way_to_more_hours(own_vendor, tmp_path, hwlicense_tpms):
    """After a power cut the device cannot set the clock on, and says how long to wait: then the TPM vouches for it."""
    tpm = hwlicense_tpms(storage_key="ecc")
    with tpm.tapped() as wire:
        customer = Customer(own_vendor, tmp_path, tpm, wire).sell(limited(3, hours=1))
        with ESAPI(wire.tcti) as esapi:
            esapi.hierarchy_change_auth(ESYS_TR.OWNER, b"the owner's")
        tpm.power_cut()
        with refused("TPM_AUTHORIZATION", words="clock"):
            customer.open()
        assert customer.opens == 0
        time.sleep(4.2)
        assert customer.drain() == 3


def test_a_full_disk_is_told_before_anything_ends(customer, monkeypatch):
    customer.sell(limited(3))
    with monkeypatch.context() as patched:
        patched.setattr(Home, "prepare_license", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            customer.install(customer.revise(limited(2)))
    assert customer.drain() == 3


def test_a_tpm_without_pin_pass_is_told_before_anything_ends(customer):
    """As TPMs before revision 1.38 answer."""
    customer.sell(limited(0, require="revocable = true\n"))
    customer.wire.inject(TPM2_RC.ATTRIBUTES | 0x2C0, TPM2_CC.NV_DefineSpace)
    raw = customer.revise(limited(2))
    with refused("TPM_UNSUPPORTED", words="PIN_PASS"):
        customer.install(raw)
    customer.open()
    customer.install(raw)
    assert customer.drain() == 2


def test_measurements_between_permission_and_write(customer):
    """As IMA makes them: it is tried again, as the older revision has ended by then."""
    customer.sell(limited(3))
    raw, measured = customer.revise(limited(2)), list[None]()

    def measuring(command):
        if int.from_bytes(command[6:10], "big") == TPM2_CC.NV_Write and len(measured) < 2:
            measured.append(customer.tpm.extend(10, b"a file"))
        return command

    customer.wire.on_command = measuring
    customer.install(raw)
    assert len(measured) == 2
    assert customer.drain() == 2


# ---- others at the same TPM, and on its bus ----


def test_other_programs_burn_no_opens_and_kill_no_license(customer):
    """Holds: counter and index share an authValue that is in the home alone, and is not seen on the bus."""
    customer.wire.forget()
    customer.sell(limited(2))
    with customer.root() as root:
        assert root.auth not in customer.wire.traffic
        counter, index = root.binding.counter.handle, root.opens.handle
        for guess in (b"", b"\0" * 32, root.auth[:-1]):
            root.auth = guess
            for attempt in (
                root.increment,
                lambda: root.e.nv_read(root.index(index), 8, auth_handle=root.index(index)),
                lambda: root.e.nv_read(root.index(index), 8, auth_handle=ESYS_TR.OWNER),
                lambda: root.run(root.session(), root.asked.sealed[-1:]),
                lambda: root.e.nv_increment(root.index(counter), auth_handle=ESYS_TR.OWNER),
            ):
                with pytest.raises(TSS2_Exception):
                    attempt()
    assert (customer.use.state, customer.use.opens, customer.use.limit) == ("current", 0, 2)


def test_answers_changed_on_the_bus_are_not_believed(customer):
    """Holds: what matters is read in sessions that are salted to the storage root key."""
    customer.sell(limited(2, hours=9, require="anchor = true\n"))
    licensed, binding = customer.license, customer.binding
    held = customer.device.home.held(licensed, binding)
    approvals = customer.device.home.approvals(licensed, customer.vendor.public)
    with customer.device.connect() as hardware:
        anchor = hardware.unwrap(binding, held, approvals, None).anchor
        for code, steps in ((TPM2_CC.NV_Read, 1), (TPM2_CC.GetTime, 2), (TPM2_CC.GetCapability, 2)):
            if code == TPM2_CC.GetCapability:
                anchor._kept.lapse = 0
            _change(customer, code)
            for action in (anchor.read, anchor.step, lambda: hardware.use(binding, held)):
                if code == TPM2_CC.GetCapability and action not in (anchor.read, anchor.step):
                    continue
                with refused("TPM_ANSWER_FORGED"):
                    action()
            customer.wire.on_command = customer.wire.on_answer = None
            assert anchor.read().steps == steps  # what was counted is counted, and given to whoever asks next
    assert customer.opens == 1


def _change(customer, code):
    sent = []

    def on_command(command):
        sent.append(int.from_bytes(command[6:10], "big"))
        return command

    def on_answer(answer):
        return answer[:-40] + bytes([answer[-40] ^ 1]) + answer[-39:] if sent[-1] == code else answer

    customer.wire.on_command, customer.wire.on_answer = on_command, on_answer


def test_a_restored_tpm_gains(customer, tmp_path):
    """Disclosed: whoever can put back the state of a virtual TPM, together with the home, opens again."""
    customer.sell(limited(2))
    customer.tpm.stop()
    shutil.copytree(customer.tpm.state, tmp_path / "snapshot")
    customer.tpm.start()
    assert customer.drain() == 2
    customer.tpm.stop()
    for file in (tmp_path / "snapshot").iterdir():
        shutil.copyfile(file, customer.tpm.state / file.name)
    customer.tpm.start()
    assert customer.drain() == 2
