"""The PKCS#11 binder, on real SoftHSM tokens behind a module that does what is asked of it, also what is wrong."""

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hwlicense.binders.pkcs11 import TokenHardware, answering, failures, process, protocol
from hwlicense.core.documents import Endorsement, TokenBinding
from hwlicense.core.errors import (
    AbsentError,
    DamagedError,
    HardwareError,
    HwlicenseError,
    Reason,
    RefusedError,
    UsageError,
)
from hwlicense.core.secret import Secret
from hwlicense.core.token import public_key, spki, wrap
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.uri import TokenUri

ENDORSEMENT = Endorsement(basis="recorded", root="", root_class="unknown")
NOTHING = Selection.parse()
PIN = "123456"
EC_POINT = 0x181
ROOT = Path(__file__).parents[2]


def secret(text):
    return Secret(bytearray(text.encode()))


class Asked:
    """A source of PINs that keeps what it was asked."""

    def __init__(self, text=PIN):
        self.text, self.prompts = text, []

    def __call__(self, prompt, *, last_try=False):
        self.prompts.append((prompt, last_try))
        return secret(self.text)


def no_pin(_prompt, *, last_try=False):  # noqa: ARG001
    pytest.fail("asked for a PIN that is not needed")


def bound(evidence, **changes):
    """A binding for a token, and its member secret."""
    wrapped = wrap(evidence.key, evidence.mechanism)
    binding = TokenBinding(
        evidence.uri, evidence.key, evidence.mechanism, ENDORSEMENT, wrapped.encapsulated, wrapped.check, evidence.pin
    )
    return msgspec.structs.replace(binding, **changes), wrapped.secret


def encoded(binding):
    return msgspec.json.encode(binding).decode()


def curve_key(der):
    key = public_key(der)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def refusal(kind, act, *arguments, **options):
    """The reason of the error, which must be of this kind."""
    with pytest.raises(kind) as caught:
        act(*arguments, **options)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def children():
    """The processes of modules that this one has."""
    return [running._running[0].pid for running in process._processes.values() if running._running is not None]


def gone(pid, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    left = children()
    for running in process._processes.values():
        running.users.clear()
        running.end_unused()
    process._processes.clear()
    assert left == []


@pytest.fixture
def reader(hwlicense_reader):
    return hwlicense_reader


@pytest.fixture
def token(reader):
    return reader.token("bench 4")


@pytest.fixture
def hardware(reader):
    with TokenHardware([str(reader.module)]) as opened:
        yield opened


@pytest.fixture
def enrolled(reader, token):  # noqa: ARG001  # it must be there
    """A P-256 key on the token, and no process left of making it."""
    with TokenHardware([str(reader.module)]) as opened:
        evidence = opened.enroll(Asked(), "p256")
    reader.forget()
    return evidence


def open_again(reader):
    return TokenHardware([str(reader.module)])


def in_module(reader, body, token=None, pin=PIN):
    """Do something to a token with python-pkcs11 in another process: `s` is a session, logged in if there is a PIN."""
    label = (token or reader.tokens[0]).label
    program = f"""
import sys, pkcs11
from pkcs11 import *
library = pkcs11.lib({str(reader.module)!r})
token = [t for t in (s.get_token() for s in library.get_slots(token_present=True)) if t.label == {label!r}][0]
s = token.open(rw=True, user_pin={pin!r})
P256 = bytes.fromhex("06082a8648ce3d030107")
{textwrap.dedent(body)}
library.finalize()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def make_key(reader, private="", public="", capabilities="MechanismFlag.DERIVE", identifier="07", token=None):
    in_module(
        reader,
        f"""
        s.create_domain_parameters(KeyType.EC, {{Attribute.EC_PARAMS: P256}}, local=True).generate_keypair(
            store=True, id=bytes.fromhex({identifier!r}), label="made", capabilities={capabilities},
            public_template={{Attribute.PRIVATE: False, {public}}},
            private_template={{Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, {private}}})
        """,
        token,
    )


# ---- the whole way ----


@pytest.mark.parametrize(("kind", "mechanism"), [("p256", "ecdh"), ("rsa2048", "rsa-oaep-sha1"), ("rsa3072", None)])
def test_a_token_enrolls_installs_opens_and_proves_that_it_is_here(reader, token, kind, mechanism):
    asked = Asked()
    with TokenHardware([str(reader.module)]) as hardware:
        evidence = hardware.enroll(asked, kind, "door key")
        assert hardware.describe(NOTHING) == evidence
        assert hardware.prove(evidence, b"statement") == b""
    assert evidence.mechanism == mechanism or kind == "rsa3072"
    assert evidence.pin
    uri = TokenUri.parse_hint(evidence.uri)
    assert (uri.token, uri.serial, uri.object) == (token.label, token.serial, "door key")
    assert len(uri.id or b"") == 16
    assert asked.prompts == [(f'PIN of the token "bench 4" (serial {token.serial})', False)]
    binding, member = bound(evidence)
    with TokenHardware([str(reader.module)]) as hardware:
        assert hardware.install(binding, []) == b""
        assert hardware.unwrap(binding, b"", [], asked).secret == member
        hardware.present(binding, b"")
        assert hardware.unwrap(binding, b"", [], no_pin).secret == member
        assert reader.logged_in
    assert len(asked.prompts) == 2
    assert children() == []
    assert not reader.logged_in
    assert reader.open_sessions == 0


@pytest.mark.parametrize(
    ("kind", "usage"), [("EC:prime256v1", "--usage-derive"), ("rsa:2048", "--usage-decrypt")], ids=["EC", "RSA"]
)
def test_keys_that_pkcs11_tool_made_serve_and_are_what_it_shows(reader, token, kind, usage, tmp_path):
    tool = ["pkcs11-tool", "--module", reader.module, "--token-label", token.label, "--login", "--pin", PIN]
    key = [*tool, "--keypairgen", "--key-type", kind, usage, "--id", "0a0b", "--label", "theirs"]
    subprocess.run(key, check=True, capture_output=True, timeout=60)
    file = tmp_path / "key"
    read = [*tool, "--read-object", "--type", "pubkey", "--id", "0a0b", "--output-file", file]
    subprocess.run(read, check=True, capture_output=True, timeout=60)
    with open_again(reader) as hardware:
        evidence = hardware.enroll(Asked())
        assert evidence.key == spki(public_key(file.read_bytes()))
        assert TokenUri.parse_hint(evidence.uri).id == b"\x0a\x0b"
        binding, member = bound(evidence)
        assert hardware.unwrap(binding, b"", [], None).secret == member


def test_what_the_token_computes_is_what_pkcs11_tool_gets_from_it(reader, token, enrolled, tmp_path):
    """The same ephemeral point, handed to the token by OpenSC: an oracle for the derivation."""
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "theirs").write_bytes(
        ephemeral.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    tool = ["pkcs11-tool", "--module", reader.module, "--token-label", token.label, "--login", "--pin", PIN, "--derive"]
    tool += ["--mechanism", "ECDH1-DERIVE", "--id", TokenUri.parse_hint(enrolled.uri).id.hex()]
    tool += ["--input-file", tmp_path / "theirs", "--output-file", tmp_path / "shared"]
    subprocess.run(tool, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "shared").read_bytes() == ephemeral.exchange(ec.ECDH(), curve_key(enrolled.key))
    point = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    asked = protocol.Compute(10, TokenUri(), enrolled.key, "ecdh", point, login=True, skip=[], pin_for=None)
    with open_again(reader) as hardware:
        hardware.unwrap(bound(enrolled)[0], b"", [], Asked())
        answer, content = process.borrow(str(reader.module), hardware._modules).ask(asked)
    assert isinstance(answer, protocol.Computed)
    assert bytes(content.buffer) == (tmp_path / "shared").read_bytes()


def test_the_application_never_loads_the_library_or_the_module(reader, enrolled):
    binding, member = bound(enrolled)
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import msgspec
        from hwlicense.binders.pkcs11 import TokenHardware
        from hwlicense.core.documents import TokenBinding
        from hwlicense.core.secret import Secret
        binding = msgspec.json.decode(sys.argv[3], type=TokenBinding)
        with TokenHardware([sys.argv[2]]) as hardware:
            opened = hardware.unwrap(binding, b"", [], lambda prompt, last_try: Secret(bytearray(b"123456")))
        assert not [name for name in sys.modules if name.startswith(("pkcs11", "asn1crypto"))]
        assert "simulated-token" not in open("/proc/self/maps").read()
        print(bytes(opened.secret.buffer).hex())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), ROOT, reader.module, encoded(binding)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == (bytes(member.buffer).hex(), "")


def test_without_the_library_the_error_names_the_extra():
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        sys.modules["pkcs11"] = None
        import hwlicense.binders.pkcs11 as binder
        try:
            binder.TokenHardware
        except Exception as error:
            print(error.reason, error.hint)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == 'EXTRA_MISSING pip install "hwlicense[pkcs11]"\n', done.stderr


# ---- PINs ----


def test_a_wrong_pin_is_tried_once_and_leaves_nothing_open(reader, token, enrolled):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:
        error = refusal(RefusedError, hardware.unwrap, binding, b"", [], Asked("000000"))
        assert error.reason == Reason.PIN_WRONG
        assert token.tries_left == 2
        assert reader.calls.count("C_Login") == 1
        assert reader.open_sessions == 0
        assert children() == []
        asked = Asked()
        assert hardware.unwrap(binding, b"", [], asked).secret == member
        assert asked.prompts[0][0].endswith("; a wrong one was entered before")
    assert token.tries_left == 3


def test_the_last_try_is_announced_and_a_locked_token_is_not_tried(reader, enrolled):
    binding, _ = bound(enrolled)
    with open_again(reader) as hardware:
        asked = Asked("000000")
        hints = [refusal(RefusedError, hardware.unwrap, binding, b"", [], asked).hint for _ in range(3)]
        assert asked.prompts[2][0].endswith("; this is the last try before it locks")
        assert [last for _, last in asked.prompts] == [False, False, True]
        assert hints[1].startswith("One try is left")
        assert hints[2].startswith("It was the last try")
        reader.forget()
        assert refusal(HardwareError, hardware.unwrap, binding, b"", [], no_pin).reason == Reason.TOKEN_LOCKED
        assert hardware.tokens()[0].locked
        assert "C_Login" not in reader.calls


def test_a_pin_given_for_three_tries_is_not_used_for_the_last_one(reader, token, enrolled):
    binding, _ = bound(enrolled)
    asked = Asked()

    def slow_person(prompt, *, last_try):
        if not asked.prompts:  # meanwhile another program uses up two tries
            for _ in range(2):
                with pytest.raises(subprocess.CalledProcessError):
                    in_module(reader, "", token, "999999")
            reader.forget()
        return asked(prompt, last_try=last_try)

    def cautious(prompt, *, last_try):
        if last_try:
            raise RefusedError(Reason.PIN_LAST_TRY, "no", "no")
        return slow_person(prompt, last_try=last_try)

    with open_again(reader) as hardware:
        error = refusal(RefusedError, hardware.unwrap, binding, b"", [], cautious)
        assert error.reason == Reason.PIN_LAST_TRY
        assert "C_Login" not in reader.calls
        hardware.unwrap(binding, b"", [], asked)
    assert [last for _, last in asked.prompts] == [False, True]


def test_nobody_to_ask_is_an_error_and_no_try(reader, token, enrolled):
    binding, _ = bound(enrolled)
    with open_again(reader) as hardware:
        assert refusal(RefusedError, hardware.unwrap, binding, b"", [], None).reason == Reason.PIN_NEEDED
        assert refusal(RefusedError, hardware.present, binding, b"").reason == Reason.PIN_NEEDED
        assert refusal(RefusedError, hardware.enroll, None, "p256").reason == Reason.PIN_NEEDED
    assert token.tries_left == 3
    assert "C_Login" not in reader.calls


@pytest.mark.parametrize("text", ["", "1", "x" * 300, "x" * 5000, "\0\0\0\0", "ä" * 20])
def test_odd_pins_are_wrong_pins(reader, enrolled, text):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:
        assert refusal(RefusedError, hardware.unwrap, binding, b"", [], Asked(text)).reason == Reason.PIN_WRONG
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member


def test_the_module_is_free_while_a_person_thinks(reader, enrolled):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:

        def thinking(prompt, *, last_try):
            with ThreadPoolExecutor() as other:
                assert len(other.submit(hardware.tokens).result(10)) == 1
            return Asked()(prompt, last_try=last_try)

        assert hardware.unwrap(binding, b"", [], thinking).secret == member


def test_a_wrong_pin_for_one_token_costs_no_login_to_another(reader, enrolled):
    second = reader.token("second")
    with TokenHardware([str(reader.module)], TokenUri(token="second")) as hardware:
        other, _ = bound(hardware.enroll(Asked(), "p256"))
    binding, _ = bound(enrolled)
    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
        (child,) = children()
        for _ in range(2):
            assert refusal(RefusedError, hardware.unwrap, other, b"", [], Asked("000000")).reason == Reason.PIN_WRONG
        assert second.tries_left == 1
        hardware.present(binding, b"")
        assert children() == [child]
    assert reader.open_sessions == 0


def test_the_pin_is_wiped_and_in_no_arguments_or_environment(reader, enrolled):
    binding, _ = bound(enrolled)
    given = []

    def source(_prompt, *, last_try):  # noqa: ARG001
        given.append(secret(PIN))
        return given[0]

    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], source)
        (child,) = children()
        assert bytes(given[0].buffer) == bytes(len(PIN))
        for name in ("cmdline", "environ"):
            with contextlib.suppress(PermissionError):  # the process is not dumpable: only root sees its environment
                assert PIN.encode() not in Path(f"/proc/{child}/{name}").read_bytes()


@pytest.mark.usefixtures("token")
def test_a_key_that_needs_no_login_is_used_without_a_pin(reader):
    make_key(reader, private="Attribute.PRIVATE: False")
    with open_again(reader) as hardware:
        evidence = hardware.describe(NOTHING)
        assert not evidence.pin
        binding, member = bound(evidence)
        assert hardware.unwrap(binding, b"", [], no_pin).secret == member
        hardware.present(binding, b"")
        assert "C_Login" not in reader.calls[reader.calls.index("C_Finalize") :]
        asked = Asked()
        assert hardware.unwrap(msgspec.structs.replace(binding, pin=True), b"", [], asked).secret == member
        assert len(asked.prompts) == 1


CAREFUL_KEY = """
s.generate_keypair(KeyType.RSA, 2048, store=True, id=b"1", label="made", capabilities=MechanismFlag.DECRYPT,
    private_template={Attribute.ALWAYS_AUTHENTICATE: True, Attribute.PRIVATE: True})
"""


def test_a_pin_for_one_use_is_not_used_for_the_last_try_unseen(reader, token):
    in_module(reader, CAREFUL_KEY)
    asked = Asked()

    def slow_person(prompt, *, last_try):
        if len(asked.prompts) == 1:
            for _ in range(2):
                with pytest.raises(subprocess.CalledProcessError):
                    in_module(reader, "", token, "999999")
        return asked(prompt, last_try=last_try)

    with open_again(reader) as hardware:
        binding, member = bound(hardware.enroll(asked))
        assert hardware.unwrap(binding, b"", [], slow_person).secret == member
    assert [last for _, last in asked.prompts] == [False, False, True]


def test_a_key_that_takes_its_pin_each_time_gets_it_each_time(reader, token):
    in_module(reader, CAREFUL_KEY)
    with open_again(reader) as hardware:
        asked = Asked()
        evidence = hardware.enroll(asked)
        assert evidence.mechanism == "rsa-oaep-sha1"
        assert len(asked.prompts) == 1
        binding, member = bound(evidence)
        assert hardware.unwrap(binding, b"", [], asked).secret == member
        assert len(asked.prompts) == 2
        assert refusal(RefusedError, hardware.unwrap, binding, b"", [], Asked("000000")).reason == Reason.PIN_WRONG
        assert token.tries_left == 2
        assert refusal(RefusedError, hardware.present, binding, b"").reason == Reason.PIN_NEEDED
        assert hardware.unwrap(binding, b"", [], asked).secret == member


def test_a_curve_key_that_takes_its_pin_each_time_is_tried_and_refused_clearly(reader, token):
    make_key(reader, private="Attribute.ALWAYS_AUTHENTICATE: True")
    with open_again(reader) as hardware:
        binding, member = bound(hardware.enroll(Asked()))
        assert hardware.unwrap(binding, b"", [], no_pin).secret == member  # SoftHSM lets it pass
        reader.fail("C_DeriveKey", 0x101)
        error = refusal(HardwareError, hardware.unwrap, binding, b"", [], no_pin)
        assert error.reason == Reason.TOKEN_UNSUPPORTED
        assert "at each use" in error.what
    assert token.tries_left == 3


# ---- which token, which key ----


def test_a_token_is_its_key_whatever_it_is_called(reader, token, enrolled):
    decoy = reader.token("bench 4")
    decoy.present_as(serial=token.serial)
    token.present_as(label="renamed", serial="1")
    binding, member = bound(enrolled)
    asked = Asked()
    with open_again(reader) as hardware:
        hardware.install(binding, [])
        assert hardware.unwrap(binding, b"", [], asked).secret == member
    assert [prompt for prompt, _ in asked.prompts] == ['PIN of the token "renamed" (serial 1)']
    assert decoy.tries_left == 3


@pytest.mark.usefixtures("token")
def test_a_token_that_hides_its_keys_is_found_by_name_and_checked_after_the_login(reader):
    make_key(reader, public="Attribute.PRIVATE: True")
    binding_of = {}
    with open_again(reader) as hardware:
        assert refusal(UsageError, hardware.describe, NOTHING).what.endswith("holds no usable key.")
        evidence = hardware.enroll(Asked())
        binding_of["right"], member = bound(evidence)
        binding_of["unnamed"] = msgspec.structs.replace(binding_of["right"], uri="pkcs11:token=other")
        stranger = spki(ec.generate_private_key(ec.SECP256R1()).public_key())
        binding_of["wrong"], _ = bound(msgspec.structs.replace(evidence, key=stranger))
    with open_again(reader) as hardware:
        hardware.install(binding_of["right"], [])
        assert refusal(AbsentError, hardware.install, binding_of["unnamed"], []).reason == Reason.TOKEN_ABSENT
        assert refusal(AbsentError, hardware.unwrap, binding_of["unnamed"], b"", [], no_pin)
        assert (
            refusal(AbsentError, hardware.unwrap, binding_of["wrong"], b"", [], Asked()).reason == Reason.TOKEN_ABSENT
        )
        assert hardware.unwrap(binding_of["right"], b"", [], no_pin).secret == member
        assert hardware.unwrap(binding_of["unnamed"], b"", [], no_pin).secret == member


def test_a_token_that_only_shows_the_key_is_passed_over(reader, token, enrolled):
    """Whoever has the public key can put it on a token of his own: it is asked, and another one answers."""
    decoy = reader.token("decoy")
    point = curve_key(enrolled.key).public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    in_module(
        reader,
        f"""
        s.create_object({{Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.KEY_TYPE: KeyType.EC,
            Attribute.TOKEN: True, Attribute.EC_PARAMS: P256,
            Attribute.EC_POINT: b"\\x04\\x41" + bytes.fromhex({point.hex()!r}),
            Attribute.ID: b"7", Attribute.PRIVATE: False}})
        """,
        decoy,
    )
    make_key(reader, token=decoy, identifier="37", private="Attribute.PRIVATE: False")  # answers, and wrongly
    binding, member = bound(enrolled, uri=f"pkcs11:token=decoy;serial={decoy.serial}")
    with open_again(reader) as hardware:
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member
        hardware.present(binding, b"")
        token.pull()
        assert refusal(HardwareError, hardware.present, binding, b"").reason == Reason.TOKEN_FORGED


@pytest.mark.usefixtures("token")
def test_a_token_without_the_key_is_no_token_of_this_license(reader):
    stranger = spki(ec.generate_private_key(ec.SECP256R1()).public_key())
    with open_again(reader) as hardware:
        binding, _ = bound(hardware.enroll(Asked(), "p256"))
        other = msgspec.structs.replace(binding, key=stranger)
    with open_again(reader) as hardware:
        for act in (
            hardware.install,
            lambda b, a: hardware.unwrap(b, b"", a, no_pin),
            lambda b, _: hardware.present(b, b""),
        ):
            error = refusal(AbsentError, act, other, [])
            assert error.reason == Reason.TOKEN_ABSENT
            assert '"bench 4"' in error.what


@pytest.mark.usefixtures("token")
def test_one_of_several_tokens_and_keys_must_be_named(reader):
    with TokenHardware([str(reader.module)]) as hardware:
        error = refusal(UsageError, hardware.enroll, Asked())
        assert error.what.endswith("holds no usable key.")
        assert "--new-key" in error.hint
        hardware.enroll(Asked(), "p256", "first")
        hardware.enroll(Asked(), "p256", "second")
        error = refusal(UsageError, hardware.enroll, Asked())
        uris = re.findall(r"pkcs11:[^\s,]+", error.hint)
        assert len(uris) == 2
    chosen = [TokenUri.parse(uri) for uri in uris] + [TokenUri(object="first"), TokenUri(object="second")]
    for uri in chosen:
        with TokenHardware([str(reader.module)], uri) as hardware:
            found = TokenUri.parse_hint(hardware.describe(NOTHING).uri)
            assert uri.object in {None, found.object}
            assert uri.id in {None, found.id}
    reader.token("other")
    with TokenHardware([str(reader.module)]) as hardware:
        error = refusal(UsageError, hardware.describe, NOTHING)
        for uri in re.findall(r"pkcs11:[^\s,]+", error.hint):
            assert TokenUri.parse(uri).module == str(reader.module)
    with TokenHardware([str(reader.module)], TokenUri(token="none")) as hardware:
        error = refusal(AbsentError, hardware.describe, NOTHING)
        assert '"bench 4", "other"' in error.what


@pytest.mark.usefixtures("token")
def test_without_a_login_only_what_is_certain_is_described(reader):
    with open_again(reader) as hardware:
        hardware.enroll(Asked(), "p256", "curve")
        hardware.enroll(Asked(), "rsa2048", "factors")
    with TokenHardware([str(reader.module)], TokenUri(object="curve")) as hardware:
        assert hardware.describe(NOTHING).mechanism == "ecdh"
    with TokenHardware([str(reader.module)], TokenUri(object="factors")) as hardware:
        assert refusal(RefusedError, hardware.describe, NOTHING).reason == Reason.PIN_NEEDED
    assert "C_Login" not in reader.calls[len(reader.calls) - reader.calls[::-1].index("C_Initialize") :]


@pytest.mark.usefixtures("token")
def test_keys_that_may_not_do_what_is_needed_are_found_out_when_enrolling(reader):
    make_key(reader, capabilities="MechanismFlag.SIGN")
    with open_again(reader) as hardware:
        assert refusal(UsageError, hardware.enroll, Asked()).what.endswith("holds no usable key.")
    reader.hide_mechanisms(0x1050)
    with open_again(reader) as hardware:
        assert refusal(HardwareError, hardware.enroll, Asked(), "p256").reason == Reason.TOKEN_UNSUPPORTED
    reader.heal()
    reader.fail("C_DeriveKey", 0x70)
    with open_again(reader) as hardware:
        error = refusal(HardwareError, hardware.enroll, Asked(), "p256")
        assert error.reason == Reason.TOKEN_UNSUPPORTED
        assert "CKR_MECHANISM_INVALID" in error.what


def certificate(public, name, signer, issuer, *, ca):
    import datetime  # noqa: PLC0415

    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder().public_key(public).serial_number(7)
    builder = builder.subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
    builder = builder.issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
    builder = builder.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=9000))
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.DER)


def test_certificates_that_may_attest_the_key_are_in_the_evidence(reader, enrolled):
    authority = ec.generate_private_key(ec.SECP256R1())
    own = certificate(curve_key(enrolled.key), "key", authority, "maker", ca=False)
    above = certificate(authority.public_key(), "maker", authority, "maker", ca=True)
    stranger = certificate(ec.generate_private_key(ec.SECP256R1()).public_key(), "x", authority, "maker", ca=False)
    for number, der in enumerate((above, stranger, own, b"\x30\x03nonsense", above + bytes(4096))):
        in_module(
            reader,
            f"""
            s.create_object({{Attribute.CLASS: ObjectClass.CERTIFICATE, Attribute.TOKEN: True, Attribute.PRIVATE: False,
                Attribute.CERTIFICATE_TYPE: CertificateType.X_509, Attribute.SUBJECT: b"0", Attribute.ID: b"{number}",
                Attribute.VALUE: bytes.fromhex({der.hex()!r})}})
            """,
        )
    with open_again(reader) as hardware:
        assert hardware.describe(NOTHING).certificates == [own, above]


def test_a_key_that_only_a_certificate_shows_is_found(reader, enrolled):
    der = certificate(curve_key(enrolled.key), "k", ec.generate_private_key(ec.SECP256R1()), "m", ca=False)
    identifier = TokenUri.parse_hint(enrolled.uri).id
    in_module(
        reader,
        f"""
        for key in list(s.get_objects({{Attribute.CLASS: ObjectClass.PUBLIC_KEY}})):
            key.destroy()
        s.create_object({{Attribute.CLASS: ObjectClass.CERTIFICATE, Attribute.TOKEN: True, Attribute.PRIVATE: False,
            Attribute.CERTIFICATE_TYPE: CertificateType.X_509, Attribute.SUBJECT: b"0",
            Attribute.ID: bytes.fromhex({identifier.hex()!r}), Attribute.VALUE: bytes.fromhex({der.hex()!r})}})
        """,
    )
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:
        hardware.install(binding, [])
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member


def test_a_point_that_is_not_in_an_octet_string_is_understood(reader, enrolled):
    point = curve_key(enrolled.key).public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    reader.forge(EC_POINT, point)
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member


@pytest.mark.parametrize("uri", ["pkcs11:token=a?module-path=/tmp/x.so", "pkcs11:slot=1", "other"])
def test_a_license_chooses_no_module(reader, enrolled, uri):
    with open_again(reader) as hardware:
        error = refusal(DamagedError, hardware.unwrap, bound(enrolled, uri=uri)[0], b"", [], no_pin)
        assert error.reason == Reason.LICENSE_DAMAGED


def test_facts_for_people_cannot_move_the_cursor(reader, token):
    token.present_as(label="a\x1b[2Jb")
    with open_again(reader) as hardware:
        (facts,) = hardware.tokens()
        assert facts.label == "a?[2Jb"
        assert facts.login_required
        assert not facts.locked
        assert facts.mechanisms == ["ECDH1_DERIVE", "RSA_PKCS_OAEP", "EC_KEY_PAIR_GEN", "RSA_PKCS_KEY_PAIR_GEN"]
        assert TokenUri.parse(facts.uri).token == "a\x1b[2Jb"
        error = refusal(UsageError, hardware.enroll, Asked())
        assert "\x1b" not in error.what + error.hint


# ---- tokens come and go ----


@pytest.mark.parametrize("slot", ["same", "other"])
def test_a_token_that_was_out_takes_its_pin_again(reader, token, enrolled, slot):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
        for _ in range(2):
            hardware.present(binding, b"")
            token.pull()
            assert refusal(AbsentError, hardware.present, binding, b"").reason == Reason.TOKEN_ABSENT
            token.plug(slot)
            error = refusal(RefusedError, hardware.present, binding, b"")
            assert error.reason == Reason.PIN_NEEDED
            assert hardware.unwrap(binding, b"", [], Asked()).secret == member
        assert reader.open_sessions == 1


def test_a_quick_swap_for_a_twin_in_the_same_slot_is_seen(reader, token, enrolled):
    twin = reader.token("twin")
    make_key(reader, token=twin)
    twin.present_as(label=token.label, serial=token.serial)
    twin.pull()
    binding, _ = bound(enrolled)
    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
        token.swap(twin)
        assert refusal(AbsentError, hardware.present, binding, b"").reason == Reason.TOKEN_ABSENT


@pytest.mark.parametrize("function", ["C_FindObjectsInit", "C_DeriveKey", "C_GetAttributeValue"])
@pytest.mark.parametrize("number", [0x5, 0x30, 0x32, 0x82, 0xB3, 0xE0])
def test_what_modules_say_of_tokens_that_were_pulled_is_an_error_and_passes(reader, enrolled, function, number):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
        reader.fail(function, number)
        with pytest.raises(HardwareError) as caught:
            hardware.present(binding, b"")
        assert caught.value.reason in {Reason.TOKEN_ABSENT, Reason.TOKEN_FAILED}
        reader.heal()
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member


def test_a_module_that_looks_for_tokens_only_when_loaded_is_loaded_again(reader, token, enrolled):
    """A token that is made meanwhile is seen by a process only after C_Initialize, here as with such modules."""
    binding, member = bound(enrolled)
    token.pull()
    with open_again(reader) as hardware:
        assert refusal(AbsentError, hardware.unwrap, binding, b"", [], no_pin).reason == Reason.TOKEN_ABSENT
        assert reader.calls.count("C_Initialize") == 3  # and looked again twice
        second = reader.token("second")
        with TokenHardware([str(reader.module)], TokenUri(token="second")) as other:
            assert refusal(AbsentError, other.describe, NOTHING)
        second.pull()
        token.plug()
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member
        reader.forget()
        token.pull()
        assert refusal(AbsentError, hardware.present, binding, b"")
        assert "C_Initialize" not in reader.calls
        assert refusal(AbsentError, hardware.unwrap, binding, b"", [], no_pin)
        assert reader.calls.count("C_Initialize") == 2


# ---- modules that fail ----


def exercise(reader, binding):
    with open_again(reader) as hardware:
        hardware.tokens()
        hardware.install(binding, [])
        hardware.unwrap(binding, b"", [], Asked())
        hardware.present(binding, b"")


def functions(reader, binding):
    """All that is called until the end begins, and in the end."""
    reader.forget()
    exercise(reader, binding)
    called = list(dict.fromkeys(reader.calls))
    return called, {"C_Logout", "C_CloseSession", "C_Finalize"}


def test_a_module_that_crashes_at_any_call_is_an_error_and_the_next_request_works(reader, token, enrolled):
    binding, _ = bound(enrolled)
    called, ending = functions(reader, binding)
    assert {"C_Initialize", "C_Login", "C_DeriveKey", "C_DestroyObject", *ending} <= set(called)
    for function in called:
        reader.crash(function)
        if function in {"C_Logout", "C_Finalize"}:
            exercise(reader, binding)
        else:
            error = refusal(HardwareError, exercise, reader, binding)
            assert error.reason == Reason.TOKEN_CRASHED, function
            assert "SIGSEGV" in error.what
        assert children() == []
        reader.heal()
    exercise(reader, binding)
    assert token.tries_left == 3
    assert reader.open_sessions == 0


def test_a_module_that_hangs_at_any_call_is_ended_in_time(reader, enrolled, monkeypatch):
    binding, _ = bound(enrolled)
    called, _ = functions(reader, binding)
    with monkeypatch.context() as short:
        short.setattr(process, "STARTING", 1.5)
        short.setattr(process, "ENDING", 0.2)
        for request in answering.DEADLINES:
            short.setitem(answering.DEADLINES, request, 0.3)
        for function in called:
            reader.hang(function)
            start = time.monotonic()
            if function in {"C_Logout", "C_Finalize"}:
                exercise(reader, binding)
            else:
                error = refusal(HardwareError, exercise, reader, binding)
                assert error.reason == Reason.TOKEN_HUNG, function
            assert time.monotonic() - start < 4
            assert children() == []
            reader.heal()
    exercise(reader, binding)


def test_nothing_is_asked_twice_when_a_module_fails(reader, enrolled, monkeypatch):
    binding, _ = bound(enrolled)
    with open_again(reader) as hardware:
        for fault in (reader.crash, reader.hang):
            monkeypatch.setitem(answering.DEADLINES, protocol.LogIn, 0.4)
            fault("C_Login")
            asked = Asked()
            reader.forget()
            refusal(HardwareError, hardware.unwrap, binding, b"", [], asked)
            assert (reader.calls.count("C_Login"), len(asked.prompts)) == (1, 1)
            reader.heal()


def test_a_process_that_died_in_between_is_started_anew(reader, enrolled):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
        (child,) = children()
        os.kill(child, signal.SIGKILL)
        assert gone(child)
        assert refusal(RefusedError, hardware.present, binding, b"").reason == Reason.PIN_NEEDED
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member


def test_signals_for_the_application_do_not_reach_the_module(reader, enrolled):
    binding, _ = bound(enrolled)
    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
        (child,) = children()
        assert os.getsid(child) == child
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child, number)
        hardware.present(binding, b"")
        assert children() == [child]


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("lie", ["wrong_secret", "short_secret", "long_secret"])
@pytest.mark.parametrize("kind", ["p256", "rsa2048"])
def test_a_wrong_secret_is_told_from_a_damaged_license(reader, kind, lie):
    with open_again(reader) as hardware:
        binding, _ = bound(hardware.enroll(Asked(), kind))
        getattr(reader, lie)()
        assert refusal(HardwareError, hardware.unwrap, binding, b"", [], Asked()).reason == Reason.TOKEN_FORGED
        assert refusal(HardwareError, hardware.present, binding, b"").reason == Reason.TOKEN_FORGED
        with pytest.raises(HardwareError):
            hardware.enroll(Asked(), kind)


def test_a_module_that_shows_another_key_finds_no_token(reader, enrolled):
    point = ec.generate_private_key(ec.SECP256R1()).public_key()
    reader.forge(EC_POINT, b"\x04\x41" + point.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
    with open_again(reader) as hardware:
        assert refusal(AbsentError, hardware.unwrap, bound(enrolled)[0], b"", [], no_pin).reason == Reason.TOKEN_ABSENT


@pytest.mark.parametrize("number", [0, 5, 0x30, 0x80000001])
@pytest.mark.parametrize(
    "function",
    ["C_Initialize", "C_GetSlotList", "C_GetTokenInfo", "C_OpenSession", "C_FindObjects", "C_Login", "C_DeriveKey"],
)
def test_claims_of_success_and_unknown_codes_are_errors_in_the_end(reader, enrolled, function, number):
    binding, _ = bound(enrolled)
    reader.fail(function, number)
    with contextlib.suppress(HwlicenseError):
        exercise(reader, binding)
    assert children() == []
    reader.heal()
    exercise(reader, binding)


@pytest.mark.parametrize("path", ["relative.so", "/usr", "", "/x\0.so", "/x\udcff.so"])
def test_a_module_is_an_absolute_path_of_a_file(path):
    assert refusal(UsageError, TokenHardware, [path]).reason == Reason.USAGE
    assert refusal(UsageError, TokenHardware, ["/nowhere/module.so"]).reason == Reason.TOKEN_UNCONFIGURED
    assert refusal(UsageError, TokenHardware, [])


@pytest.mark.usefixtures("token")
def test_what_is_no_module_is_not_loaded(tmp_path):
    text = tmp_path / "module.so"
    text.write_text("no library")
    for path in (text, "/lib/x86_64-linux-gnu/libc.so.6" if Path("/lib/x86_64-linux-gnu").exists() else sys.executable):
        with TokenHardware([str(path)]) as hardware:
            error = refusal(HardwareError, hardware.tokens)
            assert error.reason == Reason.TOKEN_FAILED
            assert str(path) in error.what


def test_a_module_that_fails_hides_no_token_of_another(reader, enrolled, tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    binding, member = bound(enrolled)
    with TokenHardware([str(tmp_path / "broken.so"), str(reader.module)]) as hardware:
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member
        reader.tokens[0].pull()
        assert refusal(HardwareError, hardware.unwrap, binding, b"", [], no_pin).reason == Reason.TOKEN_FAILED


def test_a_person_is_told_when_a_token_waits_to_be_touched(reader, enrolled, monkeypatch):
    monkeypatch.setattr(process, "SLOW", 0.2)
    binding, member = bound(enrolled)
    told = []

    def touch(prompt):
        told.append(prompt)
        threading.Thread(target=reader.touch).start()

    reader.await_touch()
    with TokenHardware([str(reader.module)], touch=touch) as hardware:
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member
        assert told == ["The token works, or waits to be touched."]
        reader.await_touch(0.1)
        error = refusal(HardwareError, hardware.present, binding, b"")
        assert "not touched" in error.what or "nobody touched" in error.what


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("executable", ["", "/nowhere/python", "/bin/false"])
def test_without_an_interpreter_there_is_no_process(reader, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with open_again(reader) as hardware:
        error = refusal(HardwareError, hardware.tokens)
        assert error.reason == Reason.TOKEN_FAILED
        assert "No process could be started" in error.what


# ---- a process that lies ----

LIES = {
    "nothing": "channel.close()",
    "garbage": "channel.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n' * 100); time.sleep(60)",
    "huge": "say(b'{}', text_size=2**32 - 1)",
    "huge secret": "say(b'{}', secret=bytes(5000))",
    "no JSON": "say(b'\\xff')",
    "deep": "say(b'[' * 100000)",
    "unknown answer": 'say(b\'{"answer":"Owned"}\')',
    "unknown field": 'say(b\'{"answer":"Done","x":1}\')',
    "request": 'say(b\'{"request":"List","seconds":1}\')',
    "half an answer": "channel.sendall(struct.pack('>II', 100, 0) + b'{'); channel.close()",
    "odd code": 'say(b\'{"answer":"Failed","code":"\\\\u001b[2J"}\')',
    "another answer": 'say(b\'{"answer":"Generated","key":""}\')',
    "a secret for nothing": 'say(b\'{"answer":"Done"}\', secret=bytes(32))',
    "two answers": 'say(b\'{"answer":"Tokens","tokens":[]}\'); say(b\'{"answer":"Done"}\')',
    "exit": "os._exit(3)",
    "descriptors": "socket.send_fds(channel, [struct.pack('>II', 2, 0) + b'{}'], [0, 1, 2])",
}
LIAR = """
import os, signal, socket, struct, sys, time
channel = socket.socket(fileno=int(sys.argv[1]))
def say(text, secret=b"", text_size=None):
    channel.sendall(struct.pack(">II", text_size or len(text), len(secret)) + text + secret)
def hear():
    head = channel.recv(8, socket.MSG_WAITALL)
    if not head:
        os._exit(0)
    return channel.recv(sum(struct.unpack(">II", head)), socket.MSG_WAITALL)
hear()
say(b'{"answer":"Done"}')
while True:
    hear()
    %s
"""


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lying_process_causes_errors_and_nothing_else(reader, enrolled, monkeypatch, lie):
    binding, _ = bound(enrolled)
    monkeypatch.setattr(process, "PROGRAM", LIAR % lie)
    for request in answering.DEADLINES:
        monkeypatch.setitem(answering.DEADLINES, request, 1)
    before = sorted(Path("/proc/self/fd").iterdir())
    with open_again(reader) as hardware:
        for act in (
            lambda: hardware.install(binding, []),
            lambda: hardware.unwrap(binding, b"", [], Asked()),
            lambda: hardware.present(binding, b""),
            lambda: hardware.enroll(Asked(), "p256"),
        ):
            with pytest.raises(HardwareError) as caught:
                act()
            assert "\x1b" not in caught.value.what
    assert sorted(Path("/proc/self/fd").iterdir()) == before


STATE = {
    "place": {"slot": 2**64 - 1, "label": "\x1b[2J", "manufacturer": "", "model": "", "serial": "\0"},
    "flags": 4,
    "abilities": ["ECDH1_DERIVE", "EC_KEY_PAIR_GEN"],
    "logged_in": False,
}
ENDLESS = {
    "PIN needed": ({"answer": "PinNeeded", "token": STATE, "each_time": False}, 2),
    "PIN needed each time": ({"answer": "PinNeeded", "token": STATE | {"logged_in": True}, "each_time": True}, 1),
    "computed": ({"answer": "Computed", "place": STATE["place"]}, 0),
    "last try": ({"answer": "Failed", "code": "LAST_TRY_UNSEEN", "token": STATE}, 0),
    "absent": ({"answer": "Absent", "labels": ["\x1b"], "logins": 0}, 0),
}


@pytest.mark.parametrize(("answer", "most"), ENDLESS.values(), ids=ENDLESS)
def test_a_lying_process_cannot_keep_the_application_busy(reader, enrolled, monkeypatch, answer, most):
    binding, _ = bound(enrolled)
    monkeypatch.setattr(process, "PROGRAM", LIAR % f"say({json.dumps(answer).encode()!r})")
    asked = Asked()
    with open_again(reader) as hardware:
        with pytest.raises(HardwareError) as caught:
            hardware.unwrap(binding, b"", [], asked)
        assert "\x1b" not in caught.value.what + "".join(prompt for prompt, _ in asked.prompts)
        assert len(asked.prompts) <= most
        with pytest.raises(HardwareError):
            hardware.present(binding, b"") if most == 0 else hardware.install(binding, [])


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(32), bytes(33), bytes(4096)])
def test_a_lying_process_cannot_invent_a_secret(reader, enrolled, monkeypatch, content):
    binding, _ = bound(enrolled)
    text = json.dumps({"answer": "Computed", "place": STATE["place"]}).encode()
    monkeypatch.setattr(process, "PROGRAM", LIAR % f"say({text!r}, secret={content!r})")
    with open_again(reader) as hardware:
        assert refusal(HardwareError, hardware.unwrap, binding, b"", [], no_pin).reason == Reason.TOKEN_FORGED


# ---- where the module runs ----

SPY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
extern char **environ;
__attribute__((constructor)) static void spy(void)
{
    Dl_info self;
    char path[4096], folder[4096];
    struct rlimit core;
    struct stat standard, null;
    dladdr((void *)spy, &self);
    snprintf(path, sizeof path, "%s.seen", self.dli_fname);
    FILE *file = fopen(path, "we");
    for (char **entry = environ; *entry; entry++)
        fprintf(file, "env %s\n", *entry);
    for (int fd = 0; fd < 1024; fd++)
        if (fd != fileno(file) && fcntl(fd, F_GETFD) >= 0)
            fprintf(file, "fd %d %s\n", fd, fcntl(fd, F_GETFD) & FD_CLOEXEC ? "private" : "inherited");
    stat("/dev/null", &null);
    for (int fd = 0; fd < 3; fd++)
        if (fstat(fd, &standard) || standard.st_rdev != null.st_rdev)
            fprintf(file, "noisy %d\n", fd);
    getrlimit(RLIMIT_CORE, &core);
    fprintf(file, "core %lu\ndumpable %d\nsession %d\ncwd %s\n", (unsigned long)core.rlim_max, prctl(PR_GET_DUMPABLE),
            getsid(0) == getpid(), getcwd(folder, sizeof folder));
    mode_t mask = umask(0);
    umask(mask);
    fprintf(file, "umask %o\n", mask);
    fclose(file);
}
"""


@pytest.fixture(scope="module")
def spy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spy")
    (folder / "spy.c").write_text(SPY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "spy.so", folder / "spy.c", "-ldl"], check=True)
    return folder / "spy.so"


def seen(spy):
    with TokenHardware([str(spy)]) as hardware:
        assert refusal(HardwareError, hardware.tokens).reason == Reason.TOKEN_FAILED
    lines = Path(f"{spy}.seen").read_text().splitlines()
    return {
        kind: [line.split(" ", 1)[1] for line in lines if line.startswith(f"{kind} ")]
        for kind in ("env", "fd", "noisy", "core", "dumpable", "session", "cwd", "umask")
    }


def test_a_module_runs_apart_from_the_application(spy, monkeypatch):
    kept = {"HOME": "/h", "USER": "u", "LC_ALL": "C", "TZ": "UTC", "SOFTHSM2_CONF": "/c", "OPENSC_DEBUG": "0"}
    kept |= {
        "PKCS11_PROXY_SOCKET": "/s",
        "YKCS11_DBG": "0",
        "ChrystokiConfigurationPath": "/l",
        "CS_PKCS11_R3_CFG": "/u",
    }
    dropped = (
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "HWLICENSE_TOKEN",
        "HWLICENSE_PIN",
        "PATH",
    )
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in {**kept, **dict.fromkeys(dropped, "x")}.items():
        monkeypatch.setenv(name, value)
    inherited = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(inherited, True)  # noqa: FBT003
    try:
        found = seen(spy)
    finally:
        os.close(inherited)
    environment = dict(entry.split("=", 1) for entry in found["env"])
    assert environment == kept | ({"LC_CTYPE": environment["LC_CTYPE"]} if "LC_CTYPE" in environment else {})
    assert [entry for entry in found["fd"] if not entry.startswith(("0 ", "1 ", "2 "))] == [
        entry for entry in found["fd"] if entry.endswith("private")
    ]
    assert len([entry for entry in found["fd"] if entry.endswith("inherited")]) == 3
    assert found["noisy"] == []
    assert (found["core"], found["dumpable"], found["session"]) == (["0"], ["0"], ["1"])
    assert (found["cwd"], found["umask"]) == (["/"], ["77"])


def test_a_daemon_without_standard_streams_is_served(reader, enrolled):
    binding, member = bound(enrolled)
    with in_fork() as run:

        def daemon():
            for number in range(3):
                os.close(number)
            with open_again(reader) as hardware:
                assert hardware.unwrap(binding, b"", [], Asked()).secret == member
                numbers = [r._running[1].fileno() for r in process._processes.values() if r._running]
            assert min(numbers) > 2

        run(daemon)


# ---- forks, threads, ends ----


@contextlib.contextmanager
def in_fork():
    """Run a function in a forked child; its failure is ours."""

    def run(act, *, wait=True):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                act()
                status = 0
            except BaseException as error:  # noqa: BLE001
                with contextlib.suppress(OSError):
                    os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(status)
        if wait:
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
        return pid

    yield run


def test_a_forked_child_has_a_process_of_its_own_and_leaves_the_parents_alone(reader, enrolled):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware, in_fork() as run:
        hardware.unwrap(binding, b"", [], Asked())
        (pid,) = children()
        number = next(r._running[1].fileno() for r in process._processes.values() if r._running)

        def child():
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)
            assert children() == []
            assert refusal(RefusedError, hardware.present, binding, b"").reason == Reason.PIN_NEEDED
            assert hardware.unwrap(binding, b"", [], Asked()).secret == member
            assert children() != [pid]
            hardware.close()
            assert children() == []
            os.kill(pid, 0)

        run(child)
        run(hardware.close)
        hardware.present(binding, b"")
        assert children() == [pid]


def test_forks_in_the_middle_of_requests_are_safe_for_both(reader, enrolled):
    binding, member = bound(enrolled)
    reader.slow(0.15, "C_DeriveKey")
    with open_again(reader) as hardware, in_fork() as run, ThreadPoolExecutor() as pool:
        hardware.unwrap(binding, b"", [], Asked())
        going = [pool.submit(hardware.present, binding, b"") for _ in range(8)]

        def child():
            assert hardware.unwrap(binding, b"", [], Asked()).secret == member
            hardware.close()

        pids = []
        for _ in range(4):
            time.sleep(0.1)
            pids.append(run(child, wait=False))
        for one in going:
            one.result(20)
        for pid in pids:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_forks_while_processes_start_keep_no_ends_of_connections(reader, enrolled):
    """If a forked child held the process's end, the process's death would not be seen before the deadline."""
    binding, _ = bound(enrolled)
    stop = threading.Event()
    forked = []

    def fork_on():
        while not stop.is_set():
            pid = os.fork()
            if pid == 0:
                time.sleep(5)
                os._exit(0)
            forked.append(pid)
            time.sleep(0.005)

    thread = threading.Thread(target=fork_on)
    thread.start()
    try:
        for _ in range(3):
            with open_again(reader) as hardware:
                hardware.tokens()
                reader.crash("C_DeriveKey")
                start = time.monotonic()
                error = refusal(HardwareError, hardware.unwrap, binding, b"", [], Asked())
                assert error.reason == Reason.TOKEN_CRASHED
                assert time.monotonic() - start < 4
                reader.heal()
    finally:
        stop.set()
        thread.join()
        for pid in forked:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_many_threads_take_turns(reader, enrolled):
    binding, member = bound(enrolled)
    with open_again(reader) as hardware, open_again(reader) as second, ThreadPoolExecutor(12) as pool:
        hardware.unwrap(binding, b"", [], Asked())

        def work(number):
            one = (hardware, second)[number % 2]
            for _ in range(4):
                one.present(binding, b"")
                assert one.unwrap(binding, b"", [], no_pin).secret == member
                assert len(one.tokens()) == 1

        for future in [pool.submit(work, number) for number in range(12)]:
            future.result(60)
        assert len(children()) == 1
    assert reader.open_sessions == 0


def test_the_process_lives_until_its_last_user_goes(reader, enrolled):
    binding, _ = bound(enrolled)
    first, second = open_again(reader), open_again(reader)
    first.unwrap(binding, b"", [], Asked())
    second.present(binding, b"")
    (pid,) = children()
    first.close()
    first.close()
    second.present(binding, b"")
    assert children() == [pid]
    second.close()
    assert children() == []
    assert not reader.logged_in
    second.tokens()
    second.close()
    third = open_again(reader)
    third.tokens()
    del third  # never closed: it counts no more
    first.tokens()
    first.close()
    assert children() == []


def test_an_interrupted_request_leaves_no_answer_for_the_next(reader, enrolled):
    binding, member = bound(enrolled)
    main = threading.get_ident()
    with open_again(reader) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
        reader.slow(4.0, "C_DeriveKey")  # much longer than it takes to get there
        timer = threading.Timer(1.5, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            hardware.present(binding, b"")
        timer.join()
        reader.heal()
        assert hardware.unwrap(binding, b"", [], Asked()).secret == member


def test_a_signal_handler_does_not_wait_for_its_own_thread(reader, enrolled, monkeypatch):
    monkeypatch.setattr(process, "SLOW", 0.1)
    binding, _ = bound(enrolled)
    caught = []

    def touch(_prompt):
        with open_again(reader) as again:
            caught.append(refusal(HardwareError, again.tokens).reason)

    reader.slow(0.3, "C_DeriveKey")
    with TokenHardware([str(reader.module)], touch=touch) as hardware:
        hardware.unwrap(binding, b"", [], Asked())
    assert caught == [Reason.TOKEN_BUSY]


@pytest.mark.parametrize("fault", ["idle", "hang", "slow"])
def test_an_application_that_is_killed_leaves_no_process(reader, enrolled, fault):
    binding, _ = bound(enrolled)
    program = """
        import signal, sys
        sys.path.insert(0, sys.argv[1])
        import msgspec
        from hwlicense.binders.pkcs11 import TokenHardware, answering, process, protocol
        from hwlicense.core.documents import TokenBinding
        from hwlicense.core.secret import Secret
        answering.DEADLINES[protocol.Compute] = 1.0 if sys.argv[4] == "hang" else 60
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        binding = msgspec.json.decode(sys.argv[3], type=TokenBinding)
        hardware = TokenHardware([sys.argv[2]])
        hardware.tokens()
        print([r._running[0].pid for r in process._processes.values()][0], flush=True)
        hardware.unwrap(binding, b"", [], lambda prompt, last_try: Secret(bytearray(b"123456")))
        print("done", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), ROOT, reader.module, encoded(binding), fault]
    if fault == "hang":
        reader.hang("C_DeriveKey")
    elif fault == "slow":
        reader.slow(0.5, "C_DeriveKey")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as application:
        child = int(application.stdout.readline())
        if fault == "idle":
            assert application.stdout.readline() == "done\n"
        else:
            time.sleep(0.3)
        application.kill()
        application.wait()
        assert gone(child)
    assert reader.open_sessions == 0
    if fault == "idle":
        assert reader.calls[-1] == "C_Finalize"
        assert "C_Logout" in reader.calls


@pytest.mark.usefixtures("enrolled")
def test_an_application_that_ends_without_closing_leaves_no_process(reader):
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from hwlicense.binders.pkcs11 import TokenHardware, process
        hardware = TokenHardware([sys.argv[2]])
        hardware.tokens()
        print([r._running[0].pid for r in process._processes.values()][0], flush=True)
    """
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program), ROOT, reader.module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    assert gone(int(done.stdout), 0.1)


def test_every_code_has_a_sentence_and_a_hint():
    for code in (
        *failures._BY_CODE,
        *failures._GONE,
        *failures.WRONG_PIN,
        "PIN_LOCKED",
        "VENDOR_DEFINED",
        "NOT_LOADED",
    ):
        error = failures.refused(protocol.Failed(code), "/module.so")
        assert error.what.endswith(".")
        assert error.hint


def test_messages_above_the_limits_are_not_sent():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(ValueError, match="too large"):
            protocol.send(ours, protocol.Done(), bytearray(protocol.SECRET_LIMIT + 1))
        theirs.sendall(struct.pack(">II", 2, 5) + b"{}" + b"12345")
        with pytest.raises(ValueError, match="schema"):
            protocol.receive(ours, protocol.ANSWERS)
