"""The binder for USB dongles: its bytes against what others say they are, and its manners against a simulated bus."""

import contextlib
import errno
import os
import secrets
import subprocess
import sys
import threading
import time
import weakref

import hypothesis
import pytest
import usb.core
from hypothesis import strategies
from usb.backend import libusb1

from hwlicense.binders.usb import Selector, UsbHardware, connection, dongle, find, find_one, frames
from hwlicense.core import dongle as challenges
from hwlicense.core.documents import UsbBinding
from hwlicense.core.errors import AbsentError, HardwareError, HwlicenseError, Reason, UsageError
from hwlicense.core.schema import check
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.pcrs import Selection
from hwlicense_simulators import Bus, Dongle

KEY, CODE = b"\x0b" * 20, b"access"
DIGEST = "b617318655057264e28bc0b6fb378c8ef146be00"  # RFC 2202, section 3, case 1: "Hi There"
WRITES = ["4869205468657280", "6500000000000081", "00300bac00000089"]  # measured
READS = ["b617318655057240", "64e28bc0b6fb3741", "8c8ef146be005742", "5400000000000043", "b617318655057240"]
IDLE, RESET = "0005040305010000", "000000000000008f"
PROTOCOL_FAULTS = ["bad_crc", "miss_sequence", "repeat_sequence", "stick", "never_answer", "short_reports", "hang"]


def secret(content):
    return Secret(bytearray(content))


class Clock:
    """Time that passes only where somebody sleeps, or looks at it."""

    def __init__(self):
        self.now, self.slept = 1000.0, 0.0

    def monotonic(self):
        self.now += 1e-4
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (dongle, connection):
        monkeypatch.setattr(module, "time", made)
    return made


class Simulated:
    """Dongles on one bus, which `backend` shows to pyusb."""

    def __init__(self, stack):
        self.bus, self._stack = Bus(), stack
        self.backend = self.bus.backend()

    def __call__(self, *, secret=KEY, **options):
        return self._stack.enter_context(Dongle(secret=secret, bus=self.bus, **options))


@pytest.fixture
def simulated():
    """Makes dongles. In the end each has its keyboard driver, and nobody has claimed it."""
    with contextlib.ExitStack() as stack:
        made = Simulated(stack)
        yield made
        for plugged in made.bus.all():
            assert (plugged.driver, plugged.claim) == (True, None)


@pytest.fixture
def plugged(simulated):
    made = simulated()
    made.backend = simulated.backend
    return made


def program(device, slot=1, key=KEY, *, touch=False, mode="less-than-64", access_code=None, current=None):
    device.program(slot, secret(key), touch=touch, mode=mode, access_code=access_code, current=current)


def binding_to(simulator, *, slot=2, answers=3, serial=None, touch=False):
    """As a vendor who knows the secret makes it."""
    seed, first = secrets.token_bytes(32), 7

    def answer(number):
        return challenges.answer(secret(simulator.secret), "less-than-64", challenges.challenge(seed, number))

    asked = challenges.challenge(seed, first)
    numbers = range(first + 1, first + 1 + answers)
    made = UsbBinding(
        dongle=challenges.identifier(
            challenges.answer(secret(simulator.secret), "less-than-64", challenges.identity_challenge())
        ),
        product=simulator.selector[:9],
        serial=str(simulator.serial) if serial is None else serial or None,
        slot=slot,
        touch=touch,
        seed=seed,
        first=first,
        check=challenges.check_value(answer(first), asked),
        answers=b"".join(challenges.verifier(answer(n), challenges.challenge(seed, n)) for n in numbers),
    )
    return made, challenges.member_secret(answer(first), asked)


def refused(reason, kind=HardwareError):
    return pytest.raises(kind, check=lambda error: error.reason == reason and type(error) is kind)


# ---- bytes ----


def test_the_measured_frame_byte_for_byte():
    assert [bytes(report).hex() for report in frames.chunks(frames.frame(0x30, b"Hi There"))] == WRITES


def test_the_measured_answer_byte_for_byte():
    response = frames.Response(20)
    assert [response.take(bytes.fromhex(report)) for report in READS] == [False] * 4 + [True]
    assert response.content().buffer.hex() == DIGEST


def test_the_checksum_is_the_one_that_others_compute():
    assert frames.crc16(b"123456789") == 0x906E ^ 0xFFFF  # check value of CRC-16/ISO-IEC-14443-3-B
    assert frames.crc16(bytes.fromhex("0010bf91ed45")) == 0xF0B8  # the serial number that OnlyKey's firmware recites


def test_a_configuration_is_laid_out_as_in_ykdef():
    made = frames.configuration(
        secret(range(20)), touch=True, mode="less-than-64", access_code=secret(b"newone"), current=secret(b"oldone")
    )
    head = "00" * 16 + "101112130000" + "000102030405060708090a0b0c0d0e0f" + b"newone".hex() + "0004402e0000"
    assert made.buffer[:50].hex() == head
    assert frames.crc16(made.buffer[:52]) == 0xF0B8
    assert made.buffer[52:] == b"oldone"
    plain = frames.configuration(secret(KEY), touch=False, mode="fixed-64", access_code=None, current=None)
    assert not any((*plain.buffer[38:44], *plain.buffer[52:]))
    assert plain.buffer[47] == 0x22


@pytest.mark.parametrize(
    "order",
    [[0, 1, 2, 0], [0, 1, 1, 2, 3, 0], [1, 2, 3, 0], [0, 1, 3, 2, 0], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 3, 0], [0, 0]],
    ids=["missing", "repeated", "headless", "swapped", "longer", "last twice", "of one"],
)
def test_an_answer_out_of_order_is_none(order):
    response = frames.Response(20)
    with refused(Reason.DONGLE_FAILED):
        for number in order:
            response.take(b"\xff" * 7 + bytes((0x40 | number,)))
    assert not any(response._buffer)


@hypothesis.given(strategies.lists(strategies.binary(max_size=9), max_size=8), strategies.integers(0, 40))
def test_whatever_the_reports_are_only_errors_of_the_tree_come(reports, size):
    response = frames.Response(size)
    with contextlib.suppress(HwlicenseError):
        for report in reports:
            if response.take(report):
                assert len(response.content()) == size
    with contextlib.suppress(HwlicenseError):
        frames.Status.parse(reports[0] if reports else b"")


@hypothesis.given(strategies.binary(min_size=20, max_size=20), strategies.integers(0, 223))
def test_a_flipped_bit_of_an_answer_is_noticed(answer, bit):
    crc = ~frames.crc16(answer) & 0xFFFF
    whole = bytearray(answer + crc.to_bytes(2, "little") + bytes(6))
    whole[bit // 8] ^= 1 << bit % 8
    response = frames.Response(20)
    for number in range(4):
        response.take(whole[7 * number : 7 * number + 7] + bytes((0x40 | number,)))
    assert response.take(bytes(7) + b"\x40")
    if bit // 8 < 22:  # the rest is padding, in which OnlyKey leaves bytes of its own
        with refused(Reason.DONGLE_FAILED):
            response.content()
    else:
        assert response.content().buffer == answer


# ---- reports over the bus ----


def scripted(backend, monkeypatch, reads):
    """Lets the device say what is in `reads`, then `IDLE`; gives what is written to it, and what happens otherwise."""
    left, written = [bytes.fromhex(report) for report in reads], []

    def transfer(_handle, kind, request, value, index, data, timeout):
        assert (kind, request, value, index) in {(0xA1, 1, 0x0300, 0), (0x21, 9, 0x0300, 0)}
        assert len(data) == 8
        assert 0 < timeout <= 1000
        if kind == 0x21:
            written.append(bytes(data).hex())
            return 8
        report = left.pop(0) if left else bytes.fromhex(IDLE)
        data[:] = type(data)("B", report)
        return 8

    monkeypatch.setattr(backend, "ctrl_transfer", transfer)
    return written


def test_the_measured_exchange_byte_for_byte(plugged, monkeypatch):
    reads = [IDLE, IDLE, *[IDLE] * 3, "0005040305010089", *READS]
    written = scripted(plugged.backend, monkeypatch, reads)
    with find_one("any", plugged.backend) as device:
        assert device.firmware == "5.4.3"
        assert device.ask(1, b"Hi There").buffer.hex() == DIGEST
        held = device._connection
        assert not any((*held._incoming, *held._outgoing))
    assert written == [RESET, RESET, *WRITES, RESET]


@pytest.mark.parametrize("end", ["b617318655057241", "b617318655057244", IDLE, "b617318655057260"])
def test_the_end_of_an_answer_is_checked(plugged, monkeypatch, end):
    bad = [IDLE, *[IDLE] * 3, *READS[:4], end]
    scripted(plugged.backend, monkeypatch, [IDLE, *bad, *bad])
    with find_one("any", plugged.backend) as device, refused(Reason.DONGLE_FAILED):
        device.ask(1, b"Hi There")
    scripted(plugged.backend, monkeypatch, [IDLE, *bad, IDLE, *[IDLE] * 3, *READS])
    with find_one("any", plugged.backend) as device:  # asked once more
        assert device.ask(1, b"Hi There").buffer.hex() == DIGEST


def test_an_old_answer_is_thrown_away_before_asking(plugged):
    challenge = challenges.challenge(bytes(32), 1)
    other = plugged.bus.backend()
    with find_one("any", other) as device:  # a process that is killed with its answer unread
        device._send(frames.frame(0x38, challenges.challenge(bytes(32), 2)))
        device._connection.read()
    assert plugged._device._answer
    with find_one("any", plugged.backend) as device:
        assert device.ask(2, challenge) == challenges.answer(secret(KEY), "less-than-64", challenge)
        assert not plugged._device._answer


def test_an_answer_before_the_question_is_refused(plugged, monkeypatch):
    scripted(plugged.backend, monkeypatch, [IDLE, IDLE, READS[0]])
    with find_one("any", plugged.backend) as device, refused(Reason.DONGLE_FAILED):
        device.ask(1, b"Hi There")


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=strategies.data())
@pytest.mark.usefixtures("clock")
def test_whatever_a_dongle_says_only_errors_of_the_tree_come(plugged, monkeypatch, data):
    flags = strategies.sampled_from(["00", "00", "00", "40", "41", "42", "43", "2f", "80", "c0"])
    report = strategies.builds(lambda head, flag: head.hex() + flag, strategies.binary(min_size=7, max_size=7), flags)
    scripted(plugged.backend, monkeypatch, data.draw(strategies.lists(report, max_size=30)))
    with contextlib.suppress(HwlicenseError), find_one("any", plugged.backend) as device:
        device.serial()
        device.ask(2, b"x")
    assert plugged.driver_attached
    assert not plugged.claimed


# RFC 2202, section 3: the cases whose keys fit into a slot, as they are, or as SHA-1 of keys that are longer than 64
@pytest.mark.parametrize(
    ("key", "data", "digest"),
    [
        ("0b" * 20, b"Hi There", DIGEST),
        (b"Jefe".hex().ljust(40, "0"), b"what do ya want for nothing?", "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"),
        ("aa" * 20, b"\xdd" * 50, "125d7342b9ac11cd91a39af48aa17b4f63f175d3"),
        ("0c" * 20, b"Test With Truncation", "4c1a03424b55e07fe7f27be1d58bb9324a9a5a04"),
        (
            "4ca0ef38f1794b28a8f8ee110ee79d48ce13be25",  # sha1sum of 80 times aa
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "aa4ae5e15272d00e95705637ce8a3b55ed402112",
        ),
    ],
)
def test_rfc_2202(plugged, key, data, digest):
    with find_one("any", plugged.backend) as device:
        for slot in (1, 2):
            program(device, slot, bytes.fromhex(key))
            assert device.ask(slot, data).buffer.hex() == digest


@pytest.mark.parametrize("mode", ["less-than-64", "fixed-64"])
def test_either_mode_answers_as_the_vendor_computes(plugged, mode):
    asked = challenges.challenge(bytes(32), 5)
    with find_one("any", plugged.backend) as device:
        program(device, key=range(20), mode=mode)
        assert device.ask(1, asked) == challenges.answer(secret(range(20)), mode, asked)


# ---- programming ----


def test_an_access_code_protects_a_slot(plugged):
    with find_one("any", plugged.backend) as device:
        assert not device.configured(1)
        program(device, access_code=secret(CODE))
        assert device.configured(1)
        for current in (None, secret(b"wrong!")):
            with refused(Reason.DONGLE_PROTECTED):
                program(device, current=current)
        program(device, current=secret(CODE))
        program(device)
        assert not device.touch_wanted(1)


def test_programming_survives_the_end_of_the_sequence(plugged):
    with find_one("any", plugged.backend) as device:
        for _ in range(260):
            program(device, touch=True)
        assert device.touch_wanted(1)


def test_a_sequence_may_start_again_at_zero(plugged, monkeypatch):
    program_it = plugged._device._configure

    def configure(number, payload):
        program_it(number, payload)
        plugged._device.program_sequence = 0

    monkeypatch.setattr(plugged._device, "_configure", configure)
    plugged._device.program_sequence = 255
    with find_one("any", plugged.backend) as device:
        program(device, slot=2)


def test_a_neo_is_made_to_tell_its_sequence_first(plugged, monkeypatch):
    monkeypatch.setattr(plugged._device, "version", (3, 4, 0))
    with find_one("any", plugged.backend) as device:
        program(device)
    last = [report[1] for kind, report in plugged.transfers if (kind, report[7]) == ("write", 0x89)]
    assert last == [frames.SCAN_MAP, frames.CONFIGURE[1]]


def test_a_dongle_that_does_not_take_the_secret_is_found_out(plugged, monkeypatch):
    monkeypatch.setattr(plugged._device, "_configure", lambda *_: None)
    with find_one("any", plugged.backend) as device, refused(Reason.DONGLE_FAILED):
        program(device)


@pytest.mark.parametrize(("size", "codes"), [(19, 6), (21, 6), (20, 5), (20, 7)])
def test_other_sizes_are_not_programmed(plugged, size, codes):
    with find_one("any", plugged.backend) as device, refused(Reason.USAGE, UsageError):
        program(device, key=bytes(size), access_code=secret(bytes(codes)))


@pytest.mark.parametrize(("slot", "challenge"), [(0, b"x"), (3, b"x"), (1, bytes(65))])
def test_a_wrong_slot_or_challenge_is_refused(plugged, slot, challenge):
    with find_one("any", plugged.backend) as device, refused(Reason.USAGE, UsageError):
        device.ask(slot, challenge)


def test_onlykey(simulated):
    made = simulated(vendor=0x1D50, product=0x60FC, serial=0x10BF91, slot=1)
    asked = challenges.identity_challenge()
    with find_one("1d50:60FC", simulated.backend) as device:
        assert device.ask(1, asked) == challenges.answer(secret(KEY), "less-than-64", asked)
        assert device.serial() is None  # the same for all
        with refused(Reason.DONGLE_FAILED):
            program(device)
    assert {report[-1] for kind, report in made.transfers if kind == "read"} >= {0xC0, 0xC1, 0xC2, 0xC3}


# ---- faults ----


@pytest.mark.parametrize("fault", PROTOCOL_FAULTS)
def test_a_faulty_dongle_fails_in_time_and_gets_its_driver_back(plugged, fault, clock, monkeypatch):
    with find_one("any", plugged.backend) as device:
        getattr(plugged, fault)()
        started = time.monotonic()
        monkeypatch.setattr(connection, "TRANSFER_TIMEOUT", 10)
        with refused(Reason.DONGLE_FAILED):
            device.ask(2, b"Hi There")
        assert time.monotonic() - started < 5
        assert clock.slept < 5
    plugged.heal()
    with find_one("any", plugged.backend) as device:
        assert device.ask(2, b"Hi There").buffer.hex() == DIGEST


def test_noise_is_refused(plugged, clock):
    for seed in range(50):
        plugged.random_bytes(seed)
        with refused(Reason.DONGLE_FAILED), find_one("any", plugged.backend) as device:
            device.ask(2, b"Hi There")
    assert clock.slept


def test_a_dongle_that_takes_its_time_is_waited_for(plugged, clock):
    plugged.be_busy(reads=100)
    with find_one("any", plugged.backend) as device:
        assert device.ask(2, b"Hi There").buffer.hex() == DIGEST
    assert clock.slept > 0.5


def test_an_unprogrammed_slot_says_so(plugged):
    with find_one("any", plugged.backend) as device, refused(Reason.DONGLE_UNPROGRAMMED):
        device.ask(1, b"Hi There")


def test_pulled_at_any_moment_is_absent(plugged):
    before = len(plugged.transfers)
    described = UsbHardware(backend=plugged.backend).describe(Selection())
    whole = len(plugged.transfers) - before
    assert whole > 35
    for moment in range(1, whole - 1):  # the last two: the answer has come, and it is cleared away
        plugged.pull_after(moment)
        with refused(Reason.DONGLE_ABSENT, AbsentError):
            UsbHardware(backend=plugged.backend).describe(Selection())
        assert not plugged.plugged
        plugged.plug()
        assert plugged.driver_attached
    assert UsbHardware(backend=plugged.backend).describe(Selection()) == described


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ETIMEDOUT, errno.EIO, None])
@pytest.mark.parametrize("gone", [True, False])
def test_a_failing_transfer_says_whether_the_dongle_is_still_there(plugged, monkeypatch, clock, number, gone):
    kind, reason = (AbsentError, Reason.DONGLE_ABSENT) if gone else (HardwareError, Reason.DONGLE_FAILED)
    with find_one("any", plugged.backend) as device:

        def fail(*_):
            raise usb.core.USBError("no", -1, number)

        pauses = []

        def pull(seconds):  # the kernel notices it a little later
            pauses.append(seconds)
            if gone and len(pauses) == 3:
                plugged.pull()
            Clock.sleep(clock, seconds)

        clock.sleep = pull
        monkeypatch.setattr(plugged.backend, "ctrl_transfer", fail)
        with refused(reason, kind):
            device.ask(2, b"x")


def test_without_permission_the_rules_are_named(plugged):
    plugged.deny()
    with refused(Reason.DONGLE_NO_PERMISSION) as caught, find_one("any", plugged.backend):
        pass
    assert "udev/69-hwlicense.rules" in caught.value.hint
    for selector in ("1050:0407:1234567", "any"):
        with refused(Reason.DONGLE_NO_PERMISSION):
            UsbHardware(selector, backend=plugged.backend).describe(Selection())
    with refused(Reason.DONGLE_NO_PERMISSION):
        UsbHardware(backend=plugged.backend).present(binding_to(plugged)[0], b"")


def test_a_busy_dongle_is_waited_for_and_then_reported(plugged, clock):
    plugged.occupy()
    with refused(Reason.DONGLE_BUSY), find_one("any", plugged.backend):
        pass
    assert 4.9 < clock.slept < 5.2


def test_processes_take_turns_and_the_driver_comes_back(plugged):
    results, backends = [], [plugged.bus.backend() for _ in range(4)]  # each stands for a process

    def work(backend):
        for _ in range(10):
            with find_one("any", backend) as device:
                results.append(device.ask(2, b"Hi There").buffer.hex())

    threads = [threading.Thread(target=work, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [DIGEST] * 40


@pytest.mark.parametrize("call", ["is_kernel_driver_active", "detach_kernel_driver", "claim_interface", "open_device"])
def test_the_driver_comes_back_also_if_claiming_fails(plugged, monkeypatch, call):
    for failure in (usb.core.USBError("no", -99, errno.EIO), NotImplementedError("no"), KeyboardInterrupt()):

        def fail(*_, failure=failure):
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(plugged.backend, call, fail)
            patch.setattr(connection, "_NOTICE", 0)
            expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else HardwareError
            with pytest.raises(expected), find_one("any", plugged.backend):
                pass
        assert plugged.driver_attached
        assert not plugged.claimed


def test_a_driver_that_another_process_has_detached_meanwhile_is_no_error(plugged, monkeypatch):
    def gone(handle, interface):
        monkeypatch.undo()
        plugged.backend.detach_kernel_driver(handle, interface)
        raise usb.core.USBError("Entity not found", -5, errno.ENOENT)

    monkeypatch.setattr(plugged.backend, "detach_kernel_driver", gone)
    with find_one("any", plugged.backend) as device:
        assert device.configured(2)


def test_a_driver_left_detached_by_a_killed_process_is_attached_again(plugged):
    plugged.bus.find(plugged._gadget).driver = False
    with find_one("any", plugged.backend):
        assert not plugged.driver_attached
    assert plugged.driver_attached


def test_a_child_forked_meanwhile_leaves_the_claim_alone(plugged, monkeypatch):
    reader, writer = os.pipe()
    with find_one("any", plugged.backend) as device:
        for call in ("release_interface", "attach_kernel_driver", "close_device"):
            monkeypatch.setattr(plugged.backend, call, lambda *_: os.write(writer, b"!"))
        child = os.fork()
        if not child:
            getattr(weakref.finalize, "_exitfunc")()  # noqa: B009  what an exit runs, and no type knows
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        monkeypatch.undo()
        assert device.ask(2, b"Hi There").buffer.hex() == DIGEST
    os.close(writer)
    assert os.read(reader, 9) == b""
    os.close(reader)


def test_without_libusb_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setattr(libusb1, "get_backend", lambda: None)
    with refused(Reason.DONGLE_FAILED) as caught:
        find("any")
    assert "libusb-1.0-0" in caught.value.hint


def test_without_pyusb_the_extra_is_named():
    program = """if True:
        import sys
        from hwlicense.core.errors import UsageError
        sys.modules["usb"] = None
        try:
            import hwlicense.binders.usb
        except UsageError as error:
            print(error.reason, error.hint)
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == 'EXTRA_MISSING pip install "hwlicense[usb]"\n'


def test_a_trace_by_environment_variable_stays_off():
    program = "import hwlicense.binders.usb, usb._debug as d; raise SystemExit(d._enable_tracing)"
    environment = {**os.environ, "PYUSB_DEBUG": "debug"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


# ---- touch ----


def test_a_touch_is_asked_for_once(simulated):
    made = simulated(touch=True)
    asked = []

    def touch(prompt):
        asked.append(prompt)
        made.touch_after(0.1)

    with find_one("any", simulated.backend) as device:
        assert device.touch_wanted(2)
        device.serial()
        assert device.ask(2, b"Hi There", touch).buffer.hex() == DIGEST
        made.touch_after(0.0)
        assert device.ask(2, b"Hi There").buffer.hex() == DIGEST
    assert asked == ["Touch the USB dongle 1050:0407:1234567."]


def test_a_dongle_that_waits_though_it_did_not_say_so_is_remembered(simulated, monkeypatch):
    made = simulated(touch=True)
    made.touch_after(0.02)
    with find_one("any", simulated.backend) as device:
        monkeypatch.setattr(frames.Status, "touch", lambda *_: False)  # as before firmware 3.0
        assert not device.touch_wanted(2)
        with refused(Reason.DONGLE_UNTOUCHED):
            device.ask(2, b"Hi There", wait=False)
        assert not made.awaiting_touch
        assert device.touch_wanted(2)


def test_a_touch_that_does_not_come_is_reported_when_the_dongle_gives_up(simulated):
    simulated(touch=True, touch_seconds=0.3)
    with find_one("any", simulated.backend) as device:
        started = time.monotonic()
        with refused(Reason.DONGLE_UNTOUCHED):
            device.ask(2, b"Hi There", lambda _: None)
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(("flags", "seconds"), [("2f", 16), ("3f", 30), ("20", 1), ("af", 16)])
def test_a_dongle_that_dies_while_it_waits_is_given_up(plugged, monkeypatch, clock, flags, seconds):
    waiting = [IDLE[:-2] + flags]
    scripted(plugged.backend, monkeypatch, [IDLE, IDLE, *[IDLE] * 3, *waiting, *["0005040305010080"] * 10000])
    with find_one("any", plugged.backend) as device, refused(Reason.DONGLE_UNTOUCHED):
        device.ask(2, b"Hi There")
    assert seconds - 1 < clock.slept < seconds + 1


def test_a_dongle_that_waits_for_ever_is_given_up(plugged, monkeypatch, clock):
    scripted(plugged.backend, monkeypatch, [IDLE, IDLE, *[IDLE] * 3, *["000504030501002f"] * 10000])
    with find_one("any", plugged.backend) as device, refused(Reason.DONGLE_UNTOUCHED):
        device.ask(2, b"Hi There")
    assert 29 < clock.slept < 31


def test_pulled_while_it_waits_for_a_touch(simulated):
    made = simulated(touch=True)
    with find_one("any", simulated.backend) as device, refused(Reason.DONGLE_ABSENT, AbsentError):
        device.ask(2, b"Hi There", lambda _: made.pull())
    made.plug()


def test_interrupted_while_it_waits_for_a_touch(simulated):
    made = simulated(touch=True)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), find_one("any", simulated.backend) as device:
        device.ask(2, b"Hi There", interrupt)
    assert not made.awaiting_touch


# ---- selectors ----


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("any", Selector()),
        ("any,slot=1", Selector(slot=1)),
        ("1050:0407", Selector("1050:0407")),
        ("1D50:60FC,slot=2", Selector("1d50:60fc")),
        ("1050:0407:123,slot=1", Selector("1050:0407", "123", 1)),
    ],
)
def test_selectors(text, selector):
    assert Selector.parse(text) == selector
    assert Selector.parse(str(selector)) == selector


@pytest.mark.parametrize(
    "text",
    ["", "all", "any:1", "1050", "1050:407", "1050:0407:", "any,slot=3", "any,slot=1\n", "046d:c31c", "\u0661050:0407"],
)
def test_what_is_no_selector_is_refused(text):
    with refused(Reason.USAGE, UsageError):
        UsbHardware(text)


def test_finding_by_serial_number(simulated):
    one, other = simulated(serial=1), simulated(serial=2, product=0x0405)
    with find_one("1050:0405:2", simulated.backend) as device:
        assert (device.product, device.serial()) == ("1050:0405", "2")
    assert find("1050:0407:2", simulated.backend) == []
    with refused(Reason.DONGLE_ABSENT, AbsentError) as caught:
        find_one("1050:0407:2", simulated.backend)
    assert caught.value.hint == "Plugged in: 1050:0407:1, 1050:0405:2."
    with refused(Reason.USAGE, UsageError) as wrong:
        UsbHardware(backend=simulated.backend).describe(Selection())
    assert "1050:0407:1, 1050:0405:2" in wrong.value.what
    one.deny()
    with refused(Reason.DONGLE_NO_PERMISSION):
        find("1050:0407:2", simulated.backend)
    one.heal()
    for made in (one, other):
        made.pull()
    with refused(Reason.DONGLE_ABSENT, AbsentError):
        find_one("any", simulated.backend)


def test_a_dongle_that_is_not_open_says_so(plugged):
    with refused(Reason.USAGE, UsageError):
        _ = find_one("any", plugged.backend).firmware


# ---- as hardware of a license ----


def test_enrolling_opening_and_presence(plugged):
    hardware = UsbHardware("1050:0407", backend=plugged.backend)
    binding, member = binding_to(plugged)
    with hardware:
        evidence = hardware.describe(Selection())
        assert (evidence.dongle, evidence.product, evidence.serial) == (binding.dongle, "1050:0407", "1234567")
        assert (evidence.firmware, evidence.slot, evidence.touch) == ("5.4.3", 2, False)
        check(evidence)
        check(binding)
        assert hardware.prove(evidence, b"statement") == b""
        assert hardware.install(binding, ()) == b""
        assert hardware.unwrap(binding, b"", (), None).secret == member
        for number in (0, 1, 2, 3, 1000):
            hardware.present(binding, b"", number)
        hardware.present(binding_to(plugged, answers=0)[0], b"")
        plugged.pull()
        with refused(Reason.DONGLE_ABSENT, AbsentError) as caught:
            hardware.present(binding, b"")
        assert caught.value.what == "The license's dongle is not plugged in (1050:0407, serial number 1234567)."
        plugged.plug(7)
        hardware.present(binding, b"")


def test_each_proof_of_presence_is_another_one(plugged):
    binding = binding_to(plugged)[0]
    hardware = UsbHardware(backend=plugged.backend)
    asked = []
    for number in range(3):
        del plugged._gadget.transfers[:]
        hardware.present(binding, b"", number)
        asked.append(bytes(b"".join(report for kind, report in plugged.transfers if kind == "write")))
    assert len(set(asked)) == 3


@pytest.mark.parametrize("fault", ["wrong_secret", "answer_stale"])
def test_wrong_answers_prove_nothing(plugged, fault):
    binding = binding_to(plugged)[0]
    hardware = UsbHardware(backend=plugged.backend)
    getattr(plugged, fault)()
    with contextlib.suppress(AbsentError):
        hardware.present(binding, b"", 0)  # after which there is an old answer
    for number in (1, 2):
        with refused(Reason.DONGLE_ABSENT, AbsentError) as caught:
            hardware.present(binding, b"", number)
        assert "answers by another secret" in caught.value.what
    with refused(Reason.DONGLE_ABSENT, AbsentError):
        hardware.unwrap(binding, b"", (), None)
    with refused(Reason.DONGLE_ABSENT, AbsentError):
        hardware.install(binding, ())


@pytest.mark.parametrize("told", [True, False])
def test_the_right_dongle_is_found_among_others(simulated, told):
    simulated(serial=1, secret=bytes(20), product=0x0410)
    simulated(serial=2, secret=bytes(20))
    right = simulated(serial=3)
    simulated(serial=4, programmed=False)
    binding, member = binding_to(right, serial=None if told else "")
    hardware = UsbHardware(backend=simulated.backend)
    assert hardware.unwrap(binding, b"", (), None).secret == member
    hardware.present(binding, b"")
    right.pull()
    with refused(Reason.DONGLE_ABSENT, AbsentError) as caught:
        hardware.present(binding, b"")
    assert all(f"1050:0407:{serial}" in caught.value.what for serial in (2, 4))
    right.copy(serial=9, bus=simulated.bus).plug()
    hardware.present(binding, b"")  # a clone is as good: serial numbers are hints


def test_the_named_dongle_is_asked_first_and_alone(simulated):
    others = [simulated(serial=number, secret=bytes(20)) for number in (1, 2)]
    right = simulated(serial=3)
    UsbHardware(backend=simulated.backend).present(binding_to(right)[0], b"")
    last = [report[1] for made in others for kind, report in made.transfers if (kind, report[7]) == ("write", 0x89)]
    assert last == [frames.SERIAL] * 2


def test_nobody_is_asked_to_touch_another_dongle(simulated, monkeypatch):
    another = simulated(serial=1, touch=True)
    right = simulated(serial=2, touch=True)
    right.touch_after(0.02)
    binding, member = binding_to(right, touch=True)
    asked: list[str] = []
    hardware = UsbHardware(backend=simulated.backend, touch=asked.append)
    assert hardware.unwrap(binding, b"", (), None).secret == member
    assert asked == ["Touch the USB dongle 1050:0407:2."]
    right.pull()
    with refused(Reason.DONGLE_ABSENT, AbsentError) as caught:
        hardware.unwrap(binding, b"", (), None)
    assert caught.value.what.startswith("Another dongle is plugged in")
    assert len(asked) == 1
    assert {report[1] for kind, report in another.transfers if report[7] == 0x89} == {frames.SERIAL}
    monkeypatch.setattr(frames.Status, "touch", lambda *_: False)  # as before firmware 3.0: its asking gives it away
    with refused(Reason.DONGLE_ABSENT, AbsentError):
        hardware.unwrap(binding, b"", (), None)
    assert len(asked) == 1
    assert not another.awaiting_touch


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("deny", Reason.DONGLE_NO_PERMISSION), ("bad_crc", Reason.DONGLE_FAILED), ("short_reports", Reason.DONGLE_FAILED)],
)
def test_a_dongle_that_fails_matters_only_if_no_other_is_right(simulated, fault, reason):
    failing, right = simulated(serial=1), simulated(serial=2)
    binding = binding_to(right)[0]
    hardware = UsbHardware(backend=simulated.backend)
    getattr(failing, fault)()
    hardware.present(binding, b"")
    right.pull()
    with refused(reason):
        hardware.present(binding, b"")


def test_an_untouched_or_emptied_dongle_is_not_absent(simulated):
    made = simulated(touch=True, touch_seconds=0.1)
    binding = binding_to(made, touch=True)[0]
    hardware = UsbHardware(backend=simulated.backend)
    with refused(Reason.DONGLE_UNTOUCHED):
        hardware.unwrap(binding, b"", (), None)
    made._device.slots.clear()
    with refused(Reason.DONGLE_UNPROGRAMMED):
        hardware.unwrap(binding, b"", (), None)


def test_threads_take_turns(plugged):
    binding = binding_to(plugged)[0]
    hardware, failures = UsbHardware(backend=plugged.backend), []

    def work():
        try:
            for number in range(5):
                hardware.present(binding, b"", number)
        except HwlicenseError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_a_signal_handler_in_the_middle_of_an_exchange_is_told_that_the_dongle_is_busy(plugged, monkeypatch):
    monkeypatch.setattr(dongle, "PATIENCE", 0.1)
    hardware = UsbHardware(backend=plugged.backend)
    with find_one("any", plugged.backend), refused(Reason.DONGLE_BUSY):  # by the very thread that waits
        hardware.describe(Selection())
    hardware.describe(Selection())
