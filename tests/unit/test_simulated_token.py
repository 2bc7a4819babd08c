"""The simulated PKCS#11 token against pkcs11-tool, python-pkcs11 and cryptography, which are other hands' work."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from hwlicense_simulators import ProgramMissingError, SimulatorError, process, softhsm
from hwlicense_simulators.token import Reader, Token

LABEL, PIN = "Löwe; 50 %", "482 915"
EC_POINT, LOCAL, OAEP, ECDH = 0x181, 0x163, 0x9, 0x1050
PEER = ec.derive_private_key(0xB0B, ec.SECP256R1())
UNCOMPRESSED = (serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
PEER_POINT = PEER.public_key().public_bytes(*UNCOMPRESSED)
NONCE = bytes(range(32))

# What an application does with a token; the test says line by line what is next, and what may happen in between.
APPLICATION = """
    import json, os, signal, sys, pkcs11
    from pkcs11 import KDF, Attribute, KeyType, Mechanism, ObjectClass
    from pkcs11.mechanisms import MGF

    module, peer = sys.argv[1], bytes.fromhex(sys.argv[2])
    lib = pkcs11.lib(module)
    slots = lambda **options: [slot.slot_id for slot in lib.get_slots(**options)]
    token = lambda number=0: lib.get_slots(token_present=True)[number].get_token()
    key = lambda kind: session.get_key(object_class=ObjectClass.PRIVATE_KEY, key_type=kind)

    def login(pin="482 915"):
        global session
        session = token().open(user_pin=pin)

    def derive(point=peer):
        template = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
        derived = key(KeyType.EC).derive_key(
            KeyType.GENERIC_SECRET, 256, mechanism=Mechanism.ECDH1_DERIVE,
            mechanism_param=(KDF.NULL, None, point), template=template)
        return derived[Attribute.VALUE].hex()

    def decrypt(sealed):
        parameters = (Mechanism.SHA_1, MGF.SHA1, None)
        return key(KeyType.RSA).decrypt(
            bytes.fromhex(sealed), mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=parameters).hex()

    def point():
        return session.get_key(object_class=ObjectClass.PUBLIC_KEY, key_type=KeyType.EC)[Attribute.EC_POINT].hex()

    for line in sys.stdin:
        try:
            code, namespace = json.loads(line), globals()
            try:
                value = eval(code, namespace)
            except SyntaxError:
                value = exec(code, namespace)
            answer = {"value": value}
        except pkcs11.PKCS11Error as error:
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), flush=True)
"""

# What python-pkcs11 has no way to: any call, with any arguments.
DIRECTLY = """
from ctypes import CDLL, CFUNCTYPE, POINTER, byref, c_char_p, c_ulong, c_void_p

start, handle, info = POINTER(c_void_p)(), c_ulong(), (c_ulong * 4)()
assert CDLL(module).C_GetFunctionList(byref(start)) == 0
places = {"C_Initialize": 1, "C_OpenSession": 13, "C_GetSessionInfo": 16, "C_Login": 19}

def call(name, *arguments):
    arguments = [c_ulong(value) if isinstance(value, int) else value for value in arguments]
    kinds = [c_ulong if isinstance(value, c_ulong) else c_void_p for value in arguments]
    return CFUNCTYPE(c_ulong, *kinds)(start[places[name]])(*arguments)
"""


class TokenError(Exception):
    """What python-pkcs11 raised in the application."""


class Application:
    def __init__(self, module, **options):
        command = [sys.executable, "-c", textwrap.dedent(APPLICATION), str(module), PEER_POINT.hex()]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def begin(self, code):
        assert self.process.stdin
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()

    def finish(self):
        assert self.process.stdout
        answer = json.loads(self.process.stdout.readline() or self.died())
        if "error" in answer:
            raise TokenError(answer["error"])
        return answer["value"]

    def died(self):
        _, errors = self.process.communicate(timeout=10)
        raise AssertionError(f"the application ended with {self.process.returncode}: {errors.decode()}")

    def __call__(self, code):
        self.begin(code)
        return self.finish()

    def refused(self, code, error):
        with pytest.raises(TokenError, match=f"^{error}$"):
            self(code)


def tool(reader, *arguments, check=True, text=True):
    command = ["pkcs11-tool", "--module", reader.module, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False, text=text)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if check else done


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def agreed(reader):
    """What both sides come to. From a listing: where pkcs11-tool exports an EC key, it uses memory it has freed."""
    listed = tool(reader, "--list-objects", "--type", "pubkey", "--id", "01")
    (point,) = re.findall(r"EC_POINT: +0441([0-9a-f]{130})\n", listed)
    public = ec.EllipticCurvePublicKey.from_encoded_point(PEER.curve, bytes.fromhex(point))
    return PEER.exchange(ec.ECDH(), public).hex()


def sealed(reader):
    der = tool(reader, "--read-object", "--type", "pubkey", "--id", "02", text=False)
    public = serialization.load_der_public_key(der)
    assert isinstance(public, rsa.RSAPublicKey)
    scheme = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)  # noqa: S303  all that SoftHSM has
    return public.encrypt(NONCE, scheme).hex()


def make_keys(reader, *options, kinds=("EC:prime256v1", "RSA:2048")):
    for kind, number in zip(kinds, ("01", "02"), strict=False):
        made = ("--keypairgen", "--key-type", kind, "--id", number, "--usage-derive", "--usage-decrypt")
        tool(reader, "--login", "--pin", PIN, *made, *options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a reader with one token, which has an EC and an RSA key."""
    folder = tmp_path_factory.mktemp("reader") / "kept"
    with Reader(folder) as reader:
        reader.token(LABEL, PIN)
        make_keys(reader)
    return folder


@pytest.fixture
def reader(made, tmp_path):
    with Reader(shutil.copytree(made, tmp_path / "reader")) as reader:
        yield reader


@pytest.fixture
def token(reader):
    return reader.tokens[0]


@pytest.fixture
def application(reader):
    with Application(reader.module) as application:
        yield application


# what it is without faults


def test_pkcs11_tool_sees_the_token(reader, token):
    listed = tool(reader, "-L")
    assert re.findall(r"token label +: (.*)", listed) == [LABEL]
    assert re.findall(r"serial num +: (.*)", listed) == [token.serial]
    assert "Slot 0 (0x0): Simulated reader, slot 0\n" in listed
    assert token.slot == 0
    assert "locked" not in listed
    assert "count low" not in listed


def test_the_secret_is_the_one_of_the_public_key(reader, application):
    application("login()")
    assert application("derive()") == agreed(reader)
    assert application(f"decrypt({sealed(reader)!r})") == NONCE.hex()


def test_pkcs11_tool_derives_the_same_secret(reader, tmp_path):
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "peer.der").write_bytes(PEER.public_key().public_bytes(*spki))
    derive = ("--derive", "-m", "ECDH1-DERIVE", "--id", "01", "--input-file", tmp_path / "peer.der")
    tool(reader, "--login", "--pin", PIN, *derive, "--output-file", tmp_path / "secret")
    assert (tmp_path / "secret").read_bytes().hex() == agreed(reader)


def test_the_uri_names_token_and_module(token):
    scheme, _, path, query, _ = urlsplit(token.uri)
    parts = dict(part.split("=") for part in path.split(";"))
    assert scheme == "pkcs11"
    assert {name: unquote(value) for name, value in parts.items()} == {"token": LABEL, "serial": token.serial}
    assert parse_qs(query) == {"module-path": [str(token.reader.module)]}
    assert re.fullmatch(r"[!-~]+", token.uri)
    assert token.environment == {"HWLICENSE_TOKEN": token.uri}
    assert PIN not in unquote(token.uri)


def test_a_token_alone_has_a_reader():
    with Token("alone", "1234", tries=1) as token:
        assert (token.label, token.pin, token.tries_left, token.plugged) == ("alone", "1234", 1, True)
        assert "alone" in tool(token.reader, "-L")
        assert token.folder.is_dir()
        folder = token.reader.module.parent
    assert not folder.exists()
    with pytest.raises(SimulatorError):
        _ = Token().serial


def test_two_readers_in_one_process_are_apart(application):
    with Reader() as other:
        token = other.token("other")
        application(f"second = pkcs11.lib({str(other.module)!r})")
        assert application("[slot.get_token().label for slot in second.get_slots()]") == ["other"]
        assert application("token().label") == LABEL
        token.pull()
        assert application("second.get_slots(token_present=True)") == []
        assert application("slots(token_present=True)") == [0]


@pytest.mark.parametrize("before", ["/elsewhere.conf", None])
def test_the_environment_stays_as_it_was(reader, before):
    environment = {name: value for name, value in os.environ.items() if name != "SOFTHSM2_CONF"}
    with Application(reader.module, env=environment | ({"SOFTHSM2_CONF": before} if before else {})) as application:
        application("login()")
        application(DIRECTLY)
        application("getenv = CDLL(None).getenv; getenv.restype = c_char_p")
        seen = application("(getenv(b'SOFTHSM2_CONF') or b'').decode()")
    assert seen == (before or "")


def test_the_module_compiles_without_a_warning(tmp_path):
    source = Path(softhsm.__file__).with_name("token_module.c")
    warnings = ("-Wall", "-Wextra", "-Werror", "-std=gnu11", "-O1", "-fvisibility=hidden")
    subprocess.run(["cc", "-shared", "-fPIC", *warnings, "-o", tmp_path / "module.so", source, "-ldl"], check=True)
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", tmp_path / "module.so"], capture_output=True, text=True, check=True
    )
    assert re.findall(r" T (\w+)", exported.stdout) == ["C_GetFunctionList"]
    assert len(softhsm.functions()) == 68


# what it tells of itself


def test_calls_are_listed(reader, application):
    application("login()")
    assert reader.calls[0] == "C_Initialize"
    assert reader.calls.count("C_Login") == 1
    reader.forget()
    assert reader.calls == []
    application("derive()")
    assert "C_DeriveKey" in reader.calls
    assert "C_Login" not in reader.calls


def test_sessions_and_logins_are_counted(reader, application):
    assert (reader.open_sessions, reader.logged_in) == (0, False)
    application("login()")
    assert (reader.open_sessions, reader.logged_in) == (1, True)
    application("session.close()")
    assert (reader.open_sessions, reader.logged_in) == (0, False)


def test_what_python_pkcs11_leaks_is_counted(reader, application):
    application.refused("login('wrong')", "PinIncorrect")
    assert (reader.open_sessions, reader.logged_in) == (1, False)


def test_calls_that_overlap_are_told(reader, application):
    application("login()")
    application("import threading")
    threads = "threads = [threading.Thread(target=session.generate_random, args=(64,)) for _ in 'ab']"
    reader.slow(0.2, "C_GenerateRandom")
    application(threads)
    application("[thread.start() or thread.join() for thread in threads]")
    assert reader.overlaps == []
    application(threads)
    application("[thread.start() for thread in threads] and [thread.join() for thread in threads]")
    assert reader.overlaps == ["C_GenerateRandom"]
    reader.forget()
    application("session.generate_random(64).hex()")
    assert reader.overlaps == []


def test_a_finalized_module_has_no_sessions(reader, application):
    application("login()")
    application("lib.reinitialize()")
    assert (reader.open_sessions, reader.logged_in) == (0, False)


def test_the_sessions_of_a_killed_process_do_not_count(reader, token, application):
    with Application(reader.module) as other:
        for each in (application, other):
            each("login()")
        assert reader.open_sessions == 2
        other.process.kill()
        other.process.wait()
        assert (reader.open_sessions, reader.logged_in) == (1, True)
    # A later process with the number of a dead one is not taken for it.
    log = token.reader.module.with_name("log")
    lines = log.read_text().replace(f"{application.process.pid} ", "1 ")
    log.write_text(re.sub(r"^1 \d+", "1 0", lines, flags=re.MULTILINE))
    assert (reader.open_sessions, reader.logged_in) == (0, False)


# in and out


def test_a_pulled_token_is_gone(reader, token, application):
    application("login()")
    application("old = token()")
    token.pull()
    application.refused("derive()", "DeviceRemoved")
    application.refused("session.generate_random(64).hex()", "DeviceRemoved")
    assert application("slots(token_present=True)") == []
    assert application("slots()") == [0]
    assert application("pkcs11.SlotFlag.TOKEN_PRESENT in lib.get_slots()[0].flags") is False
    application.refused("lib.get_slots()[0].get_token()", "TokenNotPresent")
    application.refused("old.open()", "TokenNotPresent")
    assert (reader.open_sessions, reader.logged_in, token.plugged) == (0, False, False)
    assert "(empty)" in tool(reader, "-L")


@pytest.mark.parametrize("noticed", [True, False])
def test_a_token_that_came_back_knows_no_session_and_no_login(reader, token, application, noticed):
    application("login()")
    application("public = token().open()")
    token.pull()
    if noticed:
        application.refused("derive()", "DeviceRemoved")
    token.plug()
    assert (reader.open_sessions, reader.logged_in) == (0, False)
    application.refused("derive()", "SessionHandleInvalid")
    application.refused("list(public.get_objects())", "SessionHandleInvalid")
    application("old, session = session, token().open()")
    application.refused("derive()", "NoSuchKey")
    application("login()")
    assert application("derive()") == agreed(reader)
    application.refused("old.generate_random(64).hex()", "SessionHandleInvalid")


def test_a_token_may_come_back_in_another_slot(reader, token, application):
    application("login()")
    token.pull()
    token.plug(slot="other")
    assert token.slot == 1
    assert application("slots()") == [1]
    application("login()")
    assert application("session.token.slot.slot_id") == 1
    assert application("derive()") == agreed(reader)
    assert re.findall(r"Slot \d+ \((0x\d+)\)", tool(reader, "-L")) == ["0x1"]


def test_a_session_says_in_which_slot_it_is(reader, token):
    token.pull()
    token.plug("other")
    with Application(reader.module) as application:
        application(DIRECTLY)
        application("call('C_Initialize', None)")
        application("call('C_OpenSession', 1, 4, None, None, byref(handle))")
        assert application("call('C_GetSessionInfo', handle, info)") == 0
        assert application("info[0]") == 1


def test_a_swapped_token_looks_the_same_and_has_another_key(reader, token, application):
    other = reader.token("spare", PIN, plugged=False)
    token.pull()
    other.plug("other")
    make_keys(reader, "--slot", str(other.slot), kinds=["EC:prime256v1"])
    other.pull()
    token.plug()
    application("login()")
    seen = application("[token().label, token().serial.decode(), token().slot.slot_id, point()]")
    assert seen[:2] == [LABEL, token.serial]

    other.present_as(token.label, token.serial)
    token.swap(other)
    application.refused("derive()", "DeviceRemoved")
    application("login()")
    now = application("[token().label, token().serial.decode(), token().slot.slot_id, point()]")
    assert now[:3] == seen[:3]
    assert now[3] != seen[3]
    assert application("derive()") == agreed(reader)


def test_two_tokens_may_have_the_same_label(reader, token):
    second = reader.token(LABEL)
    assert token != second
    assert reader.tokens == (token, second)
    assert token.serial != second.serial
    with Application(reader.module) as application:
        assert application("[token(i).label for i in (0, 1)]") == [LABEL, LABEL]
        assert application("[token(i).serial.decode() for i in (0, 1)]") == [token.serial, second.serial]
        application.refused(f"lib.get_token(token_label={LABEL!r})", "MultipleTokensReturned")
        token.pull()
        assert application("token().serial.decode()") == second.serial


def test_what_it_presents_itself_as_is_what_all_see(reader, token):
    token.present_as(label="another", serial="0123")
    listed = tool(reader, "-L")
    assert re.search(r"token label +: another\n", listed)
    assert re.search(r"serial num +: 0123\n", listed)
    assert ("token=another;serial=0123" in token.uri, token.label, token.serial) == (True, "another", "0123")


def test_a_pull_in_the_middle_of_a_call(reader, token, application):
    application("login()")
    reader.slow(0.5, "C_DeriveKey")
    application.begin("derive()")
    wait_until(lambda: "C_DeriveKey" in reader.calls)
    token.pull()
    with pytest.raises(TokenError, match="DeviceRemoved"):
        application.finish()


# PINs


def test_wrong_pins_lock_the_token(reader, token, application):
    flags = "[n for n in ('COUNT_LOW', 'FINAL_TRY', 'LOCKED') if pkcs11.TokenFlag['USER_PIN_' + n] in token().flags]"
    assert application(flags) == []
    application.refused("login('wrong')", "PinIncorrect")
    assert (token.tries_left, application(flags)) == (2, ["COUNT_LOW"])
    application.refused("login('wrong')", "PinIncorrect")
    assert application(flags) == ["COUNT_LOW", "FINAL_TRY"]
    assert "final user PIN try" in tool(reader, "-L")
    application.refused("login('wrong')", "PinIncorrect")
    assert (token.tries_left, application(flags)) == (0, ["COUNT_LOW", "LOCKED"])
    application.refused("login()", "PinLocked")
    assert "user PIN locked" in tool(reader, "-L")
    assert "CKR_PIN_LOCKED" in tool(reader, "--login", "--pin", PIN, "-O", check=False).stderr

    token.unlock()
    application("login()")
    assert (token.tries_left, application(flags)) == (3, [])


def test_the_right_pin_resets_the_counter(token, application):
    for wrong in ("1", "2"):
        application.refused(f"login({wrong!r})", "PinIncorrect")
    assert token.tries_left == 1
    application("login()")
    assert token.tries_left == 3


def test_a_try_is_counted_before_it_is_tried(reader, token, application):
    """Killed in between, the try is spent: SoftHSM itself is made to crash, by a PIN at an impossible address."""
    application(DIRECTLY)
    application("call('C_Initialize', None)")
    assert application("call('C_OpenSession', 0, 4, None, None, byref(handle))") == 0
    application.begin("call('C_Login', handle, 1, c_void_p(1), 6)")
    with pytest.raises(AssertionError, match=f"ended with {-signal.SIGSEGV}"):
        application.finish()
    assert token.tries_left == 2
    assert (reader.open_sessions, reader.logged_in) == (0, False)


def test_changing_the_pin_is_a_try_too(reader, token, application):
    application("session = token().open(rw=True)")
    application.refused("session.set_pin('wrong', '654321')", "PinIncorrect")
    assert token.tries_left == 2
    application(f"session.set_pin({PIN!r}, '654321')")
    assert token.tries_left == 3
    assert "CKR_PIN_INCORRECT" in tool(reader, "--login", "--pin", PIN, "-O", check=False).stderr


def test_the_security_officer_sets_a_new_pin(reader, token):
    officer = ("--login", "--login-type", "so", "--so-pin")
    for pin in ("0", "1", "2"):
        tool(reader, "--login", "--pin", pin, "-O", check=False)
    refused = tool(reader, *officer, "0000", "--init-pin", "--pin", "654321", check=False)
    assert "CKR_PIN_INCORRECT" in refused.stderr
    tool(reader, *officer, softhsm.SECURITY_OFFICER_PIN, "--change-pin", "--new-pin", "11223344")
    assert token.tries_left == 0
    tool(reader, *officer, "11223344", "--init-pin", "--pin", "654321")
    assert token.tries_left == 3
    tool(reader, "--login", "--pin", "654321", "-O")


# crashes, hangs and delays


def test_a_crash_at_the_nth_call_of_a_function(reader, application):
    application("login()")
    reader.crash("C_DeriveKey", nth=2)
    assert application("derive()") == agreed(reader)
    application.begin("derive()")
    with pytest.raises(AssertionError, match=f"ended with {-signal.SIGSEGV}"):
        application.finish()
    assert (reader.open_sessions, reader.logged_in) == (0, False)

    reader.heal()
    with Application(reader.module) as again:
        again("login()")
        assert [again("derive()"), again("derive()")] == [agreed(reader)] * 2


def test_a_crash_at_every_call(reader):
    login = ("--login", "--pin", PIN, "--list-objects", "--type", "privkey")
    assert "RSA" in tool(reader, *login)
    total = len(reader.calls)
    assert total > 10
    for nth in (1, 2, total // 2, total, total + 1):
        reader.crash(nth=nth)
        reader.forget()
        done = tool(reader, *login, check=False)
        assert done.returncode == (-signal.SIGSEGV if nth <= total else 0)
        assert len(reader.calls) == min(nth, total)


def test_a_hang_outlasts_handled_signals_and_ends_with_fatal_ones(reader, application):
    application("login()")
    application("signal.signal(signal.SIGUSR1, lambda *_: None)")
    reader.hang("C_DeriveKey")
    application.begin("derive()")
    wait_until(lambda: "C_DeriveKey" in reader.calls)
    for _ in range(3):
        time.sleep(0.05)
        application.process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    assert application.process.poll() is None
    assert reader.logged_in
    application.process.send_signal(signal.SIGTERM)
    assert application.process.wait(timeout=10) == -signal.SIGTERM
    assert application.process.stdout.read() == b""


@pytest.mark.parametrize("function", [None, "C_GenerateRandom"])
def test_a_slow_call(reader, application, function):
    application("login()")
    reader.slow(0.3, function)
    begin = time.monotonic()
    application("session.generate_random(64).hex()")
    assert time.monotonic() - begin >= 0.3


def test_only_that_function_is_slow_and_only_until_it_is_healed(reader, application):
    application("login()")
    reader.slow(3600, "C_GenerateRandom")
    assert application("derive()") == agreed(reader)
    reader.heal()
    assert application("len(session.generate_random(64))") == 8


@pytest.mark.parametrize("operation", ["derive", "decrypt"])
def test_each_use_of_the_key_awaits_a_touch(reader, application, operation):
    code, result = (
        ("derive()", agreed(reader)) if operation == "derive" else (f"decrypt({sealed(reader)!r})", NONCE.hex())
    )
    application("login()")
    reader.await_touch(30)
    with pytest.raises(SimulatorError, match="nothing awaits a touch"):
        reader.touch(0.1)  # and this one is lost
    for _ in range(2):
        application.begin(code)
        wait_until(lambda: reader.awaiting_touch)
        reader.touch()
        assert application.finish() == result
        assert not reader.awaiting_touch


def test_touching_may_begin_before_the_call(reader, application):
    application("login()")
    reader.await_touch(30)
    finger = threading.Thread(target=reader.touch)
    finger.start()
    assert application("derive()") == agreed(reader)
    finger.join()


@pytest.mark.parametrize("operation", ["derive", "decrypt"])
def test_without_a_touch_the_call_is_canceled(reader, application, operation):
    code = "derive()" if operation == "derive" else f"decrypt({sealed(reader)!r})"
    application("login()")
    reader.await_touch(0.3)
    begin = time.monotonic()
    application.refused(code, "FunctionCancelled")
    assert time.monotonic() - begin >= 0.3
    reader.heal()
    assert application(code) in {agreed(reader), NONCE.hex()}  # in the same session


def test_a_token_pulled_while_it_awaits_a_touch(reader, token, application):
    application("login()")
    reader.await_touch(30)
    application.begin("derive()")
    wait_until(lambda: reader.awaiting_touch)
    token.pull()
    with pytest.raises(TokenError, match="DeviceRemoved"):
        application.finish()


def test_a_process_that_was_killed_awaits_no_touch(reader, application):
    application("login()")
    reader.await_touch(30)
    application.begin("derive()")
    wait_until(lambda: reader.awaiting_touch)
    application.process.kill()
    application.process.wait()
    assert not reader.awaiting_touch


# malice


def test_a_wrong_secret(reader, application):
    application("login()")
    reader.wrong_secret()
    for answer, right in (
        (application("derive()"), agreed(reader)),
        (application(f"decrypt({sealed(reader)!r})"), NONCE.hex()),
    ):
        assert len(answer) == len(right)
        assert (int(answer, 16) ^ int(right, 16)).bit_count() == 1
    reader.heal()
    assert application("derive()") == agreed(reader)


@pytest.mark.parametrize("by", [1, 31, 4096])
def test_short_and_long_secrets(reader, application, by):
    application("login()")
    secret, cipher = agreed(reader), sealed(reader)
    reader.short_secret(by)
    assert application("derive()") == secret[: max(0, 64 - 2 * by)]
    assert application(f"decrypt({cipher!r})") == NONCE.hex()[: max(0, 64 - 2 * by)]
    reader.long_secret(by)
    for answer, right in ((application("derive()"), secret), (application(f"decrypt({cipher!r})"), NONCE.hex())):
        assert (answer[:64], len(answer)) == (right, 64 + 2 * by)


def test_a_forged_public_key(reader, application):
    application("login()")
    true = application("point()")
    forged = bytes((4, 65)) + PEER_POINT
    public = "Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.EC_POINT: bytes.fromhex"
    by_true, by_forged = (f"len(list(session.get_objects({{{public}({point!r})}})))" for point in (true, forged.hex()))
    assert (application(by_true), application(by_forged)) == (1, 0)
    reader.forge_point(PEER_POINT)
    assert application("point()") == forged.hex()
    assert (application(by_true), application(by_forged)) == (0, 2)  # all that the rest of the search fits
    assert PEER_POINT.hex() in tool(reader, "-O", "--type", "pubkey")
    application.refused(
        "session.get_key(object_class=ObjectClass.PUBLIC_KEY, key_type=KeyType.RSA)[Attribute.EC_POINT]",
        "AttributeTypeInvalid",
    )
    reader.heal()
    assert application("point()") == true


def test_another_forged_attribute(reader, application):
    application("login()")
    assert application("key(KeyType.EC)[Attribute.LOCAL]") is True
    reader.forge(LOCAL, b"\0")
    assert application("key(KeyType.EC)[Attribute.LOCAL]") is False


@pytest.mark.parametrize(
    ("code", "error"), [(0x30, "DeviceError"), (0x5, "GeneralError"), (0xB3, "SessionHandleInvalid")]
)
def test_any_failure_of_any_function(reader, application, code, error):
    application("login()")
    reader.fail("C_DeriveKey", code)
    application.refused("derive()", error)
    cipher = sealed(reader)
    assert application(f"decrypt({cipher!r})") == NONCE.hex()
    reader.fail("C_Decrypt", code)
    application.refused(f"decrypt({cipher!r})", error)
    reader.heal()
    assert application(f"decrypt({cipher!r})") == NONCE.hex()
    assert application("derive()") == agreed(reader)


def test_success_may_be_claimed(reader):
    reader.fail("C_Login", 0)
    assert "Private Key Object" not in tool(reader, "--login", "--pin", "wrong", "-O")
    assert not reader.logged_in


@pytest.mark.parametrize(
    ("number", "name", "use"), [(ECDH, "ECDH1-DERIVE", "derive()"), (OAEP, "RSA-PKCS-OAEP", "decrypt('00')")]
)
def test_a_hidden_mechanism(reader, application, number, name, use):
    application("login()")
    assert name in tool(reader, "-M")
    reader.hide_mechanisms(number)
    listed = tool(reader, "-M")
    assert name not in listed
    assert "RSA-PKCS," in listed
    assert application(f"{number} in lib.get_slots()[0].get_mechanisms()") is False
    application.refused(f"lib.get_slots()[0].get_mechanism_info(pkcs11.Mechanism({number}))", "MechanismInvalid")
    application.refused(use, "MechanismInvalid")
    reader.heal()
    assert name in tool(reader, "-M")


def test_faults_add_up(reader, application):
    application("login()")
    reader.wrong_secret()
    reader.slow(0.2, "C_DeriveKey")
    reader.fail("C_GenerateRandom", 0x30)
    begin = time.monotonic()
    assert application("derive()") not in {agreed(reader), ""}
    assert time.monotonic() - begin >= 0.2
    application.refused("session.generate_random(64).hex()", "DeviceError")


# what is kept and what is not


def test_a_kept_token_is_there_again(tmp_path):
    folder = tmp_path / "kept # here"
    with Token("kept", PIN, folder=folder) as token:
        serial = token.serial
        make_keys(token.reader, kinds=["EC:prime256v1"])
        secret = agreed(token.reader)
        tool(token.reader, "--login", "--pin", "wrong", "-O", check=False)
        with pytest.raises(SimulatorError, match="another process uses"), Token(folder=folder):
            pass
    with Token("ignored", folder=folder) as token, Application(token.reader.module) as application:
        assert (token.label, token.pin, token.serial, token.tries_left) == ("kept", PIN, serial, 2)
        application("login()")
        assert application("derive()") == secret


def test_a_pulled_token_is_kept_so(tmp_path):
    with Reader(tmp_path / "kept") as reader:
        reader.token("a").pull()
        reader.token("b", tries=5)
    with Reader(tmp_path / "kept") as reader:
        assert [(token.label, token.plugged, token.slot) for token in reader.tokens] == [
            ("a", False, 0),
            ("b", True, 1),
        ]
        assert reader.tokens[1].tries_left == 5
        reader.tokens[0].plug()
        assert re.findall(r"token label +: (.*)", tool(reader, "-L")) == ["a", "b"]


def test_a_copied_folder_is_a_copied_token(made, tmp_path, reader):
    with Reader(shutil.copytree(made, tmp_path / "copy")) as copy, Application(copy.module) as application:
        application("login()")
        assert application("derive()") == agreed(reader)


def test_a_broken_folder_is_refused(tmp_path):
    (tmp_path / "places").write_text("token\n")
    with pytest.raises(SimulatorError, match="no kept token"), Reader(tmp_path):
        pass


def test_nothing_is_left_after_a_kill():
    script = "from hwlicense_simulators.token import Token\nwith Token() as t: print(t.folder, flush=True); input()"
    environment = os.environ | {"PYTHONPATH": str(Path(process.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as owner:
        assert owner.stdout
        folder = Path(owner.stdout.readline().decode().strip())
        assert folder.is_dir()
        owner.kill()
    wait_until(lambda: not folder.parents[2].exists())


# errors


@pytest.mark.parametrize(("missing", "package"), [("cc", "gcc"), ("softhsm2-util", "softhsm2")])
def test_a_missing_program_is_named(monkeypatch, tmp_path, missing, package):
    softhsm._compiled.cache_clear()
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else which(name))
    with pytest.raises(ProgramMissingError, match=missing) as caught, Token():
        pass
    assert caught.value.hint == f"sudo apt-get install {package}"
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(softhsm, "_FOLDERS", ("nowhere",))
    with pytest.raises(ProgramMissingError, match=r"libsofthsm2\.so") as caught, Reader():
        pass
    assert caught.value.hint == "sudo apt-get install softhsm2"


def test_a_module_that_does_not_compile_is_an_error(monkeypatch, tmp_path):
    softhsm._compiled.cache_clear()
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho stdio.h: no such file >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SimulatorError, match=r"stdio\.h: no such file"), Reader():
        pass


def test_what_makes_no_sense_is_refused(reader, token):
    second = reader.token()
    token.pull()
    impossible = {
        "is out already": token.pull,
        "plugged in already": second.plug,
        "must be unplugged": lambda: token.swap(second),
        "no function 'C_Derive'": lambda: reader.crash("C_Derive"),
        "0 to 32 bytes": lambda: reader.token("ä" * 17),
        "4 to 255 bytes": lambda: reader.token(pin="123"),
        "0 to 16 bytes": lambda: token.present_as(serial="0" * 17),
        "one PIN try": lambda: reader.token(tries=0),
        "can be forged": lambda: reader.forge(EC_POINT, bytes(1025)),
        "65 bytes": lambda: reader.forge_point(bytes(67)),
        "16384 bytes at most": lambda: reader.long_secret(1 << 20),
    }
    for message, attempt in impossible.items():
        with pytest.raises(SimulatorError, match=message):
            attempt()
    token.plug("other")
    token.pull()
    second.pull()
    token.place.slot = second.slot
    token.plug()
    with pytest.raises(SimulatorError, match="another token is in slot"):
        second.plug()


def test_orders_that_are_not_understood_fail_every_call(reader):
    reader.installation.set_fault(("nonsense", None), "nonsense")
    done = tool(reader, "-L", check=False)
    assert "cannot read the orders" in done.stderr
    assert done.returncode
