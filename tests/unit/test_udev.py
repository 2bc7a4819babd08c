"""The files of udev/: read as strictly as udev and polkit read them, and installed below a folder."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from hwlicense.core import dongle
from hwlicense.device import plugged

FOLDER = Path(__file__).resolve().parents[2] / "udev"
RULES = FOLDER / "69-hwlicense.rules"
POLKIT = FOLDER / "50-hwlicense-pcsc.rules"

# udev(7), as far as it is used here: matches take == and !=, assignments the others
MATCHES = re.compile(r"ACTION|KERNEL|SUBSYSTEM|ATTR\{\w+\}|ENV\{\w+\}")
ASSIGNMENTS = {"TAG": {"+="}, "GROUP": {"="}, "MODE": {"="}, "GOTO": {"="}, "LABEL": {"="}}
TOKEN = re.compile(r'([A-Z]+(?:\{\w+\})?)(==|!=|\+=|:=|-=|=)"([^"\\]*)"')


def parsed(text):
    """Rules as lists of key, operator and value. Anything that is not one is an error."""
    rules = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line or line.startswith("#"):
            continue
        rule, place = [], 0
        while place < len(line):
            token = TOKEN.match(line, place)
            assert token, line[place:]
            rule.append(token.groups())
            place = token.end()
            separator = re.compile(r", *|$").match(line, place)
            assert separator, line[place:]
            place = separator.end()
        rules.append(rule)
    return rules


def wrong(rules):
    for rule in rules:
        for key, operator, value in rule:
            known = {"==", "!="} if MATCHES.fullmatch(key) else ASSIGNMENTS.get(key, set())
            if operator not in known or not value:
                yield key, operator, value
    labels = [value for rule in rules for key, _, value in rule if key == "LABEL"]
    yield from (value for rule in rules for key, _, value in rule if key == "GOTO" and labels.count(value) != 1)


def outcome(rules, facts):
    """What udev would come to for a device with these facts."""
    result, target = {}, None
    for rule in rules:
        label = next((value for key, _, value in rule if key == "LABEL"), None)
        if target and label != target:
            continue
        target = None
        matches = [(key, op, value) for key, op, value in rule if MATCHES.fullmatch(key)]
        if all((_like(facts.get(key, ""), value)) == (op == "==") for key, op, value in matches):
            for key, _, value in rule:
                if key == "GOTO":
                    target = value
                elif key in {"TAG", "GROUP", "MODE"}:
                    result[key] = value
    return result


def _like(found, pattern):
    return any(
        found == each or ("*" in each and re.fullmatch(each.replace("*", ".*"), found)) for each in pattern.split("|")
    )


def usb(product, **facts):
    vendor, _, number = product.partition(":")
    device = {"ACTION": "add", "SUBSYSTEM": "usb", "ENV{DEVTYPE}": "usb_device"}
    return {**device, "ATTR{idVendor}": vendor, "ATTR{idProduct}": number, **facts}


def test_every_key_and_operator_is_one_of_udev():
    rules = parsed(RULES.read_text())
    assert len(rules) == 7
    assert list(wrong(rules)) == []


@pytest.mark.parametrize(
    "line",
    ['GROUP=="tss"', 'KERNEL="tpmrm0"', 'TAG="uaccess"', 'MOD="0660"', 'GOTO="nowhere"', 'MODE=""', 'LABEL=="x"'],
)
def test_the_reading_is_strict(line):
    assert list(wrong(parsed(line)))


@pytest.mark.parametrize("line", ["MODE=0660", 'MODE="0660" GROUP="tss"', 'MODE="0660', 'mode="0660"', "x"])
def test_what_is_no_rule_is_refused(line):
    with pytest.raises(AssertionError):
        parsed(line)


def test_the_file_comes_before_the_rule_that_acts_on_its_tag():
    assert RULES.name == plugged.RULES
    assert "60-tpm-udev.rules" < RULES.name < "73-seat-late.rules"
    assert "uaccess" in {value for rule in parsed(RULES.read_text()) for key, _, value in rule if key == "TAG"}


def test_exactly_the_supported_dongles_are_opened_to_the_seat_and_the_group():
    rules = parsed(RULES.read_text())
    granted = {"TAG": "uaccess", "GROUP": plugged.GROUP, "MODE": "0660"}
    vendors = {product.partition(":")[0] for product in dongle.PRODUCTS}
    everything = {f"{vendor}:{number:04x}" for vendor in vendors for number in range(0x10000)}
    opened = {product for product in everything if outcome(rules, usb(product))}
    assert opened == set(dongle.PRODUCTS)
    assert all(outcome(rules, usb(product)) == granted for product in opened)
    assert outcome(rules, usb("1050:0407", ACTION="change")) == granted
    for other in ({"ACTION": "remove"}, {"SUBSYSTEM": "hidraw"}, {"ENV{DEVTYPE}": "usb_interface"}):
        assert outcome(rules, usb("1050:0407", **other)) == {}


def test_of_tpms_only_the_resource_manager_is_opened_to_the_group():
    rules = parsed(RULES.read_text())
    for kernel, subsystem in (("tpmrm0", "tpmrm"), ("tpmrm12", "tpmrm")):
        found = outcome(rules, {"ACTION": "add", "KERNEL": kernel, "SUBSYSTEM": subsystem})
        assert found == {"GROUP": "tss", "MODE": "0660"}
    assert outcome(rules, {"ACTION": "add", "KERNEL": "tpm0", "SUBSYSTEM": "tpm"}) == {}


def test_the_group_is_made_by_sysusers():
    lines = [line for line in (FOLDER / "hwlicense.conf").read_text().splitlines() if not line.startswith("#")]
    assert lines == [f"g {plugged.GROUP} -"]


def test_the_polkit_rule_lets_one_group_do_two_things():
    code = re.sub(r"//.*", "", POLKIT.read_text())
    assert set(re.findall(r'action\.id === "([^"]+)"', code)) == {
        "org.debian.pcsc-lite.access_pcsc",
        "org.debian.pcsc-lite.access_card",
    }
    assert re.findall(r'isInGroup\("([^"]+)"\)', code) == [plugged.GROUP]
    assert re.findall(r"polkit\.Result\.(\w+)", code) == ["YES", "NOT_HANDLED"]
    assert code.count("{") == code.count("}")
    assert code.count("(") == code.count(")")


# ---- installing ------------------------------------------------------------------------------------------

STAGED = ["usr/lib/sysusers.d/hwlicense.conf", "usr/lib/udev/rules.d/69-hwlicense.rules"]
WITH_PCSC = [*STAGED, "usr/share/polkit-1/rules.d/50-hwlicense-pcsc.rules"]


def install(stage, *options, status=0):
    environment = {**os.environ, "DESTDIR": str(stage)}
    done = subprocess.run(
        [FOLDER / "install", *options], env=environment, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == status, done.stderr
    return done


def files(stage):
    return sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file())


def test_installing_twice_and_taking_away_twice(tmp_path):
    stage = tmp_path / "with spaces"
    for _ in range(2):
        install(stage)
        assert files(stage) == STAGED
    for _ in range(2):
        install(stage, "--pcsc")
        assert files(stage) == WITH_PCSC
    for name in WITH_PCSC:
        assert (stage / name).read_bytes() == (FOLDER / Path(name).name).read_bytes()
        assert stat.S_IMODE((stage / name).stat().st_mode) == 0o644
    for _ in range(2):
        install(stage, "--uninstall")
        assert files(stage) == []


def test_others_files_stay_and_folders_keep_their_modes(tmp_path):
    folder = tmp_path / "usr/lib/udev/rules.d"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "70-other.rules").touch()
    install(tmp_path)
    install(tmp_path, "--uninstall")
    assert files(tmp_path) == ["usr/lib/udev/rules.d/70-other.rules"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_it_is_started_from_anywhere_and_needs_no_udev(tmp_path):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    environment = {"DESTDIR": str(tmp_path / "stage"), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", copy / "install"], env=environment, cwd="/", check=True, capture_output=True)
    assert files(tmp_path / "stage") == STAGED


def test_unknown_options_change_nothing(tmp_path):
    done = install(tmp_path, "--uninstal", status=2)
    assert "sudo udev/install [--pcsc]" in done.stderr
    assert "--uninstall" in done.stderr
    assert "DESTDIR=DIR" in done.stderr
    assert files(tmp_path) == []
