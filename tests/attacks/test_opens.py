"""More opens than the license gives, hours past their end, old revisions: by whoever holds home, disk and TPM."""

from __future__ import annotations

import datetime
import shutil
from contextlib import contextmanager, suppress

import pytest
from tpm2_pytss import ESAPI, ESYS_TR, TPM2B_NV_PUBLIC, TSS2_Exception

from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import ExceededError, HwlicenseError, Reason
from hwlicense.core.secret import Secret
from hwlicense.core.terms import parse_terms
from hwlicense.core.tpm.composing import Conditions
from hwlicense.core.tpm.nv import NvAttributes, NvPublic, counter_public
from hwlicense.core.tpm.wire import number, sized
from hwlicense.device import clock
from hwlicense.device.counters import Counters
from hwlicense.vendor import basis, evidence, issuing
from hwlicense.vendor.resetting import reset_clock
from tests.world import NOW, TERMS, WITH_PCRS, licensed

LIMIT = 4
OPENS = TERMS + f"[limits]\nopens = {LIMIT}\n"
PLATFORM = WITH_PCRS + f"[limits]\nopens = {LIMIT}\n"
HOURS = TERMS + "[limits]\npowered_on_hours = 10\n"


def opened(device, vendor, **options) -> int:
    """How often it opens until it does not."""
    done = 0
    with suppress(HwlicenseError):
        while done < 50:
            device.open(vendor, **options).close()
            done += 1
    return done


def reason(device, vendor, **options) -> Reason:
    with pytest.raises(HwlicenseError) as error:
        device.open(vendor, **options)
    return error.value.reason


def binding_of(raw: bytes):
    return unverified(raw, License)[0].bindings[0]


@contextmanager
def root(device):
    """Root's own way to the TPM."""
    with ESAPI(device.tpm.tcti) as esapi:
        yield esapi


class Revisable:
    """A device whose license can be revised: by the vendor, for the request that it was made for."""

    def __init__(self, vendor, device, terms: str) -> None:
        self.vendor, self.device, self.raws = vendor, device, list[bytes]()
        self.request = device.request(counted=True)
        trusted = evidence.Trusted(evidence.read_roots(device.tpm.ek_root.read_bytes(), "virtual"))
        self.parts = evidence.examine(self.request, trusted, datetime.datetime.now(datetime.UTC)).parts
        self.identifier: str | None = None
        self.revise(terms)

    def make(self, terms: str) -> bytes:
        vendor, agreed = self.vendor, parse_terms(terms)
        made = issuing.make(
            vendor.public,
            vendor.keys,
            self.parts,
            [basis.packaged(vendor.manifest)],
            agreed,
            vendor.place.approvals(agreed.product),
            today=NOW.date(),
            license_id=self.identifier,
            revision=len(self.raws) + 1,
        )
        if made.approval:
            vendor.place.keep_approval(*made.approval)
        self.identifier = made.license.grant.license
        self.raws.append(made.raw)
        return made.raw

    def revise(self, terms: str) -> bytes:
        raw = self.make(terms)
        self.device.install(raw, self.vendor)
        return raw


def home_of(device, copy):
    """Put a copied home in place of the device's."""
    shutil.rmtree(device.home.path)
    shutil.copytree(copy, device.home.path)


def test_a_revision_ends_the_old_one_in_hardware(own_vendor, device, tmp_path):
    license_ = Revisable(own_vendor, device, OPENS)
    device.open(own_vendor).close()
    shutil.copytree(device.home.path, tmp_path / "old")
    license_.revise(TERMS + "[limits]\nopens = 2\n")
    assert opened(device, own_vendor) == 2
    shutil.copytree(device.home.path, tmp_path / "new")
    home_of(device, tmp_path / "old")
    assert reason(device, own_vendor) == Reason.LICENSE_SUPERSEDED
    with pytest.raises(HwlicenseError) as error:
        device.install(license_.raws[0], own_vendor)
    assert error.value.reason == Reason.LICENSE_SUPERSEDED
    home_of(device, tmp_path / "new")
    device.install(license_.raws[1], own_vendor)
    assert opened(device, own_vendor) == 0


def test_a_revocable_license_without_limits_is_ended_too(own_vendor, device, tmp_path):
    license_ = Revisable(own_vendor, device, TERMS + "[require]\nrevocable = true\n")
    shutil.copytree(device.home.path, tmp_path / "old")
    license_.revise(TERMS + "[require]\nrevocable = true\n")
    device.open(own_vendor).close()
    home_of(device, tmp_path / "old")
    assert reason(device, own_vendor) == Reason.LICENSE_SUPERSEDED


def test_a_skipped_revision_is_no_matter(own_vendor, device):
    license_ = Revisable(own_vendor, device, OPENS)
    license_.make(TERMS + "[limits]\nopens = 9\n")
    license_.revise(TERMS + "[limits]\nopens = 2\n")
    assert opened(device, own_vendor) == 2
    with pytest.raises(HwlicenseError) as error:
        device.install(license_.raws[1], own_vendor)
    assert error.value.reason == Reason.LICENSE_SUPERSEDED


NV_COMMANDS = (0x134, 0x122, 0x12A, 0x137)  # increment, undefine, define, write


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("cut", range(6))
def test_a_power_cut_at_any_step_of_a_revision(own_vendor, device, cut, executed, tmp_path):
    license_ = Revisable(own_vendor, device, OPENS + "inferences = 1000\n")
    device.open(own_vendor).close()
    shutil.copytree(device.home.path, tmp_path / "old")
    raw = license_.make(TERMS + "[limits]\nopens = 3\n")
    with device.tpm.tapped() as wire:
        through = type(device)(device.home, _Tapped(wire.tcti))
        wire.cut(NV_COMMANDS[_KINDS[cut]], after=_PLACES[cut], executed=executed)
        with suppress(HwlicenseError):
            through.install(raw, own_vendor)
    inside = opened(device, own_vendor)
    untouched = (cut, executed) == (0, False)
    assert inside == (LIMIT - 1 if untouched else 0), "the old one is whole, or nothing opens"
    device.tpm.power_cut()
    device.install(raw, own_vendor)
    assert opened(device, own_vendor) == 3
    home_of(device, tmp_path / "old")
    assert reason(device, own_vendor) == Reason.LICENSE_SUPERSEDED


_KINDS = (0, 1, 1, 2, 3, 0)
_PLACES = (0, 0, 1, 0, 0, 1)


class _Tapped:
    def __init__(self, tcti: str) -> None:
        self.tcti = tcti


def test_no_more_than_the_license_gives(vendor, device):
    licensed(vendor, device, OPENS, counted=True)
    assert opened(device, vendor) == LIMIT
    with pytest.raises(ExceededError) as error:
        device.open(vendor)
    assert (error.value.reason, error.value.wait, error.value.exit_status) == (Reason.OPENS_EXHAUSTED, None, 1)


def test_restarts_power_cuts_and_restored_homes_give_none_back(vendor, device, tmp_path):
    licensed(vendor, device, OPENS, counted=True)
    shutil.copytree(device.home.path, tmp_path / "copy")
    done = 0
    for event in (device.tpm.reboot, device.tpm.power_cut, lambda: (device.tpm.suspend(), device.tpm.resume())):
        device.open(vendor).close()
        done += 1
        event()
        shutil.rmtree(device.home.path)
        shutil.copytree(tmp_path / "copy", device.home.path)
    assert done + opened(device, vendor) == LIMIT


def test_installing_again_gives_none_back(vendor, device):
    raw = licensed(vendor, device, OPENS, counted=True)
    device.open(vendor).close()
    device.install(raw, vendor)
    assert opened(device, vendor) == LIMIT - 1


def test_what_is_refused_for_another_reason_costs_no_open(own_vendor, device):
    licensed(own_vendor, device, PLATFORM, counted=True)
    device.tpm.reboot(firmware=b"other")
    for _ in range(2 * LIMIT):
        assert reason(device, own_vendor) == Reason.PCR_MISMATCH
    device.tpm.reboot(firmware=b"")
    device.tpm.boot.pop(0)
    with device.connect() as hardware:
        binding = device.home.licenses([own_vendor.public])[0][0].license.bindings[0]
        held = device.home.held(device.home.licenses([own_vendor.public])[0][0].license, binding)
        assert hardware.use(binding, held).opens == 0


def test_a_wrong_pin_costs_no_open_and_counts_as_wrong(vendor, device):
    licensed(vendor, device, OPENS, counted=True, pin=Secret(bytearray(b"2468")))
    assert reason(device, vendor, pin=lambda _: "1357") == Reason.PIN_WRONG
    assert opened(device, vendor, pin=lambda _: "2468") == LIMIT


def test_status_and_the_anchor_cost_no_open(vendor, device):
    raw = licensed(vendor, device, OPENS + "inferences = 100\n", counted=True)
    license_ = unverified(raw, License)[0]
    with device.connect() as hardware:
        for _ in range(5):
            assert hardware.use(license_.bindings[0], device.home.held(license_, license_.bindings[0])).opens == 0
    for _ in range(LIMIT):
        with device.open(vendor) as model:
            model.spend()
    assert reason(device, vendor) == Reason.OPENS_EXHAUSTED


def test_the_indexs_password_reads_it_at_the_cost_of_an_open(vendor, device):
    binding = binding_of(licensed(vendor, device, OPENS, counted=True))
    with root(device) as esapi, Counters(device.home).read(binding.counter.handle) as auth:
        index = esapi.tr_from_tpmpublic(binding.indexes[0].handle)
        esapi.tr_set_auth(index, bytes(auth.buffer))
        esapi.nv_read(index, 8, auth_handle=index)
        esapi.tr_close(index)
    assert opened(device, vendor) == LIMIT - 1


@pytest.mark.parametrize("kind", ["same", "free to write", "counter as ordinary index"])
def test_an_index_that_root_made_is_not_the_licenses(vendor, device, kind):
    binding = binding_of(licensed(vendor, device, OPENS, counted=True))
    assert opened(device, vendor) == LIMIT
    asked = Conditions.of(binding)
    public = asked.public(binding.indexes[0]).unwritten
    if kind == "free to write":
        public = NvPublic(public.handle, public.attributes | (1 << 1), b"")
    if kind == "counter as ordinary index":
        ordinary = NvAttributes.AUTH_WRITE | NvAttributes.AUTH_READ | NvAttributes.NO_DA
        public = NvPublic(binding.counter.handle, ordinary)
    with root(device) as esapi, Counters(device.home).read(binding.counter.handle) as auth:
        esapi.nv_undefine_space(esapi.tr_from_tpmpublic(public.handle))
        area, _ = TPM2B_NV_PUBLIC.unmarshal(sized(public.raw))
        made = esapi.nv_define_space(bytes(auth.buffer), area)
        esapi.tr_set_auth(made, bytes(auth.buffer))
        with suppress(TSS2_Exception):  # an index with the license's policy cannot be written
            owner = kind == "free to write"
            data = number(0, 4) + b"\xff" * 4 if owner else number(binding.counter.value, 8)
            esapi.nv_write(made, data, auth_handle=ESYS_TR.OWNER if owner else made)
    assert opened(device, vendor) == 0
    assert reason(device, vendor) == Reason.COUNTER_LOST


def test_a_counter_that_is_made_again_starts_beyond(vendor, device):
    binding = binding_of(licensed(vendor, device, OPENS, counted=True))
    public = counter_public(binding.counter.handle)
    with root(device) as esapi, Counters(device.home).read(binding.counter.handle) as auth:
        esapi.nv_undefine_space(esapi.tr_from_tpmpublic(public.handle))
        made = esapi.nv_define_space(bytes(auth.buffer), TPM2B_NV_PUBLIC.unmarshal(sized(public.unwritten.raw))[0])
        esapi.tr_set_auth(made, bytes(auth.buffer))
        esapi.nv_increment(made, auth_handle=made)
    assert reason(device, vendor) == Reason.LICENSE_SUPERSEDED


def test_clearing_the_tpm_ends_it(vendor, device):
    raw = licensed(vendor, device, HOURS, counted=True)
    device.open(vendor).close()
    device.tpm.clear()
    assert reason(device, vendor) in {Reason.WRONG_DEVICE, Reason.COUNTER_LOST}
    with pytest.raises(HwlicenseError):
        device.install(raw, vendor)


def test_hours_end_and_the_clock_is_vouched_for_after_a_power_cut(vendor, device):
    binding = binding_of(licensed(vendor, device, HOURS, counted=True))
    device.open(vendor).close()
    device.tpm.power_cut()
    device.open(vendor).close()
    with root(device) as esapi:
        esapi.clock_set(binding.deadline - 60_000)
    device.open(vendor).close()
    with root(device) as esapi:
        esapi.clock_set(binding.deadline)
    with pytest.raises(ExceededError) as error:
        device.open(vendor)
    assert (error.value.reason, error.value.wait, error.value.exit_status) == (Reason.HOURS_EXHAUSTED, None, 1)
    device.tpm.reboot()  # swtpm keeps its clock with its next write to NV, or an orderly end: not at a time of its own
    assert reason(device, vendor) == Reason.HOURS_EXHAUSTED
    device.tpm.power_cut()
    assert reason(device, vendor) == Reason.HOURS_EXHAUSTED


def test_without_the_homes_counter_it_does_not_open(vendor, device):
    licensed(vendor, device, OPENS, counted=True)
    shutil.rmtree(device.home.path / "counters")
    assert reason(device, vendor) == Reason.HOME_DAMAGED


def test_other_users_of_the_tpm_cannot_spend_opens(vendor, device):
    binding = binding_of(licensed(vendor, device, OPENS, counted=True))
    with root(device) as esapi:
        index = esapi.tr_from_tpmpublic(binding.indexes[0].handle)
        for _ in range(LIMIT):
            with pytest.raises(TSS2_Exception):
                esapi.nv_read(index, 8, auth_handle=index)
        esapi.tr_close(index)
    assert opened(device, vendor) == LIMIT


def test_a_plain_license_uses_no_nv(vendor, device):
    with root(device) as esapi:
        before = _indices(esapi)
    licensed(vendor, device)
    device.open(vendor).close()
    with root(device) as esapi:
        assert _indices(esapi) == before


def _indices(esapi) -> list[int]:
    from tpm2_pytss import TPM2_CAP  # noqa: PLC0415

    _, capability = esapi.get_capability(TPM2_CAP.HANDLES, 0x01000000, 254)
    return list(map(int, capability.data.handles))


def test_enrolling_again_uses_the_spare_counter(device):
    first = unverified_counter(device.request(counted=True))
    assert unverified_counter(device.request(counted=True)) == first


def unverified_counter(raw: bytes):
    from hwlicense.core.documents import Request  # noqa: PLC0415

    return unverified(raw, Request)[0].hardware[0].counter


def test_nothing_is_left_in_the_tpm(vendor, device):
    from tpm2_pytss import TPM2_CAP  # noqa: PLC0415

    licensed(vendor, device, OPENS + "inferences = 100\n", counted=True)
    for _ in range(LIMIT + 1):
        with suppress(HwlicenseError), device.open(vendor) as model:
            model.spend()
    with root(device) as esapi:
        for first in (0x80000000, 0x02000000, 0x03000000):
            _, capability = esapi.get_capability(TPM2_CAP.HANDLES, first, 64)
            assert not list(capability.data.handles)


def test_a_clock_reset_mends_what_was_set_far_forward(vendor, device, monkeypatch):
    """Through the whole of an opening, of which the first checks ask no hardware."""
    raw = licensed(vendor, device, OPENS + "inferences = 100\n", counted=True)
    right, ahead = clock.wall(), 300 * 86400
    monkeypatch.setattr(clock, "wall", lambda: right + ahead)
    device.open(vendor).close()
    monkeypatch.setattr(clock, "wall", lambda: right)
    assert reason(device, vendor) == Reason.CLOCK_SET_BACK
    _, reset = reset_clock(vendor.keys, unverified(raw, License)[0], datetime.datetime.now(datetime.UTC))
    device.install(reset, vendor)
    assert opened(device, vendor) == LIMIT - 1, "what was refused by the clock cost no open"


def test_days_that_are_over_and_a_clock_set_back_cost_no_open(vendor, device, monkeypatch):
    """Though each is seen in the account alone; and over a restart, after which the account is of another boot."""
    terms = OPENS + "inferences = 1000\n[validity]\ndays_from_first_use = 5\n"
    licensed(vendor, device, terms, counted=True)
    right = clock.wall()
    device.open(vendor).close()
    monkeypatch.setattr(clock, "boot_identifier", lambda: (1, 2))
    for off, expected in ((10 * 86400, Reason.LICENSE_EXPIRED), (-20 * 3600, Reason.CLOCK_SET_BACK)):
        monkeypatch.setattr(clock, "wall", lambda off=off: right + off)
        for _ in range(LIMIT):
            assert reason(device, vendor) == expected
    monkeypatch.setattr(clock, "wall", lambda: right)
    assert opened(device, vendor) == LIMIT - 1


@pytest.mark.parametrize("where", ["ledger", "folder"])
def test_a_state_folder_of_no_use_costs_no_open(vendor, device, where):
    raw = licensed(vendor, device, OPENS + "inferences = 1000\n", counted=True)
    folder = device.home.state / "licenses" / unverified(raw, License)[0].grant.license / "use-1"
    folder.mkdir(parents=True, exist_ok=True)
    blocked = folder / "ledger" if where == "ledger" else folder
    shutil.rmtree(blocked, ignore_errors=True)
    blocked.mkdir() if where == "ledger" else blocked.write_bytes(b"")
    for _ in range(LIMIT):
        with pytest.raises(HwlicenseError):
            device.open(vendor)
    blocked.rmdir() if where == "ledger" else blocked.unlink()
    assert opened(device, vendor) == LIMIT
