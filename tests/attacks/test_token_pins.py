"""PINs of tokens: one try each, none by itself, seen by nobody; and modules that die or hang with the PIN in hand."""

import os
import secrets
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from hwlicense.binders.pkcs11 import TokenHardware, answering, process, protocol
from hwlicense.core.errors import HardwareError, HwlicenseError, RefusedError
from hwlicense.core.keys import unwrap_content_key, unwrap_license_secret
from hwlicense.core.package import Layout, envelope_of, open_table_into
from hwlicense.core.secret import SIZE, Secret
from hwlicense.storage import OpenFile
from hwlicense_simulators import softhsm
from tests.pieces import PIN, Bench, DonglePiece, Kit, TokenPiece, pin
from tests.refusals import nobody, refusal, sent
from tests.world import MEMBERS, TERMS, everything

ANY = TERMS + '[require]\nbindings = "any"\n'
TWO = TERMS + "[require]\nbindings = 2\n"


@pytest.fixture(scope="module")
def bench():
    with Bench() as own:
        yield own


@pytest.fixture(scope="module")
def pieces(bench):
    return [TokenPiece(bench, label=f"officer {number}") for number in range(3)]


@pytest.fixture(scope="module")
def one(bench, vendor, pieces, tmp_path_factory):
    kit = Kit(bench, tmp_path_factory.mktemp("one"), pieces[:1])
    kit.license(vendor, TERMS)
    return kit


@pytest.fixture
def kit(bench, vendor, tmp_path, pieces, request):
    """A license of its own for these pieces, under these terms."""
    wanted, terms = request.param
    chosen = [pieces[place] if isinstance(place, int) else DonglePiece(bench) for place in wanted]
    made = Kit(bench, tmp_path / "home", chosen)
    made.license(vendor, terms)
    bench.reader.forget()
    return made


@pytest.fixture(autouse=True)
def healed(bench):
    """After each test nothing is left open."""
    for token in bench.reader.tokens:
        token.unlock()
    bench.reader.forget()
    yield
    bench.reader.heal()
    for token in bench.reader.tokens:
        if not token.plugged:
            token.plug()
    assert bench.reader.open_sessions == 0
    assert not bench.reader.logged_in


class Typist:
    """Someone who types a PIN when asked."""

    def __init__(self, text="000000"):
        self.text, self.prompts = text, []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        return Secret(bytearray(self.text.encode()))


def tries(bench):
    return [token.tries_left for token in bench.reader.tokens if token.label.startswith("officer")]


# ---- tries --------------------------------------------------------------------------------------------------


def test_a_wrong_pin_costs_one_try(bench, vendor, one):
    wrong = Typist()
    with refusal(RefusedError, "PIN_WRONG"):
        one.open(vendor, pin=wrong)
    assert tries(bench) == [2, 3, 3]
    assert bench.reader.calls.count("C_Login") == 1
    assert len(wrong.prompts) == 1
    assert "officer 0" in wrong.prompts[0]
    assert "label-reader" in wrong.prompts[0]
    one.open(vendor).close()
    assert tries(bench) == [3, 3, 3]


@pytest.mark.parametrize(
    "kit",
    [((0, 1), TERMS), ((0, 1, 2), TWO), ((0, 1), ANY), ((0, "dongle", 1), TWO)],
    indirect=True,
)
def test_a_wrong_pin_ends_the_search_for_other_hardware(bench, vendor, kit):
    """Offered to the next token it would be a wrong try there."""
    wrong = Typist()
    with refusal(RefusedError, "PIN_WRONG"):
        kit.open(vendor, pin=wrong)
    assert sorted(tries(bench)) == [2, 3, 3]
    assert len(wrong.prompts) == bench.reader.calls.count("C_Login") == 1


def test_a_wrong_pin_is_not_offered_to_a_second_license(bench, vendor, pieces, tmp_path):
    for piece in pieces:
        Kit(bench, tmp_path / "home", [piece]).license(vendor, TERMS)
    wrong = Typist()
    with refusal(RefusedError, "PIN_WRONG"):
        Kit(bench, tmp_path / "home", pieces).open(vendor, pin=wrong)
    assert sorted(tries(bench)) == [2, 3, 3]
    assert len(wrong.prompts) == 1


@pytest.mark.parametrize("given", ["", "1", "x" * 300, "\N{SNOWMAN}" * 90, "123456\n", " 123456", "12345\0006"])
def test_what_is_no_pin_of_this_token_costs_one_try_at_most(bench, vendor, one, given):
    with refusal(RefusedError, "PIN_WRONG", "PIN_NEEDED"):
        one.open(vendor, pin=lambda _prompt: given)
    assert tries(bench)[0] >= 2
    assert bench.reader.calls.count("C_Login") <= 1


def test_the_last_try_takes_a_second_yes(bench, vendor, one):
    for _ in range(2):
        with refusal(RefusedError, "PIN_WRONG"):
            one.open(vendor, pin=Typist())
    bench.reader.forget()
    for given in (nobody, pin):
        with refusal(RefusedError, "PIN_LAST_TRY"):
            one.open(vendor, pin=given)
    assert tries(bench) == [1, 3, 3]
    assert "C_Login" not in bench.reader.calls
    asked = Typist(PIN)
    one.open(vendor, pin=asked, last_try=True).close()
    assert "last try" in asked.prompts[0]
    assert tries(bench) == [3, 3, 3]


@pytest.mark.parametrize("kit", [((0, 1), ANY), ((0, 1, 2), TWO)], indirect=True)
def test_the_last_try_of_one_token_is_no_reason_to_try_another(vendor, kit):
    token = kit.pieces[0].token
    for other in kit.pieces[1:]:
        other.pull()
    for _ in range(2):
        with refusal(RefusedError, "PIN_WRONG"):
            kit.open(vendor, pin=Typist())
    for other in kit.pieces[1:]:
        other.plug()
    with refusal(RefusedError, "PIN_LAST_TRY"):
        kit.open(vendor, pin=pin)
    assert token.tries_left == 1


def test_a_locked_token_is_not_tried(bench, vendor, one):
    for _ in range(3):
        with refusal(RefusedError, "PIN_WRONG"):
            one.open(vendor, pin=Typist(), last_try=True)
    bench.reader.forget()
    for _ in range(2):
        with refusal(HardwareError, "TOKEN_LOCKED"):
            one.open(vendor, pin=nobody, last_try=True)
    assert "C_Login" not in bench.reader.calls


@pytest.mark.parametrize("kit", [((0, 1), ANY), ((0, "dongle"), ANY), ((0, 1, "dongle"), TWO)], indirect=True)
def test_a_locked_token_leaves_the_others_usable(vendor, kit):
    softhsm.write(kit.pieces[0].token._tries, ["0"])
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS
    assert kit.pieces[0].token.tries_left == 0


def test_without_anybody_to_ask_no_try_is_made(bench, vendor, one):
    with refusal(RefusedError, "PIN_NEEDED"):
        one.open(vendor, pin=None)
    given: list[object] = [None, 123456, [], ("123456",)]
    for nothing in given:
        with refusal(RefusedError, "PIN_NEEDED"):
            one.open(vendor, pin=lambda _prompt, nothing=nothing: nothing)
    assert "C_Login" not in bench.reader.calls
    assert tries(bench) == [3, 3, 3]


# ---- where the PIN is not -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden(bench, vendor, tmp_path_factory):
    """A token whose PIN is like nothing else, with a license."""
    typed = secrets.token_hex(12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.pieces.PIN", typed)
        kit = Kit(bench, tmp_path_factory.mktemp("hidden"), [TokenPiece(bench)])
        kit.license(vendor, TERMS)
    return kit, typed


def test_the_pin_is_in_no_arguments_variables_and_files(hidden, tmp_path):
    kit, typed = hidden
    with TokenHardware([str(kit.bench.reader.module)]) as hardware:
        raw = next((kit.home.path / "licenses").iterdir()) / "license.hwlic"
        (binding,) = sent(raw.read_bytes()).bindings
        hardware.unwrap(binding, b"", [], lambda _prompt, last_try=False: Secret(bytearray(typed.encode())))  # noqa: ARG005
        (running,) = [running._running[0].pid for running in process._processes.values() if running._running]
        for pid in (running, os.getpid()):
            for name in ("cmdline", "environ"):
                assert typed.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert kit.bench.reader.logged_in
    for path in [*kit.home.path.rglob("*"), kit.bench.reader.installation.log, *tmp_path.rglob("*")]:
        if path.is_file():
            assert typed.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("trouble", ["none", "wrong", "crash", "forged", "failed", "pulled", "hang"])
def test_the_pin_is_in_no_error(vendor, hidden, trouble, monkeypatch):
    """Neither in its sentence nor in anything that hangs on it: causes, arguments, locals of the product's frames."""
    kit, typed = hidden
    reader, given = kit.bench.reader, typed
    monkeypatch.setitem(answering.DEADLINES, protocol.Compute, 0.5)
    match trouble:
        case "wrong":
            given = typed[:-1] + "x"
        case "crash":
            reader.crash("C_Login")
        case "forged":
            reader.wrong_secret()
        case "failed":
            reader.fail("C_Login", 0x6)
        case "pulled":
            reader.fail("C_DeriveKey", 0x32)
        case "hang":
            reader.hang("C_DeriveKey")
    asked = []

    def source(_prompt):
        asked.append(Secret(bytearray(given.encode())))
        return asked[-1]

    try:
        if trouble == "none":
            kit.open(vendor, pin=source).close()
        else:
            with pytest.raises(HwlicenseError) as caught:
                kit.open(vendor, pin=source)
            frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
            told = "".join(frames.format()) + repr(caught.value.args) + repr(caught.value.__dict__)
            ours = [
                line for line in told.splitlines() if not line.strip().startswith(("given = ", "typed = ", "hidden"))
            ]
            assert given not in "\n".join(ours)
            assert caught.value.hint
    finally:
        reader.heal()
        for token in reader.tokens:
            token.unlock()
    assert len(asked) == 1
    assert not any(asked[0].buffer)  # wiped, whatever happened


APPLICATION = """
import sys, time
import hwlicense
from pathlib import Path
from hwlicense.cli.secrets import from_file
package, vendor, home, token = sys.argv[1:]
model = hwlicense.open(package, vendor=open(vendor).read(), home=home, token=token,
    pin=lambda _prompt: from_file(Path("/dev/fd/0")))
held = model.read("weights.bin")
print("ready", flush=True)
time.sleep(60)
"""


def test_a_core_dump_of_the_application_holds_neither_pin_nor_key(vendor, hidden, tmp_path):
    kit, typed = hidden
    raw = next((kit.home.path / "licenses").iterdir()) / "license.hwlic"
    licensed = sent(raw.read_bytes())
    with TokenHardware([str(kit.bench.reader.module)]) as hardware:
        source = lambda _prompt, last_try=False: Secret(bytearray(typed.encode()))  # noqa: E731, ARG005
        member = hardware.unwrap(licensed.bindings[0], b"", [], source).secret
    license_secret = unwrap_license_secret(licensed.wraps, {0: member})
    content_key = unwrap_content_key(license_secret, licensed, vendor.manifest.content_key)
    with OpenFile(vendor.package) as file:
        layout = Layout(vendor.manifest, len(envelope_of(file)), file.size)
        keys = bytearray(layout.chunk_count * SIZE)
        open_table_into(content_key, file.read(layout.table_size, layout.table_offset), keys)
    secret = {
        name: bytes(value.buffer)
        for name, value in {"member": member, "license": license_secret, "content key": content_key}.items()
    }
    secret |= {"PIN": typed.encode(), "chunk key": bytes(keys[:SIZE]), "plaintext": MEMBERS["weights.bin"][:29]}
    arguments = [vendor.package, vendor.folder / "vendor" / "vendor.pub.json", kit.home.path, kit.token]
    command = [sys.executable, "-c", APPLICATION, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdin.write(typed.encode())
        child.stdin.close()
        assert child.stdout.readline() == b"ready\n"
        done = subprocess.run(["gcore", "-o", tmp_path / "dump", str(child.pid)], capture_output=True, check=False)
        child.kill()
    core = tmp_path / f"dump.{child.pid}"
    assert core.exists() == (os.geteuid() == 0), done.stderr  # whoever is not root may not even attach
    if core.exists():
        dumped = core.read_bytes()
        assert {name for name, value in secret.items() if value[:16] in dumped or value[-16:] in dumped} == set()


# ---- modules that die or hang -------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["C_Initialize", "C_GetSlotList", "C_OpenSession", "C_Login", "C_DeriveKey"])
def test_a_module_that_crashes_while_a_license_is_opened(bench, vendor, one, function):
    bench.reader.crash(function)
    with refusal(HardwareError, "TOKEN_CRASHED"):
        one.open(vendor)
    assert bench.reader.calls.count(function) == 1  # not asked twice
    bench.reader.heal()
    with one.open(vendor) as model:
        assert everything(model) == MEMBERS
    assert tries(bench) == [3, 3, 3]


@pytest.mark.parametrize("function", ["C_GetSlotList", "C_Login", "C_DeriveKey"])
def test_a_module_that_hangs_while_a_license_is_opened(bench, vendor, one, function, monkeypatch):
    for request in answering.DEADLINES:
        monkeypatch.setitem(answering.DEADLINES, request, 0.6)
    bench.reader.hang(function)
    with refusal(HardwareError, "TOKEN_HUNG"):
        one.open(vendor)
    bench.reader.heal()
    monkeypatch.undo()
    with one.open(vendor) as model:
        assert everything(model) == MEMBERS


@pytest.mark.parametrize("kit", [((0, "dongle"), ANY)], indirect=True)
@pytest.mark.parametrize("fault", ["crash", "hang"])
def test_a_module_that_fails_leaves_other_hardware_usable(bench, vendor, kit, fault, monkeypatch):
    """A dongle is asked first, as it takes no PIN; without it the token's failure is what is said."""
    for request in answering.DEADLINES:
        monkeypatch.setitem(answering.DEADLINES, request, 0.6)
    getattr(bench.reader, fault)("C_DeriveKey")
    kit.open(vendor).close()
    kit.pieces[1].pull()
    with refusal(HardwareError, {"crash": "TOKEN_CRASHED", "hang": "TOKEN_HUNG"}[fault]):
        kit.open(vendor)


def test_a_fork_after_the_login_has_no_login(one):
    """A forked child asks for the PIN itself; it cannot use the parent's session, nor end it."""
    reader = one.bench.reader
    (raw,) = (one.home.path / "licenses").glob("*/license.hwlic")
    (binding,) = sent(raw.read_bytes()).bindings
    with TokenHardware([str(reader.module)]) as hardware:
        hardware.unwrap(binding, b"", [], pin)
        child = os.fork()
        if not child:
            status = 1
            try:
                with refusal(RefusedError, "PIN_NEEDED"):
                    hardware.present(binding, b"")
                hardware.unwrap(binding, b"", [], pin)
                hardware.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        hardware.present(binding, b"")
        assert reader.calls.count("C_Login") == 2
