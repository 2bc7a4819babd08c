"""Counters, indexes and policies of counted licenses: what the vendor computes is what a TPM makes of it."""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from tpm2_pytss import ESAPI, ESYS_TR, TPM2_CC, TPM2_RC, TPM2_SE, TSS2_Exception

from hwlicense.binders.tpm import TpmHardware, answering, clock
from hwlicense.binders.tpm.held import Held
from hwlicense.binders.tpm.keys import tpm_public
from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import HardwareError, HwlicenseError, Reason, UsageError
from hwlicense.core.hardware import Counting
from hwlicense.core.secret import Secret
from hwlicense.core.tpm import policy
from hwlicense.core.tpm.nv import BLOCK, FIRST, LAST, UNCOUNTABLE, counter_public
from hwlicense.core.tpm.structures import STORAGE_ROOT_TEMPLATE
from hwlicense.device.home import Home
from hwlicense_simulators import wire
from tests.counted import Customer, limited
from tests.forging import flipped, refused

EVERYTHING = limited(9, hours=10, require="anchor = true\ncap_pcr = 15\n")
ANCHORED = limited(2, hours=10, require="anchor = true\n")


def pin(_prompt="", **_options):
    return Secret(bytearray(b"2468"))


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as tap:
        own = Customer(own_vendor, tmp_path, tpm, tap)
        yield own
        assert own.loaded() == []


@pytest.fixture
def parts(customer):
    """Hardware, and what its calls take, of a license with everything but a PIN."""
    customer.sell(EVERYTHING)
    licensed, binding = customer.license, customer.binding
    home = customer.device.home
    with customer.device.connect() as hardware:
        yield hardware, binding, home.held(licensed, binding), home.approvals(licensed, customer.vendor.public)


# ---- what is computed ----


def test_the_names_that_the_vendor_computes_are_the_tpms(customer):
    customer.sell(EVERYTHING)
    with customer.root() as root:
        computed = [counter_public(root.binding.counter.handle), *map(root.asked.public, root.binding.indexes)]
        assert [each.handle - computed[0].handle for each in computed] == [0, 1, 2]
        assert [index.limit for index in root.binding.indexes] == [9, UNCOUNTABLE]
        for public in computed:
            area, name = root.e.nv_read_public(root.e.tr_from_tpmpublic(public.handle))
            assert bytes(name) == public.name
            assert bytes(area.nvPublic.marshal()) == public.raw
        fresh = computed[1]
        root.redefine(fresh)
        _, name = root.e.nv_read_public(root.e.tr_from_tpmpublic(fresh.handle))
        assert bytes(name) == fresh.unwritten.name != fresh.name


@pytest.mark.parametrize("terms", [EVERYTHING, limited(9), limited(0, hours=3), EVERYTHING.replace("[require]", "[x]")])
@pytest.mark.parametrize("digits", [None, b"2468"], ids=["no PIN", "PIN"])
def test_every_digest_is_that_of_a_trial_session(customer, terms, digits):
    """After each step, of the sealed object's policy and of the write's."""
    if "[x]" in terms:  # without PCRs
        terms = terms.replace('[x]\npcrs = ["sha256:0,7"]\n', "[require]\n")
    customer.sell(terms, pin() if digits else None)
    with customer.root() as root:
        root.pin = digits or b""
        asked = root.asked
        ways: list[tuple[list[policy.Step], Any]] = [(asked.sealed, None)]
        for index in root.binding.indexes:
            ways += [([*asked.write(index), asked.permitted(index), asked.branches(index)], index)]
        assert {type(step) for steps, _ in ways for step in steps} >= {policy.PolicyNV, policy.PolicyCommandCode}
        for steps, index in ways:
            trial, root.expecting = root.session(TPM2_SE.TRIAL), True
            for number, each in enumerate(steps, 1):
                root.run(trial, [each], index)
                assert bytes(root.e.policy_get_digest(trial)) == policy.digest(steps[:number]), each
            root.flush(trial)
        loaded = root.load()
        area, _, _ = root.e.read_public(loaded)
        assert bytes(area.publicArea.authPolicy) == policy.digest(root.asked.sealed)


def test_metadata_of_an_index_is_what_the_library_would_keep(customer):
    """An open saves two commands an index by it, and it is no part of the library's documented interface."""
    customer.sell(limited(2))
    with customer.root() as root, customer.device.connect() as hardware:
        public = root.asked.public(root.opens)
        kept = bytes(root.e.tr_serialize(root.index(public.handle)))
        del hardware
    with customer.device.connect() as hardware, hardware._connection.work() as work:
        assert bytes(work.call("tr_serialize", work.known_index(public))) == kept


# ---- a storage root key that does not stay ----


@pytest.fixture
def evicted(customer):
    """Persistent when the license was installed, and taken away since, as by `tpm2_evictcontrol`."""

    def evict():
        with ESAPI(customer.wire.tcti) as esapi:
            key, *_ = esapi.create_primary(None, tpm_public(STORAGE_ROOT_TEMPLATE), ESYS_TR.OWNER)
            kept = esapi.evict_control(ESYS_TR.OWNER, key, 0x81000001)
            esapi.flush_context(key)
            customer.sell(EVERYTHING)
            esapi.evict_control(ESYS_TR.OWNER, kept, 0x81000001)
        licensed, binding = customer.license, customer.binding
        held = customer.device.home.held(licensed, binding)
        assert Held.read(held, binding).handle == 0x81000001
        return binding, held, customer.device.home.approvals(licensed, customer.vendor.public)

    return evict


def test_a_counted_license_outlives_the_eviction_of_the_storage_root_key(customer, evicted):
    binding, held, approvals = evicted()
    with customer.device.connect() as hardware:
        anchor = hardware.unwrap(binding, held, approvals, None).anchor
        before = anchor.read().steps
        assert anchor.step().steps == before + 1
        assert (hardware.use(binding, held).state, hardware.use(binding, held).opens) == ("current", 1)
        hardware.present(binding, held)
        hardware.commit(binding, held, approvals)
        customer.install(customer.revise(EVERYTHING.replace("= 15", "= 14")))
    customer.open()


def test_after_a_clear_the_reason_is_another_device(customer, evicted):
    binding, held, approvals = evicted()
    customer.tpm.clear()
    with customer.device.connect() as hardware:
        for act in (lambda: hardware.use(binding, held), lambda: hardware.commit(binding, held, approvals)):
            with refused("WRONG_DEVICE"):
                act()
        with refused("TPM_ABSENT"):
            hardware.present(binding, held)


# ---- counters ----


def test_counters_are_odd_apart_and_kept(customer):
    """A request takes a block of its own, or the one that was made before and serves no license yet."""
    with customer.device.connect() as hardware:
        assert isinstance(hardware, Counting)
        first = hardware.provide_counter()
        assert FIRST <= first.handle <= LAST
        assert (first.handle % BLOCK, first.value % 2) == (0, 1)
        assert hardware.provide_counter() == first
        customer.sell(limited(2))
        assert customer.binding.counter.handle == first.handle
        second = hardware.provide_counter()
        assert second.handle != first.handle
        assert second.value % 2
    path = customer.device.home.path / "counters" / f"{first.handle:08x}"
    assert (path.stat().st_mode & 0o777, len(path.read_bytes())) == (0o600, 32)
    with TpmHardware(customer.wire.tcti) as without, pytest.raises(UsageError):
        without.provide_counter()


def test_a_spare_counter_whose_index_is_gone_or_anothers_is_passed_over(customer):
    with customer.device.connect() as hardware:
        first = hardware.provide_counter()
    customer.issue(limited(2))  # for a handle to root
    with customer.root(customer.files[0]) as root:
        root.undefine(first.handle)
    with customer.device.connect() as hardware:
        again = hardware.provide_counter()  # the handle once more: the TPM starts above all that was
        assert again.handle == first.handle
        assert again.value > first.value
    with customer.root(customer.files[0]) as root:
        root.undefine(first.handle)
        root.define(counter_public(first.handle), b"another's")
    with customer.device.connect() as hardware:
        assert hardware.provide_counter().handle != first.handle


def test_another_request_leaves_a_license_without_indexes_alone(customer):
    customer.sell(limited(0, hours=3))
    with customer.device.connect() as hardware:
        assert hardware.provide_counter().handle != customer.binding.counter.handle
    customer.open()


def test_the_counter_of_a_license_that_was_removed_serves_again(customer):
    """From its next odd value on: so what is removed and put back is dead."""
    customer.sell(limited(0, hours=3))
    counter = customer.binding.counter
    shutil.rmtree(customer.device.home.path / "licenses")
    with customer.device.connect() as hardware:
        again = hardware.provide_counter()
    assert (again.handle, again.value) == (counter.handle, counter.value + 1)
    with refused("LICENSE_SUPERSEDED"):
        customer.install(customer.files[0])


@pytest.mark.parametrize("terms", [ANCHORED, limited(3), limited(0, hours=2)])
def test_the_counter_of_a_removed_license_serves_again_with_what_is_left_of_its_indexes(customer, terms):
    customer.sell(ANCHORED)
    counter, before = customer.binding.counter, customer.indexes()
    folder = customer.device.home.path / "licenses"
    with customer.root() as root:
        root.flush(root.ready())
        folder.rename(folder.parent / "removed")
        request = customer.device.request(counted=True)
        with pytest.raises(TSS2_Exception):
            root.ready()
    customer.install(customer.issue(terms, request=request))
    assert (customer.binding.counter.handle, customer.binding.counter.value) == (counter.handle, counter.value + 2)
    assert len(customer.indexes()) == len(before) - 2 + len(customer.binding.indexes)
    customer.open()
    folder.rename(folder.parent / "new")
    (folder.parent / "removed").rename(folder)
    with refused("LICENSE_SUPERSEDED"):
        customer.open()


def test_one_that_never_had_a_license_is_used_first(customer):
    customer.sell(ANCHORED)
    with customer.device.connect() as hardware:
        waiting = hardware.provide_counter()
        shutil.rmtree(customer.device.home.path / "licenses")
        assert hardware.provide_counter() == waiting


def test_a_license_that_cannot_be_read_keeps_every_counter(customer):
    customer.sell(ANCHORED)
    (path,) = customer.device.home.path.glob("licenses/*/license.hwlic")
    path.write_bytes(b"damaged")
    with customer.device.connect() as hardware:
        hardware.provide_counter()
    customer.install(customer.files[0])
    customer.open()


def test_a_damaged_file_of_a_spare_counter_is_in_nobodys_way(customer):
    with customer.device.connect() as hardware:
        first = hardware.provide_counter()
        (customer.device.home.path / "counters" / f"{first.handle:08x}").write_bytes(b"short")
        assert hardware.provide_counter().handle != first.handle


@pytest.mark.parametrize("left", [b"short", None])
def test_a_counter_whose_file_is_damaged_or_gone_says_what_that_means(customer, left):
    customer.sell(ANCHORED)
    path = customer.device.home.path / "counters" / f"{customer.binding.counter.handle:08x}"
    path.unlink()
    if left:
        path.write_bytes(left)
    with pytest.raises(HwlicenseError) as caught:
        customer.open()
    assert caught.value.reason == "HOME_DAMAGED"
    assert "backup" in caught.value.hint
    assert "never open" in caught.value.hint
    assert "for that request" in caught.value.hint
    customer.sell(ANCHORED)  # as it says: enrolling anew makes another one
    customer.open()


# ---- between the TPM and the home ----


@pytest.mark.parametrize("terms", [limited(0, hours=3), limited(2)])
def test_an_enrolment_after_an_installation_that_was_cut_off_takes_another_counter(customer, monkeypatch, terms):
    """The TPM has the license in force, and the home does not know it yet."""
    with monkeypatch.context() as patched:
        patched.setattr(Home, "keep_license", cut_off)
        with pytest.raises(OSError, match="power"):
            customer.sell(terms)
    with customer.device.connect() as hardware:
        taken = hardware.provide_counter()
    customer.install(customer.files[0])
    assert customer.binding.counter.handle != taken.handle
    customer.open()
    assert not list(customer.device.home.path.glob("licenses/*/pending.hwlic"))


def cut_off(*_):
    raise OSError("the power is gone")


def test_an_enrolment_waits_for_an_installation(customer, monkeypatch):
    raw, done, keep = customer.issue(limited(0, hours=3)), [], Home.keep_license

    def enroll():
        done.append(customer.device.connect().provide_counter())

    thread = threading.Thread(target=enroll)

    def slowly(*arguments):
        thread.start()
        thread.join(0.5)
        assert done == []
        keep(*arguments)

    monkeypatch.setattr(Home, "keep_license", slowly)
    customer.install(raw)
    thread.join(60)
    assert done[0].handle != customer.binding.counter.handle
    customer.open()


def test_a_license_that_can_never_be_in_force_keeps_no_counter(customer):
    customer.sell(limited(0, hours=3))
    old = customer.issue(limited(0, hours=3))
    with customer.root(old) as root:
        root.increment()
        root.increment()
    with refused("LICENSE_SUPERSEDED"):
        customer.install(old)
    assert not list(customer.device.home.path.glob("licenses/*/pending.hwlic"))


def test_a_counter_that_was_made_and_never_counted_is_brought_to_odd(customer):
    with customer.device.connect() as hardware:
        customer.wire.cut(TPM2_CC.NV_Increment)
        with pytest.raises(HwlicenseError):
            hardware.provide_counter()
        (path,) = (customer.device.home.path / "counters").iterdir()
        made = hardware.provide_counter()
        assert (f"{made.handle:08x}", made.value % 2) == (path.name, 1)


def test_a_clock_that_is_kept_too_seldom_is_told(customer, monkeypatch):
    monkeypatch.setattr(clock, "LONGEST_LAPSE", 1)
    customer.sell(limited(2, hours=3))
    customer.tpm.power_cut()
    with refused("TPM_UNSUPPORTED", words="keeps its clock every 4,096 ms"):
        customer.open()
    assert customer.opens == 0


# ---- the anchor ----


def test_an_anchor_counts_steps_over_restarts_forks_and_threads(customer, parts):
    hardware, binding, held, approvals = parts
    anchor = hardware.unwrap(binding, held, approvals, None).anchor
    assert anchor.read().steps == 0
    assert [anchor.step().steps for _ in range(3)] == [1, 2, 3]
    first, second = anchor.read(), anchor.read()
    assert first.steps == second.steps == 3
    assert first.clock <= second.clock
    assert first.lapse == 4096
    child = os.fork()
    if not child:
        status = 1
        try:
            status = anchor.step().steps != 4
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert anchor.read().steps == 4
    threads = [threading.Thread(target=anchor.step) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for steps, happens in ((12, customer.tpm.reboot), (13, customer.tpm.power_cut), (14, lambda: None)):
        assert anchor.read().steps == steps
        assert anchor.step().steps == steps + 1
        happens()
    assert anchor.read().uptime < 60_000


@pytest.mark.parametrize("command", [TPM2_CC.NV_Read, TPM2_CC.GetTime])
def test_a_step_whose_answer_comes_late_is_given_by_the_next(customer, parts, monkeypatch, command):
    """It was counted: given to nobody, it would be charged as another's lease."""
    hardware, binding, held, approvals = parts
    anchor = hardware.unwrap(binding, held, approvals, None).anchor
    assert anchor.step().steps == 1
    monkeypatch.setattr(answering, "LIMIT", 0.5)
    customer.wire.delay(1.5, command=int(command))
    with pytest.raises(HardwareError) as error:
        anchor.step()
    assert error.value.reason == Reason.TPM_HUNG
    with pytest.raises(HardwareError, match="earlier command"):
        anchor.step()
    time.sleep(1.5)
    assert anchor.step().steps == 2
    assert anchor.read().steps == 2
    assert anchor.step().steps == 3
    customer.tpm.reboot()  # what was loaded for that command is known to nobody, and no resource manager is here


@pytest.mark.parametrize("command", [TPM2_CC.NV_Read, TPM2_CC.GetTime])
def test_a_step_that_is_interrupted_is_given_by_the_next(customer, parts, command):
    """By a signal whose handler raises, as Ctrl-C's does; the answer comes at once."""
    hardware, binding, held, approvals = parts
    anchor = hardware.unwrap(binding, held, approvals, None).anchor
    assert anchor.step().steps == 1
    customer.wire.delay(0.5, command=int(command))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        anchor.step()
    assert anchor.step().steps == 2
    assert anchor.read().steps == 2
    assert anchor.step().steps == 3


def test_a_process_that_is_forked_within_a_step_is_not_given_it_too(customer, parts):
    """Given to two processes, it would be charged as a forged one: all of the license."""
    hardware, binding, held, approvals = parts
    anchor = hardware.unwrap(binding, held, approvals, None).anchor
    customer.wire.delay(0.5, command=int(TPM2_CC.GetTime))
    stepping = threading.Thread(target=anchor.step)
    stepping.start()
    time.sleep(0.3)  # its count is known, its time is not
    assert anchor._kept.unused == (1, os.getpid())

    pid = os.fork()
    if not pid:
        try:
            time.sleep(1)  # the parent ends its step meanwhile
            os._exit(anchor.step().steps)
        finally:
            os._exit(99)
    stepping.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert anchor.step().steps == 3


def test_an_anchor_ends_with_its_revision(customer, parts):
    hardware, binding, held, approvals = parts
    anchor = hardware.unwrap(binding, held, approvals, None).anchor
    anchor.step()
    customer.tpm.reboot()
    customer.install(customer.revise(EVERYTHING))
    for action in (anchor.read, anchor.step):
        with refused("LICENSE_SUPERSEDED"):
            action()
    with customer.root() as root:
        root.undefine(root.of("anchor").handle)
    licensed, binding = customer.license, customer.binding
    held = customer.device.home.held(licensed, binding)
    anchor = hardware.unwrap(binding, held, approvals, None).anchor
    for action in (anchor.read, anchor.step):
        with refused("COUNTER_LOST", words="anchor"):
            action()


def test_a_command_to_the_anchor_that_was_changed_on_the_bus_is_told_as_that(customer, parts):
    hardware, binding, held, approvals = parts
    anchor = hardware.unwrap(binding, held, approvals, None).anchor

    def changed(command):
        if int.from_bytes(command[6:10], "big") != TPM2_CC.NV_Read:
            return command
        customer.wire.on_command = None  # once: the counter is read as it is
        return flipped(command, len(command) - 5)

    customer.wire.on_command = changed
    with refused("TPM_ANSWER_FORGED"):
        anchor.step()
    assert anchor.read().steps == 0


# ---- what is needed before a revision ends another ----


def test_without_an_approval_nothing_is_committed(customer, parts):
    hardware, *_ = parts
    customer.tpm.reboot()
    raw = customer.revise(EVERYTHING)
    customer.wire.cut(TPM2_CC.NV_Increment)
    with pytest.raises(HwlicenseError):
        customer.install(raw)  # all is there but the commitment
    (binding,) = unverified(raw, License)[0].bindings
    held = customer.device.home.held(unverified(raw, License)[0], binding)
    customer.wire.forget()
    with refused("PLATFORM_UNAPPROVED"):
        hardware.commit(binding, held, [])
    assert customer.wire.commands == []
    customer.open()


# ---- a TPM that is busy, or fails at each command ----


def test_a_tpm_that_limits_its_writes_is_waited_for(customer):
    raw = customer.issue(limited(2))
    for command in (TPM2_CC.NV_DefineSpace, TPM2_CC.NV_Write, TPM2_CC.NV_Increment):
        customer.wire.inject(wire.NV_RATE, command, times=3)
    customer.install(raw)
    for command in (TPM2_CC.PolicyNV, TPM2_CC.PolicySecret):
        customer.wire.inject(wire.NV_RATE, command, times=3)
        customer.wire.inject(wire.RETRY, command, after=3)
    assert customer.drain() == 2  # a command that was put off has counted nothing


def failing(customer, act):
    """The TPM fails at each command in turn, and the wire is cut there. Nothing may be left loaded."""
    after, done = 0, 0
    while done < 2:
        for fail in (customer.wire.cut, partial(customer.wire.inject, TPM2_RC.FAILURE)):
            customer.wire.forget()
            fail(after=after)
            with suppress(HwlicenseError):
                act()
            sent = customer.wire.commands
            done += customer.wire._faults != []
            customer.wire._faults.clear()
            left = customer.loaded()
            # A FlushContext that was itself refused leaves its handle, which the next in need of room flushes.
            refused_flush = len(sent) > after and sent[after] == TPM2_CC.FlushContext
            assert len(left) <= refused_flush, (after, list(map(hex, left)))
            if left:
                customer.flush(left)
        after += 1
    return after - 1


@pytest.mark.parametrize("what", ["unwrap", "use", "read", "step", "provide", "retire"])
def test_a_failure_at_any_command_leaves_nothing_in_the_tpm(customer, parts, what):
    hardware, binding, held, approvals = parts
    anchor = hardware.unwrap(binding, held, approvals, None).anchor
    count = failing(
        customer,
        {
            "unwrap": partial(hardware.unwrap, binding, held, approvals, None),
            "use": partial(hardware.use, binding, held),
            "read": anchor.read,
            "step": anchor.step,
            "provide": hardware.provide_counter,
            "retire": partial(hardware.retire, binding),
        }[what],
    )
    assert count >= 3


def test_a_failure_at_any_command_of_an_installation_is_made_good(customer):
    """And whatever was refused or cut: in the end the revision opens as often as it says."""
    customer.sell(ANCHORED)

    def install():
        customer.install(customer.revise(ANCHORED))

    assert failing(customer, install) > 40
    customer.install(customer.files[-1])
    assert customer.drain() == 2
