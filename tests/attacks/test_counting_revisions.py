"""Revisions of counted licenses: cut short at every step, replayed, and permitted by others."""

import shutil

import pytest
from tpm2_pytss import TSS2_Exception

from hwlicense.core.errors import HardwareError
from hwlicense.core.tpm import policy
from hwlicense.core.tpm.nv import limit_data
from hwlicense.device.home import Home
from hwlicense_simulators.measured_boot import DEFAULT_BOOT
from tests.counted import NV, Customer, limited
from tests.forging import refused
from tests.world import Device


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as wire:
        own = Customer(own_vendor, tmp_path, tpm, wire)
        yield own
        wire._faults.clear()
        wire.on_command = wire.on_answer = None
        if tpm.running:
            assert own.loaded() == []


def changes(customer):
    """What was sent that changes NV, since the record began."""
    return [NV[code] for code in customer.wire.commands if code in NV]


# ---- power cuts ----

REVISION = ["NV_Increment", "NV_UndefineSpace", "NV_DefineSpace", "NV_Write", "NV_Increment"]
GROWN = ["NV_DefineSpace", "NV_Increment", "NV_UndefineSpace", "NV_DefineSpace", "NV_Write", "NV_Write", "NV_Increment"]
ANCHORED = limited(2, require="anchor = true\n")


def test_the_durable_steps_of_a_first_installation_and_of_a_revision(customer):
    """The tests below cut at each of them."""
    raw = customer.issue(limited(2))
    customer.wire.forget()
    customer.install(raw)
    assert changes(customer) == ["NV_DefineSpace", "NV_Write", "NV_Increment"]
    for terms, expected in ((limited(2), REVISION), (ANCHORED, GROWN)):
        raw = customer.revise(terms)
        customer.wire.forget()
        customer.install(raw)
        assert changes(customer) == expected
        customer.wire.forget()
        customer.install(raw)
        assert changes(customer) == []
        assert customer.drain() == 2


@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("terms", "steps"), [(limited(2), REVISION), (ANCHORED, GROWN)], ids=["opens", "anchor too"])
def test_a_power_cut_at_each_durable_step_of_a_revision(customer, tmp_path, executed, terms, steps):
    """Holds: what was done is found and not done again; the revision opens as often as it says, the old one never."""
    for step in range(len(steps)):
        customer.install(customer.revise(limited(3)) if customer.files else customer.issue(limited(3)))
        before = Device(Home(tmp_path / f"before {step}"), customer.device.tpm)
        shutil.copytree(customer.device.home.path, before.home.path)
        old, raw = customer.files[-1], customer.revise(terms)
        _cut(customer, steps, step, executed=executed)
        with pytest.raises(HardwareError):
            customer.install(raw)
        assert changes(customer) == steps[: step + 1]  # none that is not in the list above
        customer.tpm.power_cut()
        if steps[: step + executed].count("NV_Increment") == 1:  # the window is open
            with refused("LICENSE_SUPERSEDED"):
                customer.open()
            assert customer.drain(device=before) == 0
        customer.install(raw)
        assert customer.drain() == 2
        assert customer.drain(device=before) == 0
        with refused("LICENSE_SUPERSEDED"):
            customer.install(old)


def test_power_cuts_one_after_the_other(customer):
    """Holds: each try brings the installation on by the steps that it got to."""
    customer.sell(limited(3))
    raw = customer.revise(limited(2))
    for step in REVISION:
        customer.wire.forget()
        for command in NV:
            customer.wire.cut(command, executed=True)
        with pytest.raises(HardwareError):
            customer.install(raw)
        assert changes(customer) == [step]
        customer.wire._faults.clear()
        customer.tpm.power_cut()
    customer.wire.forget()
    customer.install(raw)
    assert changes(customer) == []
    assert customer.drain() == 2


def test_a_power_cut_before_the_home_was_written(customer, monkeypatch):
    """The TPM has the new revision, and the home the old license: installing again is what is left to do."""
    customer.sell(limited(3))
    raw = customer.revise(limited(2))
    with monkeypatch.context() as patched:
        patched.setattr(Home, "keep_license", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            customer.install(raw)
    with refused("LICENSE_SUPERSEDED"):
        customer.open()
    customer.install(raw)
    assert customer.drain() == 2


def test_the_first_installation_cut_short(customer):
    raw = customer.issue(limited(2))
    for step in ("NV_DefineSpace", "NV_Write", "NV_Increment"):
        _cut(customer, [step], 0, executed=False)
        with pytest.raises(HardwareError):
            customer.install(raw)
        customer.tpm.power_cut()
        with refused("LICENSE_ABSENT"):
            customer.open()
    customer.install(raw)
    assert customer.drain() == 2


def _cut(customer, steps, step, *, executed):
    """The power goes at this step of the list: before the TPM gets the command, or when it has done it."""
    code = next(code for code, name in NV.items() if name == steps[step])
    customer.wire.forget()
    customer.wire.cut(code, after=steps[:step].count(steps[step]), executed=executed)


# ---- replays and what was skipped ----


def test_revisions_skipped_and_replayed(customer, tmp_path):
    """Holds: the counter only goes up, and each revision's policy names its value."""
    customer.sell(limited(2))
    copies = []
    for number in range(3):
        copies.append(Device(Home(tmp_path / f"copy {number}"), customer.device.tpm))
        shutil.copytree(customer.device.home.path, copies[-1].home.path)
        customer.revise(limited(2))
        customer.install(customer.revise(limited(2)))  # every second one is left out
    assert customer.drain() == 2
    for copy, raw in zip(copies, customer.files, strict=False):
        assert customer.drain(device=copy) == 0
        with refused("LICENSE_SUPERSEDED"):
            copy.install(raw, customer.vendor)
    for raw in customer.files[:-1]:
        with refused("LICENSE_SUPERSEDED"):
            customer.install(raw)
    shutil.rmtree(customer.device.home.path / "licenses")  # the home does not know what was installed: the TPM does
    for raw in customer.files[:-1]:
        with refused("LICENSE_SUPERSEDED"):
            customer.install(raw)
    customer.install(customer.files[-1])
    assert customer.drain() == 0


def test_an_increment_too_many_kills_and_never_helps(customer):
    """Root can count the counter on: then neither this revision opens nor can its index be written."""
    customer.sell(limited(2))
    with customer.root() as root:
        for _ in range(3):
            root.increment()
            with pytest.raises(TSS2_Exception):
                root.ready()
            with pytest.raises(TSS2_Exception):
                root.writer()
    assert customer.drain() == 0
    raw = customer.revise(limited(2))
    with refused("LICENSE_SUPERSEDED"):
        customer.install(raw)


def test_two_licenses_for_one_request(customer):
    """They would share a counter: the second is refused, and the first goes on."""
    request = customer.device.request(counted=True)
    first, second = (customer.issue(limited(2), request=request) for _ in range(2))
    customer.install(first)
    with refused("COUNTER_LOST"):
        customer.install(second)
    assert customer.drain() == 2


def test_a_revision_with_another_counter_ends_the_old_one_with_its_counter(customer, tmp_path):
    """As a request that was made anew brings it; also where the power is cut before the old counter is gone."""
    customer.sell(limited(3))
    before, old = Device(Home(tmp_path / "before"), customer.device.tpm), customer.license.grant
    shutil.copytree(customer.device.home.path, before.home.path)
    handles = set(customer.indexes())
    customer.issue(limited(2))  # for its request
    identity = {"license_id": old.license, "revision": 2, "since": 2}
    raw = customer._kept(limited(2), customer.parts, customer.packages, pin=None, **identity)
    for after in range(2):
        _cut(customer, ["NV_UndefineSpace"], 0, executed=bool(after))
        with pytest.raises(HardwareError):
            customer.install(raw)
        customer.tpm.power_cut()
    customer.install(raw)
    assert customer.drain() == 2
    assert customer.drain(device=before) == 0
    assert len(customer.indexes()) == len(handles), "the old counter and its index are gone"


# ---- who may write the index ----


@pytest.fixture
def window(customer):
    """Root in the write window of a revision whose files lie in the home, with its indexes defined."""
    customer.sell(ANCHORED)
    old, raw = customer.files[-1], customer.revise(ANCHORED)
    _cut(customer, ["NV_Write"], 0, executed=False)
    with pytest.raises(HardwareError):
        customer.install(raw)
    with customer.root(raw) as root, customer.root(old) as older:
        older.e = root.e
        yield customer, root, older


def test_only_the_vendors_signature_for_this_index_writes_it(window):
    """Holds: one purpose, license and revision per reference, cpHash over index and data, PCRs before all."""
    _, root, older = window
    index, anchor = root.opens, root.of("anchor")
    asked = root.asked
    root.define(asked.public(anchor))
    platform, nv, exact = asked.write(index)
    last = [asked.permitted(index), asked.branches(index)]
    other = asked.write(anchor)

    def refuses(*steps, write=index, pcr=True):
        session = root.session()
        if pcr:
            root.platform(session)
        with pytest.raises(TSS2_Exception):  # noqa: PT012  # at the latest when it is used
            root.run(session, steps, write)
            root.write(session)
        root.flush(session)

    refuses(*older.asked.write(older.opens), *last, write=older.opens)  # another revision's permission
    refuses(
        *older.asked.write(older.opens), older.asked.permitted(older.opens), asked.branches(index), write=older.opens
    )
    refuses(*other, asked.permitted(anchor), asked.branches(index), write=anchor)  # another purpose's
    refuses(platform, asked.branches(index))  # the platform's approval alone
    refuses(platform, nv, exact, *last, pcr=False)  # without PolicyPCR
    refuses(platform, exact, *last)  # without the counter
    refuses(platform, nv, *last)  # without what is to be written
    refuses(nv, exact, last[0], policy.pcr_step(root.approvals[0].pcrs), platform, last[1])  # the platform last
    refuses(policy.PolicyCommandCode(policy.NV_READ), asked.branches(index))  # the branch that reads
    approval = root.approvals[0]
    with pytest.raises(TSS2_Exception):  # a platform's signature under the write's reference, and the reverse
        root.ticket(approval.policy, index.reference, approval.signature)
    with pytest.raises(TSS2_Exception):
        root.ticket(policy.digest(asked.write(index)), asked.platform, index.write)
    for data in (limit_data(3), limit_data(2**32 - 1), bytes(8)):
        session = root.writer()
        with pytest.raises(TSS2_Exception):
            root.write(session, data=data)
    with pytest.raises(TSS2_Exception):  # that session may write the other index as little
        root.write(root.writer(), anchor)
    with pytest.raises(TSS2_Exception):
        root.ready()  # nothing opens in the window
    root.write(root.writer())
    with pytest.raises(TSS2_Exception):  # once only
        root.write(root.writer())
    root.write(root.writer(anchor), anchor)
    root.increment()
    for each in (index, anchor):
        with pytest.raises(TSS2_Exception):  # the window is closed
            root.writer(each)


def test_the_permission_of_another_license_on_the_same_chip(customer, tmp_path, own_vendor):
    customer.sell(limited(2))
    other = Customer(own_vendor, tmp_path / "other", customer.tpm, customer.wire).sell(limited(99))
    assert other.binding.counter != customer.binding.counter
    raw = customer.revise(limited(2))
    _cut(customer, ["NV_Write"], 0, executed=False)
    with pytest.raises(HardwareError):
        customer.install(raw)
    with customer.root(raw) as root, other.root() as theirs:
        session = root.session()
        root.platform(session)
        with pytest.raises(TSS2_Exception):
            theirs.run(session, [*theirs.asked.write(theirs.opens), root.asked.permitted(root.opens)], theirs.opens)
    customer.install(raw)
    assert (customer.drain(), other.drain(3)) == (2, 3)


def test_approvals_of_an_earlier_generation_write_and_open_nothing(customer, own_vendor):
    """Holds: a revision that names a later generation ends them, in the TPM as well."""
    customer.sell(limited(2))
    customer.tpm.reboot(firmware=b"firmware 2")
    own_vendor.approve(customer.device.request(), 2)
    customer.install(customer.revise(limited(2)))
    customer.open()
    customer.tpm.reboot(boot=DEFAULT_BOOT)
    with refused("PCR_MISMATCH"):
        customer.open()
    with customer.root(customer.files[0]) as old, customer.root() as root:
        session = old.session()
        old.platform(session)
        with pytest.raises(TSS2_Exception):  # the signature is under the reference of generation 1
            old.run(session, root.asked.sealed[:1])
    with refused("PCR_MISMATCH"):  # said before the revision in force ends
        customer.install(customer.revise(limited(9)))
    customer.tpm.reboot(firmware=b"firmware 2")
    customer.open()
    assert customer.opens == 2
