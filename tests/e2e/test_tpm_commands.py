"""The commands that each step sends to the TPM. On real chips each takes 20 to 300 ms, so a further one is a decision.

Listed at the wire, as swtpm gets them. A device is warm whose storage root key is persistent and whose home holds the
TPM's word (a ticket) on the approval; the coldest makes that key anew and asks for a ticket at every opening.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import pytest

from hwlicense.binders.tpm.held import Held
from hwlicense.core.secret import Secret
from hwlicense.device.home import Home
from hwlicense_simulators.measured_boot import DEFAULT_BOOT
from tests.counted import Customer, limited
from tests.world import TERMS, WITH_PCRS, Device, licensed, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense_simulators import Tpm, Wire

NAMES = {  # TPM_CC (TPM 2.0 Library, part 2, 6.5.2): those that occur
    0x122: "NV_UndefineSpace",
    0x12A: "NV_DefineSpace",
    0x131: "CreatePrimary",
    0x134: "NV_Increment",
    0x137: "NV_Write",
    0x147: "ActivateCredential",
    0x149: "PolicyNV",
    0x14C: "GetTime",
    0x14E: "NV_Read",
    0x151: "PolicySecret",
    0x156: "Import",
    0x157: "Load",
    0x158: "Quote",
    0x15E: "Unseal",
    0x165: "FlushContext",
    0x167: "LoadExternal",
    0x169: "NV_ReadPublic",
    0x16A: "PolicyAuthorize",
    0x16B: "PolicyAuthValue",
    0x16C: "PolicyCommandCode",
    0x16D: "PolicyCounterTimer",
    0x16E: "PolicyCpHash",
    0x171: "PolicyOR",
    0x173: "ReadPublic",
    0x176: "StartAuthSession",
    0x177: "VerifySignature",
    0x17A: "GetCapability",
    0x17E: "PCR_Read",
    0x17F: "PolicyPCR",
    0x182: "PCR_Extend",
}

UNLIMITED = "Load StartAuthSession PolicyPCR PolicyCommandCode Unseal FlushContext"
APPROVED = "Load StartAuthSession PolicyPCR PolicyAuthorize PolicyCommandCode Unseal FlushContext"
PIN = "Load StartAuthSession PolicyPCR PolicyCommandCode PolicyAuthValue Unseal FlushContext"
APPROVED_PIN = "Load StartAuthSession PolicyPCR PolicyAuthorize PolicyCommandCode PolicyAuthValue Unseal FlushContext"
TICKET = "LoadExternal VerifySignature FlushContext"
SHARE = "StartAuthSession StartAuthSession PolicySecret ActivateCredential"
CERTIFIED = "NV_ReadPublic NV_ReadPublic NV_Read NV_Read CreatePrimary FlushContext"


EVERYTHING = limited(9, hours=10)
COUNTED = (
    "Load StartAuthSession PolicyPCR PolicyAuthorize StartAuthSession PolicyNV PolicyCounterTimer PolicyCounterTimer "
    "PolicyCommandCode PolicySecret Unseal FlushContext"
)
COUNTED_PIN = COUNTED.replace("PolicySecret", "PolicyAuthValue PolicySecret")
WRITE = (
    f"StartAuthSession PolicyPCR PolicyAuthorize StartAuthSession PolicyNV PolicyCpHash {TICKET} PolicyAuthorize "
    "PolicyOR NV_Write"
)
DEFINE, INCREMENT, COUNTER = (
    "StartAuthSession NV_DefineSpace",
    "StartAuthSession NV_Increment",
    "StartAuthSession NV_Read",
)
READ, STEP = "StartAuthSession PolicyCommandCode PolicyOR NV_Read GetTime", "StartAuthSession NV_Read GetTime"
LAPSE = "StartAuthSession GetCapability"


class Behind(NamedTuple):
    """What a device is told of its TPM, the wire in between."""

    tcti: str
    ek_root: Path


class Tapped(NamedTuple):
    device: Device
    tpm: Tpm
    wire: Wire

    def sent(self) -> str:
        """Names of the commands since the last call."""
        names = [NAMES[code] for code in self.wire.commands]
        self.wire.forget()
        return " ".join(names)


@pytest.fixture
def tapped(tmp_path, hwlicense_tpms) -> Iterator[Callable[..., Tapped]]:
    with ExitStack() as wires:

        def make(*, warm: bool) -> Tapped:
            tpm = hwlicense_tpms(storage_key="ecc" if warm else None)
            wire = wires.enter_context(tpm.tapped())
            behind = Behind(wire.tcti, tpm.ek_root)
            return Tapped(Device(Home(tmp_path / "home"), behind), tpm, wire)  # type: ignore[arg-type]  # all it needs

        yield make


def pin(_prompt: str = "") -> Secret:
    return Secret(bytearray(b"2468"))


def cold(commands: str) -> str:
    """The same where the storage root key is made first and flushed last."""
    return f"CreatePrimary {commands} FlushContext"


@pytest.mark.parametrize(("terms", "expected"), [(TERMS, UNLIMITED), (WITH_PCRS, APPROVED)], ids=["no PCRs", "PCRs"])
@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_an_open(vendor, tapped, warm, terms, expected):
    own = tapped(warm=warm)
    licensed(vendor, own.device, terms)
    own.sent()
    for _ in range(2):  # it does not become cheaper or dearer
        own.device.open(vendor).close()
        assert own.sent() == (expected if warm else cold(expected))
    assert len(expected.split()) <= 7  # what the design promises for a warm open without limits


def test_a_fresh_process_sends_the_same(vendor, tapped):
    own = tapped(warm=True)
    licensed(vendor, own.device)
    own.sent()
    run("device", "check", "--open", "--home", own.device.home.path, "--tpm", own.wire.tcti, vendor.package)
    assert own.sent() == APPROVED


def test_verifying_without_opening_sends_nothing(vendor, tapped):
    own = tapped(warm=True)
    licensed(vendor, own.device)
    own.sent()
    environment = os.environ | {"HWLICENSE_TPM": own.wire.tcti}
    run("device", "check", "--home", own.device.home.path, vendor.package, env=environment)
    run("device", "status", "--home", own.device.home.path, env=environment)
    assert own.sent() == ""


@pytest.mark.parametrize(("terms", "expected"), [(TERMS, PIN), (WITH_PCRS, APPROVED_PIN)], ids=["no PCRs", "PCRs"])
@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_an_open_with_a_pin(vendor, tapped, warm, terms, expected):
    own = tapped(warm=warm)
    licensed(vendor, own.device, terms, pin=pin())
    own.sent()
    # The first PIN since the last start makes the TPM note that PINs are in use (Part 1, 19.8.6): it answers RETRY.
    first = expected.replace("Unseal", "Unseal Unseal")
    for each in (first, expected, expected):
        own.device.open(vendor, pin=pin).close()
        assert own.sent() == (each if warm else cold(each))


@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_an_open_without_a_ticket(vendor, tapped, warm):
    """After TPM2_Clear, or where the home's copy is of no use, each opening has the signature checked again."""
    own = tapped(warm=warm)
    licensed(vendor, own.device)
    (installed,), _ = own.device.home.licenses([vendor.public])
    (binding,) = installed.license.bindings
    held = Held.read(own.device.home.held(installed.license, binding), binding)
    without = msgspec.structs.replace(held, tickets=[])
    own.device.home.keep_held(installed.license, binding, without.write())
    own.sent()
    expected = APPROVED.replace("PolicyPCR", f"PolicyPCR {TICKET}")
    own.device.open(vendor).close()
    assert own.sent() == (expected if warm else cold(expected))


@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_an_approval_and_the_first_open_after_it(own_vendor, tapped, warm):
    own = tapped(warm=warm)
    licensed(own_vendor, own.device)
    own.tpm.reboot(firmware=b"firmware 2")
    approval = own_vendor.approve(own.device.request())
    own.sent()
    own.device.install(approval, own_vendor)
    assert own.sent() == TICKET
    own.device.open(own_vendor).close()
    assert own.sent() == (APPROVED if warm else cold(APPROVED))


def test_an_approval_that_does_not_fit_costs_one_command(own_vendor, tapped):
    """Those that came after the license are tried before its own."""
    own = tapped(warm=True)
    raw = licensed(own_vendor, own.device)
    own.tpm.reboot(firmware=b"firmware 2")
    own.device.install(own_vendor.approve(own.device.request()), own_vendor)
    own.tpm.reboot(boot=DEFAULT_BOOT)
    own.device.install(raw, own_vendor)
    own.sent()
    own.device.open(own_vendor).close()
    assert own.sent() == APPROVED.replace("PolicyPCR", "PolicyPCR PolicyPCR")


@pytest.mark.parametrize(("terms", "tickets"), [(TERMS, 0), (WITH_PCRS, 1)], ids=["no PCRs", "PCRs"])
@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_enrolling_and_installing(vendor, tapped, warm, terms, tickets):
    own = tapped(warm=warm)
    request = own.device.request()
    keys = f"{CERTIFIED} {CERTIFIED}"
    root = "ReadPublic ReadPublic" if warm else "ReadPublic CreatePrimary"
    end = "" if warm else " FlushContext"
    first = f"PCR_Read PCR_Read {root} CreatePrimary FlushContext GetCapability GetCapability {keys} GetCapability{end}"
    enrolled = f"{first} CreatePrimary Quote FlushContext"
    assert own.sent() == enrolled
    own.device.install(vendor.issue(request, own.device.tpm, terms).raw, vendor)
    imported = f"{root} StartAuthSession Import GetCapability"
    shares = f"CreatePrimary {SHARE} CreatePrimary {SHARE} FlushContext FlushContext"
    installed = " ".join([imported, shares, *[TICKET] * tickets]) + end
    assert own.sent() == installed
    assert (len(enrolled.split()), len(installed.split())) == (24 + (not warm), 17 + (not warm) + 3 * tickets)


def test_what_can_be_refused_without_the_tpm_asks_it_nothing(vendor, tapped):
    own = tapped(warm=True)
    licensed(vendor, own.device, TERMS + "[validity]\nnot_after = 2020-01-01\n")
    own.sent()
    run("device", "check", "--open", "--home", own.device.home.path, "--tpm", own.wire.tcti, vendor.package, status=1)
    assert own.sent() == ""


# ---- licenses that the TPM counts ----


@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
@pytest.mark.parametrize(("number", "expected"), [(None, COUNTED), (b"2468", COUNTED_PIN)], ids=["no PIN", "PIN"])
def test_an_open_with_opens_hours_and_pcrs(own_vendor, tapped, warm, number, expected):
    own = tapped(warm=warm)
    licensed(own_vendor, own.device, EVERYTHING, counted=True, pin=pin() if number else None)
    own.sent()
    # As for Unseal above: the first command that proves a PIN is sent twice.
    first = expected.replace("PolicyNV", "PolicyNV PolicyNV") if number else expected
    for each in (first, expected, expected):
        own.device.open(own_vendor, pin=pin if number else None).close()
        assert own.sent() == (each if warm else cold(each))
    assert len(expected.split()) == (13 if number else 12)  # what the design promises where nothing is cold


def test_an_open_with_a_cap(own_vendor, tapped):
    own = tapped(warm=True)
    licensed(own_vendor, own.device, WITH_PCRS + "cap_pcr = 15\n[limits]\nopens = 9\n", counted=True)
    own.sent()
    expected = COUNTED.replace("PolicyCounterTimer PolicyCounterTimer ", "")
    expected = expected.replace("PolicyAuthorize", "PolicyAuthorize PolicyPCR")
    tried, _, rest = expected.partition(" StartAuthSession PolicyNV")
    again = tried.removeprefix("Load ")
    first = f"{tried} PCR_Read PCR_Extend FlushContext {again} StartAuthSession PolicyNV{rest}"
    for each in (first, expected):  # once in a boot
        own.device.open(own_vendor).close()
        assert own.sent() == each


@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_an_anchor(own_vendor, tapped, warm):
    own = tapped(warm=warm)
    licensed(own_vendor, own.device, EVERYTHING.replace("[limits]", "anchor = true\n[limits]"), counted=True)
    (installed,), _ = own.device.home.licenses([own_vendor.public])
    (binding,) = installed.license.bindings
    held, approvals = own.device.home.held(installed.license, binding), installed.license.approvals
    with own.device.connect() as hardware:
        anchor = hardware.unwrap(binding, held, approvals, None).anchor
        own.sent()
        for act, expected, count in (
            (anchor.read, f"{READ} {LAPSE} FlushContext", 8),  # and once, how far the clock can be trusted
            (anchor.read, READ, 5),
            (anchor.step, STEP, 3),
            (partial(hardware.use, binding, held), f"{COUNTER} StartAuthSession GetTime {READ}", 9),
        ):
            act()
            assert own.sent() == (expected if warm else cold(expected))
            assert len(expected.split()) == count


@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_an_open_with_every_limit(own_vendor, tapped, warm):
    """The anchor is read and stepped under one key, and counts over the session that told how far its clock goes."""
    own = tapped(warm=warm)
    terms = EVERYTHING.replace("[limits]", "anchor = true\n[limits]\ninferences = 100000")
    licensed(own_vendor, own.device, terms, counted=True)
    own.sent()
    expected = [COUNTED, f"{READ} {LAPSE} {STEP.removeprefix('StartAuthSession ')}"]
    for _ in range(2):
        own.device.open(own_vendor).close()
        assert own.sent() == " ".join(expected if warm else map(cold, expected))
    assert len(" ".join(expected).split()) == 21


@pytest.mark.parametrize("warm", [True, False], ids=["persistent", "transient"])
def test_enrolling_installing_and_revising(own_vendor, tapped, tmp_path, warm):
    own = tapped(warm=warm)
    root, end = ("ReadPublic ReadPublic", "") if warm else ("ReadPublic CreatePrimary", " FlushContext")
    customer = Customer(own_vendor, tmp_path / "customer", own.tpm, own.wire)
    customer.device.request()
    plain = own.sent()
    request = customer.device.request(counted=True)
    last = " CreatePrimary Quote FlushContext"
    made = f" {root} GetCapability {DEFINE} {INCREMENT} {COUNTER}{end}"
    assert own.sent() == plain.removesuffix(last) + made + last
    customer.device.request(counted=True)  # it is made once
    again = f" {root} GetCapability NV_ReadPublic {COUNTER}{end}"
    assert own.sent() == plain.removesuffix(last) + again + last

    shares = f"CreatePrimary {SHARE} CreatePrimary {SHARE} FlushContext FlushContext {TICKET}"
    imported = f"{root} StartAuthSession Import GetCapability {shares}{end}"
    checked = f"{imported}{'' if warm else ' CreatePrimary'} {COUNTER}"
    state, owner = "StartAuthSession PolicyPCR FlushContext", "StartAuthSession PolicySecret FlushContext"
    replaced = f"{INCREMENT} NV_ReadPublic NV_UndefineSpace NV_ReadPublic {DEFINE} {WRITE} {INCREMENT}"
    for terms, expected, count in (
        (EVERYTHING, f"{state} NV_ReadPublic {DEFINE} NV_ReadPublic NV_ReadPublic {WRITE} {INCREMENT}", 44),
        (EVERYTHING, f"{state} NV_ReadPublic NV_ReadPublic {owner} {replaced}", 51),
    ):
        raw = customer.revise(terms) if customer.files else customer.issue(terms, request=request)
        own.sent()
        customer.install(raw)
        assert own.sent() == f"{checked} {expected}{end}"
        assert len(f"{checked} {expected}{end}".split()) == (count if warm else count + 3)
        customer.install(raw)  # again: it finds that all is done
        assert own.sent() == f"{checked} NV_ReadPublic{end}"
