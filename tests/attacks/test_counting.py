"""Attempts to open a counted license more often, or longer, than it says: by an operator, and by root's programs."""

import shutil
import subprocess

import pytest
from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2_CC, TPMT_SIG_SCHEME, TPMT_SYM_DEF_OBJECT, TSS2_Exception

from hwlicense.binders.tpm import probing
from hwlicense.binders.tpm.keys import tpm_public
from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.secret import Secret
from hwlicense.core.tpm import policy
from hwlicense.core.tpm.nv import NvAttributes, NvPublic, counter_public, limit_data
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.structures import ATTESTATION_TEMPLATE
from hwlicense_simulators.measured_boot import DEFAULT_BOOT
from tests.counted import Customer, limited
from tests.forging import refused
from tests.world import PROGRAM, TERMS, licensed, run


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as wire:
        own = Customer(own_vendor, tmp_path, tpm, wire)
        yield own
        if tpm.running:
            assert own.loaded() == []


def pin(digits=b"2468"):
    return lambda _prompt, **_options: Secret(bytearray(digits))


# ---- what an open costs, and what costs nothing ----


def test_it_opens_as_often_as_it_says_over_every_kind_of_restart(customer):
    """Holds: the TPM counts, in memory that it keeps."""
    customer.sell(limited(7))
    opened = 0
    for happens in (customer.tpm.reboot, customer.tpm.power_cut, lambda: None, customer.tpm.reboot):
        customer.open()
        opened += 1
        assert customer.opens == opened
        happens()
    assert opened + customer.drain() == 7
    with refused("OPENS_EXHAUSTED", words="it allowed 7"):
        customer.open()
    assert (customer.use.state, customer.use.opens, customer.use.limit) == ("current", 7, 7)  # read at the limit, too


def test_a_home_that_is_put_back_brings_no_open_back(customer, tmp_path):
    """Holds: nothing of the count is in the home."""
    customer.sell(limited(3))
    shutil.copytree(customer.device.home.path, tmp_path / "before")
    assert customer.drain() == 3
    shutil.rmtree(customer.device.home.path)
    shutil.copytree(tmp_path / "before", customer.device.home.path)
    customer.tpm.power_cut()
    assert customer.drain() == 0
    customer.install(customer.files[0])
    assert customer.drain() == 0


def test_verifying_and_status_spend_nothing(customer):
    customer.sell(limited(2, hours=9))
    customer.open()
    arguments = "--home", customer.device.home.path
    for _ in range(3):
        run("device", "check", *arguments, customer.vendor.package, env={"HWLICENSE_TPM": customer.wire.tcti})
        run("device", "status", *arguments, env={"HWLICENSE_TPM": customer.wire.tcti})
        run("device", "status", "--json", *arguments, env={"HWLICENSE_TPM": customer.wire.tcti})
    assert customer.opens == 1


def test_a_wrong_pin_costs_no_open_and_counts_as_a_wrong_pin(customer):
    """Holds: the session that authorises counter and index is bound to the sealed object."""
    customer.sell(limited(2), pin(b"2468")(""))
    with refused("PIN_WRONG"):
        customer.open(pin=pin(b"1357"))
    assert customer.opens == 0
    assert probing.probe(customer.wire.tcti, Selection()).wrong_pins == 1
    customer.open(pin=pin())
    assert customer.opens == 1
    with customer.root() as root, pytest.raises(TSS2_Exception):  # without the PIN: at the cost of an open
        root.unseal()
    assert customer.opens == 2
    with refused("OPENS_EXHAUSTED"):
        customer.open(pin=pin())


def test_the_lockout_of_the_tpm_costs_no_open(customer):
    customer.sell(limited(2), pin(b"2468")(""))
    for _ in range(4):
        with refused("PIN_WRONG", "TPM_LOCKOUT"):
            customer.open(pin=pin(b"1357"))
    with refused("TPM_LOCKOUT"):
        customer.open(pin=pin())
    assert customer.opens == 0


def test_the_pin_cannot_be_taken_off(customer):
    """Holds: adminWithPolicy, and a policy for TPM2_Unseal alone; importing again brings the PIN again."""
    customer.sell(limited(3), pin(b"2468")(""))
    with customer.root(pin=b"2468") as root:
        loaded, parent = root.load(), root.srk()
        for policed in (False, True):
            use = root.session() if policed else ESYS_TR.PASSWORD
            if policed:
                root.platform(use)
                root.run(use, root.asked.sealed[:-1])
            with pytest.raises(TSS2_Exception):
                root.e.object_change_auth(loaded, parent, b"", session1=use)
            with pytest.raises(TSS2_Exception):
                root.e.duplicate(loaded, ESYS_TR.NULL, b"", TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL), session1=use)
            if policed:
                root.flush(use)
    assert customer.opens == 0
    customer.install(customer.files[0])
    with refused("PIN_WRONG"):
        customer.open(pin=pin(b"0000"))
    assert customer.opens == 0


def test_another_platform_state_costs_no_open(customer):
    """Holds: PolicyPCR is told what is expected; and root gets past no PolicyAuthorize with an empty digest."""
    customer.sell(limited(2))
    customer.tpm.reboot(firmware=b"firmware 2")
    with refused("PCR_MISMATCH"):
        customer.open()
    with customer.root() as root, pytest.raises(TSS2_Exception, match="out of range"):
        root.ready()
    assert customer.opens == 0
    customer.tpm.reboot(boot=DEFAULT_BOOT)
    assert customer.drain() == 2


def test_a_pcr_extended_between_count_and_use_costs_one_and_is_tried_once_more(customer):
    """Disclosed: machines that go on measuring (IMA) may pay two opens for one, and never more than the limit."""
    customer.sell(limited(4))
    with customer.root() as root:
        session = root.ready()
        customer.tpm.extend(10, b"a file, by IMA")
        with pytest.raises(TSS2_Exception, match="PCR have changed"):
            root.unseal(session)
    assert customer.opens == 1
    measured: list[None] = []

    def measuring(command):
        if int.from_bytes(command[6:10], "big") == TPM2_CC.Unseal and not measured:
            measured.append(customer.tpm.extend(10, b"a file, by IMA"))
        return command

    customer.wire.on_command = measuring
    customer.open()
    assert (measured, customer.opens) == ([None], 3)
    measured[:] = []
    with refused("OPENS_EXHAUSTED"):  # the last one goes the same way
        customer.open()
    customer.wire.on_command = None
    assert customer.opens == 4


def test_what_counts_and_what_does_not_at_the_index_itself(customer):
    """Holds: branches by command code. Reading and certifying by policy is free, and good for nothing else."""
    customer.sell(limited(4))
    with customer.root() as root:
        index = root.index(root.opens.handle)
        for code, works in ((policy.NV_READ, True), (policy.NV_CERTIFY, True), (policy.UNSEAL, False)):
            session = root.session()
            root.e.policy_command_code(session, code)
            if works:
                root.run(session, [root.asked.branches(root.opens)])
                target = root.session()
                with pytest.raises(TSS2_Exception):
                    root.e.policy_secret(index, target, expiration=0, session1=session)
                root.flush(target)
            else:
                with pytest.raises(TSS2_Exception):
                    root.run(session, [root.asked.branches(root.opens)])
            root.flush(session)
        session = root.session()
        root.platform(session)
        root.run(session, [root.asked.first])
        with pytest.raises(TSS2_Exception):  # the platform's approval alone
            root.run(session, [root.asked.branches(root.opens)])
        root.flush(session)
        assert customer.opens == 0
        session = root.session()
        root.run(session, [policy.PolicyCommandCode(policy.NV_CERTIFY), root.asked.branches(root.opens)])
        key, *_ = root.e.create_primary(None, tpm_public(ATTESTATION_TEMPLATE), ESYS_TR.ENDORSEMENT)
        scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
        receipt, _ = root.e.nv_certify(key, index, b"", scheme, 8, auth_handle=index, session2=session)
        root.flush(session, key)
        assert bytes(receipt.attestationData).endswith(limit_data(4))
        root.e.nv_read(index, 8, auth_handle=index)
    assert customer.opens == 1  # by its own authValue, reading counts


def test_two_processes_at_the_last_open(customer):
    customer.sell(limited(3))
    customer.open()
    customer.open()
    command = [PROGRAM, "device", "check", "--open", "--home", customer.device.home.path, "--tpm", customer.wire.tcti]
    command.append(customer.vendor.package)
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    assert sum("OPENS_EXHAUSTED" in each for each in said) == 1
    assert customer.opens == 3


def test_a_plain_license_leaves_nothing_in_nv(vendor, device):
    with device.tpm.tapped() as wire:
        own = Customer(vendor, device.home.path, device.tpm, wire)
        before = own.indexes()
        licensed(vendor, device)
        device.open(vendor).close()
        assert own.indexes() == before
        request = device.request(counted=True)
        assert len(own.indexes()) == len(before) + 1
        device.install(vendor.issue(request, device.tpm, TERMS).raw, vendor)  # it asks for no counter, and uses none
        assert len(own.indexes()) == len(before) + 1


# ---- counter and index, defined by root ----


def test_without_its_counter_or_its_index_it_opens_nothing(customer):
    customer.sell(limited(3))
    customer.open()
    with customer.root() as root:
        opens, counter = root.asked.public(root.opens), counter_public(root.binding.counter.handle)
        root.undefine(opens.handle)
        with refused("COUNTER_LOST", words="index of its opens"):
            customer.open()
        root.undefine(counter.handle)
        with refused("COUNTER_LOST", words="counter"):
            customer.open()
        assert customer.use.state == "lost"
        made = root.define(counter)
        root.e.nv_increment(made, auth_handle=made)
        value = root.e.nv_read(root.counter, 8, auth_handle=root.counter)
        assert int.from_bytes(bytes(value), "big") > root.binding.counter.value
    with refused("LICENSE_SUPERSEDED"):
        customer.open()
    with refused("LICENSE_SUPERSEDED"):
        customer.install(customer.files[0])


def test_a_second_license_from_one_request(customer):
    """Holds: the counter and its indexes are the first one's. Nothing was removed, and that is not said."""
    request = customer.device.request(counted=True)
    customer.install(customer.issue(limited(3), request=request))
    with refused("COUNTER_LOST", words="The license's index (opens) in the TPM is another's"):
        customer.install(customer.issue(limited(3), request=request))
    customer.open()


def test_an_ordinary_index_at_the_counters_handle(customer):
    """Holds: the policy holds the Name that the vendor computed, in which type and attributes are."""
    customer.sell(limited(0, hours=9))
    with customer.root() as root:
        counter = root.binding.counter
        root.undefine(counter.handle)
        kind = NvAttributes.AUTH_WRITE | NvAttributes.AUTH_READ | NvAttributes.NO_DA
        forged = root.define(NvPublic(counter.handle, kind))
        root.e.nv_write(forged, counter.value.to_bytes(8, "big"), auth_handle=forged)
        with pytest.raises(TSS2_Exception, match="policy check failed"):
            root.unseal()
    with refused("COUNTER_LOST"):
        customer.open()
    with refused("COUNTER_LOST"):
        customer.install(customer.files[0])


def test_a_request_with_an_ordinary_index_as_its_counter(customer):
    """Holds: whatever lies at the handle, the vendor's policy is for a counter."""
    request = customer.device.request(counted=True)
    raw = customer.issue(limited(2), request=request)
    (binding,) = unverified(raw, License)[0].bindings
    counter = binding.counter
    home = customer.device.home.path / "counters" / f"{counter.handle:08x}"
    with customer.root(raw) as root:
        root.auth = home.read_bytes()
        root.undefine(counter.handle)
        kind = NvAttributes.AUTH_WRITE | NvAttributes.AUTH_READ | NvAttributes.NO_DA
        forged = root.define(NvPublic(counter.handle, kind))
        root.e.nv_write(forged, (counter.value - 1).to_bytes(8, "big"), auth_handle=forged)
        with refused("COUNTER_LOST"):
            customer.install(raw)
        root.define(root.asked.public(root.opens))
        with pytest.raises(TSS2_Exception):
            root.writer()


@pytest.mark.parametrize("how", ["own authValue", "home's authValue", "other attributes", "other policy"])
def test_the_index_of_opens_defined_again_by_root(customer, how):
    """Holds: it cannot be written without the vendor's signature, and another index has another Name."""
    customer.sell(limited(2))
    assert customer.drain() == 2
    with customer.root() as root:
        public = root.asked.public(root.opens)
        mine = NvAttributes.PIN_PASS | NvAttributes.AUTH_READ | NvAttributes.POLICY_READ | NvAttributes.NO_DA
        owner_write = NvAttributes(1 << 1)
        if "authValue" in how:
            root.auth = b"root's own" if how.startswith("own") else root.auth
            root.redefine(public)
        else:
            policy_ = public.policy if how == "other attributes" else b""
            root.redefine(NvPublic(public.handle, mine | owner_write, policy_))
            root.e.nv_write(root.index(public.handle), limit_data(2**32 - 1), auth_handle=ESYS_TR.OWNER)
        with pytest.raises(TSS2_Exception):
            root.unseal()
    with refused("COUNTER_LOST", words="index of its opens"):
        customer.open()
    with refused("COUNTER_LOST"):
        customer.install(customer.files[0])
