"""Signed outputs against who has the files, the state folder, the TPM, or the process: what is done shows."""

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec
import pytest

from hwlicense import storage
from hwlicense.binders.tpm import TpmHardware
from hwlicense.core.chain import (
    Chain,
    Checkpoint,
    Output,
    Start,
    certified_bytes,
    digest,
    parse,
    signed_bytes,
)
from hwlicense.core.documents import License, TpmBinding
from hwlicense.core.envelope import verified
from hwlicense.core.errors import ClosedError, DamagedError, HwlicenseError, RefusedError, StorageError, UsageError
from hwlicense.core.schema import encode
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import recording
from hwlicense.device.bound import Bound
from hwlicense.device.home import Home
from hwlicense.device.recording import now
from hwlicense.vendor import logs
from tests.world import WITH_PCRS, Device, licensed, write


class Scene:
    """A licensed device that has recorded: `folder` holds its log."""

    def __init__(self, vendor, device, folder) -> None:
        self.vendor, self.device, self.folder = vendor, device, folder / "alerts"
        self.raw = licensed(vendor, device)
        self.license = write(folder / "license.hwlic", self.raw)

    def open(self):
        return self.device.open(self.vendor)

    def record(self, *payloads, **options):
        with self.open() as model, model.outputs(self.folder, **options) as outputs:
            for payload in payloads:
                outputs.append(payload)
        return self.files()[-1]

    def files(self):
        return sorted(self.folder.glob("*.hwout"))

    def check(self, *files, first=1):
        known = logs.licenses([self.license], self.vendor.public)
        return logs.check(files or self.files(), known, first)

    def said(self, *files, first=1):
        return [f"{fault.severity}: {fault.what}" for fault in self.check(*files, first=first).faults]


def bound_to(document) -> TpmBinding:
    (binding,) = document.bindings
    assert isinstance(binding, TpmBinding)
    return binding


@pytest.fixture
def scene(vendor, device, tmp_path):
    return Scene(vendor, device, tmp_path)


def rewrite(path, change):
    lines = path.read_bytes().split(b"\n")[:-1]
    path.write_bytes(b"".join(line + b"\n" for line in change(lines)))


def has(said, *words):
    assert any(all(word in line for word in words) for line in said), said


def test_what_was_recorded_is_intact(scene):
    scene.record({"alert": 1}, b"bytes", "text", None, [1.5])
    scene.record({"alert": 2})
    checked = scene.check()
    assert checked.faults == []
    assert [(each.statement.recording, each.outputs, each.ended, each.hardware) for each in checked.recordings] == [
        (1, 5, True, "TPM"),
        (2, 1, True, "TPM"),
    ]
    first, second = checked.recordings
    assert len(first.quotes) == 2
    assert first.quotes[1].clock <= second.quotes[0].clock
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in scene.files())


# ---- who has the files


def test_edited_records_show(scene):
    path = scene.record({"alert": "intruder"}, {"alert": "none"})
    path.write_bytes(path.read_bytes().replace(b"intruder", b"visitors"))
    has(scene.said(), "forged", "Record 1 is not the one that this one follows")


def test_a_cut_tail_shows_as_such_and_says_from_when_nothing_is_known(scene):
    path = scene.record(*range(5))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'"json":3') + 4])
    checked = scene.check()
    assert {fault.severity for fault in checked.faults} == {"cut"}
    has(scene.said(), "in the middle of a record")
    has(scene.said(), "nothing is known after")


def test_merged_recordings_show(scene):
    one = scene.record(1, 2)
    two = scene.record(3)
    one.write_bytes(one.read_bytes() + two.read_bytes())
    has(scene.said(), "forged", "after the end, was added")
    two.unlink()
    has(scene.said(), "forged", "A recording begins within another one.")


def test_reordered_records_show(scene):
    path = scene.record(1, 2, 3)
    rewrite(path, lambda lines: [lines[0], lines[2], lines[1], *lines[3:]])
    has(scene.said(), "forged", "in a wrong place")


def test_a_record_invented_later_shows(scene):
    path = scene.record(1, 2)

    def invent(lines):
        last = parse(lines[2])
        return [*lines[:3], encode(Output(3, digest(lines[2]), last.wall, last.boot, msgspec.Raw(b"9"))), *lines[3:]]

    rewrite(path, invent)
    has(scene.said(), "forged", "comes again, or in a wrong place")


def test_a_recording_that_is_left_out_shows(scene):
    scene.record(1)
    left_out = scene.record(2)
    scene.record(3)
    left_out.unlink()
    has(scene.said(), "forged", "Missing: recording 2")


def test_a_part_that_is_left_out_shows(scene):
    scene.record(*[bytes(60_000)] * 20, rotate=300_000)
    files = scene.files()
    assert len(files) > 3
    assert scene.said() == []
    has(scene.said(*files[:1], *files[2:]), "forged", "Missing before this one")
    has(scene.said(*files[:-1]), "cut", "has no end")
    has(scene.said(*files[1:]), "forged", "whose start was not given")


def test_a_log_of_another_device_is_not_this_ones(scene, vendor, tmp_path, hwlicense_tpms):
    other = Scene(vendor, Device(Home(tmp_path / "other" / "home"), hwlicense_tpms()), tmp_path / "other")
    taken = other.record({"alert": 0})
    assert scene.said(taken)[0].startswith("unjudged: ")
    known = logs.licenses([scene.license, other.license], vendor.public)
    assert logs.check([taken], known).faults == []

    def relabel(lines):
        """The statement says this device's license; the TPM's word is the other's."""
        start = parse(lines[0])
        assert isinstance(start, Start)
        mine = verified(scene.raw, License, vendor.public).grant.license
        return [
            encode(msgspec.structs.replace(start, statement=msgspec.structs.replace(start.statement, license=mine)))
        ]

    rewrite(taken, relabel)
    has(scene.said(taken), "forged", "certified by a TPM that the license is not bound to")


def test_a_recording_handed_over_once_more_shows(scene):
    path = scene.record(1)
    again = path.with_name("00000009-0001.hwout")
    shutil.copy(path, again)
    has(scene.said(), "forged", "A recording begins within another one.")


# ---- who may put files into the folder


NO_NAMES = [
    "99999999-1.hwout",
    "000000009-0001.hwout",
    "00000009-0001.hwout.part",
    "9-0001.hwout",
    "00000000-0001.hwout",
    "00000009-0000.hwout",
    "00000001-00009.hwout",
    "00000001-x.hwout",
    "\N{SUPERSCRIPT TWO}0000009-0001.hwout",
    "\N{ARABIC-INDIC DIGIT NINE}9999999-0001.hwout",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_no_recording_has_neither_stops_nor_moves_the_log(scene, name):
    scene.record(1)
    content = scene.files()[0].read_bytes()
    planted = scene.folder / name
    planted.write_bytes(content + b'{"a":1}\n')
    scene.record(2)
    planted.unlink()
    assert [each.statement.recording for each in scene.check().recordings] == [1, 2]
    assert scene.said() == []


def no_record(path, _scene):
    path.write_bytes(b"garbage\n")


def folder(path, _scene):
    path.mkdir()


def pipe(path, _scene):
    os.mkfifo(path)


def copied(path, scene):
    shutil.copy(scene.folder / "00000001-0001.hwout", path)


def made_up(path, scene):
    """What another could write without the device's hardware: all that a start says, under its own key."""
    line = (scene.folder / "00000001-0001.hwout").read_bytes().split(b"\n")[0]
    start = parse(line)
    assert isinstance(start, Start)
    chain = Chain(digest(line))
    number = int(path.name[:8])
    said = msgspec.structs.replace(start.statement, key=chain.key, recording=number, previous=digest(line))
    chain.begin(said, start.certificate, *now())
    path.write_bytes(b"".join(link.line + b"\n" for link in chain.take()))


@pytest.mark.parametrize("plant", [no_record, folder, pipe, copied, made_up])
@pytest.mark.parametrize(
    "name", ["00000002-0001.hwout", "99999999-0001.hwout", f"{'9' * 30}-0001.hwout", "00000001-9999.hwout"]
)
@pytest.mark.parametrize("remembered", [True, False])
def test_a_name_that_a_recording_may_have_stops_the_log_and_says_what_to_do(scene, plant, name, remembered):
    scene.record(1)
    if not remembered:
        (latest,) = (scene.device.home.state / "licenses").rglob("latest")
        latest.unlink()
    planted = scene.folder / name
    if plant is made_up and name.startswith("999999999"):
        plant = copied  # no statement holds such a number
    plant(planted, scene)
    with scene.open() as model:
        with pytest.raises(HwlicenseError) as caught:
            model.outputs(scene.folder)
        assert str(planted) in caught.value.what
        assert caught.value.hint.startswith("Move it out of the folder")
        planted.rename(scene.folder / "moved-away") if plant is folder else planted.unlink()
        model.outputs(scene.folder).close()
    assert [each.statement.recording for each in scene.check().recordings] == [1, 2]
    assert scene.said() == []


def test_a_first_recording_is_not_moved_by_what_lies_in_its_folder(scene):
    path = scene.record(1)
    shutil.rmtree(scene.device.home.state / "licenses")
    planted = scene.folder / "99999999-0001.hwout"
    made_up(planted, scene)
    path.unlink()
    scene.device.install(scene.raw, scene.vendor)
    with scene.open() as model, pytest.raises(DamagedError, match="99999999-0001"):
        model.outputs(scene.folder)


def test_a_state_folder_that_was_lost_or_is_older_goes_on_from_the_files(scene):
    scene.record(1)
    (latest,) = (scene.device.home.state / "licenses").rglob("latest")
    older = latest.read_bytes()
    scene.record(2)
    scene.record(*[bytes(60_000)] * 10, rotate=300_000)
    latest.write_bytes(older)
    scene.record(4)
    latest.unlink()
    scene.record(5)
    assert [each.statement.recording for each in scene.check().recordings] == [1, 2, 3, 4, 5]
    assert scene.said() == []


# ---- a folder holds one log of one license


def refused(device, vendor, folder, *words, **options):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with device.open(vendor) as model, pytest.raises(UsageError) as caught:
        model.outputs(folder, **options)
    for word in words:
        assert word in caught.value.what
    assert caught.value.hint.startswith("Give each log a folder of its own")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("known", [False, True])
def test_two_logs_of_one_license_need_two_folders(scene, known):
    first = scene.record(1, name="a")
    if known:  # its numbers are beyond those in the folder
        for _ in range(3):
            with scene.open() as model:
                model.outputs(scene.folder.with_name("b"), name="b").close()
    refused(scene.device, scene.vendor, scene.folder, str(first), "'a'", "'b'", name="b")
    scene.record(2, name="a")
    assert scene.said() == []


def test_a_new_license_and_another_device_need_another_folder(scene, vendor, tmp_path, hwlicense_tpms):
    first = scene.record(1)
    old = verified(scene.raw, License, vendor.public).grant.license
    other = Device(Home(tmp_path / "other" / "home"), hwlicense_tpms())
    licensed(vendor, other)
    refused(other, vendor, scene.folder, str(first), old)
    shutil.rmtree(scene.device.home.path / "licenses")
    licensed(vendor, scene.device)
    refused(scene.device, vendor, scene.folder, str(first), old)
    assert scene.said() == []


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_log_that_begins_in_the_same_folder_at_once_is_refused(scene, monkeypatch, ahead):
    """The second looks at the folder, and the first begins before the second has."""
    for _ in range(ahead):
        with scene.open() as model:
            model.outputs(scene.folder.with_name("b"), name="b").close()
    with scene.open() as model, scene.open() as other:
        certify, begun = Bound.certify, list[Any]()

        def late(self, selection, statement, pin):
            if not begun:
                begun.append(None)
                begun[0] = model.outputs(scene.folder, name="a")
            return certify(self, selection, statement, pin)

        monkeypatch.setattr(Bound, "certify", late)
        with pytest.raises(UsageError) as caught:
            other.outputs(scene.folder, name="b")
        assert caught.value.hint.startswith("Give each log a folder of its own")
        begun[0].append(1)
        begun[0].close()
    assert [path.name for path in scene.files()] == ["00000001-0001.hwout"]
    assert scene.said() == []


# ---- who has the device, and not the process


def test_a_state_folder_that_is_set_back_shows(scene, tmp_path):
    scene.record(1)
    state = scene.device.home.state / "licenses"
    shutil.copytree(state, tmp_path / "kept")
    second = scene.record(2)
    kept = second.read_bytes()
    second.unlink()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "kept", state)
    scene.record(3)
    (scene.folder / "sent-before.hwout").write_bytes(kept)
    has(scene.said(), "forged", "There are two recordings with this number")


def test_a_recording_after_files_were_removed_goes_on_with_the_next_number(scene):
    for _ in range(2):
        scene.record(1)
    shutil.rmtree(scene.folder)
    scene.record(2)
    assert [each.statement.recording for each in scene.check().recordings] == [3]
    has(scene.said(), "cut", "Not given: recordings 1 to 2")
    assert scene.said(first=3) == []


def test_a_tail_that_is_cut_after_a_crash_shows_by_the_recording_that_follows(scene):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        for number in range(4):
            outputs.append(number)
        outputs.flush()
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        crashed = scene.files()[0].read_bytes()
        outputs.close()
    scene.files()[0].write_bytes(crashed)  # as it was when the power went
    scene.record("after")
    assert {line.partition(":")[0] for line in scene.said()} == {"cut"}
    rewrite(scene.files()[0], lambda lines: lines[:3])
    has(scene.said(), "forged", "records are missing there")


def test_another_program_with_the_tpm_cannot_go_back_in_time(scene):
    """It makes a recording that says it was before one that is there: the TPM's clock tells."""
    first = scene.record("true")
    scene.record("and on")
    document = verified(scene.raw, License, scene.vendor.public)
    start = parse(first.read_bytes().split(b"\n")[0])
    assert isinstance(start, Start)
    chain = Chain(start.previous)
    said = msgspec.structs.replace(start.statement, key=chain.key)
    with TpmHardware(scene.device.tpm.tcti) as hardware:
        selection = Selection.parse(*document.grant.pcrs)
        chain.begin(said, hardware.certify(bound_to(document), selection, certified_bytes(said), None), *now())
        chain.end(hardware.certify(bound_to(document), selection, certified_bytes(chain.closing()), None), None, *now())
    first.write_bytes(b"".join(link.line + b"\n" for link in chain.take()))
    has(scene.said(), "forged", "By the TPM's clock it began before")


def test_a_forged_certificate_is_none(scene):
    """A key in software signs a quote that says what is wanted; or a quote of the TPM's is for another statement."""
    path = scene.record(1)
    lines = path.read_bytes().split(b"\n")
    start = parse(lines[0])
    assert isinstance(start, Start)
    chain = Chain(start.previous)
    said = msgspec.structs.replace(start.statement, key=chain.key)
    chain.begin(said, start.certificate, start.wall, start.boot)
    chain.add(Output, start.wall, start.boot, json=b"2")
    chain.end(start.certificate, None, start.wall, start.boot)
    path.write_bytes(b"".join(link.line + b"\n" for link in chain.take()))
    has(scene.said(), "forged", "it was made for another document")


def test_a_clock_that_is_moved_shows(scene):
    path = scene.record(1, 2)
    document, lines = verified(scene.raw, License, scene.vendor.public), path.read_bytes().split(b"\n")
    start = parse(lines[0])
    assert isinstance(start, Start)
    chain = Chain(start.previous)
    said = msgspec.structs.replace(start.statement, key=chain.key)
    selection = Selection.parse(*document.grant.pcrs)
    with TpmHardware(scene.device.tpm.tcti) as hardware:

        def certify(statement):
            return hardware.certify(bound_to(document), selection, certified_bytes(statement), None)

        wall, boot = now()
        chain.begin(said, certify(said), wall, boot)
        chain.add(Output, wall - 86_400_000_000, boot + 1, json=b"1")
        chain.end(certify(chain.closing()), None, wall, boot + 2)
    path.write_bytes(b"".join(link.line + b"\n" for link in chain.take()))
    has(scene.said(), "note", "The wall clock was moved by -86,400.0 s.")


# ---- who has the process


def test_who_takes_the_process_over_cannot_change_what_was_signed(scene):
    with scene.open() as model, model.outputs(scene.folder) as outputs:
        outputs.append({"alert": "intruder"})
        outputs.flush()
        while len(outputs._chain._links) > 1:
            time.sleep(0.01)
        stolen = outputs._chain.last.key
        assert stolen is not None
        outputs.append({"alert": "later"})
    path = scene.files()[0]

    def forge(lines):
        lines[1] = lines[1].replace(b"intruder", b"visitors")
        for place in range(2, len(lines)):
            record = msgspec.structs.replace(parse(lines[place]), previous=digest(lines[place - 1]))
            if isinstance(record, Checkpoint):
                record = msgspec.structs.replace(record, signature=stolen.sign(signed_bytes(record)))
            lines[place] = encode(record)
        return lines

    rewrite(path, forge)
    has(scene.said(), "forged", "Its signature is not by the key that is due.")


def test_records_that_wait_for_the_disk_have_no_keys(scene, monkeypatch):
    with scene.open() as model, model.outputs(scene.folder) as outputs:
        disk = LosingDisk(monkeypatch, 1000)
        disk._size = scene.files()[0].stat().st_size
        outputs.append({"alert": "intruder"})
        with pytest.raises(StorageError, match="Input/output"):
            outputs.flush(0.2)
        assert outputs._files.links
        assert all(link.key is None for link in outputs._files.links)
        disk.failures = 0
    assert scene.said() == []


def test_silence_shows(scene):
    with scene.open() as model, model.outputs(scene.folder, heartbeat=1) as outputs:
        outputs.append(1)
        time.sleep(3.3)
    kinds = [type(parse(line)).__name__ for line in scene.files()[0].read_bytes().split(b"\n")[:-1]]
    assert kinds.count("Heartbeat") >= 2
    assert scene.said() == []


# ---- crashes, forks, full disks


CRASHING = """
import sys, hwlicense
vendor, package, home, tpm, folder = sys.argv[1:]
model = hwlicense.open(package, vendor=open(vendor).read(), home=home, tpm=tpm)
outputs = model.outputs(folder)
for number in range(int(1e9)):
    outputs.append({"alert": number})
    if number == 500:
        outputs.flush()
        print("flushed", flush=True)
"""


def test_sigkill_loses_nothing_that_was_flushed_and_the_rest_verifies(scene):
    vendor = scene.vendor.folder / "vendor" / "vendor.pub.json"
    arguments = (vendor, scene.vendor.package, scene.device.home.path, scene.device.tpm.tcti, scene.folder)
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHING, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "flushed\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    checked = scene.check()
    assert {fault.severity for fault in checked.faults} == {"cut"}
    assert checked.recordings[0].outputs > 500
    assert checked.recordings[0].signed > 500
    scene.record("after")
    assert {fault.severity for fault in scene.check().faults} == {"cut"}


def test_a_forked_child_has_no_part_in_it(scene):
    with scene.open() as model, model.outputs(scene.folder) as outputs:
        outputs.append("parent")
        pid = os.fork()
        if not pid:
            try:
                outputs.append("child")
            except UsageError:
                outputs.close()
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        outputs.append("parent again")
    assert scene.said() == []
    assert scene.check().recordings[0].outputs == 2


def test_a_child_that_lives_on_does_not_keep_the_log(scene):
    pid = os.fork()
    if not pid:  # a process that dies in the middle of a recording, and leaves a child
        model = scene.open()
        model.outputs(scene.folder)
        if not os.fork():
            time.sleep(5)
            os._exit(0)
        os._exit(9)
    os.waitpid(pid, 0)
    scene.record("next")
    assert {line.partition(":")[0] for line in scene.said()} == {"cut"}


def test_a_close_that_a_signal_interrupts_is_done_again(scene, monkeypatch):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.append(1)

        def interrupted(_closing):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(outputs, "_certify", interrupted)
            with pytest.raises(KeyboardInterrupt):
                outputs.close()
        outputs.append(2)
        outputs.close()
    assert scene.said() == []
    assert scene.check().recordings[0].outputs == 2


MAIN = threading.main_thread().ident or 0


MAIN = threading.main_thread().ident or 0


class Interrupting(threading.Event):
    """Holds a disk up until it is set; a moment after it came there, a signal comes."""

    def __init__(self, monkeypatch, signals=1) -> None:
        super().__init__()
        self._signals, self._write = signals, os.pwrite
        monkeypatch.setattr("hwlicense.device.log_files.os.pwrite", self)

    def __call__(self, fd, data, at):
        if not self.is_set():
            for _ in range(self._signals):
                time.sleep(0.2)
                signal.pthread_kill(MAIN, signal.SIGINT)
            self.wait(30)
        return self._write(fd, data, at)


def test_a_close_that_is_interrupted_while_the_disk_is_slow_lets_log_and_hardware_go(scene, monkeypatch):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.append(1)
        outputs.flush()
        disk = Interrupting(monkeypatch)
        released = threading.Timer(0.5, disk.set)
        released.start()
        with pytest.raises(KeyboardInterrupt):
            outputs.close()
        with model.outputs(scene.folder) as again:
            again.append(2)
        outputs.close()
    assert scene.said() == []
    assert [each.ended for each in scene.check().recordings] == [True, True]


def test_a_close_that_is_interrupted_twice_waits_for_no_disk(scene, monkeypatch):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.append(1)
        outputs.flush()
        disk, begun = Interrupting(monkeypatch, 2), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            outputs.close()
        assert time.monotonic() - begun < 10
        disk.set()
        with model.outputs(scene.folder) as again:
            again.append(2)
        outputs.close()


def test_threads_that_close_it_together_end_it_once(scene):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.append(1)
        threads = [threading.Thread(target=outputs.close) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with model.outputs(scene.folder) as again:
            again.append(2)
    assert scene.said() == []


def test_an_anchored_license_gives_its_count(vendor, device, tmp_path):
    terms = WITH_PCRS + "anchor = true\n[limits]\ninferences = 100000\n"
    raw = licensed(vendor, device, terms, counted=True)
    license_ = write(tmp_path / "license.hwlic", raw)
    for _ in range(2):
        with device.open(vendor) as model, model.outputs(tmp_path / "log") as outputs:
            model.spend()
            outputs.append(1)
    checked = logs.check(sorted((tmp_path / "log").glob("*")), logs.licenses([license_], vendor.public))
    assert checked.faults == []
    first, second = (each.statement.steps for each in checked.recordings)
    assert first is not None
    assert second is not None
    assert first < second


def test_threads_share_it(scene):
    with scene.open() as model, model.outputs(scene.folder) as outputs:

        def work():
            for number in range(500):
                outputs.append(number)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert scene.said() == []
    assert scene.check().recordings[0].outputs == 4000


def test_one_process_at_a_time_records_in_a_log(scene):
    with scene.open() as model, model.outputs(scene.folder):
        with pytest.raises(StorageError, match="is being recorded already") as caught:
            model.outputs(scene.folder)
        assert "a folder and a name" in caught.value.hint
        with model.outputs(scene.folder.with_name("other")) as other:
            other.append(1)


def test_the_end_of_the_interpreter_ends_the_recording(scene):
    script = CRASHING.replace("int(1e9)", "600")
    vendor = scene.vendor.folder / "vendor" / "vendor.pub.json"
    arguments = (vendor, scene.vendor.package, scene.device.home.path, scene.device.tpm.tcti, scene.folder)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert scene.said() == []
    assert scene.check().recordings[0].outputs == 600


def test_a_closed_recording_takes_nothing(scene):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.close()
        outputs.close()
        for use in (lambda: outputs.append(1), outputs.flush):
            with pytest.raises(ClosedError):
                use()


class FullDisk:
    """pwrite(2) for files of logs: `room` bytes are taken, then there is no space, until room is made."""

    def __init__(self, monkeypatch, room) -> None:
        self.room, self.tries, self._write = room, 0, os.pwrite
        monkeypatch.setattr("hwlicense.device.log_files.os.pwrite", self)

    def __call__(self, fd, data, at):
        self.tries += 1
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        done = self._write(fd, bytes(data)[: self.room], at)
        self.room -= done
        return done


class LosingDisk:
    """fdatasync(2) for files of logs that fails so often: what it had to write is lost then, and it says so once."""

    def __init__(self, monkeypatch, failures) -> None:
        self.calls, self.failures, self._size, self._sync = 0, failures, 0, os.fdatasync
        monkeypatch.setattr("hwlicense.device.log_files.os.fdatasync", self)

    def __call__(self, fd):
        self.calls += 1
        if self.calls <= self.failures:
            os.ftruncate(fd, self._size)
            raise OSError(5, "Input/output error")
        self._sync(fd)
        self._size = os.fstat(fd).st_size


@pytest.mark.parametrize("sync", ["checkpoint", "always"])
def test_what_a_disk_lost_is_not_called_safe_and_comes_again(scene, monkeypatch, sync):
    monkeypatch.setattr(recording, "_AGAIN", 0.1)
    with scene.open() as model, model.outputs(scene.folder, sync=sync) as outputs:
        disk = LosingDisk(monkeypatch, 1)
        disk._size = scene.files()[0].stat().st_size
        outputs.append("first")
        outputs.append("second")
        outputs.flush()
        assert disk.calls >= 2
    assert scene.said() == []
    assert scene.check().recordings[0].outputs == 2


@pytest.mark.parametrize(("sync", "least", "most"), [("never", 0, 0), ("checkpoint", 1, 2), ("always", 5, 99)])
def test_a_recording_is_brought_to_the_disk_as_often_as_was_asked(scene, monkeypatch, sync, least, most):
    disk = LosingDisk(monkeypatch, 0)
    with scene.open() as model, model.outputs(scene.folder, sync=sync, interval=10.0) as outputs:
        for number in range(5):
            outputs.append(number)
            while outputs._files.total < outputs._chain.last.total:
                time.sleep(0.001)
    assert least <= disk.calls <= most


@pytest.mark.parametrize("full", ["refuse", "drop"])
def test_a_disk_that_is_full_in_the_middle_of_a_record(scene, monkeypatch, full):
    with scene.open() as model, model.outputs(scene.folder, full=full, buffer=256 << 10) as outputs:
        outputs.append("before")
        outputs.flush()
        disk = FullDisk(monkeypatch, 30_100)
        refused, reasons = 0, set()
        for _ in range(20):
            try:
                refused += outputs.append(bytes(30_000)) < 0
            except StorageError as error:
                reasons.add(str(error.reason))
                refused += 1
            time.sleep(0.01)
        assert refused
        assert reasons == ({"OUTPUTS_FULL"} if full == "refuse" else set())
        assert outputs.problem is not None
        assert outputs.problem.reason == "STORAGE"
        with pytest.raises(StorageError, match="not taken"):
            outputs.flush(0.1)
        content = scene.files()[0].read_bytes()
        assert content.endswith(b"\n")
        disk.room = 1 << 30
        outputs.flush(10)
        assert outputs.problem is None
        outputs.append("after")
    recording = scene.check().recordings[0]
    assert recording.ended
    assert recording.dropped == (refused if full == "drop" else 0)
    assert {line.partition(":")[0] for line in scene.said()} <= {"note"}
    assert recording.outputs == 22 - refused


def test_a_disk_that_is_full_for_a_moment_at_the_end_loses_nothing(scene, monkeypatch):
    monkeypatch.setattr(recording, "_AGAIN", 0.1)
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.append("before")
        outputs.flush()
        disk = FullDisk(monkeypatch, 100)
        outputs.append("kept")
        room = threading.Timer(1.0, setattr, (disk, "room", 1 << 20))
        room.start()
        outputs.close()
    assert scene.said() == []


def test_a_disk_that_fails_is_not_tried_more_often_because_records_come(scene, monkeypatch):
    monkeypatch.setattr(recording, "_AGAIN", 0.25)
    with scene.open() as model, model.outputs(scene.folder, full="drop") as outputs:
        outputs.append("before")
        outputs.flush()
        disk = FullDisk(monkeypatch, 0)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            outputs.append("more")
            time.sleep(0.001)
        assert 2 <= disk.tries <= 6
        disk.room = 1 << 30
    assert scene.said() == []


def test_a_disk_that_fails_is_not_tried_more_often_because_of_the_end(scene, monkeypatch):
    monkeypatch.setattr(recording, "_AGAIN", 0.25)
    monkeypatch.setattr(recording, "_REFUSED", 1.0)
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        disk = FullDisk(monkeypatch, 0)
        outputs.append("lost")
        with pytest.raises(StorageError, match="No space left"):
            outputs.close()
        assert 2 <= disk.tries <= 9


def test_a_writer_that_fails_is_told(scene, monkeypatch):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)

        def fails(_self):
            raise ValueError("unforeseen")

        monkeypatch.setattr("hwlicense.device.log_files.LogFiles.write", fails)
        outputs.append("lost")
        with pytest.raises(StorageError, match="unforeseen"):
            outputs.flush()
        with pytest.raises(StorageError):
            outputs.close()


def test_a_disk_that_stays_full_is_told_at_the_end(scene, monkeypatch):
    monkeypatch.setattr(recording, "_AGAIN", 0.1)
    monkeypatch.setattr(recording, "_PATIENCE", 1.0)
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.append("before")
        outputs.flush()
        FullDisk(monkeypatch, 100)
        outputs.append("lost")
        with pytest.raises(StorageError, match="No space left"):
            outputs.close()
        outputs.close()
    assert {line.partition(":")[0] for line in scene.said()} == {"cut"}


def test_a_disk_that_refuses_is_not_waited_for_as_long_as_one_that_is_silent(scene, monkeypatch):
    monkeypatch.setattr(recording, "_AGAIN", 0.1)
    monkeypatch.setattr(recording, "_REFUSED", 0.5)
    with scene.open() as model:
        outputs = model.outputs(scene.folder, full="drop")
        FullDisk(monkeypatch, 0)
        outputs.append("lost")
        begun = time.monotonic()
        with pytest.raises(StorageError, match="No space left"):
            outputs.close()
    assert time.monotonic() - begun < 10


def test_a_burst_of_20_ms_is_not_lost_whole_to_sigkill(scene):
    pid = os.fork()
    if not pid:
        model = scene.open()
        outputs = model.outputs(scene.folder)
        time.sleep(0.05)
        for number in range(2000):
            outputs.append(number)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert scene.check().recordings[0].outputs > 100


def test_a_slow_disk_keeps_nobody_waiting(scene, monkeypatch):
    with scene.open() as model, model.outputs(scene.folder) as outputs:
        monkeypatch.setattr("hwlicense.device.log_files.os.fdatasync", lambda _fd: time.sleep(0.5))
        worst = 0.0
        for number in range(2000):
            begun = time.perf_counter()
            outputs.append(number)
            worst = max(worst, time.perf_counter() - begun)
        assert worst < 0.2
    assert scene.said() == []


def test_hardware_that_is_gone_at_the_end_leaves_an_end_that_says_so(scene):
    with scene.open() as model:
        outputs = model.outputs(scene.folder)
        outputs.append(1)
        scene.device.tpm.power_cut(restart=False)
        with pytest.raises(HwlicenseError) as caught:
            outputs.close()
        scene.device.tpm.start()
    has(scene.said(), "cut", f"The hardware did not certify the end ({caught.value.reason})")


# ---- wrong use


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "x" * 201},
        {"name": "\udc80"},
        {"sensors": {"camera": b"no key"}},
        {"sensors": {"camera": "text"}},
        {"sensors": ["camera"]},
        {"name": 7},
    ],
)
def test_names_that_make_no_sense_are_refused(scene, options):
    with scene.open() as model, pytest.raises(UsageError):
        model.outputs(scene.folder, **options)
    assert scene.files() == []


@pytest.mark.parametrize(
    ("option", "values", "takes"),
    [
        ("rotate", [1, "1 MiB"], "a whole number of bytes, 262144 at least, or None"),
        ("buffer", [10, None], "a whole number of bytes, 262144 at least"),
        ("every", [0, None], "a whole number of records, 1 at least"),
        ("heartbeat", [0, 86401, None, 1.5], "whole seconds, from 1 to 86400"),
        ("interval", [0, 11, "1", math.nan], "seconds, more than 0 and at most the heartbeat (10)"),
        ("full", ["ignore", []], "'refuse' or 'drop'"),
        ("sync", ["maybe", None], "'checkpoint', 'always' or 'never'"),
    ],
)
def test_an_option_that_makes_no_sense_is_named_with_what_it_takes(scene, option, values, takes):
    with scene.open() as model:
        for value in values:
            with pytest.raises(UsageError) as refused:
                model.outputs(scene.folder, **{option: value})
            assert f"{option}={value!r}" in refused.value.what
            assert refused.value.hint == f"It takes {takes}."
    assert scene.files() == []


NO_PAYLOADS = [object(), bytes(65537), "x" * 65536, float, {"a": object()}, "\udc80", math.nan, {"a": [None, math.inf]}]


@pytest.mark.parametrize("payload", NO_PAYLOADS)
def test_payloads_that_cannot_be_recorded_are_refused(scene, payload):
    with scene.open() as model, model.outputs(scene.folder) as outputs:
        with pytest.raises(UsageError):
            outputs.append(payload)
        with pytest.raises(UsageError):
            outputs.append(1, digest=b"short")
        with pytest.raises(UsageError):
            outputs.append(1, input=b"frame", sensor="camera", signature=b"s")
        for wrong in ({"input": "text"}, {"digest": "d" * 32}, {"sensor": 1}, {"signature": "s"}):
            with pytest.raises(UsageError):
                outputs.append_input(**wrong)
    assert scene.said() == []


def test_a_damaged_memory_of_the_log_is_told(scene):
    scene.record(1)
    (latest,) = (scene.device.home.state / "licenses").rglob("latest")
    storage.atomic_write(latest, b"{}")
    with scene.open() as model, pytest.raises(DamagedError, match="latest"):
        model.outputs(scene.folder)
    latest.unlink()
    scene.record(2)
    assert scene.said() == []


def test_a_tpm_that_the_license_is_not_for_certifies_nothing(scene, hwlicense_tpms):
    other = hwlicense_tpms()
    document = verified(scene.raw, License, scene.vendor.public)
    with TpmHardware(other.tcti) as hardware, pytest.raises(RefusedError, match="another TPM"):
        hardware.certify(bound_to(document), Selection(), b"statement", None)
