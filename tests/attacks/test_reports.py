"""What `device status`, `doctor` and `check` say of limits: no more than is known, whatever lies there."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import signal
import subprocess

import pytest

from hwlicense.core import calendar
from hwlicense.device import clock, diagnosing, recovering
from hwlicense.device.reporting import status
from tests.counted import Customer, limited
from tests.world import PROGRAM, TERMS, licensed, run

METERED = 'inferences = 1000\nrates = ["500/hour"]\n'


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as tap:
        yield Customer(own_vendor, tmp_path, tpm, tap)


def asked(customer, *command, status=0):
    at = "--home", customer.device.home.path
    return run("device", *command, *at, status=status, env={"HWLICENSE_TPM": customer.wire.tcti})


def shown(customer, *more):
    """The license's entry, its limits by name, and the lines of text."""
    report = json.loads(asked(customer, "status", "--json", *more).stdout)
    (entry,) = report["licenses"]
    text = {line[:17].strip(): line[17:].strip() for line in asked(customer, "status", *more).stdout.splitlines()}
    return entry, {row["limit"]: row for row in entry.get("limits", [])}, text, report["problems"]


def refused(customer, code):
    """That both commands say so, for people and for machines."""
    entry, _, text, _ = shown(customer)
    assert entry["state"] == text["state"] == f"refused: {code}"
    assert entry["refusal"]["reason"] == code
    assert entry["refusal"]["what"] in asked(customer, "status").stdout
    assert f": refused: {code}. " in asked(customer, "doctor", status=3).stdout
    findings = json.loads(asked(customer, "doctor", "--json", status=3).stdout)
    (finding,) = [f for f in findings if f"refused: {code}" in f["text"]]
    assert (finding["state"], finding["subject"]) == ("missing", "license")
    assert finding["mend"]


def folder(customer):
    return recovering.account_folder(customer.device.home.state, customer.license.grant)


# ---- the account's own word ----


def test_an_account_that_nobody_has_checked_is_said_to_be_so(customer):
    customer.sell(limited(9, extra=METERED))
    with customer.device.open(customer.vendor) as model, model.session(100):
        model.spend(100)
    entry, limits, _, _ = shown(customer)
    assert entry["account"] == "unverified"
    assert (limits["inferences"]["left"], limits["inferences"]["verified"]) == (900, False)
    assert (limits["opens"]["left"], limits["opens"]["verified"]) == (8, True)
    out = asked(customer, "status").stdout
    assert "its own word, checked when the license is opened" in out
    assert "900 of 1,000 left by the account; enforced by: runtime, anchored in the TPM" in out
    assert "8 of 9 left; enforced by: TPM" in out


def test_an_account_that_is_gone_leaves_nothing_to_tell(customer):
    customer.sell(limited(9, extra=METERED))
    assert shown(customer)[1]["inferences"]["left"] == 1000, "by the TPM's word it was never opened"
    customer.open()
    shutil.rmtree(folder(customer))
    entry, limits, _, _ = shown(customer)
    assert entry["account"] == "missing"
    assert [limits[name]["left"] for name in ("inferences", "500/hour")] == [None, None]
    out = asked(customer, "status").stdout
    assert "though the TPM has counted opens" in out
    assert "unknown, of 1,000: see account; enforced by: runtime" in out


def test_another_state_folder_than_the_one_in_use(customer, tmp_path):
    customer.sell(limited(0, require="anchor = true\n", extra=METERED + "[validity]\ndays_from_first_use = 9\n"))
    customer.open()
    entry, limits, _, _ = shown(customer, "--state", tmp_path / "elsewhere")
    assert entry["account"] == "absent"
    assert entry["account_folder"].startswith(str(tmp_path / "elsewhere"))
    assert {row["left"] for row in limits.values()} == {None}
    text = asked(customer, "status", "--state", tmp_path / "elsewhere").stdout
    assert f"none in {tmp_path / 'elsewhere'}" in text
    assert shown(customer)[1]["days_from_first_use"]["left"] == 9


def test_what_may_have_been_spent_is_not_said_to_be_lost(customer):
    customer.sell(limited(9, extra=METERED))
    customer.open()
    entry, _, _, _ = shown(customer)
    assert entry["charged_in_doubt"] == 0
    assert "lost" not in asked(customer, "status").stdout


def test_what_a_killed_process_left_open_is_said_to_be_charged(customer):
    customer.sell(limited(9, extra=METERED))
    pid = os.fork()
    if not pid:
        model = customer.device.open(customer.vendor)
        model.spend(20)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    entry, limits, text, _ = shown(customer)
    assert 0 < entry["uncharged"]["now"] <= entry["uncharged"]["most"] <= limits["inferences"]["left"]
    assert "it was not closed: opening it now charges about " in text["uncharged"]
    customer.open()
    after, then, _, _ = shown(customer)
    assert "uncharged" not in after
    assert limits["inferences"]["left"] - then["inferences"]["left"] >= entry["uncharged"]["now"]


@pytest.mark.parametrize("seed", range(4))
def test_numbers_that_nobody_wrote(customer, seed):
    customer.sell(limited(0, require="anchor = true\n", extra=METERED + "[monitor.regularity]\naction = 'deny'\n"))
    customer.open()
    made_up = random.Random(seed)
    raw = bytearray((folder(customer) / "ledger").read_bytes())
    heads = [at for at in range(0, len(raw), 4096) if raw[at : at + 8] == b"hwledger"]
    for at in heads:
        raw[at + 48 : at + 600] = made_up.randbytes(552) if seed else b"\xff" * 551 + b"\x7f"
    (folder(customer) / "ledger").write_bytes(raw)
    left = shown(customer)[1]["inferences"]["left"]
    assert left is None or 0 <= left <= 1000
    asked(customer, "doctor", status=None)


# ---- a license that cannot be used ----


def test_opens_that_are_spent(customer):
    customer.sell(limited(1))
    assert shown(customer)[0]["state"] == "installed"
    customer.open()
    refused(customer, "OPENS_EXHAUSTED")


def test_hours_that_are_over(customer):
    customer.sell(limited(0, hours=1))
    with customer.root() as root:
        root.e.clock_set(customer.binding.deadline)
    refused(customer, "HOURS_EXHAUSTED")


def test_inferences_that_are_used_up(customer):
    customer.sell(limited(9, extra="inferences = 10\n"))
    with customer.device.open(customer.vendor) as model:
        for _ in range(10):
            model.spend()
    refused(customer, "INFERENCES_EXHAUSTED")
    assert "opening spends one" in asked(customer, "check", "--open", customer.vendor.package).stderr, "it does open"


@pytest.mark.parametrize(("opened", "then", "code"), [(9, 6, "CLOCK_SET_BACK"), (0, 40, "LICENSE_EXPIRED")])
def test_clocks_and_days(customer, monkeypatch, opened, then, code):
    customer.sell(limited(9, extra="[validity]\ndays_from_first_use = 30\n"))
    now = clock.wall()
    monkeypatch.setattr(clock, "wall", lambda: now + opened * 86400)
    customer.open()
    monkeypatch.setattr(clock, "wall", lambda: now + then * 86400)
    home = customer.device.home
    (entry,), problems = status(home, calendar.day(clock.wall()), customer.device.connect)
    assert (entry["state"], problems) == (f"refused: {code}", [])
    (finding,) = [f for f in diagnosing.examine(home, customer.wire.tcti) if f.subject == "license"]
    assert (finding.state, f"refused: {code}. " in finding.text) == ("missing", True)


# ---- what the doctor says of use ----


def found(customer, status=0):
    """What the doctor finds about use, with what mends it."""
    findings = json.loads(asked(customer, "doctor", "--json", status=status).stdout)
    return [(each["text"], each["mend"]) for each in findings if each["subject"].startswith("use of ")]


def test_the_doctor_says_nothing_where_there_is_nothing_to_say(customer):
    customer.sell(limited(9, extra=METERED))
    assert found(customer) == []
    customer.open()
    assert found(customer) == []


def test_the_doctor_says_that_little_is_left(customer):
    customer.sell(limited(3, extra="inferences = 100\n[validity]\ndays_from_first_use = 3\n"))
    with customer.device.open(customer.vendor) as model, model.session(91):
        model.spend(91)
    customer.open()
    ((text, mend),) = found(customer)
    assert "inferences: 9 of 100 left" in text
    assert "opens" not in text
    assert "revision" in mend


def test_the_doctor_says_that_an_account_is_gone(customer):
    customer.sell(limited(9, extra=METERED))
    customer.open()
    shutil.rmtree(folder(customer))
    ((text, mend),) = found(customer)
    assert str(folder(customer)) in text
    assert "charges all that is left" in text
    assert "--state" in mend


def test_the_doctor_says_that_an_account_cannot_be_read(customer):
    customer.sell(limited(9, extra=METERED))
    customer.open()
    (folder(customer) / "ledger").write_bytes(b"damage" * 2000)
    ((text, mend),) = found(customer)
    assert "cannot be read" in text
    assert mend


def test_the_doctor_says_that_a_license_was_left_open(customer):
    customer.sell(limited(9, extra=METERED))
    pid = os.fork()
    if not pid:
        model = customer.device.open(customer.vendor)
        model.spend(20)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    ((text, mend),) = found(customer)
    assert "it was not closed: opening it now charges about " in text
    assert "Open it soon" in mend


def test_the_doctor_says_that_nothing_anchors_an_account(customer):
    licensed(customer.vendor, customer.device, TERMS + "[limits]\ninferences = 100\n")
    ((text, mend),) = found(customer)
    assert "not anchored" in text
    assert "--counted" in mend


# ---- without the TPM ----


def test_a_tpm_that_was_not_reached_is_why_nothing_is_known(customer, tmp_path):
    customer.sell(limited(9, extra=METERED))
    at, away = ("--home", customer.device.home.path), {"HWLICENSE_TPM": f"swtpm:path={tmp_path / 'nowhere'}"}
    (entry,) = json.loads(run("device", "status", "--json", *at, env=away).stdout)["licenses"]
    assert entry["state"] == "installed"
    assert entry["unreached"]["reason"].startswith("TPM_")
    assert entry["unreached"]["hint"]
    shown = run("device", "status", *at, env=away)
    assert "the TPM was not reached, so it is not known whether it opens" in shown.stdout
    assert entry["unreached"]["hint"] in shown.stdout
    assert "unknown, of 9: the TPM was not reached; enforced by: TPM" in shown.stdout
    assert "days_left" not in shown.stdout, "it has no end"
    assert f"hint: {entry['unreached']['hint']}" in shown.stderr
    told = run("device", "doctor", *at, env=away, status=3).stdout
    assert "installed, as far as is known without the TPM" in told


def test_what_a_monitor_found_is_said_in_words(customer):
    customer.sell(limited(9, extra=METERED + "[monitor.regularity]\n"))
    assert shown(customer)[2]["monitor"] == "nothing found"
    customer.open()
    shutil.rmtree(folder(customer))
    entry, _, text, _ = shown(customer)
    assert entry["monitor"]["in_force"] is None
    assert text["monitor"] == "unknown: see account"


def test_what_was_charged_has_separators(customer):
    customer.sell(limited(9, extra="inferences = 2000\n"))
    customer.open()
    shutil.rmtree(folder(customer))
    customer.open()
    entry, _, text, _ = shown(customer)
    assert entry["charged_in_doubt"] == 2000
    assert text["charged_in_doubt"] == "2,000"


def test_a_home_on_another_board_is_refused_not_unreached(customer, hwlicense_tpms):
    customer.sell(limited(9, extra=METERED))
    at, other = ("--home", customer.device.home.path), {"HWLICENSE_TPM": hwlicense_tpms().tcti}
    (entry,) = json.loads(run("device", "status", "--json", *at, env=other).stdout)["licenses"]
    assert entry["state"] == "refused: WRONG_DEVICE"
    assert entry["refusal"]["reason"] == "WRONG_DEVICE"
    assert "unreached" not in entry
    out = run("device", "status", *at, env=other).stdout
    assert "not reached" not in out
    assert "unknown, of 9; enforced by: TPM" in out
    told = run("device", "doctor", *at, env=other, status=3).stdout
    assert "missing license: " in told
    assert ": refused: WRONG_DEVICE. " in told


def test_what_lets_the_device_count_is_damaged_not_unreached(customer):
    customer.sell(limited(9))
    next((customer.device.home.path / "counters").iterdir()).write_bytes(b"short")
    entry, _, _, _ = shown(customer)
    assert entry["state"] == "damaged: HOME_DAMAGED"
    assert "unreached" not in entry


# ---- what opening costs ----


def test_what_an_opening_costs_is_said_where_it_costs_it(customer):
    customer.sell(limited(2))
    command = "check", "--open", customer.vendor.package
    assert "The license has 2 of 2 opens left, and opening spends one." in asked(customer, *command).stderr
    assert "spends" not in asked(customer, "check", customer.vendor.package).stderr
    assert "The license has 1 of 2 opens left" in asked(customer, *command).stderr
    assert "spends" not in asked(customer, *command, status=1).stderr


# ---- what lies in the way ----


def test_what_lies_in_an_instances_place_is_reported_and_the_rest_is_told(customer, tmp_path):
    customer.sell(limited(0, require="revocable = true\n", extra="instances = 3\n"))
    place = folder(customer) / "instances"
    place.mkdir(parents=True)
    for lies_there in ((place / "0").mkdir, lambda: (place / "0").symlink_to(tmp_path / "counted")):
        (tmp_path / "counted").touch()
        lies_there()
        entry, limits, _, problems = shown(customer)
        assert entry["state"] == "installed"
        assert limits["instances"]["left"] is None
        assert str(place / "0") in problems[0]["what"]
        assert str(place / "0") in asked(customer, "doctor", status=3).stdout
        (place / "0").rmdir() if (place / "0").is_dir() else (place / "0").unlink()
    assert shown(customer)[1]["instances"]["left"] == 3


def watched(customer, *more):
    """Three pictures of `status --watch`, as lines."""
    words = [PROGRAM, "device", "status", "--home", customer.device.home.path, "--watch", "0.2", *more]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"TZ": "EST5"}) as watching:
        lines: list[str] = []
        try:
            while sum(line.startswith(("{", "license ")) for line in lines) < 3:
                lines.append(watching.stdout.readline())
        finally:
            watching.terminate()
    return lines


def test_watching_gives_a_line_of_json_each_time(customer):
    customer.sell(limited(0, require="revocable = true\n"))
    reports = [json.loads(line) for line in watched(customer, "--json")]
    assert [report["licenses"][0]["state"] for report in reports] == ["installed"] * 3
    assert now_is(datetime.datetime.fromisoformat(reports[-1]["time"]))


def test_watching_says_the_local_time_of_each_picture(customer):
    customer.sell(limited(0, require="revocable = true\n"))
    times = [line for line in watched(customer) if line.endswith(" EST\n")]
    assert len(times) == 3
    assert now_is(datetime.datetime.fromisoformat(times[-1].replace(" EST\n", "-05:00")))


def now_is(time):
    return abs(time - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=1)
