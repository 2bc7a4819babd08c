"""The simulated TPM against tpm2-tools and openssl, which are other hands' work."""

import contextlib
import fcntl
import hashlib
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hwlicense_simulators import CertificateAuthority, ProgramMissingError, SimulatorError, Tpm, predict_pcrs, wire

if TYPE_CHECKING:
    from hwlicense_simulators.measured_boot import Measurements

SEPARATOR = bytes(4)
GET_RANDOM, READ_CLOCK, PCR_EXTEND = 0x17B, 0x181, 0x182
EK_CERTIFICATES = {"RSA 2048": "0x1c00002", "P-384": "0x1c00016"}


def ask(environment, *command, check=True, **options):
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, timeout=30, check=False, **options
    )
    assert not check or done.returncode == 0, done.stderr.decode()
    return done.stdout if check else done


def clock(tpm):
    return dict(re.findall(r"(\w+): (\w+)", ask(tpm.environment, "tpm2_readclock").decode()))


def pcrs(tpm, selection="sha256:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"):
    text = ask(tpm.environment, "tpm2_pcrread", selection).decode()
    return {int(i): bytes.fromhex(value) for i, value in re.findall(r"(\d+) *: 0x([0-9A-F]+)", text)}


def measured(*events, bank=hashlib.sha256):
    value = bytes(bank().digest_size)
    for event in events:
        value = bank(value + bank(event).digest()).digest()
    return value


def verify(tpm, index, root, tmp_path, *options):
    certificate = tmp_path / "ek.der"
    certificate.write_bytes(ask(tpm.environment, "tpm2_nvread", index))
    return ask({}, "openssl", "verify", "-CAfile", root, *options, certificate, check=False)


def process_exists(pid):
    return Path(f"/proc/{pid}").exists()


def gone(path):
    for _ in range(200):
        if not path.exists():
            return True
        time.sleep(0.02)
    return False


def test_the_simulators_need_nothing_of_the_product():
    program = (
        "import sys, hwlicense_simulators.cli, hwlicense_simulators.pytest_plugin;"
        "print({'hwlicense', 'tpm2_pytss'} & set(sys.modules))"
    )
    assert ask({}, sys.executable, "-c", program) == b"set()\n"


def test_it_is_booted_like_a_real_machine(hwlicense_tpm):
    boot: Measurements = {0: b"UEFI 7", 4: [b"shim", b"GRUB"], 9: b"Linux"}
    hwlicense_tpm.reboot(boot=boot)
    values = pcrs(hwlicense_tpm)
    assert values[0] == measured(b"UEFI 7", SEPARATOR)
    assert values[4] == measured(b"shim", b"GRUB", SEPARATOR)
    assert values[5] == measured(SEPARATOR)
    assert values[9] == measured(b"Linux")
    assert values[10] == bytes(32)
    assert values == predict_pcrs(boot)
    assert clock(hwlicense_tpm)["safe"] == "yes"


def test_a_firmware_update_changes_pcr_0_only_and_stays(hwlicense_tpm):
    before = pcrs(hwlicense_tpm)
    hwlicense_tpm.reboot(firmware=b"firmware 2")
    after = pcrs(hwlicense_tpm)
    assert {index for index in after if after[index] != before[index]} == {0}
    hwlicense_tpm.reboot()
    assert pcrs(hwlicense_tpm) == after


def test_every_bank_is_measured(hwlicense_tpms):
    tpm = hwlicense_tpms(banks=("sha256", "sha384"))
    assert pcrs(tpm, "sha384:0,9")[9] == measured(b"kernel 1", bank=hashlib.sha384)
    assert tpm.pcr(0, "sha384") == predict_pcrs(bank="sha384")[0]
    with pytest.raises(SimulatorError, match="no sha1 bank"):
        tpm.pcr(0, "sha1")


def test_only_boot_pcrs_are_measured_at_boot():
    with pytest.raises(SimulatorError, match="PCR 16"), Tpm(boot={16: b"debug"}):
        pass


@pytest.mark.parametrize("kind", EK_CERTIFICATES)
def test_the_ek_certificate_verifies_against_its_maker_and_no_other(kind, hwlicense_tpm, hwlicense_ek_root, tmp_path):
    assert verify(hwlicense_tpm, EK_CERTIFICATES[kind], hwlicense_ek_root, tmp_path).returncode == 0
    assert verify(hwlicense_tpm, EK_CERTIFICATES[kind], hwlicense_tpm.ek_root, tmp_path).returncode == 0
    other = CertificateAuthority(tmp_path / "another maker")
    assert verify(hwlicense_tpm, EK_CERTIFICATES[kind], other.root, tmp_path).returncode != 0


def test_the_ek_certificate_is_for_the_ek(hwlicense_tpm, tmp_path):
    (tmp_path / "ek.der").write_bytes(ask(hwlicense_tpm.environment, "tpm2_nvread", EK_CERTIFICATES["RSA 2048"]))
    certified = ask({}, "openssl", "x509", "-in", tmp_path / "ek.der", "-noout", "-pubkey")
    public = tmp_path / "ek.pem"
    ask(hwlicense_tpm.environment, "tpm2_createek", "-G", "rsa", "-c", "-", "-u", public, "-f", "pem")
    assert public.read_bytes() == certified


def test_a_maker_may_have_an_intermediate(hwlicense_tpms, tmp_path):
    maker = CertificateAuthority(tmp_path / "maker", intermediate=True)
    tpm = hwlicense_tpms(authority=maker)
    index = EK_CERTIFICATES["RSA 2048"]
    assert verify(tpm, index, maker.root, tmp_path).returncode != 0
    assert verify(tpm, index, maker.root, tmp_path, "-untrusted", maker.issuer).returncode == 0


def test_a_maker_is_kept_and_its_key_is_private(tmp_path):
    first, again = CertificateAuthority(tmp_path / "maker"), CertificateAuthority(tmp_path / "maker")
    assert first.root.read_bytes() == again.root.read_bytes()
    assert (tmp_path / "maker" / "key.pem").stat().st_mode & 0o777 == 0o600
    (tmp_path / "maker" / "key.pem").unlink()
    with pytest.raises(SimulatorError, match=r"key\.pem is missing"):
        CertificateAuthority(tmp_path / "maker")


def test_a_tpm_may_have_no_certificate_or_a_storage_key(hwlicense_tpms):
    bare, windows, linux = (
        hwlicense_tpms(ek_certificates=False),
        hwlicense_tpms(storage_key="rsa"),
        hwlicense_tpms(storage_key="ecc"),
    )
    assert ask(bare.environment, "tpm2_getcap", "handles-nv-index") == b""
    assert b"0x81000001" not in ask(bare.environment, "tpm2_getcap", "handles-persistent")
    for tpm, kind in ((windows, b"rsa"), (linux, b"ecc")):
        assert b"value: " + kind in ask(tpm.environment, "tpm2_readpublic", "-c", "0x81000001")


def test_a_reboot_is_orderly_and_a_power_cut_is_not(hwlicense_tpm):
    before = clock(hwlicense_tpm)
    hwlicense_tpm.reboot()
    rebooted = clock(hwlicense_tpm)
    assert int(rebooted["reset_count"]) == int(before["reset_count"]) + 1
    assert int(rebooted["clock"]) >= int(before["clock"])
    assert rebooted["safe"] == "yes"
    hwlicense_tpm.power_cut()
    assert clock(hwlicense_tpm)["safe"] == "no"
    assert pcrs(hwlicense_tpm) == predict_pcrs()


def test_suspend_keeps_pcrs_and_is_no_reset(hwlicense_tpm):
    hwlicense_tpm.extend(10, b"an application")
    before, counted = pcrs(hwlicense_tpm), clock(hwlicense_tpm)
    assert before[10] == measured(b"an application")
    hwlicense_tpm.suspend()
    assert not hwlicense_tpm.running
    hwlicense_tpm.resume()
    after = clock(hwlicense_tpm)
    assert pcrs(hwlicense_tpm) == before
    assert after["reset_count"] == counted["reset_count"]
    assert int(after["restart_count"]) == int(counted["restart_count"]) + 1


def test_the_power_may_be_cut_in_the_middle_of_a_command(hwlicense_tpm):
    with in_the_middle_of_a_command(hwlicense_tpm) as client:
        hwlicense_tpm.power_cut()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert clock(hwlicense_tpm)["safe"] == "no"
    assert pcrs(hwlicense_tpm) == predict_pcrs()


@contextlib.contextmanager
def in_the_middle_of_a_command(tpm):
    """A client whose command swtpm has taken, and stopped before its answer: however busy the machine is."""
    for _ in range(1000):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(tpm.tcti.removeprefix("swtpm:path="))
            client.sendall(rsa_key())
            while any(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4))):  # swtpm has not read it yet
                time.sleep(0)
            os.kill(tpm.pid, signal.SIGSTOP)
            while Path(f"/proc/{tpm.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0)
            answered, _, _ = select.select([client], [], [], 0)
            if not answered:
                yield client
                return
            os.kill(tpm.pid, signal.SIGCONT)  # too late, and the next key may take longer
    raise AssertionError("swtpm was always quicker")


def rsa_key():
    """TPM2_CreatePrimary (part 3, 24.1) in the owner hierarchy of an RSA key that is never the same."""
    attributes, aes, scheme, unique = 0x00030472, (0x0006, 128, 0x0043), 0x0010, os.urandom(256)
    public = struct.pack(">HHIHHHHHHIH", 0x0001, 0x000B, attributes, 0, *aes, scheme, 2048, 0, len(unique)) + unique
    password = struct.pack(">IIHBH", 9, 0x40000009, 0, 1, 0)
    body = struct.pack(">I", 0x40000001) + password + struct.pack(">HHH", 4, 0, 0)
    body += struct.pack(">H", len(public)) + public + struct.pack(">HI", 0, 0)
    return struct.pack(">HII", 0x8002, 10 + len(body), 0x131) + body


def test_a_key_of_that_test_is_made(hwlicense_tpm):
    """So that what is cut off is no refusal."""
    hwlicense_tpm.command(rsa_key())


def test_resume_without_suspend_fails(hwlicense_tpm):
    hwlicense_tpm.stop()
    with pytest.raises(SimulatorError):
        hwlicense_tpm.resume()


def test_clear_gives_a_new_storage_seed_and_keeps_the_ek(hwlicense_tpm, tmp_path):
    def primary(hierarchy):
        ask(hwlicense_tpm.environment, "tpm2_createprimary", "-C", hierarchy, "-c", tmp_path / "context")
        name = ask(hwlicense_tpm.environment, "tpm2_readpublic", "-c", tmp_path / "context")
        ask(hwlicense_tpm.environment, "tpm2_flushcontext", "-t")
        return name

    storage, endorsement = primary("o"), primary("e")
    hwlicense_tpm.clear()
    assert primary("o") != storage
    assert primary("e") == endorsement


def test_a_kept_tpm_is_the_same_one_with_its_clock(tmp_path):
    folder = tmp_path / ("a folder, whose name is longer than a socket address may be " * 2)
    with Tpm(folder) as first:
        index = ask(first.environment, "tpm2_nvread", EK_CERTIFICATES["P-384"])
        before, root = clock(first), first.ek_root.read_bytes()
        with pytest.raises(SimulatorError, match="another process uses"), Tpm(folder):
            pass
    with Tpm(folder, firmware=b"firmware 2") as again:
        assert ask(again.environment, "tpm2_nvread", EK_CERTIFICATES["P-384"]) == index
        after = clock(again)
        assert again.ek_root.read_bytes() == root
        assert verify(again, EK_CERTIFICATES["P-384"], again.ek_root, tmp_path).returncode == 0
        assert again.pcr(0) == measured(b"firmware 2", SEPARATOR)
    assert int(after["reset_count"]) == int(before["reset_count"]) + 1
    assert after["safe"] == "yes"


def test_what_was_left_half_made_is_made_anew(tmp_path):
    (tmp_path / "tpm.new").mkdir()
    (tmp_path / "tpm.new" / "tpm2-00.permall").write_bytes(b"half")
    with Tpm(tmp_path) as tpm:
        assert pcrs(tpm) == predict_pcrs()


def test_damaged_state_is_said(tmp_path):
    with Tpm(tmp_path) as tpm:
        state = tpm.state / "tpm2-00.permall"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(SimulatorError) as failure, Tpm(tmp_path):
        pass
    assert str(tmp_path) in failure.value.hint


def test_two_at_once_are_independent(hwlicense_tpms):
    first, second = hwlicense_tpms(), hwlicense_tpms()
    first.extend(10, b"x")
    assert second.pcr(10) == bytes(32)
    assert ask(first.environment, "tpm2_nvread", "0x1c00002") != ask(second.environment, "tpm2_nvread", "0x1c00002")
    first.power_cut()
    assert clock(second)["safe"] == "yes"
    assert first.ek_root.read_bytes() == second.ek_root.read_bytes()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(error):
    with pytest.raises(error), Tpm() as tpm, tpm.tapped():  # noqa: PT012
        pid, folder = tpm.pid, tpm.ek_root.parent.parent
        assert process_exists(pid)
        assert folder.exists()
        raise error
    assert not process_exists(pid)
    assert not folder.exists()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_its_process_dies(end):
    program = textwrap.dedent(
        """
        import subprocess, sys, time
        from hwlicense_simulators import Tpm
        with Tpm() as tpm:
            print(tpm.pid, tpm.ek_root.parent.parent, flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        pid, folder = process.stdout.readline().split()
        assert process_exists(int(pid))
        process.send_signal(end)
    assert gone(Path(folder.decode()))
    # The container may have no init that reaps it, so a zombie may stay; what counts is that it does not run.
    status = Path(f"/proc/{int(pid)}/status")
    ends = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_it_outlives_the_thread_that_started_it(hwlicense_tpm):
    thread = threading.Thread(target=hwlicense_tpm.power_cut)
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert pcrs(hwlicense_tpm) == predict_pcrs()


def test_a_forked_child_does_not_end_it():
    with Tpm() as tpm:
        program = "import os; os.fork() == 0 and os._exit(0)"
        ask(tpm.environment, sys.executable, "-c", program)
        child = os.fork()
        if not child:
            tpm.__exit__(None, None, None)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pcrs(tpm) == predict_pcrs()


def zombies():
    """Of this process, by their numbers."""
    stat = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    mine = [line for line in stat if line.rpartition(")")[2].split()[1] == str(os.getpid())]
    return {line.split()[0] for line in mine if ") Z " in line}


def test_manufacturing_leaves_no_zombie():
    before = zombies()  # of other tests, whose children end when they like
    with Tpm() as tpm:
        assert zombies() <= before
        assert tpm.running


@pytest.mark.parametrize(
    ("missing", "package"), [("swtpm", "swtpm"), ("swtpm_setup", "swtpm-tools"), ("swtpm_localca", "swtpm-tools")]
)
def test_a_missing_program_is_named_with_its_package(missing, package, tmp_path, monkeypatch):
    for path in ("/bin/sh", "/usr/bin/swtpm", "/usr/bin/swtpm_setup", "/usr/bin/swtpm_localca", "/usr/bin/setpriv"):
        if Path(path).name != missing:
            (tmp_path / Path(path).name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissingError, match=f"{missing} is not installed") as failure, Tpm():
        pass
    assert failure.value.hint.endswith(f" {package}")
    assert failure.value.reason == "SIMULATOR_MISSING"


def test_a_failing_setup_shows_what_it_said(tmp_path):
    with pytest.raises(SimulatorError, match="None of the selected algorithms"), Tpm(tmp_path, banks=("sha0",)):
        pass
    with Tpm(tmp_path) as tpm:
        assert tpm.running


def test_a_long_temporary_folder_is_no_obstacle(tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with Tpm() as tpm:
        assert len(tpm.tcti) < 108
        assert pcrs(tpm) == predict_pcrs()


def test_use_out_of_order_is_an_error():
    tpm = Tpm()
    with pytest.raises(SimulatorError, match="not in use"):
        _ = tpm.tcti
    with tpm:
        with pytest.raises(SimulatorError, match="on already"):
            tpm.start()
        tpm.power_cut(restart=False)
        with pytest.raises(SimulatorError, match="off already"):
            tpm.stop()
        with pytest.raises(SimulatorError, match="does not answer"):
            tpm.extend(0, b"")


# the wire


def random(wire_, *, check=True):
    return ask(wire_.environment, "tpm2_getrandom", "--hex", "8", check=check)


def test_the_wire_records_commands_and_bytes(hwlicense_tpm):
    with hwlicense_tpm.tapped() as tapped:
        drawn = random(tapped)
        assert tapped.commands[-1] == GET_RANDOM
        assert bytes.fromhex(drawn.decode()) in tapped.traffic
        assert tapped.control
        tapped.forget()
        assert tapped.traffic == b""


def test_the_wire_alters(hwlicense_tpm):
    with hwlicense_tpm.tapped() as tapped:
        tapped.on_answer = lambda answer: answer[:-8] + bytes(8) if tapped.commands[-1] == GET_RANDOM else answer
        assert random(tapped) == b"00" * 8
        assert bytes(8) not in tapped.exchanges[-1].answer
        tapped.on_answer = None
        tapped.on_command = lambda command: command.replace(
            GET_RANDOM.to_bytes(4, "big") + b"\0\x08", b"\0\0\1\x7b\0\4"
        )
        assert b"Got 4 bytes, expected: 8" in random(tapped, check=False).stderr


def test_an_alteration_that_fails_is_not_swallowed(hwlicense_tpm):
    def alter(_):
        raise OSError("the test is wrong")

    with pytest.raises(OSError, match="the test is wrong"), hwlicense_tpm.tapped() as tapped:  # noqa: PT012
        tapped.on_command = alter
        assert random(tapped, check=False).returncode != 0


def test_the_wire_injects_response_codes(hwlicense_tpm):
    with hwlicense_tpm.tapped() as tapped:
        tapped.inject(wire.LOCKOUT, GET_RANDOM)
        refused = random(tapped, check=False)
        assert refused.returncode != 0
        assert b"0x921" in refused.stderr.lower()
        assert random(tapped)
        tapped.forget()
        tapped.inject(wire.RETRY, GET_RANDOM, times=3)
        assert random(tapped)
        assert tapped.commands.count(GET_RANDOM) == 4


def test_the_wire_cuts_before_or_after_the_tpm_has_worked(hwlicense_tpm):
    with hwlicense_tpm.tapped() as tapped:
        for executed, value in ((False, bytes(32)), (True, measured(b"x"))):
            digest = hashlib.sha256(b"x").hexdigest()
            tapped.cut(PCR_EXTEND, executed=executed)
            assert ask(tapped.environment, "tpm2_pcrextend", f"10:sha256={digest}", check=False).returncode != 0
            assert hwlicense_tpm.pcr(10) == value


def test_the_wire_cuts_at_the_nth_command_and_delays(hwlicense_tpm):
    with hwlicense_tpm.tapped() as tapped:
        random(tapped)
        count = len(tapped.commands)
        tapped.cut(after=count - 1)
        assert random(tapped, check=False).returncode != 0
        assert len(tapped.commands) == 2 * count
        tapped.delay(0.3, GET_RANDOM)
        started = time.monotonic()
        random(tapped)
        assert time.monotonic() - started > 0.3


def test_closing_the_wire_ends_a_delay(hwlicense_tpm):
    with hwlicense_tpm.tapped() as tapped:
        tapped.delay(600)
        client = threading.Thread(target=random, args=(tapped,), kwargs={"check": False})
        client.start()
        time.sleep(0.2)
    client.join(10)
    assert not client.is_alive()


def test_the_wire_serves_several_clients_over_a_power_cut(hwlicense_tpm):
    with hwlicense_tpm.tapped() as tapped, socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(tapped.path))
        random(tapped)
        hwlicense_tpm.power_cut()
        assert random(tapped)
        assert hwlicense_tpm.pcr(0) == predict_pcrs()[0]


def test_swtpm_kept_busy_by_another_client_is_said(hwlicense_tpm, monkeypatch):
    monkeypatch.setattr("hwlicense_simulators.tpm._ANSWER", 0.2)
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(hwlicense_tpm.tcti.removeprefix("swtpm:path="))
        with pytest.raises(SimulatorError, match="another client") as failure:
            hwlicense_tpm.pcr(0)
    assert "tapped" in failure.value.hint
