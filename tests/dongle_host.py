"""A host for dongles, which does with pyusb what yubikit does: to look at simulated ones with other eyes."""

import hashlib
import hmac
import time

import usb.core
import usb.util

from hwlicense_simulators.dongle_protocol import CRC_RESIDUAL, crc

READ, WRITE = (0xA1, 0x01, 0x0300, 0), (0x21, 0x09, 0x0300, 0)
CHALLENGES, CONFIGURATIONS, SERIAL = {1: 0x30, 2: 0x38}, {1: 0x01, 2: 0x03}, 0x10
RESET = bytes(7) + b"\x8f"


class RefusedError(Exception):
    """Flags 0 and no data."""


class IncompleteError(Exception):
    """Sequence numbers or CRC are wrong."""


class Host:
    """What yubikit does, over pyusb."""

    def __init__(self, device):
        self.device = device
        self.awaited_touch = False

    def __enter__(self):
        self.device.detach_kernel_driver(0)
        usb.util.claim_interface(self.device, 0)
        return self

    def __exit__(self, *exception):
        try:
            usb.util.release_interface(self.device, 0)
            self.device.attach_kernel_driver(0)
        except usb.core.USBError:
            pass
        usb.util.dispose_resources(self.device)

    def read(self, timeout=1000):
        return bytes(self.device.ctrl_transfer(*READ, 8, timeout))

    def write(self, report):
        assert self.device.ctrl_transfer(*WRITE, report) == 8

    def ready(self):
        for _ in range(5):
            if not self.read()[7] & 0x80:
                return
        raise TimeoutError("0x80 stays set")

    def send(self, slot, payload):
        for report in reports(slot, payload):
            self.ready()
            self.write(report)

    def receive(self, size):
        data, expected = b"", 0
        for _ in range(100):
            report = self.read()
            if report[7] & 0x40:
                if report[7] & 0x1F == expected:
                    data, expected = data + report[:7], expected + 1
                elif report[7] & 0x1F == 0:
                    break
            elif report[7] & 0x20:
                self.awaited_touch = True
                time.sleep(0.005)
            elif report[7] == 0:
                raise IncompleteError if data else RefusedError
        else:
            raise TimeoutError("no answer")
        self.write(RESET)
        if crc(data[: size + 2]) != CRC_RESIDUAL:
            raise IncompleteError
        return data[:size]

    def ask(self, challenge, slot=2, *, fill=b"\0"):
        self.send(CHALLENGES[slot], challenge.ljust(64, fill))
        return self.receive(20)

    def serial(self):
        self.send(SERIAL, b"")
        return int.from_bytes(self.receive(4), "big")

    def configure(self, slot, configuration, current=bytes(6)):
        before = self.read()[4]
        self.send(CONFIGURATIONS[slot], configuration + current)
        status = self.read()
        assert status[7] == 0
        return status[4] == before + 1 or (before > 0 and status[4] == 0)


def reports(slot, payload):
    payload = payload.ljust(64, b"\0")
    frame = payload + bytes((slot,)) + crc(payload).to_bytes(2, "little") + bytes(3)
    chunks = [frame[start : start + 7] for start in range(0, 70, 7)]
    return [chunk + bytes((0x80 | n,)) for n, chunk in enumerate(chunks) if n in (0, 9) or any(chunk)]


def find(bus=None, **options):
    return usb.core.find(backend=bus.backend() if bus else None, **options)


def host(dongle):
    return Host(find(dongle.bus))


def expected(secret, message):
    return hmac.new(secret, message, hashlib.sha1).digest()


def number_of(error):
    return error.value.errno


# the same for a process of its own, that has nothing but pyusb

CLIENT = """
import sys, time, usb.core, usb.util
device = usb.core.find(idVendor=0x1050)
if device is None:
    sys.exit("no dongle")
try:
    if device.is_kernel_driver_active(0):
        device.detach_kernel_driver(0)
    usb.util.claim_interface(device, 0)
except usb.core.USBError as error:
    sys.exit(f"errno {error.errno}")
def read():
    return bytes(device.ctrl_transfer(0xA1, 1, 0x300, 0, 8))
"""

ANSWER = """
for report in sys.argv[1:]:
    device.ctrl_transfer(0x21, 9, 0x300, 0, bytes.fromhex(report))
data = b""
while len(data) < 22:
    report = read()
    if report[7] & 0x40:
        data += report[:7]
    elif not report[7]:
        sys.exit("refused")
    time.sleep(0.01)
print(data[:20].hex())
usb.util.release_interface(device, 0)
device.attach_kernel_driver(0)
"""


def asked(challenge, slot=2):
    """The arguments for CLIENT + ANSWER."""
    return [report.hex() for report in reports(CHALLENGES[slot], challenge)]
