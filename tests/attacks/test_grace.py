"""The grace of absence: paid for before it is used, once by all processes, and refilled by nothing but presence."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from hwlicense.core.documents import ANSWER_LIMIT, Presence
from hwlicense.core.errors import AbsentError, StorageError
from hwlicense.core.secret import Secret
from hwlicense.device import grace
from hwlicense.device.opening import utc_today
from hwlicense.device.records import CODE
from hwlicense.device.reporting import status
from tests.forging import flipped
from tests.pieces import PIN, Bench, DonglePiece, Kit, TokenPiece
from tests.refusals import refusal, until
from tests.world import MEMBERS, TERMS, everything

INTERVAL, GRACE = 1.0, 60.0
STEP = 4.0  # seconds of such a grace that are paid for at a time, at the most


def terms(seconds):
    return f'{TERMS}[presence]\ninterval = "1s"\ngrace = "{seconds}s"\nanswers = 60\n'


@pytest.fixture
def bench():
    with Bench() as own:
        yield own
        until(lambda: own.reader.open_sessions == 0, 5)  # what was killed ends a moment later


@pytest.fixture(params=["dongle"])
def kit(request, bench, vendor, tmp_path):
    piece = DonglePiece(bench) if request.param == "dongle" else TokenPiece(bench)
    made = Kit(bench, tmp_path / "home", [piece])
    made.license(vendor, terms(60))
    return made


def account_of(kit):
    (folder,) = (kit.home.path / "licenses").iterdir()
    return folder / "presence"


def used(kit):
    """By the account's own word."""
    (entry,), _ = status(kit.home, utc_today())
    return GRACE - entry["grace_left"]


def charge(model, seconds):
    """As an absence would: without waiting for it."""
    now = time.monotonic()
    assert model._presence._account.bridge(now, seconds) == pytest.approx(now + seconds, abs=0.01)


def left(kit, vendor):
    """What a model that is opened now has of it."""
    with kit.open(vendor) as model:
        return model.standing().grace_left


# ---- one absence after another ------------------------------------------------------------------------------


def test_plugging_in_again_and_opening_again_refill_nothing(bench, vendor, tmp_path):
    kit = Kit(bench, tmp_path / "home", [DonglePiece(bench)])
    kit.license(vendor, terms(2))
    dongle = kit.pieces[0]
    with kit.open(vendor) as model:
        dongle.pull()
        until(lambda: not model.standing().present, 2)
        until(lambda: model.standing().grace_left < 2, 1)
        with model.session():  # bridged: sessions start as before
            assert everything(model) == MEMBERS
        assert until(lambda: not model.standing(), 4) > 1
        until(lambda: not any(model._keys.memory.view), 1)
        dongle.plug()
        until(lambda: model.standing().may_start, 5)
        assert model.standing().grace_left == 0
        dongle.pull()
        assert until(lambda: not model.standing(), 3) < INTERVAL + 0.5  # nothing bridges it any more
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass
    dongle.plug()
    assert left(kit, vendor) == 0
    (entry,), _ = status(kit.home, utc_today())
    assert entry["grace_left"] == 0
    with kit.open(vendor) as model:
        dongle.pull()
        assert until(lambda: not model.standing(), 3) < INTERVAL + 0.5


def test_what_was_used_stays_used(vendor, kit):
    """Reopened, reinstalled, and by presence where the license gives nothing back."""
    with kit.open(vendor) as model:
        charge(model, 20)
        charge(model, 25)  # of which 20 are paid for
    assert left(kit, vendor) == pytest.approx(GRACE - 25, abs=0.1)
    raw = account_of(kit).with_name("license.hwlic").read_bytes()
    kit.install(raw, vendor)
    assert left(kit, vendor) == pytest.approx(GRACE - 25, abs=0.1)
    with kit.open(vendor) as model:
        until(lambda: model._presence.proofs >= 2)
    assert left(kit, vendor) == pytest.approx(GRACE - 25, abs=0.1)


def test_looking_costs_nothing_and_standing_shows_what_is_left(vendor, kit):
    with kit.open(vendor) as model:
        for _ in range(500):
            assert model.standing().grace_left == GRACE
    assert used(kit) == 0


# ---- accounts that were edited ------------------------------------------------------------------------------


def account(folder, regain=None):
    """As a process that starts now has it."""
    made = grace.PresenceAccount(folder, Presence(1, 60, regain, repeat=True), Secret(bytearray(b"k" * 32)))
    folder.mkdir(exist_ok=True)
    return made


def test_no_byte_of_an_account_may_differ(tmp_path):
    first = account(tmp_path)
    first.prepare()
    first.bridge(time.monotonic(), 20)
    path = tmp_path / "presence"
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in (1, 0x20):
            path.write_bytes(flipped(good, place, bit))
            assert account(tmp_path).grace_left == 0, (place, bit)
            assert account(tmp_path).proofs >= ANSWER_LIMIT
    path.write_bytes(good)
    assert account(tmp_path).grace_left == pytest.approx(40, abs=0.1)
    assert account(tmp_path).proofs == 0


def test_presence_gives_the_grace_back_to_all_processes(tmp_path, monkeypatch):
    """Each credits the same seconds, and none takes back what another was given."""
    clock = SimpleNamespace(now=time.monotonic())
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(grace, "time", clock)
    one, two = account(tmp_path, 60), account(tmp_path, 60)
    began = clock.now
    one.prepare()
    one.bridge(began, 30)
    assert one.grace_left == two.grace_left == pytest.approx(30, abs=0.1)
    for _ in range(3):
        clock.now += 20
        one.credit(clock.now - 10, clock.now)
        two.credit(clock.now - 10, clock.now)
    for each in (one, two, account(tmp_path, 60)):
        assert each.grace_left == pytest.approx(60, abs=0.5)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[" * 4000, b"\xff" * 200, b"x" * 5000, bytes(CODE)],
    ids=["empty", "object", "null", "nested", "binary", "large", "seal alone"],
)
def test_a_forged_account_is_spent_for_good(vendor, kit, content):
    left(kit, vendor)
    account_of(kit).write_bytes(content)
    assert left(kit, vendor) == 0
    assert left(kit, vendor) == 0
    with kit.open(vendor) as model:
        kit.pieces[0].pull()
        assert until(lambda: not model.standing(), 3) < INTERVAL + 0.5


def test_entries_and_seals_of_two_accounts_exchanged(vendor, kit):
    """The entries of a fresh account under the seal of a spent one, and the other way round."""
    left(kit, vendor)
    fresh = account_of(kit).read_bytes()
    with kit.open(vendor) as model:
        charge(model, 50)
        spent = account_of(kit).read_bytes()
    for entries, seal in ((fresh, spent), (spent, fresh)):
        account_of(kit).write_bytes(entries[:-CODE] + seal[-CODE:])
        assert left(kit, vendor) == 0


def test_an_account_of_another_license_is_spent(vendor, bench, kit, tmp_path):
    """Of the same dongle, vendor and terms: its key comes from another license secret."""
    other = Kit(bench, tmp_path / "other", kit.pieces)
    other.license(vendor, terms(60))
    assert left(other, vendor) == GRACE
    shutil.copy(account_of(other), account_of(kit))
    assert left(kit, vendor) == 0


def test_an_older_copy_of_an_account_brings_its_grace_back(vendor, kit, tmp_path):
    """As documented: it is anchored in no hardware."""
    left(kit, vendor)
    shutil.copy(account_of(kit), tmp_path / "copy")
    with kit.open(vendor) as model:
        charge(model, 50)
    assert left(kit, vendor) == pytest.approx(10, abs=0.1)
    shutil.copy(tmp_path / "copy", account_of(kit))
    assert left(kit, vendor) == GRACE
    account_of(kit).unlink()
    assert left(kit, vendor) == GRACE


# ---- several processes --------------------------------------------------------------------------------------

OPENED = """
import sys, time
import hwlicense
package, vendor, home, token, pin = sys.argv[1:]
model = hwlicense.open(package, vendor=open(vendor).read(), home=home, token=token, pin=lambda _prompt: pin)
print("open", model.standing().grace_left, flush=True)
while model.standing().present:
    time.sleep(0.01)
while model.standing().grace_left == 60:
    time.sleep(0.01)
assert model.standing(), model.standing()
print("bridged", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def token(bench, vendor, tmp_path):
    made = Kit(bench, tmp_path / "home", [TokenPiece(bench)])
    made.license(vendor, terms(60))
    return made


@contextmanager
def application(kit, vendor):
    public = vendor.folder / "vendor" / "vendor.pub.json"
    command = [sys.executable, "-c", OPENED, vendor.package, public, kit.home.path, kit.token, PIN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            word, shown = child.stdout.readline().split()
            assert word == "open"
            yield child, float(shown)
        finally:
            child.stdin.close()
            child.kill()


def bridged(child):
    assert child.stdout.readline() == "bridged\n"


def test_killed_in_an_absence_and_started_again(vendor, token):
    """What was paid for is gone, whether it was used or not; a machine that is started again has no more of it."""
    with application(token, vendor) as (child, shown):
        assert shown == GRACE
        began = time.monotonic()
        token.pieces[0].pull()
        bridged(child)
        time.sleep(0.3)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        took = time.monotonic() - began
    spent = used(token)
    assert took - INTERVAL < spent < took + STEP
    token.pieces[0].plug()
    with application(token, vendor) as (_, shown):
        assert shown == pytest.approx(GRACE - spent, abs=0.1)


def test_two_processes_pay_once_for_one_absence(vendor, token):
    with application(token, vendor) as (one, _), application(token, vendor) as (two, _):
        began = time.monotonic()
        token.pieces[0].pull()
        for child in (one, two):
            bridged(child)
        time.sleep(0.3)
        took = time.monotonic() - began
    assert took - INTERVAL < used(token) < took + STEP


def test_a_loose_contact_costs_no_more_than_the_seconds_that_it_takes(vendor, kit):
    """Away, here and away again within seconds that are paid for."""
    with kit.open(vendor) as model:
        began = time.monotonic()
        for _ in range(5):
            kit.pieces[0].pull()
            until(lambda: not model.standing().present and model.standing().grace_left < GRACE, 3)
            kit.pieces[0].plug()
            until(lambda: model.standing().present, 5)
    assert used(kit) < time.monotonic() - began + STEP


def test_a_child_forked_in_an_absence_shares_the_grace(vendor, kit):
    with kit.open(vendor) as model:
        began = time.monotonic()
        kit.pieces[0].pull()
        until(lambda: model.standing().grace_left < GRACE, 3)
        child = os.fork()
        if not child:
            code = 1
            try:
                with model.session():
                    code = int(everything(model) != MEMBERS)
                time.sleep(0.3)
                if not model.standing() or model.standing().present:
                    code = 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert model.standing()
    assert used(kit) < time.monotonic() - began + STEP


# ---- where nothing can be written ---------------------------------------------------------------------------


def without_privileges():
    """Permissions hold for root, too, without its capabilities (capset(2), version 3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(header, nothing) == 0


@pytest.mark.parametrize("where", ["home", "state"])
def test_a_license_with_a_grace_does_not_open_where_nothing_can_be_written(vendor, kit, tmp_path, where):
    """Else what is used would be forgotten. Nothing is granted, and nothing opens half."""
    state = tmp_path / "state"
    state.mkdir()
    folders = [kit.home.path, *kit.home.path.rglob("*")] if where == "home" else [state]
    for folder in folders:
        if folder.is_dir():
            folder.chmod(0o500)
    child = os.fork()
    if not child:
        code = 1
        try:
            without_privileges()
            with refusal_of_storage():
                kit.open(vendor, **({} if where == "home" else {"state": state}))
            code = 0
        finally:
            os._exit(code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        for folder in folders:
            if folder.is_dir():
                folder.chmod(0o700)
    if where == "home":
        left(kit, vendor)


@contextmanager
def refusal_of_storage():
    with pytest.raises(StorageError) as caught:
        yield
    assert caught.value.reason == "STORAGE"
    assert caught.value.exit_status == 5
    assert caught.value.hint


def test_a_grace_that_cannot_be_written_down_later_is_not_granted(vendor, kit):
    """The disk is full, or the folder went away, after the opening."""
    with kit.open(vendor) as model:
        licenses = kit.home.path / "licenses"
        licenses.rename(kit.home.path / "elsewhere")
        licenses.write_text("in the way")
        kit.pieces[0].pull()
        assert until(lambda: not model.standing(), 4) < INTERVAL + 1.5
        with refusal(AbsentError, "DONGLE_ABSENT"), model.session():
            pass
