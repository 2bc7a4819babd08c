"""The TPM binder keeps the contract of `core.hardware.Hardware`, on a real swtpm."""

import hmac
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tpm2_pytss import ESYS_TR, TPM2_CC, TPM2_RC

from hwlicense.binders.tpm import TpmHardware, connection, keys, opening, probing
from hwlicense.binders.tpm.held import Held
from hwlicense.binders.tpm.keys import tpm_public
from hwlicense.binders.tpm.sealed import Sealed
from hwlicense.core.documents import TpmEvidence
from hwlicense.core.errors import (
    AbsentError,
    DamagedError,
    HardwareError,
    HwlicenseError,
    Reason,
    RefusedError,
    UsageError,
)
from hwlicense.core.schema import encode
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.quote import check_quote
from hwlicense.core.tpm.structures import ATTESTATION_TEMPLATE, STORAGE_ROOT_TEMPLATE, Public
from hwlicense.core.tpm.wire import sized
from hwlicense_simulators import wire
from tests.machines import PRODUCT, SELECTION, Machine
from tests.order_desk import OrderDesk, secret

KINDS = {
    "template SRK": {},
    "persistent P-384 SRK": {"storage_key": "ecc"},
    "persistent RSA SRK": {"storage_key": "rsa"},
    "no EK certificates": {"ek_certificates": False},
    "two banks": {"banks": ("sha256", "sha384")},
}
WARM = [TPM2_CC.Load, TPM2_CC.StartAuthSession, TPM2_CC.PolicyPCR, TPM2_CC.PolicyAuthorize, TPM2_CC.PolicyCommandCode]
WARM += [TPM2_CC.Unseal, TPM2_CC.FlushContext]


@pytest.fixture(scope="module")
def machine():
    with Machine(storage_key="ecc") as shared:
        yield shared
        assert shared.loaded() == []


@pytest.fixture
def fresh():
    with Machine() as own:
        yield own
        assert own.loaded() == []


def pin(text) -> Any:
    return lambda _prompt: secret(text)


def no_pin(_prompt, /, **_options):
    pytest.fail("asked for a PIN that is not needed")


# ---- the whole way ----


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_kind_of_tpm_enrolls_installs_and_opens_with_every_endorsement_key(options):
    with Machine(**options) as machine:
        evidence, hardware = machine.evidence, machine.hardware
        quote = hardware.prove(evidence, b"a request")
        check_quote(Public.parse(evidence.attestation_key), quote, b"a request", evidence.pcrs)
        approval = machine.desk.approve(evidence.pcrs)
        assert len(evidence.endorsement_keys) == 2
        opened = []
        for ek, (product, number) in itertools.product(range(2), ((None, None), (PRODUCT, None), (PRODUCT, b"2468"))):
            binding, member = machine.desk.bind(evidence, product, pin=number, ek=ek)
            held = hardware.install(binding, [approval])
            assert hardware.admit(binding, held, approval) == held if product else True
            hardware.present(binding, held)
            source = pin(number) if number else no_pin
            assert hardware.unwrap(binding, held, [approval], source).secret == member
            opened.append((binding, held, source, member))
        assert machine.loaded() == []
        machine.tpm.reboot()
        for binding, held, source, member in opened:
            assert hardware.unwrap(binding, held, [approval], source).secret == member


def test_a_request_fits_its_schema_and_its_certificates_belong_to_its_keys(machine):
    evidence = machine.evidence
    assert msgspec.json.decode(encode(evidence), type=TpmEvidence) == evidence
    for key in evidence.endorsement_keys:
        assert key.certificate
        certificate = x509.load_der_x509_certificate(key.certificate)
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        assert certificate.public_key().public_bytes(*form) == Public.parse(key.public).key().public_bytes(*form)
    assert evidence.manufacturer == "IBM SW TPM"
    assert [(pcr.bank, pcr.index) for pcr in evidence.pcrs] == list(SELECTION)
    assert [pcr.value for pcr in evidence.pcrs] == [machine.tpm.pcr(pcr.index) for pcr in evidence.pcrs]


def test_a_warm_open_takes_seven_commands_and_a_cold_one_three_more(machine):
    binding, member = machine.desk.bind(machine.evidence, PRODUCT)
    approval = machine.desk.approve(machine.evidence.pcrs)
    warm, cold = machine.hardware.install(binding, [approval]), machine.hardware.install(binding, [])
    machine.wire.forget()
    assert machine.hardware.unwrap(binding, warm, [approval], None).secret == member
    assert machine.wire.commands == WARM
    machine.wire.forget()
    assert machine.hardware.unwrap(binding, cold, [approval], None).secret == member
    verifying = [TPM2_CC.LoadExternal, TPM2_CC.VerifySignature, TPM2_CC.FlushContext]
    assert machine.wire.commands == WARM[:3] + verifying + WARM[3:]
    machine.wire.forget()
    machine.hardware.present(binding, warm)
    assert machine.wire.commands == [TPM2_CC.StartAuthSession, TPM2_CC.GetRandom]


def test_nothing_secret_is_seen_on_the_wire(machine):
    approval = machine.desk.approve(machine.evidence.pcrs)
    binding, member = machine.desk.bind(machine.evidence, PRODUCT, pin=b"a long PIN, not to be seen")
    machine.wire.forget()
    held = machine.hardware.install(binding, [approval])
    opened = machine.hardware.unwrap(binding, held, [approval], pin(b"a long PIN, not to be seen"))
    seen = machine.wire.traffic
    assert opened.secret == member
    kept = Held.read(held, binding)
    assert kept.private in seen  # so that the search does find what is there
    for hidden in (kept.storage_share, kept.attestation_share, b"a long PIN", bytes(member.buffer)):
        assert hidden not in seen


# ---- held bytes ----


def test_held_bytes_of_another_license_or_damaged_ones_are_refused_before_any_command(machine):
    (one, _), (other, _) = (machine.desk.bind(machine.evidence) for _ in range(2))
    held = machine.hardware.install(one, [])
    machine.wire.forget()
    for binding, raw in (
        (other, held),
        (one, held[:-1]),
        (one, held + b" "),
        (one, b""),
        (one, held.replace(b"1", b"2", 1)),
    ):
        with pytest.raises(DamagedError) as caught:
            machine.hardware.unwrap(binding, raw, [], None)
        assert caught.value.reason == Reason.HOME_DAMAGED
        assert "install" in caught.value.hint
    assert machine.wire.commands == []


def test_a_ticket_that_the_tpm_refuses_is_made_again(machine):
    binding, member = machine.desk.bind(machine.evidence, PRODUCT)
    approval = machine.desk.approve(machine.evidence.pcrs)
    held = Held.read(machine.hardware.install(binding, [approval]), binding)
    ticket = held.tickets[0]
    for bad in (ticket.ticket[:-1] + bytes([ticket.ticket[-1] ^ 1]), b"", b"\0" * 40, ticket.ticket[:-1]):
        damaged = msgspec.structs.replace(held, tickets=[msgspec.structs.replace(ticket, ticket=bad)])
        assert machine.hardware.unwrap(binding, damaged.write(), [approval], None).secret == member


def test_metadata_of_the_storage_root_key_is_what_the_library_would_keep(machine):
    """Seven commands rest on this form, which is no part of the library's documented interface."""
    public = Public.parse(machine.evidence.storage_root_key)
    with machine.esapi() as esapi:
        kept = bytes(esapi.tr_serialize(esapi.tr_from_tpmpublic(0x81000001)))
    assert kept == (0x81000001).to_bytes(4, "big") + sized(public.name) + b"\0\0\0\1" + sized(public.raw)


def test_a_storage_root_key_that_is_not_persistent_any_more_is_made_again(fresh):
    with fresh.esapi() as esapi:
        key, *_ = esapi.create_primary(None, tpm_public(STORAGE_ROOT_TEMPLATE), ESYS_TR.OWNER)
        kept = esapi.evict_control(ESYS_TR.OWNER, key, 0x81000001)
        esapi.flush_context(key)
        binding, member = fresh.desk.bind(fresh.evidence)
        held = fresh.hardware.install(binding, [])
        assert Held.read(held, binding).handle == 0x81000001
        esapi.evict_control(ESYS_TR.OWNER, kept, 0x81000001)
    assert fresh.hardware.unwrap(binding, held, [], None).secret == member


def test_some_other_key_at_the_usual_handle_is_left_alone(fresh):
    with fresh.esapi() as esapi:
        key, *_ = esapi.create_primary(None, tpm_public(ATTESTATION_TEMPLATE), ESYS_TR.OWNER)
        esapi.evict_control(ESYS_TR.OWNER, key, 0x81000001)
        esapi.flush_context(key)
    assert fresh.hardware.describe(SELECTION).storage_root_key == fresh.evidence.storage_root_key


# ---- platform state and PIN ----


def test_a_changed_pcr_is_named_and_the_nearest_of_several_approvals_counts(fresh):
    approval = fresh.desk.approve(fresh.evidence.pcrs)
    binding, member = fresh.desk.bind(fresh.evidence, PRODUCT)
    held = fresh.hardware.install(binding, [approval])
    fresh.tpm.reboot(boot=dict(fresh.tpm.boot) | {7: b"another secure boot policy"})
    with pytest.raises(RefusedError, match=r"^PCR 7 \(sha256\) is not as approved") as caught:
        fresh.hardware.unwrap(binding, held, [approval], None)
    assert caught.value.reason == Reason.PCR_MISMATCH
    assert "device install" in caught.value.hint
    now = fresh.desk.approve(fresh.hardware.describe(SELECTION).pcrs)
    held = fresh.hardware.admit(binding, held, now)
    assert fresh.hardware.unwrap(binding, held, [approval, now], None).secret == member
    fresh.tpm.reboot(boot=dict(fresh.tpm.boot) | {4: b"another boot loader"})
    with pytest.raises(RefusedError, match=r"^PCR 4 \(sha256\) is not"):
        fresh.hardware.unwrap(binding, held, [approval, now], None)


def test_without_an_approval_nothing_is_asked_of_the_tpm(machine):
    binding, _ = machine.desk.bind(machine.evidence, PRODUCT)
    held = machine.hardware.install(binding, [])
    machine.wire.forget()
    foreign = machine.desk.approve(machine.evidence.pcrs, "another product")
    for approvals in ([], [foreign]):
        with pytest.raises(RefusedError) as caught:
            machine.hardware.unwrap(binding, held, approvals, None)
        assert caught.value.reason == Reason.PLATFORM_UNAPPROVED
    assert machine.wire.commands == []


def test_a_step_that_cannot_be_taken_is_refused_and_not_left_out(machine):
    binding, _ = machine.desk.bind(machine.evidence, PRODUCT)
    kept = Held.read(machine.hardware.install(binding, []), binding)
    sealed = Sealed.check(binding, [])
    machine.wire.forget()
    with machine.hardware._connection.work() as work:
        later: Any = object()  # of a later release
        for step in (sealed.steps[0], later):  # the first is an approval's, and there is none
            with pytest.raises(DamagedError, match="cannot take") as caught:
                opening.run(work, ESYS_TR.NONE, step, sealed, None, kept)
            assert caught.value.reason == Reason.LICENSE_DAMAGED
    assert machine.wire.commands == []


def test_a_pcr_bank_that_the_tpm_lacks_is_refused_by_name(machine):
    with pytest.raises(RefusedError, match="no sha384 bank") as caught:
        machine.hardware.describe(Selection.parse("sha384:7"))
    assert caught.value.reason == Reason.PCR_UNUSABLE
    with pytest.raises(RefusedError, match=r"PCR 15 \(sha256\) was never extended"):
        machine.hardware.describe(Selection.parse("sha256:15"))


def test_pins_are_asked_for_once_wiped_counted_and_locked_out(fresh):
    binding, member = fresh.desk.bind(fresh.evidence, pin=b"2468")
    held = fresh.hardware.install(binding, [])
    with pytest.raises(RefusedError) as caught:
        fresh.hardware.unwrap(binding, held, [], None)
    assert caught.value.reason == Reason.PIN_NEEDED
    given = [secret(b"1357"), secret(b"2468")]
    asked = iter(given)
    with pytest.raises(RefusedError, match="The PIN is wrong") as caught:
        fresh.hardware.unwrap(binding, held, [], lambda _: next(asked))
    assert caught.value.reason == Reason.PIN_WRONG
    assert fresh.hardware.unwrap(binding, held, [], lambda _: next(asked)).secret == member
    assert all(not any(used.buffer) for used in given)
    assert probing.probe(fresh.wire.tcti, Selection()).wrong_pins == 1
    for _ in range(3):
        with pytest.raises(HwlicenseError):
            fresh.hardware.unwrap(binding, held, [], pin(b"1357"))
    with pytest.raises(HardwareError) as locked:
        fresh.hardware.unwrap(binding, held, [], pin(b"1357"))
    assert locked.value.reason == Reason.TPM_LOCKOUT
    assert "tpm2_dictionarylockout" in locked.value.hint
    plain, other = fresh.desk.bind(fresh.evidence)
    assert fresh.hardware.unwrap(plain, fresh.hardware.install(plain, []), [], None).secret == other


# ---- the TPM's moods ----


@pytest.mark.parametrize("code", [wire.RETRY, wire.NV_RATE, TPM2_RC.YIELDED, TPM2_RC.TESTING], ids=hex)
def test_a_busy_tpm_is_waited_for_at_every_command(machine, code):
    binding, member = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    for command in (TPM2_CC.Load, TPM2_CC.StartAuthSession, TPM2_CC.PolicyPCR, TPM2_CC.Unseal):
        machine.wire.inject(code, command, times=4 if code == wire.NV_RATE else 8)  # the library tries some five times
        assert machine.hardware.unwrap(binding, held, [], None).secret == member


def test_patience_has_a_bound(machine, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    binding, _ = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    machine.wire.inject(wire.NV_RATE, TPM2_CC.Unseal, times=10**6)
    begun = time.monotonic()
    with pytest.raises(HardwareError, match=r"unseal, response code 0x920") as caught:
        machine.hardware.unwrap(binding, held, [], None)
    assert time.monotonic() - begun < 5
    assert caught.value.reason == Reason.TPM_BUSY
    machine.heal()


@pytest.mark.parametrize(
    ("code", "command", "reason"),
    [
        (wire.LOCKOUT, TPM2_CC.Load, Reason.TPM_LOCKOUT),
        (0x9A2, TPM2_CC.CreatePrimary, Reason.TPM_AUTHORIZATION),
        (TPM2_RC.FAILURE, TPM2_CC.StartAuthSession, Reason.TPM_FAILED),
        (TPM2_RC.COMMAND_CODE, TPM2_CC.Load, Reason.TPM_UNSUPPORTED),
        (0xB0000 | TPM2_RC.COMMAND_CODE, TPM2_CC.Load, Reason.TPM_UNSUPPORTED),  # as the kernel says it
    ],
)
def test_response_codes_have_reasons_and_name_the_command(fresh, code, command, reason):
    binding, member = fresh.desk.bind(fresh.evidence)
    held = fresh.hardware.install(binding, [])
    fresh.wire.inject(code, command)
    with pytest.raises(HardwareError, match=f"response code 0x{code:x}") as caught:
        fresh.hardware.unwrap(binding, held, [], None)
    assert caught.value.reason == reason
    assert caught.value.hint
    assert fresh.hardware.unwrap(binding, held, [], None).secret == member


@pytest.mark.parametrize("what", ["describe", "prove", "install", "admit", "present", "unwrap"])
def test_a_failure_at_any_command_leaves_nothing_in_the_tpm(fresh, what):
    approval = fresh.desk.approve(fresh.evidence.pcrs)
    binding, member = fresh.desk.bind(fresh.evidence, PRODUCT, pin=b"2468")
    held = fresh.hardware.install(binding, [approval])
    act = {
        "describe": lambda: fresh.hardware.describe(SELECTION),
        "prove": lambda: fresh.hardware.prove(fresh.evidence, b"request"),
        "install": lambda: fresh.hardware.install(binding, [approval]),
        "admit": lambda: fresh.hardware.admit(binding, held, approval),
        "present": lambda: fresh.hardware.present(binding, held),
        "unwrap": lambda: fresh.hardware.unwrap(binding, held, [approval], pin(b"2468")),
    }[what]
    fresh.wire.forget()
    act()
    count = len(fresh.wire.commands)
    assert count >= 3
    for after in range(count):
        for fail in (lambda n: fresh.wire.inject(TPM2_RC.FAILURE, after=n), lambda n: fresh.wire.cut(after=n)):
            fail(after)
            with suppress(HwlicenseError):  # refused flushes fail in silence
                act()
            fresh.heal()
            left = fresh.loaded()
            # A FlushContext that was itself refused leaves its handle, which the next in need of room flushes.
            assert len(left) <= (fresh.wire.commands[after] == TPM2_CC.FlushContext), (after, list(map(hex, left)))
            fresh.wire.forget()
            with fresh.esapi() as esapi:
                for handle in left:
                    esapi.flush_context(esapi.tr_from_tpmpublic(handle))
            act()
            fresh.wire.forget()
    assert fresh.hardware.unwrap(binding, held, [approval], pin(b"2468")).secret == member


def test_room_is_made_in_a_tpm_full_of_what_killed_programs_left(fresh):
    approval = fresh.desk.approve(fresh.evidence.pcrs)
    binding, member = fresh.desk.bind(fresh.evidence, PRODUCT)
    with fresh.esapi() as esapi:
        for _ in range(3):
            esapi.create_primary(None, "ecc", ESYS_TR.OWNER)
            esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, 0, "null", 0xB)
    assert len(fresh.loaded()) == 6
    held = fresh.hardware.install(binding, [approval])
    assert fresh.hardware.unwrap(binding, held, [approval], None).secret == member


def test_a_lost_connection_is_said_and_made_again(machine):
    binding, member = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    machine.wire.cut(TPM2_CC.Unseal, executed=True)
    with pytest.raises(HardwareError) as caught:
        machine.hardware.unwrap(binding, held, [], None)
    assert caught.value.reason == Reason.TPM_GONE
    assert machine.hardware.unwrap(binding, held, [], None).secret == member


# ---- threads, forks, killed processes ----


def test_threads_share_one_binder(machine):
    binding, member = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: machine.hardware.unwrap(binding, held, [], None).secret, range(60)))
    assert all(one == member for one in opened)


def test_a_forked_child_opens_afresh_and_leaves_the_parents_connection_alone(machine):
    binding, member = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    working, done = threading.Event(), threading.Event()

    def work():  # another thread is in the middle of its work when the process forks
        with machine.hardware._connection.work():
            working.set()
            done.wait()

    for concurrent in (False, True):
        worker = threading.Thread(target=work) if concurrent else threading.Thread()
        worker.start()
        assert not concurrent or working.wait(10)
        child = os.fork()
        if not child:
            status = 1
            try:
                status = machine.hardware.unwrap(binding, held, [], None).secret != member
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        done.set()
        worker.join()
        assert machine.hardware.unwrap(binding, held, [], None).secret == member


@pytest.fixture
def handler():
    """Sets what a signal does, and raises it. No test waits for ever."""

    def interrupt(act):
        signal.signal(signal.SIGUSR1, lambda *_: act())
        signal.raise_signal(signal.SIGUSR1)

    def give_up(*_):
        raise TimeoutError

    former = [(number, signal.getsignal(number)) for number in (signal.SIGUSR1, signal.SIGALRM)]
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield interrupt
    signal.alarm(0)
    for number, action in former:
        signal.signal(number, action)


def test_a_signal_handler_within_a_command_is_refused_and_harms_nothing(machine, handler):
    binding, member = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    with machine.hardware._connection.work() as work:
        loaded, _ = keys.attestation_key(work)
        for act in (lambda: machine.hardware.present(binding, held), machine.hardware.close):
            with pytest.raises(HardwareError, match="signal handler") as caught:
                handler(act)
            assert caught.value.reason == Reason.TPM_BUSY
            assert caught.value.hint
        work.call("read_public", loaded)
    handler(lambda: machine.hardware.present(binding, held))  # between commands it may
    assert machine.hardware.unwrap(binding, held, [], None).secret == member
    machine.hardware.close()


def test_a_child_that_a_signal_handler_forks_within_a_command(machine, handler):
    binding, member = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    children = []
    parent = os.getpid()
    status = 1
    try:
        with machine.hardware._connection.work() as work:
            keys.attestation_key(work)
            handler(lambda: children.append(os.fork()))
            if children == [0]:  # opens afresh, and leaves what the parent has loaded alone
                machine.hardware.present(binding, held)
            else:
                assert os.waitpid(children[0], 0)[1] == 0
                assert len(machine.loaded()) == 1
        status = 0
    finally:
        if os.getpid() != parent:
            os._exit(status)
    assert machine.hardware.unwrap(binding, held, [], None).secret == member


KILLED = """
import sys
from hwlicense.binders.tpm import TpmHardware
from hwlicense.core.tpm.pcrs import Selection
print("started", flush=True)
while True:
    TpmHardware(sys.argv[1]).describe(Selection.parse("sha256:7"))
"""


def test_what_a_killed_process_left_is_no_hindrance(fresh):
    binding, member = fresh.desk.bind(fresh.evidence)
    held = fresh.hardware.install(binding, [])
    for seconds in (0.01, 0.03, 0.05):
        with subprocess.Popen([sys.executable, "-c", KILLED, fresh.wire.tcti], stdout=subprocess.PIPE) as victim:
            assert victim.stdout
            victim.stdout.readline()
            time.sleep(seconds)
            victim.kill()
        assert fresh.hardware.unwrap(binding, held, [], None).secret == member
        assert fresh.hardware.unwrap(binding, fresh.hardware.install(binding, []), [], None).secret == member
    with fresh.esapi() as esapi:
        for handle in fresh.loaded():
            esapi.flush_context(esapi.tr_from_tpmpublic(handle))


# ---- connections ----


@pytest.mark.parametrize(
    "tcti",
    [
        *("cmd:id", "tabrmd", "pcap:device", "device", "device:", "/dev/tpmrm0", "swtpm", "libtss2-tcti-cmd.so:id"),
        *("device:/dev/tpm0:x", "./evil.so:x", "mssim:a:b", "spi-ltt2go:", "swtpm:path=/x\nfoo:y"),
    ],
)
def test_no_tcti_may_run_a_program_or_load_a_library(tcti):
    with pytest.raises(UsageError, match="does not name a TPM"):
        TpmHardware(tcti)


@pytest.mark.parametrize(
    "tcti",
    ["device:/nonexistent", "swtpm:path=/nonexistent", "swtpm:host=127.0.0.1,port=1", "mssim:host=127.0.0.1,port=1"],
)
def test_no_tpm_is_absent(tcti):
    with pytest.raises(AbsentError, match="There is no TPM at") as caught, TpmHardware(tcti) as hardware:
        hardware.describe(SELECTION)
    assert caught.value.reason == Reason.TPM_ABSENT


def test_no_permission_names_the_group(tmp_path):
    node = tmp_path / "tpmrm0"
    node.touch(mode=0)
    tmp_path.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if not child:  # root would have the permission
        try:
            for folder in node.parents[:3]:
                folder.chmod(0o755)
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            TpmHardware(f"device:{node}").describe(SELECTION)
        except HardwareError as error:
            os.write(write, f"{error.reason} {error.hint}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        assert said.read().startswith('TPM_NO_PERMISSION Add the user to the group "tss"')
    os.waitpid(child, 0)


def test_a_tpm_of_another_device_is_not_present(machine, fresh):
    binding, _ = machine.desk.bind(machine.evidence)
    held = machine.hardware.install(binding, [])
    with pytest.raises(AbsentError):
        fresh.hardware.present(binding, held)
    with pytest.raises(RefusedError) as caught:
        fresh.hardware.unwrap(binding, held, [], None)
    assert caught.value.reason == Reason.WRONG_DEVICE
    with pytest.raises(RefusedError) as caught:
        fresh.hardware.install(binding, [])
    assert caught.value.reason == Reason.WRONG_DEVICE


def test_a_closed_binder_connects_again(fresh):
    fresh.hardware.close()
    fresh.hardware.close()
    assert fresh.hardware.describe(SELECTION) == fresh.evidence


WITHOUT_LIBRARY = """
import sys
sys.modules["tpm2_pytss"] = None
import hwlicense, hwlicense.vendor.issuing, hwlicense.core.tpm.duplicate
from hwlicense.core.errors import UsageError
try:
    import hwlicense.binders.tpm
except UsageError as error:
    print(error.reason, error.hint)
"""


def test_without_the_library_everything_but_the_binder_works_and_the_extra_is_named():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'EXTRA_MISSING pip install "hwlicense[tpm]"'


SILENT = """
import sys, hwlicense, hwlicense.vendor.issuing
from hwlicense.core.errors import AbsentError
assert not any(name.startswith("tpm2_pytss") for name in sys.modules)
from hwlicense.binders.tpm import TpmHardware
from hwlicense.core.tpm.pcrs import Selection
try:
    TpmHardware("swtpm:path=/nonexistent").describe(Selection())
except AbsentError:
    print("absent")
"""


def test_the_library_is_loaded_by_the_binder_alone_and_its_chatter_is_not_heard():
    environment = {name: value for name, value in os.environ.items() if name != "TSS2_LOG"}
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("absent\n", "")


def test_facts_for_people(machine):
    facts = probing.probe(machine.wire.tcti, SELECTION)
    assert facts.pcrs == machine.evidence.pcrs
    assert (facts.banks, facts.persistent_srk, facts.in_lockout) == (["sha256"], True, False)
    assert facts.ek_certificates == ["EK-RSA2048", "H-3"]
    assert hmac.compare_digest(facts.manufacturer, "IBM SW TPM")
    assert OrderDesk().policy_key.bits == 256
