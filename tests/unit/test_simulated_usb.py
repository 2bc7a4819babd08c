"""The simulated bus as pyusb sees it, in this process and in others: plugs, claims, the kernel's driver."""

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import usb.backend.libusb1
import usb.core
import usb.util

from hwlicense_simulators import Bus, Dongle, SimulatorError
from tests.dongle_host import ANSWER, CLIENT, READ, Host, asked, expected, find, host, number_of

SECRET = bytes(range(20))
QUESTION = b"what is the answer?"


@pytest.fixture
def dongle():
    with Dongle(secret=SECRET) as made:
        yield made


# the bus


def test_each_plug_gives_a_new_address_and_the_kernel_its_driver(dongle):
    before = find(dongle.bus)
    with host(dongle):
        assert not dongle.driver_attached
        assert dongle.claimed
        dongle.pull()
        assert not dongle.plugged
        dongle.plug(port=4)
        after = find(dongle.bus)
        assert (after.bus, after.port_number) == (before.bus, 4)
        assert after.address != before.address
        with pytest.raises(usb.core.USBError) as error:
            before.ctrl_transfer(*READ, 8)
        assert number_of(error) == errno.ENODEV
        assert dongle.driver_attached
    with pytest.raises(SimulatorError, match="plugged in already"):
        dongle.plug()


def test_an_unplugged_dongle_can_come_later():
    with Dongle(plugged=False) as dongle:
        assert not dongle.plugged
        assert find(dongle.bus) is None
        with pytest.raises(SimulatorError, match="not plugged in"):
            dongle.pull()
        dongle.plug()
        assert find(dongle.bus) is not None


def test_the_kernel_driver_comes_back_only_when_it_is_attached(dongle):
    device = find(dongle.bus)
    assert device.is_kernel_driver_active(0)
    with pytest.raises(usb.core.USBError, match="busy") as error:
        device.ctrl_transfer(*READ, 8)
    assert number_of(error) == errno.EBUSY
    with pytest.raises(usb.core.USBError):
        device.set_configuration()
    device.detach_kernel_driver(0)
    with pytest.raises(usb.core.USBError) as error:
        device.detach_kernel_driver(0)
    assert number_of(error) == errno.ENOENT
    device.set_configuration()
    assert device.get_active_configuration().bConfigurationValue == 1
    assert len(device.ctrl_transfer(*READ, 8)) == 8  # pyusb claims by itself
    with pytest.raises(usb.core.USBError) as error:
        device.attach_kernel_driver(0)
    assert number_of(error) == errno.EBUSY
    usb.util.dispose_resources(device)
    assert not dongle.claimed
    assert not dongle.driver_attached
    device.attach_kernel_driver(0)
    assert dongle.driver_attached
    usb.util.dispose_resources(device)


def test_descriptors_are_those_of_a_keyboard_with_names(dongle):
    device = find(dongle.bus, idVendor=0x1050, idProduct=0x0407)
    (interface,) = device[0]
    assert (interface.bInterfaceClass, interface.bInterfaceSubClass, interface.bInterfaceProtocol) == (3, 1, 1)
    assert [endpoint.bEndpointAddress for endpoint in interface] == [0x81]
    assert (device.manufacturer, device.product, device.serial_number) == ("Yubico", "YubiKey OTP+FIDO+CCID", None)
    assert "Human Interface Device" in str(device)
    assert device.parent is None
    usb.util.dispose_resources(device)


@pytest.mark.parametrize("setup", [(0xA1, 1, 0x0100, 0), (0x80, 6, 0x0100, 0), (0x80, 6, 0x0303, 0), (0xC0, 1, 0, 0)])
def test_what_a_dongle_does_not_know_stalls(dongle, setup):
    with host(dongle) as it, pytest.raises(usb.core.USBError) as error:
        it.device.ctrl_transfer(*setup, 8)
    assert number_of(error) == errno.EPIPE


def test_several_on_one_bus():
    bus = Bus()
    with Dongle(secret=SECRET, bus=bus) as one, one.copy(bus=bus) as two, Dongle(bus=bus, serial=9):
        found = list(find(bus, find_all=True))
        assert [device.port_number for device in found] == [1, 2, 3]
        serials = []
        for device in found:
            with Host(device) as it:
                serials.append(it.serial())
        assert serials == [one.serial, two.serial, 9]
        with pytest.raises(SimulatorError, match="this process alone"):
            _ = one.environment
    assert find(bus) is None


def test_installing_ends_with_its_block(dongle):
    before = usb.backend.libusb1.get_backend
    with dongle.bus.installed():
        assert usb.core.find(idVendor=0x1050).idProduct == 0x0407
    assert usb.backend.libusb1.get_backend is before


def test_forgotten_devices_release_their_claims_in_silence(dongle):
    device = find(dongle.bus)
    device.detach_kernel_driver(0)
    usb.util.claim_interface(device, 0)
    dongle.pull()
    del device
    dongle.plug()
    with host(dongle):
        pass


# other processes

HOLD = """
print(read().hex(), flush=True)
sys.stdin.read()
"""


def run(environment, script, *arguments, check=True):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if check else done


def holding(environment):
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT + HOLD],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "0005040301020100\n"
    return process


def until(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_plain_pyusb_client_in_another_process_sees_it(dongle):
    assert run(dongle.environment, CLIENT + ANSWER, *asked(QUESTION)).strip() == expected(SECRET, QUESTION).hex()
    assert dongle.driver_attached
    dongle.pull()
    assert run(dongle.environment, CLIENT, check=False).stderr == "no dongle\n"


def test_without_the_environment_a_process_sees_no_simulated_bus(dongle):
    environment = dict.fromkeys(dongle.environment, "")
    script = "import usb.core, usb.backend.libusb1; print(usb.backend.libusb1.get_backend.__module__)"
    assert run(environment, script) == "usb.backend.libusb1\n"


def test_claims_exclude_other_processes_and_end_with_them_but_the_driver_stays_detached(dongle):
    with holding(dongle.environment) as process:
        assert run(dongle.environment, CLIENT, check=False).stderr == "errno 16\n"
        with pytest.raises(usb.core.USBError) as error:
            usb.util.claim_interface(find(dongle.bus), 0)
        assert number_of(error) == errno.EBUSY
        process.send_signal(signal.SIGKILL)
    assert until(lambda: not dongle.claimed)
    assert not dongle.driver_attached
    assert run(dongle.environment, CLIENT + ANSWER, *asked(QUESTION)).strip() == expected(SECRET, QUESTION).hex()
    assert dongle.driver_attached


def test_pulled_under_another_process(dongle):
    script = """
    print("ready", flush=True)
    try:
        while True:
            read()
    except usb.core.USBError as error:
        print(error.errno, usb.core.find(idVendor=0x1050))
    """
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT + textwrap.dedent(script)],
        env=os.environ | dongle.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        dongle.pull()
        assert process.stdout.read() == f"{errno.ENODEV} None\n"


def test_a_process_outlives_the_bus():
    with Dongle() as dongle:
        environment = dongle.environment
        process = holding(environment)
    with process:
        assert process.communicate(timeout=10) == ("", "")
        assert process.returncode == 0
    assert "FileNotFoundError" in run(environment, CLIENT, check=False).stderr


def test_a_fork_opens_the_dongle_for_itself(dongle):
    script = """
    import os
    child = os.fork()
    if not child:
        try:
            read()
        except usb.core.USBError as error:
            os._exit(error.errno)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(read()))
    """
    assert run(dongle.environment, CLIENT + textwrap.dedent(script)) == f"{errno.ENODEV} 8\n"


def test_threads_of_one_process_share_its_handles(dongle):
    script = """
    import threading
    threads = [threading.Thread(target=lambda: [read() for _ in range(20)]) for _ in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    """
    run(dongle.environment, CLIENT + textwrap.dedent(script))
    assert len(dongle.transfers) == 120


def test_another_sitecustomize_runs_as_well_and_pyusb_is_not_imported_for_nothing(dongle, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.other = __file__")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = """
    import sys, sitecustomize
    print(other, sitecustomize.__file__, {"usb", "hwlicense_simulators"} & set(sys.modules))
    """
    there = str(tmp_path / "sitecustomize.py")
    assert run(dongle.environment, script).split() == [there, there, "set()"]
    run(dongle.environment, CLIENT)


def test_the_bus_works_without_pyusb():
    script = """
    import sys
    sys.modules["usb"] = None
    from hwlicense_simulators import Dongle, SimulatorError
    with Dongle() as dongle:
        try:
            dongle.bus.backend()
        except SimulatorError as error:
            print(error, "-", error.hint)
    """
    assert run({}, script) == "pyusb is not installed - pip install 'hwlicense-simulators[usb]'\n"


def test_a_client_that_stops_in_the_middle_of_a_message_holds_nothing_up():
    with Dongle() as dongle, socket.socket(socket.AF_UNIX) as client:
        client.connect(dongle.environment["HWLICENSE_SIMULATOR_USB"])
        client.sendall(struct.pack(">I", 6) + b'"name"' + struct.pack(">I", 100) + b"[")
        assert find(dongle.bus) is not None
        time.sleep(0.05)


def test_nothing_is_left_behind():
    with Dongle() as dongle:
        path = Path(dongle.environment["HWLICENSE_SIMULATOR_USB"])
        assert path.is_socket()
    assert not path.parent.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "simulated USB"]
