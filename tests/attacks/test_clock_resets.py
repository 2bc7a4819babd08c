"""Clock resets forged, edited, replayed, and taken to where they are not for."""

import datetime
import stat

import pytest

from hwlicense.core.documents import ClockReset, License
from hwlicense.core.envelope import unverified
from hwlicense.core.schema import SCHEMA
from hwlicense.device.home import Home
from hwlicense.device.resetting import install_clock_reset, pending
from hwlicense.vendor.resetting import reset_clock
from tests.forging import edited, flipped, refused, rejoined, replace, signed_anew
from tests.world import Vendor, licensed

MADE = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def installed(vendor, device):
    return unverified(licensed(vendor, device), License)[0]


def reset(vendor, installed, when=MADE):
    return reset_clock(vendor.keys, installed, when)[1]


def kept(home, installed):
    return home.state / "licenses" / installed.grant.license / "clock.hwclk"


def test_one_is_taken_in_and_found(vendor, device, installed):
    assert pending(device.home, installed, vendor.public) is None
    raw = reset(vendor, installed)
    taken = install_clock_reset(device.home, raw)
    assert taken == ClockReset(SCHEMA, vendor.public.fingerprint, installed.grant.license, int(MADE.timestamp()))
    assert pending(device.home, installed, vendor.public) == taken
    assert kept(device.home, installed).read_bytes() == raw
    assert stat.S_IMODE(kept(device.home, installed).stat().st_mode) == 0o600
    install_clock_reset(device.home, raw)  # once more does no harm
    device.open(vendor).close()


def test_an_older_one_is_refused_after_a_newer(vendor, device, installed):
    older, newer = reset(vendor, installed), reset(vendor, installed, MADE + HOUR)
    for raw in (older, newer):
        install_clock_reset(device.home, raw)
    with refused("CLOCK_SET_BACK", words="2030-01-01 13:00:00 UTC"):
        install_clock_reset(device.home, older)
    assert kept(device.home, installed).read_bytes() == newer


def test_no_byte_may_differ(vendor, device, installed):
    raw = reset(vendor, installed)
    for place in range(0, len(raw), 5):
        with refused("DOCUMENT_MALFORMED", "SIGNATURE_INVALID", "SIGNATURE_MISSING", "VENDOR_UNTRUSTED"):
            install_clock_reset(device.home, flipped(raw, place))
    for size in range(0, len(raw), 97):
        with refused("DOCUMENT_MALFORMED"):
            install_clock_reset(device.home, raw[:size])
    assert not kept(device.home, installed).exists()


def test_another_time_under_the_old_signatures_is_refused(vendor, device, installed):
    raw = reset(vendor, installed)
    later = replace(unverified(raw, ClockReset)[0], time=2**40)
    with refused("SIGNATURE_INVALID"):
        install_clock_reset(device.home, edited(raw, later))
    for which, reason in ((slice(1), "SIGNATURE_MISSING"), (slice(1, None), "SIGNATURE_MISSING")):
        with refused(reason):
            install_clock_reset(device.home, signed_anew(later, vendor, which=which))
    with refused("VENDOR_UNTRUSTED"):
        install_clock_reset(device.home, rejoined(raw, signatures=[]))


@pytest.mark.parametrize("time", [0, -1, 2**53, 1.5, True, "now", None])
def test_a_time_that_is_none(vendor, device, installed, time):
    absurd = replace(unverified(reset(vendor, installed), ClockReset)[0], time=time)
    with refused("DOCUMENT_MALFORMED"):
        install_clock_reset(device.home, signed_anew(absurd, vendor))


def test_the_furthest_time_is_taken_in_and_said(vendor, device, installed):
    furthest = replace(unverified(reset(vendor, installed), ClockReset)[0], time=2**53 - 1)
    install_clock_reset(device.home, signed_anew(furthest, vendor))
    with refused("CLOCK_SET_BACK", words="9,007,199,254,740,991 s after 1970"):
        install_clock_reset(device.home, reset(vendor, installed))


def test_one_for_another_license_is_refused(vendor, device, installed):
    other = unverified(vendor.issue(device.request(), device.tpm).raw, License)[0]
    with refused("LICENSE_ABSENT"):
        install_clock_reset(device.home, reset(vendor, other))
    device.install(signed_anew(other, vendor), vendor)
    install_clock_reset(device.home, reset(vendor, other))
    assert pending(device.home, installed, vendor.public) is None
    kept(device.home, installed).write_bytes(reset(vendor, other))  # put in its place
    with refused("HOME_DAMAGED"):
        pending(device.home, installed, vendor.public)


def test_another_vendors_is_refused(vendor, device, installed, tmp_path):
    (tmp_path / "other").mkdir()
    other = Vendor(tmp_path / "other")
    raw = reset(other, replace(installed, grant=replace(installed.grant, vendor=other.public.fingerprint)))
    with refused("VENDOR_UNTRUSTED"):
        install_clock_reset(device.home, raw)
    device.home.trust(other.public)
    with refused("LICENSE_ABSENT"):
        install_clock_reset(device.home, raw)
    with refused("WRONG_VENDOR"):  # in the first one's name
        install_clock_reset(device.home, reset(other, installed))
    kept(device.home, installed).write_bytes(raw)
    with refused("HOME_DAMAGED"):
        pending(device.home, installed, vendor.public)


def test_a_damaged_one_is_said_and_replaced(vendor, device, installed):
    raw = reset(vendor, installed)
    install_clock_reset(device.home, raw)
    for bad in (b"", b"\0" * 100, flipped(raw, 300), b"x" * (5 << 20)):
        kept(device.home, installed).write_bytes(bad)
        with refused("HOME_DAMAGED"):
            pending(device.home, installed, vendor.public)
        install_clock_reset(device.home, raw)
        assert pending(device.home, installed, vendor.public)


def test_what_is_no_clock_reset(vendor, device, installed):
    for raw in (signed_anew(installed, vendor), b"", b"{}", b"\xff" * 99):
        with refused("DOCUMENT_MALFORMED"):
            install_clock_reset(device.home, raw)


def test_a_read_only_home_keeps_it_in_the_state_folder(vendor, device, installed, tmp_path):
    device.home.trust(vendor.public)
    home = Home(device.home.path, tmp_path / "state")
    install_clock_reset(home, reset(vendor, installed))
    assert kept(home, installed).is_file()
    assert not kept(device.home, installed).exists()
    assert pending(home, installed, vendor.public)
    assert not pending(device.home, installed, vendor.public)
    install_clock_reset(device.home, reset(vendor, installed, MADE + HOUR))  # before there was a state folder
    assert pending(home, installed, vendor.public).time == (MADE + HOUR).timestamp()
    with refused("CLOCK_SET_BACK"):
        install_clock_reset(home, reset(vendor, installed))
