"""What the doctor says of dongles and tokens: each cause with its mend, on made-up systems and simulated hardware."""

import ctypes.util
import grp
import os
import pwd
import stat
from pathlib import Path

import pytest

from hwlicense.binders.pkcs11 import TokenHardware
from hwlicense.cli.hardware import plugged_dongles
from hwlicense.core.documents import License
from hwlicense.core.dongle import PRODUCTS
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import AbsentError, HardwareError, HwlicenseError, Reason
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.uri import TokenUri
from hwlicense.device import diagnosing, grace, plugged
from hwlicense.device.home import Home
from tests.pieces import Bench, DonglePiece, Kit, TokenPiece, TpmPiece
from tests.world import TERMS

NOWHERE = "swtpm:path=/nonexistent/tpm"
PRESENCE = f'[presence]\ninterval = "10s"\nanswers = {grace.BLOCK}\n'


class Machine:
    """A made-up /sys, /dev, /proc and list of groups. By default the rule is installed and this user is in no group."""

    def __init__(self, root, patch):
        self.root, self._patch = root, patch
        self.devices, self.nodes, self.processes = root / "devices", root / "nodes", root / "proc"
        self.rules = [root / "etc", root / "usr"]
        for folder in (self.devices, self.nodes, self.processes, *self.rules):
            folder.mkdir()
        for name in ("devices", "nodes", "processes"):
            patch.setattr(plugged, name.upper(), getattr(self, name))
        patch.setattr(plugged, "RULES_FOLDERS", tuple(self.rules))
        patch.setattr(plugged, "PCSCD", root / "pcscd.comm")
        patch.setattr(plugged, "_listed", list)
        patch.setattr(plugged, "user_name", lambda: "operator")
        patch.setattr(os, "access", self._access)
        self.write_rule()
        self.group(gid=os.getgid())
        self.groups()
        self.seat(here=False)
        self.libusb(here=True)

    def write_rule(self, place=1, content="# rules\n"):
        (self.rules[place] / plugged.RULES).write_text(content)

    def group(self, gid, members=()):
        def by_name(name):
            assert name == "hwlicense"
            if gid is None:
                raise KeyError(name)
            return grp.struct_group((name, "x", gid, list(members)))

        self._patch.setattr(grp, "getgrnam", by_name)

    def groups(self, *numbers):
        self._patch.setattr(os, "getgroups", lambda: list(numbers))
        self._patch.setattr(os, "getegid", lambda: -1)

    def seat(self, *, here):
        self._patch.setattr(plugged, "at_seat", lambda: here)

    def libusb(self, *, here):
        found = "libusb-1.0.so.0" if here else None
        self._patch.setattr(ctypes.util, "find_library", lambda name: found if name == "usb-1.0" else None)

    def without(self, *libraries):
        self._patch.setattr(plugged, "installed", lambda library: library not in libraries)

    def plug(self, product="1050:0407", number=7, mode=0, name="YubiKey OTP+FIDO+CCID"):
        vendor, _, model = product.partition(":")
        folder = self.devices / f"1-{number}"
        folder.mkdir()
        facts = {"idVendor": vendor, "idProduct": model, "busnum": "1", "devnum": str(number), "product": name}
        for fact, value in facts.items():
            if value is not None:
                (folder / fact).write_text(value + "\n")
        (self.devices / f"1-{number}:1.0").mkdir()  # an interface has no product
        node = self.nodes / "001" / f"{number:03}"
        node.parent.mkdir(exist_ok=True)
        node.touch()
        node.chmod(mode)
        return node

    @staticmethod
    def _access(path, mode):
        """By the owner's bits, also for root, whom nothing is forbidden."""
        try:
            bits = Path(path).stat().st_mode >> 6
        except OSError:
            return False
        return mode & bits == mode


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "machine").mkdir()
    return Machine(tmp_path / "machine", monkeypatch)


def dongles(*, wanted=False):
    return [tuple(found) for found in plugged.dongles(wanted=wanted)]


def only(found, subject):
    (one,) = [each for each in found if each[1] == subject]
    return one


# ---- dongles ---------------------------------------------------------------------------------------------


def test_a_machine_without_usb_or_dongles_is_no_finding(machine):
    assert dongles() == []
    machine.devices.rmdir()
    assert dongles() == []


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_dongle_is_seen_and_others_are_not(machine, product):
    node = machine.plug(product, mode=0o600)
    machine.plug("046d:c31c", 8, 0o600, "Keyboard")
    assert dongles() == [
        ("ok", "dongle", f"{product} (YubiKey OTP+FIDO+CCID): {node} can be read and written", ""),
        ("ok", "libusb", "libusb 1.0 is installed", ""),
    ]


def test_a_dongle_without_a_name_of_its_own(machine):
    node = machine.plug("1d50:60fc", mode=0o600, name=None)
    assert dongles()[0] == ("ok", "dongle", f"1d50:60fc: {node} can be read and written", "")


def test_a_device_that_is_pulled_out_meanwhile_is_passed_over(machine):
    machine.plug()
    for fact in ("devnum", "busnum"):
        (machine.devices / "1-7" / fact).write_text("")
        assert dongles() == []


def test_a_node_that_is_not_here(machine):
    node = machine.plug()
    node.unlink()
    state, _, text, mend = only(dongles(), "dongle")
    assert (state, text) == (
        "missing",
        f"1050:0407 (YubiKey OTP+FIDO+CCID) is plugged in, and its node {node} is not here",
    )
    assert mend == "Into a container, pass the device and its group (docs/udev.md)."


def refusal(machine, mode=0):
    """What is said of a node with this mode, after the part that all have in common."""
    node = machine.plug(mode=mode)
    state, _, text, mend = only(dongles(), "dongle")
    start = f"no permission for {node}, 1050:0407 (YubiKey OTP+FIDO+CCID): "
    assert state == "missing"
    assert text.startswith(start)
    return text.removeprefix(start), mend


@pytest.mark.parametrize("mode", [0, 0o400, 0o200])
def test_no_rule(machine, mode):
    (machine.rules[1] / plugged.RULES).unlink()
    assert refusal(machine, mode) == (
        "the udev rule 69-hwlicense.rules is not installed",
        "sudo udev/install (docs/udev.md)",
    )


def test_a_rule_that_is_switched_off(machine):
    machine.write_rule(0, "")
    place = machine.rules[0] / plugged.RULES
    expected = f"the udev rule is switched off by {place}, which is empty"
    assert refusal(machine) == (expected, "Remove that file, then sudo udev/install (docs/udev.md)")
    place.unlink()
    place.symlink_to("/dev/null")
    assert only(dongles(), "dongle")[2].endswith(expected)


def test_no_group(machine):
    machine.group(None)
    assert refusal(machine) == ("the group hwlicense does not exist", "sudo udev/install (docs/udev.md)")


def test_a_rule_that_was_not_applied_yet(machine):
    machine.group(os.getgid() + 1)
    text, mend = refusal(machine)
    assert text == "the udev rule has not been applied to it"
    assert mend == "Pull it out and plug it in again, or: sudo udevadm trigger --subsystem-match=usb"


def test_another_rule_that_takes_the_mode_away(machine):
    machine.groups(4, os.getgid())
    text, mend = refusal(machine, 0o400)
    assert text == "this user is in the group hwlicense, and the node's mode is 0400"
    assert mend.startswith("See which other rule sets the mode: udevadm test $(udevadm info --query=path /")


@pytest.mark.parametrize("primary", [True, False])
def test_a_user_who_joined_the_group_after_the_session_began(machine, monkeypatch, primary):
    machine.group(os.getgid(), () if primary else ("somebody", "operator"))
    entry = pwd.struct_passwd(("operator", "x", 1, os.getgid(), "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", {"operator": entry}.__getitem__)
    assert refusal(machine) == (
        "the user operator is in the group hwlicense, but not since before this session",
        "Log in again (or restart the service).",
    )


def test_a_session_at_a_seat_that_got_nothing(machine):
    machine.seat(here=True)
    text, mend = refusal(machine)
    assert text == "this session is at a seat, and was given no access all the same"
    assert mend.startswith("Pull it out and plug it in again")


def test_a_session_elsewhere_of_a_user_outside_the_group(machine):
    assert refusal(machine) == (
        "the user operator is not in the group hwlicense, and the session is not at a seat (ssh, a service)",
        "sudo usermod --append --groups hwlicense operator, then log in again (or restart the service).",
    )


def test_the_seat_is_asked_of_systemd(monkeypatch):
    seats = iter([1, 0, -2])

    class Library:
        def __init__(self, name):
            assert name == "libsystemd.so.0"

        def sd_uid_get_seats(self, *arguments):
            assert arguments == (os.geteuid(), 1, None)
            return next(seats)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert [plugged.at_seat() for _ in range(3)] == [True, False, False]

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not plugged.at_seat()


def test_the_real_library_answers():
    assert plugged.at_seat() in {True, False}


def test_no_dongle_where_a_license_needs_one(machine):
    needed = "no USB dongle is plugged in that answers challenges, and a license needs one"
    assert dongles(wanted=True) == [
        ("missing", "dongle", needed, "Plug in the license's dongle; `lsusb` shows what is there."),
        ("ok", "libusb", "libusb 1.0 is installed", ""),
    ]
    machine.plug("1050:0406", name="YubiKey FIDO+CCID")
    state, _, text, mend = only(dongles(wanted=True), "dongle")
    assert state == "missing"
    assert text == f"{needed}; 1050:0406 (YubiKey FIDO+CCID) has its OTP interface switched off, if it has one"
    assert mend == "ykman config usb --enable OTP, or plug in the license's dongle."
    assert dongles() == []


def test_no_libusb(machine):
    machine.libusb(here=False)
    missing = ("missing", "libusb", "libusb 1.0 is not installed", "sudo apt install libusb-1.0-0")
    assert only(dongles(wanted=True), "libusb") == missing
    assert dongles() == [missing]  # its Python library is here, and of no use
    machine.without("usb")
    assert dongles() == []
    machine.plug(mode=0o600)
    assert dongles()[1] == missing


def test_dongles_that_only_libusb_sees(monkeypatch, hwlicense_dongles, tmp_path):
    monkeypatch.setattr(plugged, "DEVICES", tmp_path)
    first = hwlicense_dongles(serial=7_654_321)
    product = first.selector[:9]
    assert dongles(wanted=True) == [("ok", "dongle", f"plugged in, as libusb says: {product}", "")]
    monkeypatch.setattr(plugged, "installed", lambda _: False)
    assert only(dongles(wanted=True), "dongle")[0] == "missing"


def test_libusb_that_refuses_is_no_end_of_the_examination(monkeypatch, tmp_path):
    def refuse():
        raise HwlicenseError(Reason.DONGLE_FAILED, "no")

    monkeypatch.setattr(plugged, "DEVICES", tmp_path)
    monkeypatch.setattr("hwlicense.binders.usb.find", refuse)
    assert only(dongles(wanted=True), "dongle")[0] == "missing"


# ---- tokens ----------------------------------------------------------------------------------------------


def tokens(*texts):
    return [tuple(found) for found in plugged.tokens([TokenUri.parse(text) for text in texts])]


def module_uri(path, start=""):
    return f"pkcs11:{start}?module-path={path}"


def enter_wrong(reader, token, times):
    def wrong(_prompt, /, *, last_try=False):  # noqa: ARG001  # it is what a person would say
        return Secret(bytearray(b"999999"))

    for _ in range(times):
        with TokenHardware([str(reader.module)], TokenUri.parse(token.uri)) as hardware:
            with pytest.raises(HwlicenseError) as error:
                hardware.enroll(wrong)
            assert error.value.reason == Reason.PIN_WRONG


def test_without_tokens_nothing_is_said(machine):
    process(machine, 17, "scdaemon")
    assert tokens() == []


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("opensc-pkcs11.so", "sudo apt install opensc-pkcs11 pcscd"),
        ("onepin-opensc-pkcs11.so", "sudo apt install opensc-pkcs11 pcscd"),
        ("libykcs11.so.2", "sudo apt install ykcs11 pcscd"),
        (
            "libother.so",
            "Install what the token's maker gives for it, or name the right path: --token pkcs11:?module-path=PATH",
        ),
    ],
)
def test_a_module_that_does_not_exist(machine, name, mend):
    path = machine.root / name
    assert tokens(module_uri(path)) == [("missing", "module", f"{path} does not exist", mend)]


def test_a_module_that_cannot_be_read(machine):
    path = machine.root / "module.so"
    path.touch(0)
    path.chmod(0o200)
    expected = (
        "missing",
        "module",
        f"{path} is not a file that operator may read",
        "Check the path and its permissions.",
    )
    assert tokens(module_uri(path)) == [expected]
    path.unlink()
    path.mkdir()
    assert tokens(module_uri(path)) == [expected]


def test_a_module_that_is_none(machine):
    path = machine.root / "module.so"
    path.write_text("no library")
    ok, broken = tokens(module_uri(path))
    assert ok == ("ok", "module", str(path), "")
    assert broken[:2] == ("missing", "token")
    assert "is no PKCS#11 module that can be loaded here" in broken[2]
    assert broken[3] == "Give the path of the token maker's module, for this machine."


def test_without_the_library_modules_are_not_asked(machine):
    path = machine.root / "module.so"
    path.write_text("no library")
    machine.without("pkcs11")
    assert tokens(module_uri(path)) == [("ok", "module", str(path), "")]


def test_tokens_say_what_state_their_pin_is_in(hwlicense_reader):
    names = ("fine", "once", "twice", "locked")
    made = {name: hwlicense_reader.token(name, tries=3) for name in names}
    for times, name in enumerate(names):
        enter_wrong(hwlicense_reader, made[name], times)
    module = str(hwlicense_reader.module)
    named = {name: f'"{name}" (serial {made[name].serial})' for name in names}
    unlock = "Unlock it with its PUK or security officer's PIN (the maker's tool)."
    found = tokens(module_uri(module))
    assert found[0] == ("ok", "module", module, "")
    assert set(found[1:]) == {
        ("ok", "token", f"{named['fine']} is plugged in", ""),
        (
            "note",
            "token",
            f"{named['once']}: a wrong PIN was entered",
            "Be sure of the PIN: after a few more wrong ones the token locks.",
        ),
        (
            "note",
            "token",
            f"{named['twice']}: one more wrong PIN locks it, this is the last try before",
            "Be sure of the PIN; then say yes at the prompt, or give --last-try.",
        ),
        ("missing", "token", f"{named['locked']} is locked after too many wrong PINs", unlock),
    }
    # One that nobody named may be as it is
    found = tokens(module_uri(module, "token=fine"))
    assert ("note", "token", f"{named['locked']} is locked after too many wrong PINs", unlock) in found


def test_tokens_that_are_not_plugged_in(hwlicense_reader):
    module = hwlicense_reader.module
    assert tokens(module_uri(module))[1:] == [("missing", "token", "no token is plugged in", "Plug it in.")]
    hwlicense_reader.token("here")
    found = tokens(module_uri(module, "token=here;object=any"), module_uri(module, "token=away;id=%01"))
    assert [each[0] for each in found] == ["ok", "ok", "missing"]
    assert found[2] == ("missing", "token", "no token is plugged in that fits pkcs11:token=away", "Plug it in.")


@pytest.mark.usefixtures("machine")
def test_modules_that_need_pcscd(monkeypatch, hwlicense_reader):
    monkeypatch.setitem(plugged._PCSC_MODULES, hwlicense_reader.module.name.partition(".")[0], "opensc-pkcs11")
    found = tokens(module_uri(hwlicense_reader.module))
    assert only(found, "pcscd") == (
        "missing",
        "pcscd",
        f"pcscd is not running, or not for this user ({plugged.PCSCD})",
        "sudo apt install pcscd; sudo systemctl enable --now pcscd.socket. Into a container, pass /run/pcscd.",
    )
    absent = only(found, "token")
    assert absent[3] == (
        "Plug it in. If pcscd refuses this user: sudo udev/install --pcsc, and the group hwlicense (docs/udev.md)."
    )
    plugged.PCSCD.touch(0o600)
    assert only(tokens(module_uri(hwlicense_reader.module)), "pcscd") == ("ok", "pcscd", "pcscd can be reached", "")


def process(machine, number, name, user=None):
    folder = machine.processes / str(number)
    folder.mkdir()
    user = os.geteuid() if user is None else user
    (folder / "status").write_text(f"Name:\t{name}\nUmask:\t0077\nUid:\t{user}\t{user}\t{user}\t{user}\n")


def test_scdaemon_of_this_user(machine):
    away = module_uri(machine.root / "away.so")
    process(machine, 1, "systemd")
    process(machine, 21, "scdaemon", os.geteuid() + 1)
    (machine.processes / "22").mkdir()  # it ended
    (machine.processes / "self").mkdir()
    assert len(tokens(away)) == 1
    process(machine, 23, "scdaemon")
    assert tokens(away)[1:] == [
        (
            "note",
            "scdaemon",
            "GnuPG's scdaemon (process 23) is running, and may hold the card for itself",
            "gpgconf --kill scdaemon",
        )
    ]


# ---- libraries, and what needs them ----------------------------------------------------------------------


def examined(home, *token_uris, tcti=NOWHERE):
    return [tuple(found) for found in diagnosing.examine(home, tcti, token_uris)]


def libraries(found):
    return [each for each in found if each[1] == "library"]


def note_of(name, extra):
    text, mend = (
        f"{name} is not installed, and nothing here needs it",
        f'If that changes: pip install "hwlicense[{extra}]"',
    )
    return ("note", "library", text, mend)


def missing_of(name, extra):
    return ("missing", "library", f"{name} is not installed", f'pip install "hwlicense[{extra}]"')


@pytest.mark.usefixtures("machine")
def test_libraries_that_are_installed(tmp_path):
    found = libraries(examined(Home(tmp_path / "home")))
    names = ("tpm2-pytss", "python-pkcs11", "pyusb")
    assert found == [("ok", "library", f"{name} is installed", "") for name in names]


def test_libraries_that_nothing_or_the_enrolment_needs(machine, tmp_path, monkeypatch):
    machine.without("pkcs11", "usb", "tpm2_pytss")
    home = Home(tmp_path / "home")
    tpm, pkcs11, usb = ("tpm2-pytss", "tpm"), ("python-pkcs11", "pkcs11"), ("pyusb", "usb")
    monkeypatch.setattr(diagnosing, "probe", _no_tpm)
    assert libraries(examined(home, tcti=None)) == [missing_of(*tpm), note_of(*pkcs11), note_of(*usb)]
    away = module_uri(tmp_path / "away.so")
    assert libraries(examined(home, away, tcti=None)) == [note_of(*tpm), missing_of(*pkcs11), note_of(*usb)]
    home.keep_enrolled(None, "", [away], ["any"])
    assert libraries(examined(home, tcti=None)) == [note_of(*tpm), missing_of(*pkcs11), missing_of(*usb)]
    home.keep_enrolled(None, "sha256:7", [], ["any"])
    assert libraries(examined(home, tcti=None)) == [missing_of(*tpm), note_of(*pkcs11), missing_of(*usb)]
    (home.path / "device.json").write_text("{}")
    assert libraries(examined(home, tcti=None)) == [missing_of(*tpm), note_of(*pkcs11), note_of(*usb)]


def test_variables_name_hardware_too(machine, tmp_path, monkeypatch):
    machine.without("pkcs11", "usb", "tpm2_pytss")
    for name, value in (("TPM", NOWHERE), ("TOKEN", module_uri("/nowhere.so"))):
        monkeypatch.setenv(f"HWLICENSE_{name}", value)
    found = libraries(examined(Home(tmp_path / "home"), tcti=None))
    assert [each[0] for each in found] == ["missing", "missing", "note"]


def test_a_license_needs_the_library_of_its_hardware(bench, vendor, tmp_path, machine):
    kit = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    kit.license(vendor, TERMS)
    machine.without("usb", "pkcs11")
    assert libraries(examined(kit.home))[1:] == [note_of("python-pkcs11", "pkcs11"), missing_of("pyusb", "usb")]


def _no_tpm(*_):
    raise AbsentError(Reason.TPM_ABSENT, "There is no TPM here.", "Enable it.")


@pytest.mark.usefixtures("machine")
def test_a_tpm_that_nothing_needs_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosing, "probe", _no_tpm)
    monkeypatch.setattr(diagnosing, "DEVICE", tmp_path / "tpmrm0")
    home = Home(tmp_path / "home")

    def states():
        return {each[0] for each in examined(home, tcti=None) if each[1] in {"TPM", "device node"}}

    assert states() == {"missing"}
    home.keep_enrolled(None, "", [], ["any"])
    assert states() == {"note"}
    home.keep_enrolled(NOWHERE, "", [], ["any"])
    assert states() == {"missing"}


def test_a_dongle_that_nothing_needs_may_be_out_of_reach(machine, tmp_path):
    machine.plug()
    home = Home(tmp_path / "home")
    assert only(examined(home), "dongle")[0] == "note"
    home.keep_enrolled(None, "", [], ["any"])
    assert only(examined(home), "dongle")[0] == "missing"


@pytest.mark.usefixtures("machine")
def test_a_token_without_a_module_is_said_and_the_rest_goes_on(tmp_path):
    found = examined(Home(tmp_path / "home"), "pkcs11:token=mine")
    assert only(found, "token")[:3] == (
        "missing",
        "token",
        "pkcs11:token=mine does not say which module the token needs.",
    )
    assert only(found, "clock")


# ---- licenses --------------------------------------------------------------------------------------------


@pytest.fixture
def bench():
    with Bench() as own:
        yield own


def of_license(kit, *token_uris):
    """What is said of the one license, without the line about dates."""
    found = diagnosing.examine(kit.home, kit.tcti, token_uris)
    return [(each.state, each.text, each.mend) for each in found if each.subject.startswith("license ")]


HERE = ("ok", "its hardware is here", "")


@pytest.mark.parametrize("make", [DonglePiece, TokenPiece, TpmPiece])
def test_one_piece_of_hardware(bench, vendor, tmp_path, make):
    piece = make(bench)
    kit = Kit(bench, tmp_path / "home", [piece])
    kit.license(vendor, TERMS)
    assert of_license(kit, kit.token) == [HERE]
    piece.pull()
    ((state, text, mend),) = of_license(kit, kit.token)
    assert state == "missing"
    expected = {"usb": "dongle is not plugged in", "pkcs11": "The license's token", "tpm": "TPM"}
    assert expected[piece.kind] in text
    assert mend
    piece.plug()
    assert of_license(kit, kit.token) == [HERE]


def test_a_token_of_which_no_module_is_known(bench, vendor, tmp_path):
    kit = Kit(bench, tmp_path / "home", [TokenPiece(bench)])
    kit.license(vendor, TERMS)
    ((state, text, mend),) = of_license(kit)
    assert (state, "which module" in text) == ("missing", True)
    assert "HWLICENSE_TOKEN" in mend


def test_the_doctor_asks_for_no_pin_and_no_touch(bench, vendor, tmp_path):
    token, dongle = TokenPiece(bench), DonglePiece(bench, touch=True)
    kit = Kit(bench, tmp_path / "home", [token, dongle])
    dongle.dongle.touch_after(0.01)
    raw = kit.license(vendor, TERMS)
    bench.reader.forget()
    before = len(dongle.dongle.transfers)
    found = of_license(kit, kit.token)
    uri = unverified(raw, License)[0].bindings[0].uri
    named = f"its dongle 1050:0407, serial number {dongle.dongle.serial}"
    asks = "hwlicense device check --open PACKAGE asks it."
    assert found == [
        ("ok", f"its token {uri} is here", ""),
        ("note", f"{named} answers only when touched, so it was not asked", asks),
    ]
    assert not any(call.startswith("C_Login") for call in bench.reader.calls)
    assert len(dongle.dongle.transfers) == before
    token.pull()
    assert of_license(kit, kit.token)[0][0] == "missing"


def test_any_of_several(bench, vendor, tmp_path):
    first, second = DonglePiece(bench), DonglePiece(bench)
    kit = Kit(bench, tmp_path / "home", [first, second])
    kit.license(vendor, f'{TERMS}[require]\nbindings = "any"\n')
    named = [f"its dongle 1050:0407, serial number {piece.dongle.serial} is here" for piece in (first, second)]
    assert of_license(kit) == [
        ("ok", named[0], ""),
        ("ok", named[1], ""),
        ("ok", "its hardware is here: 2 of 2 pieces, and it takes 1", ""),
    ]
    first.pull()
    absent, here, said = of_license(kit)
    assert absent[0] == "note"
    assert "not the license's" in absent[1]
    assert (here, said) == (("ok", named[1], ""), ("ok", "its hardware is here: 1 of 2 pieces, and it takes 1", ""))


def test_too_few_of_several(bench, vendor, tmp_path):
    pieces = [DonglePiece(bench) for _ in range(3)]
    kit = Kit(bench, tmp_path / "home", [*pieces])
    kit.license(vendor, f"{TERMS}[require]\nbindings = 2\n")
    for piece in pieces[:2]:
        piece.pull()
    found = of_license(kit)
    assert [each[0] for each in found] == ["missing", "missing", "ok", "missing"]
    assert found[3] == (
        "missing",
        "1 of 3 pieces of its hardware are here, and it takes 2",
        "Plug in more of it; the findings above say what is wrong with each.",
    )


def test_a_kind_that_a_license_can_do_without_may_be_missing(bench, vendor, tmp_path, machine):
    dongle, token = DonglePiece(bench), TokenPiece(bench)
    kit = Kit(bench, tmp_path / "home", [dongle, token])
    kit.license(vendor, f'{TERMS}[require]\nbindings = "any"\n')
    kit.home.keep_enrolled(NOWHERE, "", [kit.token], ["any"])
    token.pull()
    machine.plug()
    found = examined(kit.home)
    assert only(found, "token")[0] == "note"
    assert only(found, "dongle")[0] == "note"
    assert only(examined(kit.home, kit.token), "token")[0] == "missing"  # asked about, so it is to be here


def test_the_platform_counts_where_the_tpm_is_here(bench, vendor, tmp_path):
    tpm, dongle = TpmPiece(bench), DonglePiece(bench)
    kit = Kit(bench, tmp_path / "home", [tpm, dongle])
    terms = f'{TERMS}[require]\nbindings = "all"\npcrs = ["sha256:7"]\n'
    selection = Selection.parse("sha256:7")
    kit.install(kit.issue(vendor, terms, kit.request(vendor, selection)), vendor)
    approved = ("ok", "the platform's present state is approved", "")
    assert of_license(kit)[2:] == [HERE, approved]
    dongle.pull()
    assert [each[0] for each in of_license(kit)] == ["ok", "missing", "ok"]
    dongle.plug()
    tpm.pull()
    found = of_license(kit)
    assert [each[0] for each in found] == ["missing", "ok"]
    assert "platform" not in " ".join(text for _, text, _ in found)


def test_a_license_without_its_approval_does_not_hide_the_next(bench, vendor, tmp_path, monkeypatch):
    kit = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    first = unverified(kit.license(vendor, TERMS), License)[0].grant.license
    kit.license(vendor, TERMS)
    approvals = Home.approvals

    def gone(self, licensed, public):
        if licensed.grant.license == first:
            raise HwlicenseError(Reason.APPROVAL_WITHDRAWN, "It is gone.", "Install it.")
        return approvals(self, licensed, public)

    monkeypatch.setattr(Home, "approvals", gone)
    assert sorted(of_license(kit)) == [("missing", "It is gone.", "Install it."), HERE]


# ---- presence --------------------------------------------------------------------------------------------


def presence(kit):
    return [each for each in of_license(kit, kit.token) if each != HERE]


def account(kit, terms):
    (folder,) = (kit.home.state / "licenses").iterdir()
    return grace.PresenceAccount(folder, terms, Secret(bytearray(32)))


def test_presence_without_grace(bench, vendor, tmp_path):
    kit = Kit(bench, tmp_path / "home", [TokenPiece(bench)])
    kit.license(vendor, TERMS + PRESENCE)
    assert presence(kit) == [("ok", "its hardware is to prove every 10 s that it is here; there is no grace", "")]


@pytest.mark.parametrize(
    ("regain", "mend"),
    [
        ("", "See that the hardware stays plugged in: nothing gives it back."),
        ('regain = "1h"\n', "See that the hardware stays plugged in: 1 h of that give all of it back."),
    ],
)
def test_presence_with_grace(bench, vendor, tmp_path, regain, mend):
    kit = Kit(bench, tmp_path / "home", [TokenPiece(bench)])
    terms = unverified(kit.license(vendor, f'{TERMS}{PRESENCE}grace = "2h"\n{regain}'), License)[0].grant.presence
    start = "its hardware is to prove every 10 s that it is here; "
    assert presence(kit) == [("ok", f"{start}0 s of 2 h of grace are used", "")]
    used = account(kit, terms)
    used.bridge(1000, 90.4)
    assert presence(kit) == [("ok", f"{start}1 min 30 s of 2 h of grace are used", "")]
    used.bridge(2000, 9000)
    assert presence(kit) == [("note", f"{start}all 2 h of grace are used", mend)]


@pytest.mark.parametrize("repeat", ["true", "false"])
def test_recorded_answers_that_are_used_up(bench, vendor, tmp_path, repeat):
    kit = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    terms = unverified(kit.license(vendor, f"{TERMS}{PRESENCE}repeat = {repeat}\n"), License)[0].grant.presence
    assert len(presence(kit)) == 1
    assert account(kit, terms).reserve_proofs() == range(grace.BLOCK)
    over = ("missing", "the recorded answers of its dongle are used up", "Ask the vendor for a new license.")
    assert presence(kit)[1:] == ([] if repeat == "true" else [over])


def test_probe_says_of_a_dongle_that_cannot_be_asked_what_to_do(monkeypatch):
    class Taken:
        product = "Key"

        def __enter__(self):
            raise HardwareError(Reason.DONGLE_BUSY, "Another program has it.", "Close that program.")

        def __exit__(self, *_):
            pytest.fail("not reached")

    monkeypatch.setattr("hwlicense.binders.usb.find", lambda: [Taken()])
    said = {"problem": "Another program has it.", "reason": "DONGLE_BUSY", "hint": "Close that program."}
    assert plugged_dongles() == [{"selector": "Key", **said}]


def test_the_made_up_machine_forbids_by_mode(machine):
    node = machine.plug(mode=0o400)
    assert stat.S_IMODE(node.stat().st_mode) == 0o400
    assert os.access(node, os.R_OK)
    assert not os.access(node, os.R_OK | os.W_OK)
    assert not os.access(node / "none", os.F_OK)
