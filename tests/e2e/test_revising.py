"""Revisions and clock resets by the installed command line, with a simulated TPM."""

import json
import os
import re
import subprocess
import time

import pytest

import hwlicense
from tests.forging import as_root, listing
from tests.world import PROGRAM, TERMS, WITH_PCRS, run, write

LATER = WITH_PCRS + "[validity]\nnot_after = 2090-12-31\n"
OVER = WITH_PCRS + "[validity]\nnot_after = 2020-12-31\n"


class Desk:
    """An order desk with one device that has a license."""

    def __init__(self, folder, tpm):
        self.folder, self.tpm = folder, tpm
        self.home = folder / "home"
        write(folder / "weights.bin", b"weights")
        run("vendor", "init", "vendor", "--no-passphrase", cwd=folder)
        self.pack("reader")
        self.terms("terms.toml", WITH_PCRS)
        self.device("enroll", "--pcrs", "sha256:0,7", "-o", "board.hwreq")
        self.device("trust", "vendor/vendor.pub.json", tpm=False)
        self.issue("1.hwlic")
        self.device("install", "1.hwlic")

    def pack(self, name):
        run(
            "vendor", "pack", "--vendor", "vendor", "--name", name, "--version", "1", "-o", f"{name}.hwpkg",
            "weights.bin", cwd=self.folder,
        )  # fmt: skip

    def terms(self, name, text):
        write(self.folder / name, text.encode())

    def issue(self, target, *more, status=0):
        return run(
            "vendor", "issue", "--vendor", "vendor", "--request", "board.hwreq", "--package", "reader.hwpkg", "--terms",
            "terms.toml", "--ek-root", self.tpm.ek_root, "-o", target, *more, cwd=self.folder,
            status=status,
        )  # fmt: skip

    def revise(self, old, target, terms=LATER, *more, **options):
        self.terms("next.toml", terms)
        return run(
            "vendor", "revise", "--vendor", "vendor", "--license", old, "--terms", "next.toml", "-o", target, *more,
            cwd=self.folder, **options,
        )  # fmt: skip

    def device(self, command, *arguments, tpm=True, status=0):
        where = ["--home", self.home, *(["--tpm", self.tpm.tcti] if tpm else [])]
        return run("device", command, *where, *arguments, status=status, cwd=self.folder)


@pytest.fixture
def desk(tmp_path, hwlicense_tpms):
    return Desk(tmp_path, hwlicense_tpms())


def test_terms_change_in_the_field(desk):
    done = desk.revise("1.hwlic", "2.hwlic", OVER)
    assert "warning: this license ends before it is issued" in done.stderr
    assert "Made revision 2 of license" in done.stderr
    assert "Nothing in hardware ends revision 1" in done.stderr
    desk.device("check", "--open", "reader.hwpkg")
    desk.device("install", "2.hwlic")
    assert "LICENSE_EXPIRED" in desk.device("check", "--open", "reader.hwpkg", status=1).stderr
    assert "LICENSE_SUPERSEDED" in desk.device("install", "1.hwlic", status=1).stderr
    desk.revise("2.hwlic", "3.hwlic", LATER)
    desk.device("install", "3.hwlic")
    desk.device("check", "--open", "reader.hwpkg")
    assert "LICENSE_SUPERSEDED" in desk.device("install", "2.hwlic", status=1).stderr


def test_packages_are_added_without_the_first_ones_file(desk):
    desk.pack("second")
    (desk.folder / "reader.hwpkg").rename(desk.folder / "away.hwpkg")
    desk.revise("1.hwlic", "2.hwlic", LATER)  # takes no package at all
    desk.revise("2.hwlic", "3.hwlic", LATER, "--package", "away.hwpkg", "--package", "second.hwpkg")
    desk.device("install", "3.hwlic")
    for package in ("away.hwpkg", "second.hwpkg"):
        desk.device("check", "--open", package)


def test_a_new_request_takes_the_place_of_the_old(desk, hwlicense_tpms):
    desk.device("enroll", "--pcrs", "sha256:0,7", "-o", "again.hwreq")
    root = ["--ek-root", desk.tpm.ek_root]
    assert "EK_UNTRUSTED" in desk.revise("1.hwlic", "2.hwlic", LATER, "--request", "again.hwreq", status=1).stderr
    desk.revise("1.hwlic", "2.hwlic", LATER, "--request", "again.hwreq", *root)
    desk.device("install", "2.hwlic")
    desk.device("check", "--open", "reader.hwpkg")
    other = hwlicense_tpms()
    run("device", "enroll", "--home", "elsewhere", "--tpm", other.tcti, "-o", "other.hwreq", cwd=desk.folder)
    done = desk.revise(
        "2.hwlic", "3.hwlic", LATER, "--request", "other.hwreq", "--ek-root", other.ek_root, status=1
    )  # fmt: skip
    assert "WRONG_DEVICE" in done.stderr


def test_a_pin_is_not_lost_by_the_way(desk):
    write(desk.folder / "pin", b"4711\n")
    desk.revise("1.hwlic", "2.hwlic", LATER, "--pin-file", "pin")
    desk.device("install", "2.hwlic")
    desk.device("check", "--open", "--pin-file", "pin", "reader.hwpkg")
    assert "Revision 2 has a PIN" in desk.revise("2.hwlic", "3.hwlic", LATER, status=2).stderr
    assert "excludes" in desk.revise("2.hwlic", "3.hwlic", LATER, "--no-pin", "--pin-file", "pin", status=2).stderr
    desk.revise("2.hwlic", "3.hwlic", LATER, "--no-pin")
    desk.device("install", "3.hwlic")
    desk.device("check", "--open", "reader.hwpkg")


def test_what_is_not_to_be_revised(desk, tmp_path):
    desk.revise("1.hwlic", "2.hwlic")
    done = desk.revise("1.hwlic", "3.hwlic", status=1)
    assert "reason: LICENSE_SUPERSEDED" in done.stderr
    assert "-r2.hwlic" in done.stderr
    run("vendor", "init", "other", "--no-passphrase", cwd=desk.folder)
    done = run(
        "vendor", "revise", "--vendor", "other", "--license", "2.hwlic", "--terms", "next.toml", "-o", "3.hwlic",
        cwd=desk.folder, status=1,
    )  # fmt: skip
    assert "reason: WRONG_VENDOR" in done.stderr
    (issued,) = (desk.folder / "vendor" / "issued").glob("*-r2.hwlic")
    issued.with_suffix(".json").unlink()
    assert "An earlier release issued this license" in desk.revise("2.hwlic", "3.hwlic", status=2).stderr
    desk.revise(
        "2.hwlic", "3.hwlic", LATER, "--request", "board.hwreq", "--ek-root", desk.tpm.ek_root, "--package",
        "reader.hwpkg",
    )  # fmt: skip
    desk.device("install", "3.hwlic")
    desk.device("check", "--open", "reader.hwpkg")
    assert not (tmp_path / "4.hwlic").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 999, b"{}", "vendor.pub.json", "request"])
def test_what_is_no_license(desk, content):
    known = {"vendor.pub.json": desk.folder / "vendor" / "vendor.pub.json", "request": desk.folder / "board.hwreq"}
    raw = known[content].read_bytes() if isinstance(content, str) else content
    write(desk.folder / "bad.hwlic", raw)
    before = listing(desk.folder / "vendor")
    assert "reason: DOCUMENT_MALFORMED" in desk.revise("bad.hwlic", "2.hwlic", status=4).stderr
    done = run(
        "vendor", "reset-clock", "--vendor", "vendor", "--license", "bad.hwlic", "-o", "c.hwclk", cwd=desk.folder,
        status=4,
    )  # fmt: skip
    assert "bad.hwlic: " in done.stderr
    assert listing(desk.folder / "vendor") == before


def test_a_second_license_from_one_counted_request_is_pointed_out(desk):
    warned = "was made from a request with the same counter, which serves one"
    assert warned not in desk.issue("plain.hwlic").stderr, "it has no counter"
    desk.device("enroll", "--counted", "--pcrs", "sha256:0,7", "-o", "counted.hwreq")
    (desk.folder / "counted.hwreq").replace(desk.folder / "board.hwreq")
    desk.terms("terms.toml", WITH_PCRS + "[limits]\nopens = 3\n")
    assert warned not in desk.issue("first.hwlic").stderr
    assert warned not in desk.revise("first.hwlic", "first-2.hwlic").stderr, "a revision is meant to"
    second = desk.issue("second.hwlic").stderr
    assert second.count(warned) == 1
    assert "vendor revise" in second


def test_terms_that_say_something_in_vain(desk):
    desk.terms("terms.toml", odd := TERMS + "[limits]\ninferences = 5\nrates = ['10/hour']\n")
    for done in (desk.revise("1.hwlic", "2.hwlic", odd), desk.issue("other.hwlic")):
        assert "warning: limits.rates: '10/hour' never limits anything beside limits.inferences = 5." in done.stderr
    desk.terms("terms.toml", never := TERMS + "[validity]\nnot_after = 2020-01-01\ndays_from_first_use = 30\n")
    for done in (desk.revise("2.hwlic", "3.hwlic", never, status=2), desk.issue("no.hwlic", status=2)):
        assert "reason: TERM_INVALID" in done.stderr
        assert "hint: Mend validity.not_after; to end a license by a revision" in done.stderr
    assert not (desk.folder / "3.hwlic").exists()


def test_a_revision_that_cannot_be_written_is_not_recorded(desk):
    before = listing(desk.folder / "vendor")
    assert "FILE_EXISTS" in desk.revise("1.hwlic", "1.hwlic", status=2).stderr
    assert "FILE_ABSENT" in desk.revise("1.hwlic", "no/such/folder/2.hwlic", status=2).stderr
    assert "TERM_INVALID" in desk.revise("1.hwlic", "2.hwlic", TERMS + "[limits]\nopens = 1\n", status=2).stderr
    if not as_root():
        (desk.folder / "closed").mkdir(mode=0o500)
        assert "STORAGE" in desk.revise("1.hwlic", "closed/2.hwlic", status=5).stderr
    assert listing(desk.folder / "vendor") == before
    desk.revise("1.hwlic", "1.hwlic", LATER, "--force")
    assert listing(desk.folder / "vendor") != before


def test_of_many_at_once_one_makes_the_revision(desk):
    desk.terms("next.toml", LATER)
    command = [str(PROGRAM), "vendor", "revise", "--vendor", "vendor", "--license", "1.hwlic", "--terms", "next.toml"]
    started = [
        subprocess.Popen([*command, "-o", f"2-{n}.hwlic"], cwd=desk.folder, stderr=subprocess.PIPE, text=True)
        for n in range(6)
    ]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert sorted(status for _, status in ends) == [0, 1, 1, 1, 1, 1]
    assert all("reason: LICENSE_SUPERSEDED" in text for text, status in ends if status)
    assert len(list(desk.folder.glob("2-*.hwlic"))) == 1
    assert len(list((desk.folder / "vendor" / "issued").glob("*-r*.hwlic"))) == 2


def test_killed_at_any_moment_there_is_a_revision_or_none(desk):
    """What was recorded is whole, and can be revised; what was not is made anew."""
    desk.terms("next.toml", LATER)
    made, issued = 0, desk.folder / "vendor" / "issued"
    for delay in range(60, 660, 40):
        latest = max(issued.glob("*.hwlic"), key=lambda path: int(path.stem.rpartition("r")[2]))
        command = [str(PROGRAM), "vendor", "revise", "--vendor", "vendor", "--license", str(latest)]
        command += ["--terms", "next.toml"]
        process = subprocess.Popen(
            [*command, "-o", "next.hwlic", "--force"], cwd=desk.folder, stderr=subprocess.DEVNULL
        )  # fmt: skip
        try:
            process.wait(delay / 1000)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        now = len(list(issued.glob("*.hwlic")))
        assert now in (1 + made, 2 + made)
        made = now - 1
        assert len(list(issued.glob("*.json"))) in (now, now + 1)
    print(f"\n15 kills between 60 and 620 ms: {made} revisions recorded")  # noqa: T201
    latest = max(issued.glob("*.hwlic"), key=lambda path: int(path.stem.rpartition("r")[2]))
    desk.revise(latest, "last.hwlic", LATER)
    desk.device("install", "last.hwlic")
    desk.device("check", "--open", "reader.hwpkg")


def test_a_passphrase_is_asked_for(desk):
    write(desk.folder / "words", b"correct horse\n")
    run("vendor", "init", "locked", "--passphrase-file", "words", cwd=desk.folder)
    run(
        "vendor", "pack", "--vendor", "locked", "--name", "reader", "--version", "1", "-o", "locked.hwpkg",
        "weights.bin", "--passphrase-file", "words", cwd=desk.folder,
    )  # fmt: skip
    run(
        "vendor", "issue", "--vendor", "locked", "--request", "board.hwreq", "--package", "locked.hwpkg", "--terms",
        "terms.toml", "--ek-root", desk.tpm.ek_root, "-o", "l1.hwlic", "--passphrase-file", "words", cwd=desk.folder,
    )  # fmt: skip
    command = ["vendor", "revise", "--vendor", "locked", "--license", "l1.hwlic", "--terms", "terms.toml"]
    done = run(*command, "-o", "l2.hwlic", cwd=desk.folder, status=1, stdin=subprocess.DEVNULL)
    assert "PASSPHRASE_NEEDED" in done.stderr
    run(*command, "-o", "l2.hwlic", "--passphrase-file", "words", cwd=desk.folder)
    command = ["vendor", "reset-clock", "--vendor", "locked", "--license", "l1.hwlic", "-o", "l.hwclk"]
    assert "PASSPHRASE_NEEDED" in run(*command, cwd=desk.folder, status=1, stdin=subprocess.DEVNULL).stderr
    run(*command, "--passphrase-file", "words", cwd=desk.folder)


def test_the_vendors_side_needs_no_tpm_library(desk, tmp_path):
    """As in the other vendor commands: it runs where importing it fails."""
    (tmp_path / "blocked").mkdir()
    write(tmp_path / "blocked" / "tpm2_pytss.py", b"raise ImportError('blocked')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "blocked")}
    desk.revise("1.hwlic", "2.hwlic", LATER, env=environment)


def test_a_clock_reset_goes_to_the_device(desk):
    command = ["vendor", "reset-clock", "--vendor", "vendor", "--license"]
    done = run(*command, "1.hwlic", "-o", "first.hwclk", cwd=desk.folder)
    assert "Reset the clock of license" in done.stderr
    assert "FILE_EXISTS" in run(*command, "1.hwlic", "-o", "first.hwclk", cwd=desk.folder, status=2).stderr
    desk.issue("other.hwlic")
    run(*command, "other.hwlic", "-o", "other.hwclk", cwd=desk.folder)
    time.sleep(1.1)  # resets have a second's precision
    run(*command, "1.hwlic", "-o", "second.hwclk", cwd=desk.folder)
    assert "The clock reset of license" in desk.device("install", "second.hwclk", tpm=False).stderr
    desk.device("install", "second.hwclk", tpm=False)
    assert "CLOCK_SET_BACK" in desk.device("install", "first.hwclk", tpm=False, status=1).stderr
    assert "LICENSE_ABSENT" in desk.device("install", "other.hwclk", tpm=False, status=1).stderr
    raw = (desk.folder / "second.hwclk").read_bytes()
    write(desk.folder / "bad.hwclk", raw[:-9] + b"\n")
    assert "DOCUMENT_MALFORMED" in desk.device("install", "bad.hwclk", tpm=False, status=4).stderr
    run("vendor", "init", "stranger", "--no-passphrase", cwd=desk.folder)
    done = run(
        "vendor", "reset-clock", "--vendor", "stranger", "--license", "1.hwlic", "-o", "x.hwclk", cwd=desk.folder,
        status=1,
    )  # fmt: skip
    assert "WRONG_VENDOR" in done.stderr
    desk.device("check", "--open", "reader.hwpkg")
    shown = run("inspect", "--vendor", "vendor/vendor.pub.json", "second.hwclk", cwd=desk.folder).stdout
    assert "ClockReset (signed by" in shown


def test_what_a_license_encloses_goes_on_in_the_next_revision(desk):
    write(desk.folder / "seed", b"seed of one customer")
    desk.issue("own.hwlic", "--enclose", "seed")
    assert "20 bytes for the application" in run("inspect", "own.hwlic", cwd=desk.folder).stdout
    desk.revise("1.hwlic", "first.hwlic", LATER, "--enclose", "seed")
    desk.revise("first.hwlic", "kept.hwlic")
    enclosed = dict.fromkeys(("first.hwlic", "kept.hwlic"), b"seed of one customer")
    write(desk.folder / "seed", b"another")
    desk.revise("kept.hwlic", "changed.hwlic", LATER, "--enclose", "seed")
    enclosed["changed.hwlic"] = b"another"
    desk.revise("changed.hwlic", "without.hwlic", LATER, "--no-enclosure")
    enclosed["without.hwlic"] = b""
    vendor = (desk.folder / "vendor/vendor.pub.json").read_text()
    for name, content in enclosed.items():
        desk.device("install", name)
        opened = hwlicense.open(desk.folder / "reader.hwpkg", vendor=vendor, home=desk.home, tpm=desk.tpm.tcti)
        with opened as model:
            assert bytes(model.enclosure) == content, name


def test_wrong_enclosures(desk):
    write(desk.folder / "seed", b"x" * (64 * 1024 + 1))
    said = desk.issue("own.hwlic", "--enclose", "seed", status=2).stderr
    assert "65,537 bytes; a license encloses 1 to 65,536" in said
    assert "FILE_ABSENT" in desk.issue("own.hwlic", "--enclose", "none", status=2).stderr
    both = desk.revise("1.hwlic", "2.hwlic", LATER, "--enclose", "seed", "--no-enclosure", status=2)
    assert "exclude each other" in both.stderr
    assert not (desk.folder / "own.hwlic").exists()


def test_status_and_doctor_say_what_the_application_is_held_to(desk):
    held = f'{WITH_PCRS}[guard]\nrefuse = ["tracing"]\ninterval = "1m"\n[application.files]\na = "{"0" * 64}"\n'
    write(desk.folder / "seed", b"seed of this customer")
    desk.revise("1.hwlic", "2.hwlic", held, "--enclose", "seed")
    desk.device("install", "2.hwlic")
    (entry,) = json.loads(desk.device("status", "--json").stdout)["licenses"]
    assert (entry["guard"], entry["guard_interval"], entry["enclosed_bytes"]) == (["tracing"], 60, 21)
    assert entry["application"] == {"files": 1, "required": 0}
    status = desk.device("status").stdout
    assert re.search(r"^guard +tracing$", status, re.MULTILINE)
    assert re.search(r"^guard_interval +1 min$", status, re.MULTILINE)
    doctor = desk.device("doctor").stdout
    assert "refuses a process with findings of tracing and opens where nothing is loaded but the 1 measured" in doctor
