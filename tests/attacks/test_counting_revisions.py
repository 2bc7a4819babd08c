"""Revisions of counted licenses: cut short at every step, replayed, permitted by others; and a TPM that fails."""

import contextlib
import shutil

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


def test_an_owner_with_a_password_is_told_before_anything_ends(customer):
    customer.sell(limited(3))
    with ESAPI(customer.wire.tcti) as esapi:
        esapi.hierarchy_change_auth(ESYS_TR.OWNER, b"the owner's")
    for terms in (limited(2), ANCHORED):
        with refused("TPM_AUTHORIZATION"):
            customer.install(customer.revise(terms))
    # This TPM has no persistent storage root key, so an owner's password is in the way of opening, too.
    with ESAPI(customer.wire.tcti) as esapi:
        esapi.tr_set_auth(ESYS_TR.OWNER, b"the owner's")
        esapi.hierarchy_change_auth(ESYS_TR.OWNER, b"")
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
    assert customer.use[:3] == ("current", 0, 2)


def test_answers_changed_on_the_bus_are_not_believed(customer):
    """Holds: what matters is read in sessions that are salted to the storage root key."""
    customer.sell(limited(2, hours=9, require="anchor = true\n"))
    licensed, binding = customer.license, customer.binding
    held = customer.device.home.held(licensed, binding)
    approvals = customer.device.home.approvals(licensed, customer.vendor.public)
    with customer.device.connect() as hardware:
        anchor = hardware.unwrap(binding, held, approvals, None).anchor
        for code, steps in ((TPM2_CC.NV_Read, 1), (TPM2_CC.GetTime, 2), (TPM2_CC.GetCapability, 3)):
            if code == TPM2_CC.GetCapability:
                anchor._lapse = 0
            _change(customer, code)
            for action in (anchor.read, anchor.step, lambda: hardware.use(binding, held)):
                if code == TPM2_CC.GetCapability and action not in (anchor.read, anchor.step):
                    continue
                with refused("TPM_ANSWER_FORGED"):
                    action()
            customer.wire.on_command = customer.wire.on_answer = None
            assert anchor.read().steps == steps  # what was counted is counted
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
