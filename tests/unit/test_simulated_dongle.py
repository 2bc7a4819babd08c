"""The simulated dongle against what others say of it: RFC 2202, FIPS 198, python-yubico and a measured exchange."""

import errno
import itertools
import json
import threading
import time
from dataclasses import replace

import hypothesis
import pytest
import usb.core
from hypothesis import strategies

from hwlicense_simulators import Dongle, SimulatorError
from hwlicense_simulators.dongle_protocol import CRC_RESIDUAL, Configuration, Device, Faults, crc, with_crc
from tests.dongle_host import RESET, IncompleteError, RefusedError, expected, find, host, number_of, reports

SECRET, CODE = bytes(range(20)), b"access"
QUESTION = b"what is the answer?"


@pytest.fixture
def dongle():
    with Dongle(secret=SECRET) as made:
        yield made


# what others say the bytes are


def test_a_measured_exchange_byte_for_byte():
    with Dongle(secret=b"\x0b" * 20, slot=1) as dongle:
        with host(dongle) as it:
            assert it.ask(b"Hi There", 1).hex() == "b617318655057264e28bc0b6fb378c8ef146be00"
        spoken = [(kind, report.hex()) for kind, report in dongle.transfers]
    status = ("read", "0005040301010100")
    assert spoken == [
        *(status, ("write", "4869205468657280")),
        *(status, ("write", "6500000000000081")),
        *(status, ("write", "00300bac00000089")),
        ("read", "b617318655057240"),
        ("read", "64e28bc0b6fb3741"),
        ("read", "8c8ef146be005742"),
        ("read", "5400000000000043"),
        ("read", "0000000000000040"),
        ("write", "000000000000008f"),
    ]


# RFC 2202, section 3, those whose keys have 20 bytes; the third ends with equal bytes, so a less-than-64 dongle, asked
# the way yubikit does it, can answer it only because another byte fills up.
@pytest.mark.parametrize(
    ("key", "data", "digest"),
    [
        ("0b" * 20, b"Hi There".hex(), "b617318655057264e28bc0b6fb378c8ef146be00"),
        ("aa" * 20, "dd" * 50, "125d7342b9ac11cd91a39af48aa17b4f63f175d3"),
        ("0c" * 20, b"Test With Truncation".hex(), "4c1a03424b55e07fe7f27be1d58bb9324a9a5a04"),
    ],
)
def test_rfc_2202(key, data, digest):
    with Dongle(secret=bytes.fromhex(key)) as dongle, host(dongle) as it:
        assert it.ask(bytes.fromhex(data)).hex() == digest


def test_python_yubico_configures_it_and_fips_198_says_what_it_answers():
    frame = """0000000000000080 0000404142430082 0030313233343583 363738393a3b3c84
               3d3e3f0000000085 0000000440260086 0098410000000087 0003955600000089"""
    with Dongle(programmed=False) as dongle, host(dongle) as it:
        for report in frame.split():
            it.write(bytes.fromhex(report))
        assert dongle.secret == bytes(range(0x30, 0x44))
        assert it.ask(b"Sample #2").hex() == "0922d3405faa3d194f82a45830737d5cc6c75d24"


@pytest.mark.parametrize(
    ("less_than_64", "extended", "end"), [(True, 4, "04402600009841"), (False, 0, "0040220000e90f")]
)
def test_a_configuration_is_the_one_of_python_yubico(less_than_64, extended, end):
    made = replace(Configuration.for_hmac(bytes(range(0x30, 0x44)), less_than_64=less_than_64), extended=extended)
    assert made.encode()[45:].hex() == end
    assert Configuration.decode(made.encode()) == made


def test_an_empty_frame_has_the_crc_of_python_yubico():
    assert [report.hex() for report in reports(0x32, b"")] == ["0000000000000080", "00326b5b00000089"]


# what it answers


@pytest.mark.parametrize(("mode", "length"), [("less-than-64", 32), ("fixed-64", 64)])
@pytest.mark.parametrize("slot", [1, 2])
def test_modes(slot, mode, length):
    challenge = bytes(range(32)) + b" " * 32
    with Dongle(secret=SECRET, slot=slot, mode=mode) as dongle, host(dongle) as it:
        assert it.ask(challenge, slot) == expected(SECRET, challenge[:length])


def test_less_than_64_strips_whatever_the_last_byte_is(dongle):
    with host(dongle) as it:
        assert it.ask(b"abc", fill=b"\x01") == it.ask(b"abc", fill=b"\x02") == expected(SECRET, b"abc")
        assert it.ask(bytes(range(64))) == expected(SECRET, bytes(range(63)))
        assert it.ask(b"\7" * 64) == expected(SECRET, b"")


def test_serial_number_and_status(dongle):
    with host(dongle) as it:
        assert it.serial() == dongle.serial == 1234567
        assert it.read().hex() == "0005040301020100"
    assert dongle.selector == "1050:0407:1234567"


def test_a_serial_number_may_be_hidden(dongle):
    with host(dongle) as it:
        hidden = Configuration(key=bytes(16), ticket=0x40, options=0x22)
        assert it.configure(2, hidden.encode())
        with pytest.raises(RefusedError):
            it.serial()
        assert it.configure(2, bytes(52))
        assert it.serial() == 1234567


def test_an_empty_slot_refuses(dongle):
    with host(dongle) as it, pytest.raises(RefusedError):
        it.ask(QUESTION, 1)


def test_a_frame_with_a_wrong_crc_is_refused(dongle):
    with host(dongle) as it:
        *chunks, last = reports(0x38, QUESTION)
        for report in (*chunks, last[:2] + bytes((last[2] ^ 1,)) + last[3:]):
            it.write(report)
        with pytest.raises(RefusedError):
            it.receive(20)
        assert it.ask(QUESTION) == expected(SECRET, QUESTION)


@pytest.mark.parametrize("abort", [0x8F, 0xFF])
def test_a_reset_ends_what_was_going_on(dongle, abort):
    dongle.await_touch()
    with host(dongle) as it:
        it.send(0x38, QUESTION)
        assert it.read()[7] == 0x20 | 15
        assert dongle.awaiting_touch
        it.write(bytes(7) + bytes((abort,)))
        assert it.read()[7] == 0
        assert not dongle.awaiting_touch


def test_a_dongle_like_onlykey_sets_both_flags_and_wants_sixteen_bytes():
    with Dongle(secret=SECRET, vendor=0x1D50, product=0x60FC) as dongle, host(dongle) as it:
        assert (it.device.idVendor, it.device.idProduct) == (0x1D50, 0x60FC)
        assert dongle.selector.startswith("1d50:60fc:")
        it.send(0x38, b"sixteen bytes or")
        assert [it.read()[7] for _ in range(4)] == [0xC0, 0xC1, 0xC2, 0xC3]
        it.write(RESET)
        with pytest.raises(RefusedError):
            it.ask(b"too few")


# programming


def test_programming_and_access_codes():
    first, second = (Configuration.for_hmac(secret, access_code=CODE) for secret in (SECRET, SECRET[::-1]))
    with Dongle(programmed=False) as dongle, host(dongle) as it:
        assert it.read()[4:6] == b"\0\0"
        assert it.configure(2, first.encode())
        assert it.read()[4:6] == b"\1\2"
        assert it.ask(QUESTION) == expected(SECRET, QUESTION)
        for wrong in (bytes(6), b"excess"):
            assert not it.configure(2, second.encode(), wrong)
            assert not it.configure(2, bytes(52), wrong)
            assert it.read()[4:6] == b"\1\2"
        assert it.ask(QUESTION) == expected(SECRET, QUESTION)
        assert it.configure(2, second.encode(), CODE)
        assert it.ask(QUESTION) == expected(SECRET[::-1], QUESTION)
        assert it.configure(1, Configuration.for_hmac(SECRET, touch=True).encode())
        assert it.read()[4:6] == b"\3\7"
        assert it.configure(2, bytes(52), CODE)
        assert it.configure(1, bytes(52))
        assert it.read()[4:6] == b"\0\0"  # none is programmed
        assert not dongle.programmed


def test_a_damaged_configuration_is_refused(dongle):
    made = bytearray(Configuration.for_hmac(SECRET[::-1]).encode())
    for place in (0, 20, 45, 50):
        damaged = bytearray(made)
        damaged[place] ^= 1
        with host(dongle) as it:
            assert not it.configure(2, bytes(damaged))
    assert dongle.secret == SECRET


def test_a_kept_dongle_is_the_same_at_the_next_run(tmp_path):
    with Dongle(tmp_path, serial=42, access_code=CODE) as dongle:
        secret = dongle.secret
        with host(dongle) as it:
            it.configure(1, Configuration.for_hmac(SECRET, touch=True).encode())
            status = it.read()
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o600
    with Dongle(tmp_path, serial=43, secret=SECRET) as dongle, host(dongle) as it:
        assert (dongle.serial, dongle.secret, dongle.access_code, it.read()) == (42, secret, CODE, status)
        with pytest.raises(SimulatorError, match="another process uses the dongle"):
            Dongle(tmp_path).__enter__()
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(SimulatorError, match=r"state\.json is not the state"):
        Dongle(tmp_path).__enter__()


def test_a_clone_answers_alike_under_another_serial_number(dongle):
    with dongle.copy() as clone, host(dongle) as one, host(clone) as other:
        assert one.ask(QUESTION) == other.ask(QUESTION)
        assert one.serial() != other.serial()


# touch


def test_touch():
    with Dongle(secret=SECRET, touch=True) as dongle, host(dongle) as it:
        assert it.read()[5] == 0b1010
        with pytest.raises(SimulatorError, match="awaits no touch"):
            dongle.touch(seconds=0)
        threading.Thread(target=dongle.touch).start()
        it.send(0x38, QUESTION)
        assert it.receive(20) == expected(SECRET, QUESTION)
        assert it.awaited_touch


def test_touches_by_themselves():
    with Dongle(secret=SECRET, touch=True) as dongle, host(dongle) as it:
        dongle.touch_after(0.02)
        for _ in range(2):
            it.awaited_touch = False
            assert it.ask(QUESTION) == expected(SECRET, QUESTION)
            assert it.awaited_touch


def test_a_touch_that_does_not_come():
    with Dongle(touch=True, touch_seconds=0.05) as dongle, host(dongle) as it:
        with pytest.raises(RefusedError):
            it.ask(QUESTION)
        assert it.awaited_touch
        assert not dongle.awaiting_touch


# what goes wrong


def ask(dongle):
    with host(dongle) as it:
        answer = it.ask(QUESTION)
    if answer != expected(SECRET, QUESTION):
        raise ValueError("wrong answer")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("wrong_secret", ValueError),
        ("bad_crc", IncompleteError),
        ("miss_sequence", IncompleteError),
        ("stick", TimeoutError),
        ("never_answer", TimeoutError),
        ("await_touch", TimeoutError),
        ("time_out_touch", RefusedError),
        ("short_reports", IndexError),
        ("random_bytes", Exception),
    ],
)
def test_a_fault_shows_and_can_be_healed(dongle, fault, error):
    ask(dongle)
    getattr(dongle, fault)()
    with pytest.raises(error):
        ask(dongle)
    dongle.heal()
    with host(dongle) as it:
        it.write(RESET)
    ask(dongle)


@pytest.mark.parametrize(("fault", "number"), [("deny", errno.EACCES), ("occupy", errno.EBUSY)])
def test_a_dongle_that_cannot_be_had(dongle, fault, number):
    getattr(dongle, fault)()
    with pytest.raises(usb.core.USBError) as error:
        ask(dongle)
    assert number_of(error) == number
    dongle.heal()
    dongle.pull()
    dongle.plug()
    ask(dongle)


def test_a_stale_answer(dongle):
    dongle.answer_stale()
    with host(dongle) as it:
        assert it.ask(b"one") == it.ask(b"two") == expected(SECRET, b"one")


def test_a_repeated_sequence_number(dongle):
    dongle.repeat_sequence()
    with host(dongle) as it:
        it.send(0x38, QUESTION)
        assert [it.read()[7] for _ in range(6)] == [0x40, 0x41, 0x41, 0x42, 0x43, 0x40]


def test_reports_written_too_early_are_lost(dongle):
    dongle.be_busy()
    ask(dongle)
    with host(dongle) as it:
        for report in reports(0x38, QUESTION):
            it.write(report)
        assert [it.read()[7] for _ in range(4)] == [0x80, 0x80, 0x80, 0]
        with pytest.raises(RefusedError):
            it.receive(20)


def test_slow_transfers_run_into_a_short_limit(dongle):
    with host(dongle) as it:
        dongle.slow(0.05)
        start = time.monotonic()
        it.read()
        assert time.monotonic() - start >= 0.05
        with pytest.raises(usb.core.USBTimeoutError) as error:
            it.read(timeout=10)
        assert number_of(error) == errno.ETIMEDOUT


def test_hanging_transfers_end_with_the_limit_the_fault_or_the_plug(dongle):
    with host(dongle) as it:
        dongle.hang()
        with pytest.raises(usb.core.USBTimeoutError):
            it.read(timeout=10)
        threading.Timer(0.05, dongle.heal).start()
        assert len(it.read(timeout=0)) == 8
        dongle.hang()
        threading.Timer(0.05, dongle.pull).start()
        with pytest.raises(usb.core.USBError) as error:
            it.read(timeout=0)
        assert number_of(error) == errno.ENODEV


@pytest.mark.parametrize("transfers", [1, 2, 5, 8, 13])
def test_pulled_in_the_middle_of_a_frame(dongle, transfers):
    dongle.pull_after(transfers)
    with host(dongle) as it, pytest.raises(usb.core.USBError) as error:
        it.ask(QUESTION)
    assert number_of(error) == errno.ENODEV
    assert len(dongle.transfers) == transfers
    assert find(dongle.bus) is None
    dongle.plug()
    ask(dongle)


# any bytes at all

REPORTS = strategies.binary(min_size=8, max_size=8)
ORDERLY = strategies.builds(reports, strategies.integers(0, 255), strategies.binary(max_size=64))


@hypothesis.given(
    strategies.lists(strategies.one_of(REPORTS.map(lambda report: [report]), ORDERLY, strategies.just([])), max_size=20)
)
def test_no_report_breaks_the_device(written):
    device = Device(1, {1: Configuration.for_hmac(SECRET), 2: Configuration()}, clock=itertools.count().__next__)
    for report in itertools.chain(*written):
        device.write(report)
        assert len(device.read()) == 8
    device.write(RESET)
    assert device.read()[7] == 0


@hypothesis.given(strategies.binary(max_size=80))
def test_no_length_breaks_it(report):
    device = Device(1, {}, clock=float)
    device.write(report)
    assert len(device.read()) == 8


@hypothesis.given(strategies.binary(min_size=64, max_size=64), strategies.booleans())
def test_any_challenge_is_answered_by_hmac(challenge, less_than_64):
    device = Device(1, {1: Configuration.for_hmac(SECRET, less_than_64=less_than_64)}, clock=float)
    for report in reports(0x30, challenge):
        device.write(report)
    answer = b"".join(device.read()[:7] for _ in range(4))
    length = len(challenge)
    while less_than_64 and length and challenge[length - 1] == challenge[-1]:
        length -= 1
    assert answer[:22] == with_crc(expected(SECRET, challenge[:length]))


@hypothesis.given(strategies.binary(min_size=52, max_size=52))
def test_a_configuration_decodes_strictly_enough(data):
    try:
        Configuration.decode(data)
    except ValueError:
        assert crc(data) != CRC_RESIDUAL
    whole = with_crc(data[:50])
    Configuration.decode(whole)


def test_all_faults_are_off_in_a_new_device():
    assert Faults() == Device(1, {}, clock=float).faults


def test_state_is_readable(tmp_path):
    with Dongle(tmp_path, secret=SECRET):
        state = json.loads((tmp_path / "state.json").read_text())
    assert Configuration.decode(bytes.fromhex(state["slots"]["2"])).secret == SECRET
