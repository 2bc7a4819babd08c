"""What is seen of USB dongles and PKCS#11 tokens, and what keeps this user from them. Opens no dongle, asks no PIN."""

from __future__ import annotations

import ctypes
import ctypes.util
import grp
import importlib.util
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from hwlicense.core.dongle import PRODUCTS
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.uri import TokenUri

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.binders.pkcs11 import TokenFacts

DEVICES: Final = Path("/sys/bus/usb/devices")
NODES: Final = Path("/dev/bus/usb")
PROCESSES: Final = Path("/proc")
PCSCD: Final = Path("/run/pcscd/pcscd.comm")
RULES: Final = "69-hwlicense.rules"
RULES_FOLDERS: Final = tuple(
    Path(base, "udev/rules.d") for base in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
)
"""In udev's order: a file in an earlier one replaces those of its name in later ones."""

GROUP: Final = "hwlicense"
YUBICO: Final = "1050"

_PCSC_MODULES: Final = {
    "opensc-pkcs11": "opensc-pkcs11",
    "onepin-opensc-pkcs11": "opensc-pkcs11",
    "libykcs11": "ykcs11",
}
"""Modules that speak to cards through pcscd, and their Debian packages."""

_INSTALL: Final = "sudo udev/install (docs/udev.md)"
_REPLUG: Final = "Pull it out and plug it in again, or: sudo udevadm trigger --subsystem-match=usb"
_POLKIT: Final = "If pcscd refuses this user: sudo udev/install --pcsc, and the group hwlicense (docs/udev.md)."


class Finding(NamedTuple):
    """One thing looked at. `mend` is a command or what a person does, empty where nothing is to be done."""

    state: Literal["ok", "note", "missing"]
    subject: str
    text: str
    mend: str = ""


def whole(subject: str, section: Iterator[Finding]) -> Iterator[Finding]:
    """A section, to its end or to what broke it off: that is a finding, too."""
    try:
        yield from section
    except HwlicenseError as error:
        yield Finding("missing", subject, error.what, error.hint)


def installed(library: str) -> bool:
    """Whether a Python library is there."""
    return importlib.util.find_spec(library) is not None


def user_name() -> str:
    """This process's user, by number where nothing else is known."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container need not know the host's users
        return str(os.geteuid())


# ---- dongles ---------------------------------------------------------------------------------------------


class _Device(NamedTuple):
    product: str
    node: Path
    name: str


def dongles(*, wanted: bool) -> Iterator[Finding]:
    """Dongles that are plugged in, whether this user may use them, and libusb. `wanted`: no license does without."""
    devices = list(_devices())
    here = [device for device in devices if device.product in PRODUCTS]
    for device in here:
        yield from _access(device)
    if not here and (listed := _listed()):  # such as simulated ones, which the kernel does not know of
        yield Finding("ok", "dongle", f"plugged in, as libusb says: {', '.join(listed)}")
        return
    if not here and wanted:
        yield _none_here(devices)
    if ctypes.util.find_library("usb-1.0"):
        if here or wanted:
            yield Finding("ok", "libusb", "libusb 1.0 is installed")
    elif here or wanted or installed("usb"):
        yield Finding("missing", "libusb", "libusb 1.0 is not installed", "sudo apt install libusb-1.0-0")


def _devices() -> Iterator[_Device]:
    try:
        folders = sorted(DEVICES.iterdir())
    except OSError:  # no USB, or a container without it
        return
    for folder in folders:
        try:
            product = f"{_line(folder / 'idVendor')}:{_line(folder / 'idProduct')}"
            node = NODES / f"{int(_line(folder / 'busnum')):03}" / f"{int(_line(folder / 'devnum')):03}"
        except (OSError, ValueError):
            continue  # an interface of a device, or pulled out meanwhile
        name = product
        with suppress(OSError):
            name = f"{product} ({_line(folder / 'product')})"
        yield _Device(product, node, name)


def _line(path: Path) -> str:
    return path.read_text(errors="replace").strip()


def _none_here(devices: Sequence[_Device]) -> Finding:
    text = "no USB dongle is plugged in that answers challenges, and a license needs one"
    others = [device.name for device in devices if device.product.startswith(f"{YUBICO}:")]
    if not others:
        return Finding("missing", "dongle", text, "Plug in the license's dongle; `lsusb` shows what is there.")
    text = f"{text}; {', '.join(others)} has its OTP interface switched off, if it has one"
    return Finding("missing", "dongle", text, "ykman config usb --enable OTP, or plug in the license's dongle.")


def _listed() -> list[str]:
    if not installed("usb"):
        return []
    from hwlicense.binders.usb import find  # noqa: PLC0415  # its library is an extra

    try:
        return [str(dongle) for dongle in find()]
    except HwlicenseError:  # libusb is missing, or refuses: both are looked at by themselves
        return []


def _access(device: _Device) -> Iterator[Finding]:
    if not os.access(device.node, os.F_OK):
        text = f"{device.name} is plugged in, and its node {device.node} is not here"
        yield Finding("missing", "dongle", text, "Into a container, pass the device and its group (docs/udev.md).")
    elif os.access(device.node, os.R_OK | os.W_OK):
        yield Finding("ok", "dongle", f"{device.name}: {device.node} can be read and written")
    else:
        cause, mend = _cause(device.node)
        yield Finding("missing", "dongle", f"no permission for {device.node}, {device.name}: {cause}", mend)


def _cause(node: Path) -> tuple[str, str]:
    """What keeps this user from a dongle, and what mends that."""
    rules = next((folder / RULES for folder in RULES_FOLDERS if os.path.lexists(folder / RULES)), None)
    if rules is None:
        return f"the udev rule {RULES} is not installed", _INSTALL
    if not rules.is_file() or not rules.stat().st_size:  # udev's way to switch off a rule of a package
        return f"the udev rule is switched off by {rules}, which is empty", f"Remove that file, then {_INSTALL}"
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        return f"the group {GROUP} does not exist", _INSTALL
    return _cause_beyond(node, group)


def _cause_beyond(node: Path, group: grp.struct_group) -> tuple[str, str]:
    """The same, where rule and group are as they should be."""
    status, user = node.stat(), user_name()
    if status.st_gid != group.gr_gid:
        return "the udev rule has not been applied to it", _REPLUG
    if group.gr_gid in {os.getegid(), *os.getgroups()}:
        text = f"this user is in the group {GROUP}, and the node's mode is {stat.S_IMODE(status.st_mode):04o}"
        return text, f"See which other rule sets the mode: udevadm test $(udevadm info --query=path {node})"
    if _belongs(user, group):
        return f"the user {user} is in the group {GROUP}, but not since before this session", (
            "Log in again (or restart the service)."
        )
    if at_seat():
        return "this session is at a seat, and was given no access all the same", _REPLUG
    text = f"the user {user} is not in the group {GROUP}, and the session is not at a seat (ssh, a service)"
    return text, f"sudo usermod --append --groups {GROUP} {user}, then log in again (or restart the service)."


def _belongs(user: str, group: grp.struct_group) -> bool:
    if user in group.gr_mem:
        return True
    try:
        return pwd.getpwnam(user).pw_gid == group.gr_gid
    except KeyError:
        return False


def at_seat() -> bool:
    """Whether this user has the active session of a seat, to which udev gives what is tagged "uaccess"."""
    try:
        seats = ctypes.CDLL("libsystemd.so.0").sd_uid_get_seats(os.geteuid(), 1, None)
    except (OSError, AttributeError):  # no systemd, no seats
        return False
    return bool(seats > 0)


# ---- tokens ----------------------------------------------------------------------------------------------


def tokens(uris: Sequence[TokenUri]) -> Iterator[Finding]:
    """The modules of these URIs, the tokens that they see, and what else may hold or withhold a card."""
    for module in dict.fromkeys(uri.module for uri in uris if uri.module):
        yield from whole("token", _module(module, [uri for uri in uris if uri.module == module]))
    if uris:
        yield from _scdaemon()


def _module(module: str, uris: Sequence[TokenUri]) -> Iterator[Finding]:
    package = _PCSC_MODULES.get(Path(module).name.partition(".")[0])
    if not os.access(module, os.F_OK):
        mend = "Install what the token's maker gives for it, or name the right path: --token pkcs11:?module-path=PATH"
        yield Finding(
            "missing", "module", f"{module} does not exist", f"sudo apt install {package} pcscd" if package else mend
        )
        return
    if not Path(module).is_file() or not os.access(module, os.R_OK):
        text = f"{module} is not a file that {user_name()} may read"
        yield Finding("missing", "module", text, "Check the path and its permissions.")
        return
    yield Finding("ok", "module", module)
    if package:
        yield _pcscd()
    if not installed("pkcs11"):  # of which there is a finding
        return
    from hwlicense.binders.pkcs11 import TokenHardware  # noqa: PLC0415  # its library is an extra

    with TokenHardware([module]) as hardware:
        found = [(facts, TokenUri.parse(facts.uri)) for facts in hardware.tokens()]
    for facts, place in found:
        yield _token(facts, named=any(uri.matches(place) for uri in uris))
    for uri in uris:
        if not any(uri.matches(place) for _, place in found):
            wanted = uri._replace(object=None, id=None, module=None)
            which = "" if wanted == TokenUri() else f" that fits {wanted}"
            mend = f"Plug it in. {_POLKIT}" if package else "Plug it in."
            yield Finding("missing", "token", f"no token is plugged in{which}", mend)


def _token(facts: TokenFacts, *, named: bool) -> Finding:
    name = f'"{facts.label}" (serial {facts.serial})'
    if facts.locked:
        mend = "Unlock it with its PUK or security officer's PIN (the maker's tool)."
        return Finding("missing" if named else "note", "token", f"{name} is locked after too many wrong PINs", mend)
    if facts.last_try:
        mend = "Be sure of the PIN; then say yes at the prompt, or give --last-try."
        return Finding("note", "token", f"{name}: one more wrong PIN locks it, this is the last try before", mend)
    if facts.wrong_pin_before:
        mend = "Be sure of the PIN: after a few more wrong ones the token locks."
        return Finding("note", "token", f"{name}: a wrong PIN was entered", mend)
    return Finding("ok", "token", f"{name} is plugged in")


def _pcscd() -> Finding:
    if os.access(PCSCD, os.W_OK):
        return Finding("ok", "pcscd", "pcscd can be reached")
    text = f"pcscd is not running, or not for this user ({PCSCD})"
    mend = "sudo apt install pcscd; sudo systemctl enable --now pcscd.socket. Into a container, pass /run/pcscd."
    return Finding("missing", "pcscd", text, mend)


def _scdaemon() -> Iterator[Finding]:
    for process in PROCESSES.glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            lines = (process / "status").read_text(errors="replace").splitlines()
            facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if facts.get("Name") == "scdaemon" and facts.get("Uid", "").split()[:1] == [str(os.geteuid())]:
                text = f"GnuPG's scdaemon (process {process.name}) is running, and may hold the card for itself"
                yield Finding("note", "scdaemon", text, "gpgconf --kill scdaemon")
