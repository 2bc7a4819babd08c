"""What the command line asks and says about tokens and dongles: PINs, prompts, JSON, help, exit statuses."""

import json
import os
import re
import subprocess
import sys

import pytest

from hwlicense.cli import _run
from hwlicense.cli.commands import root
from tests.counter import CHECK, WATCHED, Terminal, deliver, enter, issue, make_shop, prepare, simulate, told
from tests.world import run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Copied, not made anew, for each test."""
    return make_shop(tmp_path_factory.mktemp("made"))


@pytest.fixture
def shop(made, tmp_path, monkeypatch):
    return enter(made, tmp_path, monkeypatch)


# ---- PINs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def delivered(made, tmp_path_factory):
    """A token with a license, at the customer's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = enter(made, tmp_path_factory.mktemp("delivered"), patch)
        issue(prepare("token"))
        deliver(["--token"], "token")
    return folder


@pytest.fixture
def token(delivered, tmp_path, monkeypatch):
    return enter(delivered, tmp_path, monkeypatch)


def test_pins_from_files_and_descriptors(token):
    told(simulate(["--token"], *CHECK, "--json", state="token", status=1, stdin=subprocess.DEVNULL), "PIN_NEEDED")
    told(simulate(["--token"], *CHECK, "--json", "--pin-file", "wrong", state="token", status=1), "PIN_WRONG")
    told(simulate(["--token"], *CHECK, "--pin-file", "absent", state="token", status=2), "FILE_ABSENT")
    told(simulate(["--token"], *CHECK, "--pin-file", "/dev/null", state="token", status=2), "USAGE")
    read, write = os.pipe()
    os.write(write, b"123456\n")
    os.close(write)
    simulate(["--token"], *CHECK, "--pin-file", f"/dev/fd/{read}", state="token", pass_fds=[read])
    os.close(read)
    assert (token / "pin").read_text() == "123456\n"


@pytest.mark.usefixtures("token")
def test_the_last_try_takes_the_option():
    """One run of the token, many of the command: what each says, and its exit status."""
    tried = [
        ("wrong", "", "1 PIN_WRONG"),
        ("wrong", "", "1 PIN_WRONG"),
        ("wrong", "", "1 PIN_LAST_TRY"),
        ("pin", "", "1 PIN_LAST_TRY"),
        ("pin", "--last-try", "0"),
        *[("wrong", "--last-try", "1 PIN_WRONG")] * 3,
        ("pin", "--last-try", "3 TOKEN_LOCKED"),
        ("pin", "", "3 TOKEN_LOCKED"),
    ]
    command = " ".join(CHECK)
    script = "".join(
        f"said=$({command} --pin-file {file} {option} 2>&1 >/dev/null) && code=0 || code=$?\n"
        'printf "%s %s\\n" $code "$(echo "$said" | sed -n "s/^reason: //p")"\n'
        for file, option, _ in tried
    )
    done = simulate(["--token"], "sh", "-c", script, state="token")
    assert [line.strip() for line in done.stdout.splitlines()] == [expected for _, _, expected in tried]


AT_THE_TERMINAL = ("simulate", "--token", "--state", "token", "--", *CHECK)
PIN_PROMPT, QUESTION = r"PIN[^\n]*: $", r"\[y/N\]: $"


@pytest.mark.usefixtures("token")
def test_a_person_is_asked_for_the_pin_of_this_token():
    with Terminal(*AT_THE_TERMINAL) as person:
        asked = person.until(PIN_PROMPT).splitlines()[-1]
        assert re.search(r'token "hwlicense" \(serial [0-9a-f]{16}\)', asked)
        assert re.search(r"icense [0-9a-f]{8} \(label-reader, Acme Robotics\)", asked)
        assert "last try" not in asked
        person.type("123456\n")
        rest, status = person.end()
    assert status == 0
    assert "opened and read" in rest
    assert "123456" not in rest  # nor was it echoed


@pytest.mark.parametrize(
    ("answer", "pin", "status"),
    [("n\n", None, 1), ("\n", None, 1), ("y\n", "123456\n", 0)],
    ids=["no", "nothing", "yes"],
)
@pytest.mark.usefixtures("token")
def test_the_last_try_asks_a_second_question(answer, pin, status):
    for _ in range(2):
        simulate(["--token"], *CHECK, "--pin-file", "wrong", state="token", status=1)
    with Terminal(*AT_THE_TERMINAL) as person:
        asked = person.until(QUESTION)
        assert 'token "hwlicense"' in asked
        assert "this is the last try before it locks" in asked
        person.type(answer)
        if pin:
            person.until(PIN_PROMPT)
            person.type(pin)
        rest, ended = person.end()
    assert ended == status, rest
    assert pin or "reason: PIN_LAST_TRY\nhint: " in rest
    assert not re.search(PIN_PROMPT, rest)


@pytest.mark.usefixtures("token")
def test_a_wrong_pin_at_the_prompt_is_not_asked_for_again():
    with Terminal(*AT_THE_TERMINAL) as person:
        person.until(PIN_PROMPT)
        person.type("000000\n")
        rest, status = person.end()
    assert status == 1
    assert re.search("reason: PIN_WRONG\nhint: .*\n$", rest)
    with Terminal(*AT_THE_TERMINAL) as person:
        assert "wrong" in person.until(PIN_PROMPT).splitlines()[-1]
        person.type("\x03")
        assert person.end()[1] == 130


@pytest.fixture
def here(monkeypatch, capsys):
    """The command line in this process, for what ends before any hardware is asked."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hwlicense", *arguments])
        status = _run(root)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return call


# ---- what is said -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shop")
def test_probing():
    found = json.loads(
        simulate(
            ["--token", "--dongle"],
            *("sh", "-c", 'hwlicense device probe --token "$HWLICENSE_TOKEN" --usb --json'),
        ).stdout
    )
    (token,), (dongle,) = found["tokens"], found["dongles"]
    assert (token["label"], token["locked"], token["last_try"]) == ("hwlicense", False, False)
    assert "module-path=" in token["uri"]
    assert (dongle["selector"], dongle["programmed_slots"]) == (f"1050:0407:{dongle['serial']}", [2])
    nothing = ("--token", "--dongle", "--pulled", "token", "--pulled", "dongle")
    script = 'hwlicense device probe --token "$HWLICENSE_TOKEN" --usb --json'
    empty = simulate(nothing, "sh", "-c", script)
    assert json.loads(empty.stdout) == {"tokens": [], "dongles": []}
    wrong = ("device", "probe", "--token", "pkcs11:token=x", "--json")
    told(run(*wrong, status=2), "USAGE")
    told(run("device", "probe", "--token", "pkcs11:?module-path=/etc/passwd", "--json", status=3), "TOKEN_FAILED")
    told(run("device", "probe", "--usb", "--tpm", "device:/dev/tpm0", status=2), "USAGE")


def test_status_of_presence(shop):
    issue(prepare("dongle"), terms=WATCHED)
    deliver(["--dongle"], "dongle")
    simulate(["--dongle"], *CHECK, state="dongle")
    (entry,) = json.loads(run("device", "status", "--home", "home", "--json").stdout)["licenses"]
    assert (entry["presence_interval"], entry["grace"], entry["grace_left"]) == (1, 30, 30.0)
    assert entry["fresh_answers_left"] <= 20
    assert entry["needs"] == "1 of 1"
    (license_file,) = (shop / "home").rglob("license.hwlic")
    license_file.write_bytes(b"{}")
    (problem,) = json.loads(run("device", "status", "--home", "home", "--json").stdout)["problems"]
    assert problem["reason"] == "DOCUMENT_MALFORMED"
    assert problem["hint"]
    assert f"(DOCUMENT_MALFORMED)\nhint: {problem['hint']}\n" in run("device", "status", "--home", "home").stderr


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["device", "enroll", "--home", "home", "--token", "pkcs11:token=a", "-o", "x"], 2, "USAGE"),
        (["device", "enroll", "--home", "home", "--token", "pkcs11:?module-path=x.so", "-o", "x"], 2, "USAGE"),
        (["device", "enroll", "--home", "home", "--token", "pkcs11:?pin-value=918273", "-o", "x"], 2, "USAGE"),
        (["device", "enroll", "--home", "home", "--usb", "1234:5678", "-o", "x"], 2, "USAGE"),
        (["device", "enroll", "--home", "home", "--usb", "all", "-o", "x"], 2, "USAGE"),
        (["device", "enroll", "--home", "home", "--new-key", "p256", "-o", "x"], 2, "USAGE"),
        (["device", "enroll", "--home", "home", "--usb", "any", "-o", "absent/x"], 2, "FILE_ABSENT"),
        (["vendor", "dongle", "program", "--vendor", "home", "--usb", "any"], 2, "FILE_ABSENT"),
        (["vendor", "dongle", "program", "--vendor", "vendor", "--usb", "any,slot=3"], 2, "USAGE"),
        (["vendor", "dongle", "enroll", "--vendor", "vendor", "--answers", "0"], 2, "USAGE"),
        (["vendor", "dongle", "enroll", "--vendor", "vendor", "--answers", "50001"], 2, "USAGE"),
        (["vendor", "token", "enroll", "--vendor", "vendor", "--token", "pkcs11:token=a"], 2, "USAGE"),
        (["vendor", "token", "enroll", "--vendor", "vendor", "--token", "opensc-pkcs11.so"], 2, "USAGE"),
    ],
)
def test_wrong_arguments(shop, here, arguments, status, reason):
    done = here(*arguments)
    assert done.returncode == status
    told(done, reason)
    assert "918273" not in done.stderr
    assert not (shop / "x").exists()


def test_without_any_dongle(shop):
    simulated = ["--dongle", "--pulled", "dongle"]
    for command in ("program", "enroll"):
        done = simulate(simulated, "hwlicense", "vendor", "dongle", command, "--vendor", "vendor", status=3)
        told(done, "DONGLE_ABSENT")
    enroll = ("device", "enroll", "--home", "home", "--usb", "any", "-o", "x.hwreq")
    told(simulate(simulated, "hwlicense", *enroll, status=3), "DONGLE_ABSENT")
    assert not (shop / "x.hwreq").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("device enroll", ["--token", "--usb", "--new-key", "--pin-file", "--last-try"]),
        ("device install", ["--token"]),
        ("device check", ["--token", "--pin-file", "--last-try"]),
        ("device probe", ["--token", "--usb"]),
        ("device doctor", ["--token"]),
        ("vendor dongle", ["program", "enroll"]),
        ("vendor dongle program", ["--usb", "--touch", "--mode", "--output", "--force", "--passphrase-file"]),
        ("vendor dongle enroll", ["--usb", "--answers", "--output", "--force", "--passphrase-file"]),
        ("vendor token", ["enroll"]),
        ("vendor token enroll", ["--token", "--new-key", "--pin-file", "--last-try", "--output", "--force"]),
        ("vendor issue", ["--token-root", "--token", "--request"]),
        ("simulate", ["--token", "--dongle", "--dongle-blank", "--dongle-touch", "--no-touch", "--pulled"]),
    ],
)
def test_help_names_every_option(here, command, options):
    done = here(*command.split(), "--help")
    assert done.returncode == 0
    text = done.stdout
    for option in options:
        assert re.search(rf"(^|[\s,]){option}\b", text, re.MULTILINE), option
