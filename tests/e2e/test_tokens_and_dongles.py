"""Tokens and dongles through the installed command line, from the order desk to the open model."""

import json
import re
import subprocess

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key

from tests.counter import ANY, CHECK, PIECES, WATCHED, deliver, enter, issue, make_shop, prepare, simulate, told
from tests.refusals import Authority
from tests.world import PROGRAM, run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Copied, not made anew, for each test."""
    return make_shop(tmp_path_factory.mktemp("made"))


@pytest.fixture
def shop(made, tmp_path, monkeypatch):
    return enter(made, tmp_path, monkeypatch)


# ---- the whole way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dongle", "enrolled", "token", "rsa"])
@pytest.mark.usefixtures("shop")
def test_from_the_order_desk_to_the_open_model(kind):
    issue(prepare(kind))
    options = ["--token"] if kind in {"token", "rsa"} else ["--dongle"]
    deliver(options, kind)
    pin = ("--pin-file", "pin") if options == ["--token"] else ()
    opened = simulate(options, *CHECK, *pin, "--json", state=kind)
    assert json.loads(opened.stdout)["opened"] is True
    if kind in {"dongle", "token"}:
        absent = {"token": "TOKEN_ABSENT", "dongle": "DONGLE_ABSENT"}[kind]
        told(simulate(options, *CHECK, *pin, "--json", state="another", status=3), absent)
        told(simulate([*options, "--pulled", kind], *CHECK, *pin, state=kind, status=3), absent)
    (entry,) = json.loads(run("device", "status", "--home", "home", "--json").stdout)["licenses"]
    assert (entry["bindings"], entry["pin"]) == (["pkcs11" if pin else "usb"], bool(pin))


@pytest.mark.usefixtures("shop")
def test_a_tpm_and_a_dongle_together(hwlicense_tpms):
    tpm = hwlicense_tpms()
    run("device", "enroll", "--home", "home", "--tpm", tpm.tcti, "-o", "tpm.hwreq")
    root = ("--ek-root", f"virtual={tpm.ek_root}")
    issue("tpm.hwreq", prepare("dongle"), more=root)
    deliver(["--dongle"], "dongle")
    simulate(["--dongle"], *CHECK, state="dongle")
    told(simulate(["--dongle"], *CHECK, state="another", status=3), "DONGLE_ABSENT")
    other = hwlicense_tpms()
    told(simulate(["--dongle"], *CHECK, "--tpm", other.tcti, state="dongle", status=1), "WRONG_DEVICE")


@pytest.mark.usefixtures("shop")
def test_either_of_a_token_and_a_dongle():
    issue(prepare("token"), prepare("dongle"), terms=ANY)
    warned = deliver(["--dongle"], "dongle")
    assert "warning: not all of the license's hardware is here" in warned.stderr
    simulate(["--dongle"], *CHECK, state="dongle")
    deliver(["--token"], "token")
    simulate(["--token"], *CHECK, "--pin-file", "pin", state="token")
    failed = simulate(["--token", "--dongle"], *CHECK, "--pin-file", "pin", "--json", state="neither", status=3)
    assert "takes 1 of 2 pieces of hardware; 0 answered" in told(failed, "DONGLE_ABSENT")


def test_a_device_asks_with_what_it_has(shop):
    """`device enroll` with a token and a dongle in one request; the vendor knows both."""
    prepare("dongle", "both")
    (shop / "both.hwreq").unlink()
    simulate(["--token"], "sh", "-ec", PIECES["token"][1].replace("NAME", "both"), state="both")
    enroll = 'hwlicense device enroll --home home --token "$HWLICENSE_TOKEN" --usb any --pin-file pin -o device.hwreq'
    simulate(["--token", "--dongle"], "sh", "-ec", enroll, state="both")
    shown = run("inspect", "device.hwreq").stdout
    assert "key P-256" in shown
    assert "dongle" in shown
    issue("device.hwreq")
    deliver(["--token", "--dongle"], "both")
    simulate(["--token", "--dongle"], *CHECK, "--pin-file", "pin", state="both")


def test_a_request_that_nobody_knows_gives_no_license(shop):
    enroll = 'hwlicense device enroll --home home --token "$HWLICENSE_TOKEN" --new-key p256 --pin-file pin -o t.hwreq'
    simulate(["--token"], "sh", "-ec", enroll, state="unknown")
    told(issue("t.hwreq", status=1), "TOKEN_UNTRUSTED")
    simulate(["--dongle"], "hwlicense", "device", "enroll", "--home", "home", "--usb", "any", "-o", "d.hwreq")
    told(issue("d.hwreq", status=1), "DONGLE_UNKNOWN")
    assert not (shop / "a.hwlic").exists()
    (fingerprint,) = re.findall(r"key P-256\s+([0-9a-f]{64})", run("inspect", "t.hwreq").stdout)
    issue("t.hwreq", more=("--token", fingerprint))
    told(issue("t.hwreq", more=("--token", "xyz"), out="b.hwlic", status=2), "USAGE")


def test_an_attested_token_needs_no_record(shop):
    """The certificate is put on the token as its maker would; then --token-root is enough."""
    script = """
        module="${HWLICENSE_TOKEN#*module-path=}"
        hwlicense device enroll --home home --token "$HWLICENSE_TOKEN" --new-key p256 --pin-file pin -o first.hwreq
        pkcs11-tool --module "$module" --read-object --type pubkey --label hwlicense -o key.der
        pkcs11-tool --module "$module" --list-objects --type pubkey | sed -n 's/ *ID: *//p' >id
    """
    simulate(["--token"], "sh", "-ec", script, state="attested")
    maker = Authority("maker")
    public = load_der_public_key((shop / "key.der").read_bytes())
    (shop / "cert.der").write_bytes(maker.certify(public))
    (shop / "maker.pem").write_bytes(maker.pem())
    (shop / "other.pem").write_bytes(Authority("maker").pem())
    script = """
        module="${HWLICENSE_TOKEN#*module-path=}"
        pkcs11-tool --module "$module" --login --pin 123456 --write-object cert.der --type cert --id "$(cat id)"
        hwlicense device enroll --home home --token "$HWLICENSE_TOKEN" --pin-file pin -o a.hwreq
    """
    simulate(["--token"], "sh", "-ec", script, state="attested")
    told(issue("a.hwreq", status=1), "TOKEN_UNTRUSTED")
    told(issue("a.hwreq", more=("--token-root", "other.pem"), status=1), "TOKEN_UNTRUSTED")
    told(issue("first.hwreq", more=("--token-root", "maker.pem"), status=1), "TOKEN_UNTRUSTED")
    told(issue("a.hwreq", more=("--token-root", "pin"), status=2), "USAGE")
    issue("a.hwreq", more=("--token-root", "maker.pem"))
    assert "attested under CN=maker" in run("inspect", "a.hwlic").stdout
    deliver(["--token"], "attested")
    simulate(["--token"], *CHECK, "--pin-file", "pin", state="attested")


# ---- the order desk -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shop")
def test_a_slot_in_use_takes_force():
    program = ("hwlicense", "vendor", "dongle", "program", "--vendor", "vendor")
    told(simulate(["--dongle"], *program, "--force", state="used", status=2), "SLOT_IN_USE")
    simulate(["--dongle"], *program, "--replace-slot", state="used")
    simulate(["--dongle"], *program, "--replace-slot", "-o", "again.hwreq", state="used")  # by its access code
    run("vendor", "init", "theirs", "--name", "Other", "--no-passphrase")
    stolen = [*program[:-1], "theirs", "--replace-slot"]
    told(simulate(["--dongle"], *stolen, state="used", status=3), "DONGLE_PROTECTED")
    issue("again.hwreq")
    deliver(["--dongle"], "used")
    simulate(["--dongle"], *CHECK, state="used")


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("dongle", "hwlicense vendor dongle program --vendor vendor --replace-slot -o OUT"),
        ("dongle", "hwlicense vendor dongle enroll --vendor vendor --answers 3 -o OUT"),
        ("token", 'hwlicense vendor token enroll --vendor vendor --token "$HWLICENSE_TOKEN" --new-key p256 -o OUT'),
    ],
)
def test_a_request_that_cannot_be_written_changes_no_hardware(shop, kind, command):
    """A wrong path costs nothing: the slot keeps its secret, the token gets no key, the folder no record."""
    look = {
        "dongle": "hwlicense device enroll --home other --usb any -o look.hwreq; hwlicense inspect look.hwreq",
        "token": 'pkcs11-tool --module "${HWLICENSE_TOKEN#*module-path=}" --list-objects --login --pin 123456',
    }[kind]

    def seen():
        (shop / "look.hwreq").unlink(missing_ok=True)
        return simulate([f"--{kind}"], "sh", "-ec", look, state="kept").stdout

    before = seen()
    command += " --pin-file pin" if kind == "token" else ""
    failed = simulate([f"--{kind}"], "sh", "-ec", command.replace("OUT", "absent/a.hwreq"), status=2)
    told(failed, "FILE_ABSENT")
    if "--replace-slot" not in command:
        (shop / "a.hwreq").write_text("mine")
        told(simulate([f"--{kind}"], "sh", "-ec", command.replace("OUT", "a.hwreq"), status=2), "FILE_EXISTS")
        assert (shop / "a.hwreq").read_text() == "mine"
    assert list((shop / "vendor" / "hardware").iterdir()) == []
    assert seen() == before


def test_two_licenses_issued_at_once_share_no_answer(shop):
    request = prepare("enrolled")
    (shop / "terms.toml").write_text(WATCHED.replace("answers = 20", "answers = 4"))
    given = ("--request", request, "--package", "model.hwpkg", "--terms", "terms.toml")
    command = [PROGRAM, "vendor", "issue", "--vendor", "vendor", *given]
    running = [
        subprocess.Popen([*command, "-o", f"{number}.hwlic"], stderr=subprocess.PIPE, text=True) for number in range(7)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in running]
    assert sorted(status for _, status in ended) == [0, 0, 0, 0, 0, 0, 1]  # 30 answers are six times five
    assert sum("reason: ANSWERS_EXHAUSTED" in said for said, _ in ended) == 1
    firsts = []
    for path in shop.glob("[0-6].hwlic"):
        (binding,) = json.loads(run("inspect", "--json", path).stdout)["document"]["bindings"]
        firsts.append(binding["first"])
    assert sorted(firsts) == [0, 5, 10, 15, 20, 25]


@pytest.mark.usefixtures("shop")
def test_a_touch_dongle_is_refused_for_presence():
    program = PIECES["dongle"][1].replace("NAME", "touch") + " --touch"
    simulate(["--dongle", "--dongle-blank"], "sh", "-ec", program, state="touch")
    told(issue("touch.hwreq", terms=WATCHED, status=2), "TERM_INVALID")
    issue("touch.hwreq")
    deliver(["--dongle", "--dongle-touch"], "touch")
    opened = simulate(["--dongle", "--dongle-touch"], *CHECK, state="touch")
    assert opened.stderr.count("Touch the USB dongle") == 1
    assert opened.stdout == "reader 1.0, 3 files: opened and read\n"
