"""Signed outputs as an application makes them and a vendor verifies them: the example, and the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hwlicense_simulators import Tpm
from tests.recorded import Log
from tests.world import run

EXAMPLE = Path(__file__).parents[2] / "examples" / "network_sensor" / "sensor.py"
SCAN = "".join(f"10.0.0.9 10.0.0.1 {port}\n" for port in (22, 80, 443, 8080)) + "10.0.0.2 10.0.0.1 443\n"


class Scene:
    def __init__(self, folder: Path, tpm: Tpm) -> None:
        self.folder, self.tpm = folder, tpm
        self.vendor, self.home, self.alerts = folder / "vendor", folder / "home", folder / "alerts"
        self.public, self.license = self.vendor / "vendor.pub.json", folder / "a.hwlic"
        (folder / "model.json").write_text('{"ports": 3}')
        (folder / "terms.toml").write_text('licensee = "Acme"\nproduct = "sensor"\n')
        self.run("vendor", "init", self.vendor, "--no-passphrase")
        pack = ("--name", "sensor", "--version", "1", "-o", folder / "a.hwpkg", folder / "model.json")
        self.run("vendor", "pack", "--vendor", self.vendor, *pack)
        self.run("device", "enroll", "--home", self.home, "-o", folder / "a.hwreq")
        issue = ("--request", folder / "a.hwreq", "--package", folder / "a.hwpkg", "--terms", folder / "terms.toml")
        trust = ("--ek-root", f"virtual={tpm.ek_root}")
        self.run("vendor", "issue", "--vendor", self.vendor, *issue, *trust, "-o", self.license)
        self.run("device", "trust", "--home", self.home, self.public)
        self.run("device", "install", "--home", self.home, self.license)
        self.sensor = Path(shutil.copy(EXAMPLE, folder))
        shutil.copy(self.public, folder)

    def run(self, *arguments, status=0):
        return run(*arguments, status=status, env=self.tpm.environment | {"PATH": "/usr/bin:/bin"})

    def watch(self, traffic):
        command = [sys.executable, *map(str, (self.sensor, self.folder / "a.hwpkg", self.home, self.alerts))]
        environment = self.tpm.environment | {"PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, input=traffic, capture_output=True, text=True, check=True, env=environment)
        assert done.stderr == ""
        return done.stdout

    def verify(self, *arguments, status=0):
        given = ("--vendor-public", self.public, "--license", self.license)
        return self.run("vendor", "verify-outputs", *given, *(arguments or (self.alerts,)), status=status)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    with Tpm() as tpm:
        scene = Scene(tmp_path_factory.mktemp("sensor"), tpm)
        assert scene.watch(SCAN) == "port scan from 10.0.0.9\n"
        assert scene.watch("10.0.0.2 10.0.0.1 80\n") == ""
        yield scene


@pytest.fixture
def scene(recorded, tmp_path):
    """With files of its own."""
    recorded.alerts = Path(shutil.copytree(recorded.folder / "alerts", tmp_path / "alerts"))
    yield recorded
    recorded.alerts = recorded.folder / "alerts"


def test_a_sensors_alerts_are_verified_offline(scene):
    shown = scene.verify()
    assert shown.stderr == ""
    assert "log 'alerts', recording 1" in shown.stdout
    assert ": 1 output, 0 inputs" in shown.stdout
    report = json.loads(scene.verify("--json", scene.alerts).stdout)
    assert (report["verdict"], report["faults"]) == ("intact", [])
    first, second = report["recordings"]
    assert (first["recording"], first["outputs"], first["ended"], first["hardware"]) == (1, 1, True, "TPM")
    assert first["tpm"][0]["resets"] == second["tpm"][0]["resets"]
    assert scene.run("vendor", "verify-outputs", "--vendor", scene.vendor, "--license", scene.license, scene.alerts)


def test_a_changed_alert_is_told_with_its_place_and_ends_with_4(scene):
    path = scene.alerts / "00000001-0001.hwout"
    path.write_bytes(path.read_bytes().replace(b"10.0.0.9", b"10.0.0.8"))
    done = scene.verify(status=4)
    assert f"forged: {path}, line 3: record 2: " in done.stdout
    assert done.stderr.startswith("error: ")
    assert "reason: OUTPUTS_DAMAGED\nhint: " in done.stderr
    report = json.loads(scene.verify("--json", scene.alerts, status=4).stdout)
    assert report["verdict"] == "OUTPUTS_DAMAGED"
    assert {fault["severity"] for fault in report["faults"]} == {"forged"}


def test_a_cut_recording_ends_with_1(scene):
    path = scene.alerts / "00000002-0001.hwout"
    path.write_bytes(path.read_bytes()[:-10])
    done = scene.verify(status=1)
    assert "reason: OUTPUTS_INCOMPLETE" in done.stderr
    assert "nothing is known after" in done.stdout
    assert json.loads(scene.verify("--json", scene.alerts, status=1).stdout)["verdict"] == "OUTPUTS_INCOMPLETE"


@pytest.mark.parametrize("added", [b"x", b"\n", b'{"kind":"record"', b"x\n"])
def test_what_was_added_after_a_certified_end_is_no_cut(scene, added):
    path = scene.alerts / "00000002-0001.hwout"
    path.write_bytes(path.read_bytes() + added)
    done = scene.verify(status=4)
    assert "forged: " in done.stdout
    assert "after the end" in done.stdout
    assert "cut" not in done.stdout.lower()
    report = json.loads(scene.verify("--json", scene.alerts, status=4).stdout)
    assert report["verdict"] == "OUTPUTS_DAMAGED"
    assert [fault["severity"] for fault in report["faults"]] == ["forged"]
    assert report["recordings"][1]["ended"]


def test_a_license_that_was_not_given_is_asked_for(scene, tmp_path):
    other = tmp_path / "other.hwlic"
    issue = ("--request", scene.folder / "a.hwreq", "--package", scene.folder / "a.hwpkg")
    trust = ("--ek-root", f"virtual={scene.tpm.ek_root}", "--terms", scene.folder / "terms.toml")
    scene.run("vendor", "issue", "--vendor", scene.vendor, *issue, *trust, "-o", other)
    given = ("vendor", "verify-outputs", "--vendor", scene.vendor, "--license", other)
    done = scene.run(*given, scene.alerts, status=2)
    license_ = json.loads(scene.run("inspect", scene.license, "--json").stdout)["document"]["grant"]["license"]
    assert f"cannot be judged without the license that they name: {license_} r1" in done.stderr
    assert "forged" not in done.stdout
    report = json.loads(scene.run(*given, "--json", scene.alerts, status=2).stdout)
    assert report["verdict"] == "OUTPUTS_UNJUDGED"
    assert {fault["severity"] for fault in report["faults"]} == {"unjudged"}
    scene.run(*given, "--license", scene.license, scene.alerts)
    path = scene.alerts / "00000001-0001.hwout"
    path.write_bytes(path.read_bytes().replace(b"10.0.0.9", b"10.0.0.8"))
    scene.run(*given, scene.alerts, status=4)


def test_a_license_encloses_one_file(scene, tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "empty").touch()
    issue = ("--request", scene.folder / "a.hwreq", "--package", scene.folder / "a.hwpkg")
    trust = ("--ek-root", f"virtual={scene.tpm.ek_root}", "--terms", scene.folder / "terms.toml")
    given = ("vendor", "issue", "--vendor", scene.vendor, *issue, *trust, "-o", tmp_path / "b.hwlic")
    assert "given twice" in scene.run(*given, *["--enclose", tmp_path / "a"] * 2, status=2).stderr
    shown = scene.run(*given, "--enclose", tmp_path / "empty", status=2).stderr
    assert "has 0 bytes" in shown
    assert "larger" not in shown


def test_later_recordings_are_verified_from_where_one_is(scene):
    last = scene.alerts / "00000002-0001.hwout"
    assert "Not given: recording 1." in scene.verify(last, status=1).stdout
    scene.verify("--first", "2", last)


def test_many_faults_are_told_in_part_and_in_json_all(scene):
    path = scene.alerts / "00000001-0001.hwout"
    head, *rest = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([head, *[b"{}"] * 50, *rest]))
    assert "more (--json shows all)" in scene.verify(status=4).stdout
    assert len(json.loads(scene.verify("--json", scene.alerts, status=4).stdout)["faults"]) > 50


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\0" * 5000, b"x" * 300_000, b"{}\n", b'{"kind":"start"}\n', b"\xff\n"]
)
def test_what_is_no_log_is_no_traceback(scene, content):
    path = scene.alerts / "00000003-0001.hwout"
    path.write_bytes(content)
    done = scene.verify(status=None)
    assert done.returncode in {1, 4}
    assert str(path) in done.stdout


def test_wrong_use_is_told(scene, tmp_path):
    given = ("vendor", "verify-outputs", "--license", scene.license)
    assert "Give either" in scene.run(*given, scene.alerts, status=2).stderr
    both = ("--vendor", scene.vendor, "--vendor-public", scene.public)
    assert "Give either" in scene.run(*given, *both, scene.alerts, status=2).stderr
    (tmp_path / "empty").mkdir()
    assert "FILE_ABSENT" in scene.verify(tmp_path / "empty", status=2).stderr
    assert "FILE_ABSENT" in scene.verify(tmp_path / "absent", status=2).stderr
    one = scene.alerts / "00000001-0001.hwout"
    assert "given twice" in scene.verify(one, one, status=2).stderr
    other = tmp_path / "other"
    scene.run("vendor", "init", other, "--no-passphrase")
    wrong = ("vendor", "verify-outputs", "--vendor", other, "--license", scene.license, scene.alerts)
    assert "WRONG_VENDOR" in scene.run(*wrong, status=1).stderr


def inspected(scene, path, *more, status=0):
    return scene.run("inspect", path, *more, status=status)


def test_inspect_says_what_a_file_of_a_log_is(scene):
    path = scene.alerts / "00000001-0001.hwout"
    shown = inspected(scene, path).stdout
    license_ = json.loads(scene.run("inspect", scene.license, "--json").stdout)["document"]
    rows = {name: value for name, _, value in (line.partition("  ") for line in shown.splitlines())}
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["file"] == "Recording (nothing is checked: `vendor verify-outputs` does that)"
    assert rows["license"] == f"{license_['grant']['license']}, revision 1"
    assert rows["package"] == license_["grant"]["packages"][0]["content_key"]
    assert (rows["log"], rows["recording"], rows["dropped"]) == ("alerts", "1", "0")
    assert rows["records"].endswith(": 1 output, 0 inputs")
    assert rows["certified by"].startswith("TPM, AK 000b")
    assert rows["end"] == f"certified by {rows['certified by']}"
    assert rows["from"] < rows["to"]
    report = json.loads(inspected(scene, path, "--json").stdout)
    assert report["type"] == "recording"
    assert report["document"]["end"]["certified"]["by"] == report["document"]["certified"]["by"] == "tpm"
    assert report["document"]["records"] == len(path.read_bytes().splitlines())


def test_inspect_says_where_a_log_was_cut_or_is_no_log(scene):
    path = scene.alerts / "00000001-0001.hwout"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "end           not in this file; it ends in the middle of a record" in inspected(scene, path).stdout
    assert json.loads(inspected(scene, path, "--json").stdout)["document"]["end"] is None
    path.write_bytes(whole.replace(b'"kind":"record"', b'"kind":"rekord"'))
    done = inspected(scene, path, status=4)
    assert f"error: {path}: Line " in done.stderr
    path.write_bytes(b'{"kind":"start"')
    assert "not one whole record" in inspected(scene, path, status=4).stderr
    path.write_bytes(b'{"kind":"start"' + b"x" * 300_000)
    assert "too long" in inspected(scene, path, status=4).stderr
    path.write_bytes(whole)
    assert "no vendor has signed" in inspected(scene, path, "--vendor", scene.public, status=2).stderr


def test_inspect_of_a_further_part(tmp_path):
    log = Log()
    chain = log.begin()
    start = chain.start
    chain.begin_part(2, *log.now())
    log.add(b"1")
    path = tmp_path / "00000001-0002.hwout"
    path.write_bytes(b"".join(line + b"\n" for line in log.lines()[1:]))
    shown = run("inspect", path).stdout
    assert f"part     2 of the recording that starts with {start.hex()}" in shown
    assert "end      not in this file\n" in shown
