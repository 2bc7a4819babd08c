"""What is here, what is missing, and which command or group mends it."""

from __future__ import annotations

import grp
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from hwlicense import storage
from hwlicense.core import dongle
from hwlicense.core.documents import License, TokenBinding, TpmBinding, UsbBinding
from hwlicense.core.durations import spelled
from hwlicense.core.errors import HardwareError, HwlicenseError, Reason, StorageError, UsageError
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import grace, memory, plugged, selecting, tpm_memory, usage
from hwlicense.device.bound import kind_of
from hwlicense.device.counters import Counters
from hwlicense.device.opening import utc_today
from hwlicense.device.plugged import Finding, user_name, whole
from hwlicense.device.recovering import kept
from hwlicense.device.reporting import status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwlicense.core.documents import Binding
    from hwlicense.device.bound import Connect
    from hwlicense.device.home import Home, Installed

    _Answer = Literal["here", "untouched"] | HwlicenseError

__all__ = ["Finding", "examine", "probe"]

DEVICE: Final = Path("/dev/tpmrm0")
FIRST_YEAR: Final = 2026
ROOM: Final = 32 << 10
"""Bytes that the account of a license may take, and a monitor's state beside it."""


_LIBRARIES: Final = {
    "tpm": ("tpm2_pytss", "tpm2-pytss"),
    "pkcs11": ("pkcs11", "python-pkcs11"),
    "usb": ("usb", "pyusb"),
}
"""By kind of hardware, which is the extra's name, too: what is imported, and what it is called."""


def examine(home: Home, tcti: str | None, tokens: Sequence[str] = ()) -> list[Finding]:
    """Everything that opening a model depends on, for this TPM and these tokens, or the usual ones. Changes nothing."""
    needs = _needs(home, tcti, tokens)
    sections: tuple[tuple[str, Iterator[Finding], bool], ...] = (
        ("library", _libraries(needs), True),
        ("TPM", _tpm(home, tcti), "tpm" in needs.all),
        ("dongle", plugged.dongles(wanted="usb" in needs.licensed), needs.now("usb")),
        ("token", _tokens(home, tokens), bool(tokens) or needs.now("pkcs11")),
        ("home", _home(home, selecting.hardware(home, tcti, tokens)), True),
        ("license", _licenses(home, tcti, tokens), True),
        ("system", _system(), True),
    )
    return [
        finding if needed or finding.state != "missing" else finding._replace(state="note")
        for subject, section, needed in sections
        for finding in whole(subject, section)
    ]


class _Needs(NamedTuple):
    """Kinds of hardware: those without which a license here cannot open, and those that were enrolled or named."""

    licensed: frozenset[str]
    named: frozenset[str]
    any_license: bool

    @property
    def all(self) -> frozenset[str]:
        return self.licensed | self.named

    def now(self, kind: str) -> bool:
        """Whether it must be plugged in: where licenses are installed, they alone decide."""
        return kind in (self.licensed if self.any_license else self.all)


def _needs(home: Home, tcti: str | None, tokens: Sequence[str]) -> _Needs:
    enrolled, licenses = None, list[License]()
    with suppress(HwlicenseError):  # other findings are about what is damaged
        enrolled = home.enrolled()
    with suppress(HwlicenseError):
        licenses = [installed.license for installed in home.licenses(home.trusted())[0]]
    licensed = {kind for kind in _LIBRARIES for each in licenses if _indispensable(each, kind)}
    named = set[str]()
    if tokens or os.environ.get(selecting.TOKEN_VARIABLE) or (enrolled and enrolled.tokens):
        named.add("pkcs11")
    if enrolled and enrolled.dongles:
        named.add("usb")
    if tcti or os.environ.get(selecting.TPM_VARIABLE) or (enrolled and (enrolled.tpm or enrolled.pcrs)):
        named.add("tpm")
    if not licensed and not named:  # what is enrolled by default
        named.add("tpm")
    return _Needs(frozenset(licensed), frozenset(named), bool(licenses))


def _indispensable(licensed: License, kind: str) -> bool:
    return sum(kind_of(binding) != kind for binding in licensed.bindings) < licensed.need


def probe(tcti: str | None, selection: Selection) -> dict[str, Any]:
    """Facts about the TPM, with the values of the selected PCRs under "pcrs", by bank and number.

    Raises HardwareError, UsageError EXTRA_MISSING.
    """
    from hwlicense.binders.tpm.probing import probe as ask  # noqa: PLC0415  # the library is an extra

    facts = ask(tcti, selection)
    banks: dict[str, dict[int, bytes]] = {}
    for pcr in facts.pcrs:
        banks.setdefault(pcr.bank, {})[pcr.index] = pcr.value
    return {**msgspec.structs.asdict(facts), "pcrs": banks}


def _libraries(needs: _Needs) -> Iterator[Finding]:
    for kind, (module, name) in _LIBRARIES.items():
        if plugged.installed(module):
            yield Finding("ok", "library", f"{name} is installed")
        elif kind in needs.all:
            yield Finding("missing", "library", f"{name} is not installed", f'pip install "hwlicense[{kind}]"')
        else:
            text = f"{name} is not installed, and nothing here needs it"
            yield Finding("note", "library", text, f'If that changes: pip install "hwlicense[{kind}]"')


def _tpm(home: Home, tcti: str | None) -> Iterator[Finding]:
    address = selecting.tpm_address(tcti, home)
    if address is None or address.startswith("device:"):
        yield from _node(DEVICE if address is None else Path(address.removeprefix("device:")))
    facts = probe(address, Selection())
    yield Finding(
        "ok", "TPM", f"{facts['manufacturer']}, firmware {facts['firmware']}, specification {facts['revision']}"
    )
    yield from _keys(facts)
    yield from tpm_memory.memory(facts, Counters(home).spare())


def _keys(facts: dict[str, Any]) -> Iterator[Finding]:
    if facts["ek_certificates"]:
        yield Finding("ok", "EK", f"certificates: {', '.join(facts['ek_certificates'])}")
    else:
        mend = "Record the EK's Name at the factory and issue with --ek (docs/tpm.md)."
        yield Finding("note", "EK", "the TPM holds no EK certificate, as many firmware TPMs", mend)
    if facts["persistent_srk"]:
        yield Finding("ok", "SRK", "persistent at 0x81000001")
    else:
        mend = "Where opening is slow, make it persistent before enrolling (docs/tpm.md)."
        yield Finding("note", "SRK", "not persistent: it is made anew at each opening", mend)
    if facts["in_lockout"]:
        mend = "Wait for the recovery time, or tpm2_dictionarylockout --clear-lockout."
        yield Finding("missing", "lockout", "the TPM refuses PINs after too many wrong ones", mend)


def _node(node: Path) -> Iterator[Finding]:
    if not node.exists():
        mend = (
            "Enable the TPM in the firmware setup; kernel modules: tpm_tis, tpm_crb. In a container, pass the device."
        )
        yield Finding("missing", "device node", f"{node} does not exist", mend)
        return
    if os.access(node, os.R_OK | os.W_OK):
        yield Finding("ok", "device node", f"{node} can be read and written")
        return
    group = _group(node.stat().st_gid)
    mend = f"sudo usermod --append --groups {group} {user_name()}, then log in again (or restart the service)."
    yield Finding("missing", "device node", f"no permission for {node}, which belongs to the group {group}", mend)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:  # a container need not know the host's groups
        return str(number)


def _home(home: Home, connect: Connect) -> Iterator[Finding]:
    if not home.path.is_dir():
        yield Finding(
            "missing", "home", f"{home.path} does not exist", f"hwlicense device enroll --home {home.path} -o OUT.hwreq"
        )
        return
    mode = home.path.stat().st_mode & 0o077
    if mode:
        yield Finding("note", "home", f"{home.path} is open to other users", f"chmod go= {home.path}")
    else:
        yield Finding("ok", "home", str(home.path))
    vendors = home.trusted()
    yield from _state(home)
    if not vendors:
        yield Finding(
            "missing",
            "trust",
            "no vendor is trusted by the command line",
            f"hwlicense device trust --home {home.path} VENDOR.pub.json",
        )
        return
    yield Finding("ok", "trust", ", ".join(vendor.name for vendor in vendors))
    yield from _installed(home, connect)


def _state(home: Home) -> Iterator[Finding]:
    """Whether what changes can be written. Without room, a license that keeps an account does not open."""
    folder = next(each for each in (home.state, *home.state.absolute().parents) if each.exists())
    try:
        storage.check_room(folder, ROOM)
    except (StorageError, UsageError) as error:
        accounts = any(kept(installed.license.grant) for installed in home.licenses(home.trusted())[0])
        lost = "a license that keeps an account may not open" if accounts else "no approval can be installed"
        mend = f"{error.hint} Or give --state DIR, a folder that can be written."
        yield Finding("missing" if accounts else "note", "state", f"{error.what} So {lost}.", mend)


def _installed(home: Home, connect: Connect) -> Iterator[Finding]:
    entries, problems = status(home, utc_today(), connect)
    for entry in entries:
        text, mend = f"{entry['license']} ({', '.join(entry['packages'])}): {entry['state']}", ""
        if refusal := entry["refusal"]:
            text, mend = f"{text}. {refusal['what']}", refusal["hint"]
        elif entry.get("unreached"):
            text += ", as far as is known without the TPM"
        yield Finding("missing" if refusal else "ok", "license", text, mend)
        yield from usage.doubts(entry)
        yield from _of_the_process(entry)
    for problem in problems:
        if not isinstance(problem, HardwareError) and problem.reason != Reason.EXTRA_MISSING:  # others say that
            yield Finding("missing", "license", problem.what, problem.hint)
    if not entries and not problems:
        yield Finding("missing", "license", "none is installed", f"hwlicense device install --home {home.path} LICENSE")


def _of_the_process(entry: dict[str, Any]) -> Iterator[Finding]:
    """What only the application itself can see."""
    asked = []
    if guard := entry.get("guard"):
        asked.append(f"refuses a process with findings of {', '.join(guard)}")
    if application := entry.get("application"):
        asked.append(f"opens where nothing is loaded but the {application['files']:,} measured files")
    if asked:
        text = f"{entry['license'][:8]} {' and '.join(asked)}: not known here"
        yield Finding("note", "process", text, "The application sees it: by `model.findings`, and when it opens.")


def _tokens(home: Home, tokens: Sequence[str]) -> Iterator[Finding]:
    yield from plugged.tokens(selecting.token_uris(tokens, home))


def _licenses(home: Home, tcti: str | None, tokens: Sequence[str]) -> Iterator[Finding]:
    """Whether the licenses in force are for hardware that is here, and for the platform's present state."""
    connect = selecting.hardware(home, tcti, tokens)
    for installed in home.licenses(home.trusted())[0]:
        subject = f"license {installed.license.grant.license[:8]}"
        yield from whole(subject, _license(home, connect, tcti, subject, installed))


def _license(home: Home, connect: Connect, tcti: str | None, subject: str, installed: Installed) -> Iterator[Finding]:
    licensed, vendor = installed
    approvals = home.approvals(licensed, vendor)
    answers = [_answer(home, connect, licensed, binding) for binding in licensed.bindings]
    yield from _judged(subject, licensed, answers)
    yield from _presence(home, subject, licensed)
    yield from _counted(home, connect, subject, licensed, answers)
    tpms = [isinstance(b, TpmBinding) and a == "here" for b, a in zip(licensed.bindings, answers, strict=True)]
    if licensed.grant.pcrs and any(tpms):
        present = probe(selecting.tpm_address(tcti, home), Selection.parse(*licensed.grant.pcrs))["pcrs"]
        if not any(all(present[pcr.bank][pcr.index] == pcr.value for pcr in a.pcrs) for a in approvals):
            mend = "Boot the approved system, or install the vendor's approval of this one: hwlicense device install."
            yield Finding("missing", subject, "the platform's present state is not approved", mend)
        else:
            yield Finding("ok", subject, "the platform's present state is approved")


def _answer(home: Home, connect: Connect, licensed: License, binding: Binding) -> _Answer:
    """What the hardware of one binding says: without a PIN, and without waiting for a finger."""
    if isinstance(binding, UsbBinding) and binding.touch:
        return "untouched"
    try:
        with connect(kind_of(binding)) as hardware:
            if isinstance(binding, TpmBinding):
                hardware.present(binding, home.held(licensed, binding))
            else:
                hardware.install(binding, [])
    except HwlicenseError as error:
        return error
    return "here"


def _judged(subject: str, licensed: License, answers: Sequence[_Answer]) -> Iterator[Finding]:
    need, count = licensed.need, len(licensed.bindings)
    here, untouched = answers.count("here"), answers.count("untouched")
    for binding, answer in zip(licensed.bindings, answers, strict=True):
        if isinstance(answer, HwlicenseError):
            yield Finding("note" if here + untouched >= need else "missing", subject, answer.what, answer.hint)
        elif answer == "untouched":
            text = f"{_name(binding)} answers only when touched, so it was not asked"
            yield Finding("note", subject, text, "hwlicense device check --open PACKAGE asks it.")
        elif count > 1:
            yield Finding("ok", subject, f"{_name(binding)} is here")
    if here >= need:
        some = "" if need == count else f": {here} of {count} pieces, and it takes {need}"
        yield Finding("ok", subject, f"its hardware is here{some}")
    elif here + untouched < need < count:
        text = f"{here} of {count} pieces of its hardware are here, and it takes {need}"
        yield Finding("missing", subject, text, "Plug in more of it; the findings above say what is wrong with each.")


def _name(binding: Binding) -> str:
    if isinstance(binding, TpmBinding):
        return "its TPM"
    if isinstance(binding, TokenBinding):
        return f"its token {binding.uri}"
    serial = f", serial number {binding.serial}" if binding.serial else ""
    return f"its dongle {binding.product}{serial}"


def _counted(
    home: Home, connect: Connect, subject: str, licensed: License, answers: Sequence[_Answer]
) -> Iterator[Finding]:
    for binding, answer in zip(licensed.bindings, answers, strict=True):
        if isinstance(binding, TpmBinding) and binding.counter and answer == "here":
            with connect("tpm") as hardware:
                yield from tpm_memory.counted(subject, binding, home.held(licensed, binding), hardware)


def _presence(home: Home, subject: str, licensed: License) -> Iterator[Finding]:
    """The terms of presence, and what is used up of them, by the account's own word."""
    terms = licensed.grant.presence
    if terms is None:
        return
    account = grace.recorded(grace.presence_folder(home.state, licensed.grant))
    used = min(terms.grace, account.used / 1000 if account else 0)
    text = f"its hardware is to prove every {spelled(terms.interval)} that it is here"
    if not terms.grace:
        yield Finding("ok", subject, f"{text}; there is no grace")
    elif used < terms.grace:
        yield Finding("ok", subject, f"{text}; {spelled(round(used))} of {spelled(terms.grace)} of grace are used")
    else:
        back = f"{spelled(terms.regain)} of that give all of it back" if terms.regain else "nothing gives it back"
        mend = f"See that the hardware stays plugged in: {back}."
        yield Finding("note", subject, f"{text}; all {spelled(terms.grace)} of grace are used", mend)
    counts = [dongle.answer_count(binding) for binding in licensed.bindings if isinstance(binding, UsbBinding)]
    if counts and not terms.repeat and account and account.proofs >= min(counts):
        mend = "Ask the vendor for a new license."
        yield Finding("missing", subject, "the recorded answers of its dongle are used up", mend)


def _system() -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not memory.protection().swap:
        yield Finding("ok", "memory", "no swap is in use")
    elif limit == resource.RLIM_INFINITY or os.geteuid() == 0:
        yield Finding("ok", "memory", "swap is in use; any amount of memory can be locked out of it")
    else:
        text = f"swap is in use; {limit:,} bytes can be locked out of it, and plaintext beyond that may reach it"
        yield Finding("note", "memory", text, "ulimit -l unlimited, LimitMEMLOCK=infinity in the service, or swapoff.")
    today = utc_today()
    if today.year < FIRST_YEAR:
        yield Finding(
            "missing", "clock", f"the date is {today}, which cannot be", "Set the clock (timedatectl, hwclock)."
        )
    else:
        yield Finding("ok", "clock", f"{today} (UTC)")
