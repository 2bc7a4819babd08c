"""Hours of powered-on time, by the TPM's own clock: cut, set, cleared."""

import pytest
from tpm2_pytss import ESAPI, ESYS_TR, TSS2_Exception

from hwlicense.binders.tpm.keys import tpm_public
from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.tpm import policy
from hwlicense.core.tpm.nv import NvAttributes, NvPublic, counter_public
from hwlicense.core.tpm.structures import STORAGE_ROOT_TEMPLATE
from tests.counted import Customer, limited
from tests.forging import refused


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as wire:
        own = Customer(own_vendor, tmp_path, tpm, wire)
        yield own
        assert own.loaded() == []


def test_after_a_power_cut_the_clock_is_made_safe(customer):
    """Holds: the safe flag is heeded, by the TPM; and the device sets the clock on by what it can have lost."""
    customer.sell(limited(9, hours=10))
    customer.tpm.power_cut()
    for happens in (lambda: None, customer.tpm.reboot):  # a clean boot does not mend it
        happens()
        with customer.root() as root, pytest.raises(TSS2_Exception):
            root.ready()
    assert customer.opens == 0
    before = customer.use.clock
    customer.open()
    lost = customer.use.clock - before
    assert 0 < lost <= 1 << 22, "at most one interval of the clock's updates"
    customer.open()
    assert customer.opens == 2


def test_hours_are_over_at_the_tpms_own_clock(customer):
    customer.sell(limited(0, hours=1))
    customer.open()
    with customer.root() as root:
        root.e.clock_set(customer.binding.deadline - 1500)
    customer.open()
    with customer.root() as root:
        root.e.clock_set(customer.binding.deadline)
        with pytest.raises(TSS2_Exception):  # it goes forward only
            root.e.clock_set(customer.binding.deadline - 3000)
    for happens in (lambda: None, customer.tpm.reboot, customer.tpm.power_cut, lambda: None):
        happens()
        with refused("HOURS_EXHAUSTED"):
            customer.open()
    customer.install(customer.revise(limited(0, hours=2)))
    customer.open()


def test_tpm2_clear_brings_no_hours_back(customer):
    """Holds: Clear resets the clock, and takes storage seed and counter with it."""
    customer.sell(limited(2, hours=1))
    with customer.root() as root:
        root.e.clock_set(customer.binding.deadline)
        old = customer.binding.counter
        private = root.held.private
    customer.tpm.clear()
    assert customer.drain() == 0
    with refused("WRONG_DEVICE", "LICENSE_DAMAGED"):
        customer.install(customer.files[0])
    with customer.root() as root, pytest.raises(TSS2_Exception):
        root.load(private)
    # The handle once more: the TPM starts a counter above all that it ever had.
    with customer.root() as root:
        counter = root.define(counter_public(old.handle), root.auth)
        root.e.nv_increment(counter, auth_handle=counter)
        value = root.e.nv_read(root.index(old.handle), 8, auth_handle=root.index(old.handle))
        assert int.from_bytes(bytes(value), "big") > old.value
        root.undefine(old.handle)


def test_a_false_storage_root_key_brings_no_hours_back_after_a_clear(customer):
    """Holds: a key of the endorsement hierarchy survives Clear; hours imply the revision counter, which does not."""

    def persist():
        with ESAPI(customer.wire.tcti) as esapi:
            key, *_ = esapi.create_primary(None, tpm_public(STORAGE_ROOT_TEMPLATE), ESYS_TR.ENDORSEMENT)
            esapi.evict_control(ESYS_TR.OWNER, key, 0x81000001)
            esapi.flush_context(key)

    persist()
    customer.sell(limited(0, hours=1))
    customer.open()
    with customer.root() as root:
        root.e.clock_set(customer.binding.deadline)
    with refused("HOURS_EXHAUSTED"):
        customer.open()
    customer.tpm.clear()
    persist()
    with refused("WRONG_DEVICE"):
        customer.open()
    with refused("COUNTER_LOST"):
        customer.install(customer.files[0])
    with customer.root() as root:
        root.hierarchy = ESYS_TR.ENDORSEMENT
        root.flush(root.load())  # the sealed object is alive indeed
        session, timed = root.session(), [s for s in root.asked.sealed if isinstance(s, policy.PolicyCounterTimer)]
        root.run(session, timed)  # and the clock is back at its start
        root.flush(session)
        public = counter_public(root.binding.counter.handle)
        counter = root.define(public)
        for _ in range(4):
            root.e.nv_increment(counter, auth_handle=counter)
            with pytest.raises(TSS2_Exception, match="in math operation"):
                root.unseal()
        root.redefine(NvPublic(public.handle, public.attributes & ~NvAttributes.COUNTER))
        forged = root.index(public.handle)
        root.e.nv_write(forged, root.binding.counter.value.to_bytes(8, "big"), auth_handle=forged)
        with pytest.raises(TSS2_Exception, match="policy check failed"):
            root.unseal()


def test_a_license_after_a_clear(customer):
    """The same license, issued again for the request that the device makes then, installs over the dead one."""
    customer.sell(limited(2))
    customer.tpm.clear()
    assert customer.drain() == 0
    parts, first = customer.parts, customer.files[0]
    customer.issue(limited(2))  # for its request
    assert customer.parts[0].evidence.counter != parts[0].evidence.counter
    old = unverified(first, License)[0]
    identity = {"license_id": old.grant.license, "revision": 2, "since": 2}
    customer.install(customer._kept(limited(2), customer.parts, customer.packages, pin=None, **identity))
    assert customer.drain() == 2
