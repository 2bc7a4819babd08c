"""What the doctor says of a TPM's memory and of the licenses that it counts; and that its mends mend."""

import subprocess

import pytest

from hwlicense.core.hardware import Counted
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.device import diagnosing, tpm_memory
from hwlicense.device.counters import Counters
from hwlicense.device.home import Home
from tests.counted import Customer, limited
from tests.forging import refused
from tests.world import TERMS

ANCHORED = limited(2, hours=10, require="anchor = true\n")
FACTS = {
    "nv_counters": 1,
    "nv_counters_left": 7,
    "nv_counters_most": 8,
    "nv_indexes": 4,
    "nv_ours": ["0x01880000"],
    "nv_ours_bytes": 54,
    "revision": "1.59",
}


@pytest.fixture
def customer(own_vendor, tmp_path, hwlicense_tpms):
    tpm = hwlicense_tpms()
    with tpm.tapped() as tap:
        own = Customer(own_vendor, tmp_path, tpm, tap)
        yield own
        assert own.loaded() == []


def examined(customer, start, home=None):
    """Findings whose subject starts so: about the TPM's memory, or about a license."""
    findings = diagnosing.examine(home or customer.device.home, customer.wire.tcti)
    return [finding for finding in findings if finding.subject.startswith(start)]


def about(customer):
    """The one finding about the license's counter."""
    (finding,) = [f for f in examined(customer, "license ") if "counter 0x" in f.text]
    return finding


def undefine(customer, *handles):
    where = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": customer.wire.tcti}
    for handle in handles:
        done = ["tpm2_nvundefine", "-C", "o", handle]
        subprocess.run(done, check=True, env=where, timeout=60, capture_output=True)


def mended(customer, finding):
    """As a person would who types what the finding says, after its last colon."""
    commands = finding.mend.rpartition(": ")[2].split(" && ")
    assert all(command.startswith("tpm2_nvundefine -C o 0x018") for command in commands)
    undefine(customer, *(command.split()[-1] for command in commands))


def test_a_license_in_force_with_its_handles_and_what_is_left(customer):
    customer.sell(ANCHORED)
    first = customer.binding.counter.handle
    assert about(customer)[:2] == ("ok", f"license {customer.license.grant.license[:8]}")
    text = f"counter 0x{first:08x}, 0x{first + 1:08x} (opens), 0x{first + 2:08x} (anchor): in force; "
    assert about(customer).text == f"{text}2 of 2 opens left; 10.0 powered-on hours left"
    assert customer.opens == 0  # looking spends nothing
    customer.open()
    assert "; 1 of 2 opens left;" in about(customer).text


def test_probe_and_doctor_show_what_the_memory_holds(customer):
    before = diagnosing.probe(customer.tpm.tcti, Selection())
    assert (before["nv_ours"], before["nv_ours_bytes"]) == ([], 0)
    customer.sell(ANCHORED)
    facts, first = diagnosing.probe(customer.tpm.tcti, Selection()), customer.binding.counter.handle
    assert facts["nv_ours"] == [f"0x{handle:08x}" for handle in range(first, first + 3)]
    assert facts["nv_ours_bytes"] == (14 + 32 + 8) + 2 * (46 + 32 + 8)  # public area, authValue, data
    assert facts["nv_counters"] == before["nv_counters"] + 1
    assert facts["nv_indexes"] == before["nv_indexes"] + 3
    (finding,) = examined(customer, "TPM memory")
    assert finding.state == "ok"
    assert f"{facts['nv_indexes']} NV indexes, 3 of them by enrolments with --counted (226 bytes)" in finding.text


def test_a_license_without_limits_takes_nothing_and_is_not_asked_about(customer):
    customer.sell(TERMS)
    assert not any("counter" in finding.text for finding in examined(customer, "license "))


def test_no_opens_left(customer):
    customer.sell(ANCHORED)
    assert customer.drain() == 2
    finding = about(customer)
    assert finding.state == "missing"
    assert "in force; 0 of 2 opens left" in finding.text
    assert "revision of the license with more" in finding.mend


def test_a_license_that_a_later_revision_ended(customer):
    customer.sell(ANCHORED)
    with customer.root() as root:
        root.increment()
        root.increment()
    assert about(customer).state == "missing"
    assert "has ended this license" in about(customer).text
    with refused("LICENSE_SUPERSEDED"):
        customer.open()


def test_an_installation_of_the_next_revision_that_was_cut_off(customer):
    customer.sell(ANCHORED)
    with customer.root() as root:
        root.increment()
    assert about(customer).state == "missing"
    assert "or one whose installation has begun" in about(customer).text
    customer.install(customer.revise(ANCHORED))
    assert about(customer).state == "ok"


@pytest.mark.parametrize("place", [0, 1])
def test_a_counter_or_index_that_was_removed(customer, place):
    customer.sell(ANCHORED)
    undefine(customer, hex(customer.binding.counter.handle + place))
    finding = about(customer)
    assert (finding.state, "no longer has the license's counter or an index" in finding.text) == ("missing", True)


def test_what_lets_the_device_count_is_gone(customer):
    customer.sell(ANCHORED)
    handle = customer.binding.counter.handle
    (customer.device.home.path / "counters" / f"{handle:08x}").unlink()
    finding = about(customer)
    assert finding.state == "missing"
    assert "lacks what lets the device use the counter" in finding.text


def test_a_counter_that_waits_for_its_license_and_its_removal(customer):
    customer.device.request(counted=True)
    (handle,) = Counters(customer.device.home).spare()
    _, finding = examined(customer, "TPM memory")
    assert finding[:3] == ("note", "TPM memory", f"the counter 0x{handle:08x} serves no license that is installed here")
    mended(customer, finding)
    assert handle not in customer.indexes()
    assert len(examined(customer, "TPM memory")) == 1
    customer.sell(ANCHORED)  # and the file that is left of it is in nobody's way
    assert customer.drain() == 2


def test_what_a_license_left_that_was_removed_and_its_removal(customer):
    customer.sell(ANCHORED)
    home, first = customer.device.home, customer.binding.counter.handle
    folder = home.path / "licenses" / customer.license.grant.license
    folder.rename(home.path / "elsewhere")
    _, finding = examined(customer, "TPM memory")
    left = ", ".join(f"0x{first + place:08x}" for place in range(3))
    assert finding.text == f"{left}: counter or indexes of a license that is not installed here any more"
    mended(customer, finding)
    assert not any(first <= handle <= first + 3 for handle in customer.indexes())
    assert len(examined(customer, "TPM memory")) == 1


def test_another_home_sees_what_is_there_and_offers_to_remove_none_of_it(customer, tmp_path):
    customer.sell(ANCHORED)
    (finding,) = examined(customer, "TPM memory", Home(tmp_path / "other"))
    assert "3 of them by enrolments with --counted" in finding.text
    assert "0x" not in finding.mend


def test_a_tpm_that_is_too_old_and_one_that_is_full():
    (old,) = tpm_memory.memory({**FACTS, "revision": "1.16"}, [])
    assert (old.state, "PIN_PASS" in old.text) == ("note", True)
    (full,) = tpm_memory.memory({**FACTS, "nv_counters_left": 0}, [])
    assert (full.state, "tpm2_nvundefine" in full.mend) == ("note", True)
    (good,) = tpm_memory.memory({**FACTS, "revision": "1.38"}, [])
    assert (good.state, good.mend) == ("ok", "")


def test_a_file_whose_counter_was_never_made_is_not_spoken_of(tmp_path):
    home = Home(tmp_path)
    with Secret(bytearray(b"a" * 32)) as value:
        Counters(home).keep(0x01880010, value)
    assert len(list(tpm_memory.memory(FACTS, Counters(home).spare()))) == 1


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Counted("current", 0, 2, 36_000_001, 36_000_000), "0.0 powered-on hours left"),
        (Counted("unfinished", None, 2, 0, None), "was not finished"),
    ],
)
def test_what_else_a_tpm_may_say(customer, monkeypatch, found, words):
    customer.sell(ANCHORED)
    with customer.device.connect() as hardware:
        monkeypatch.setattr(type(hardware), "use", lambda *_: found)
        (finding,) = tpm_memory.counted("license", customer.binding, b"", hardware)
    assert (finding.state, words in finding.text) == ("missing", True)


def test_the_simulator_is_of_a_revision_that_counts(hwlicense_tpms):
    assert float(diagnosing.probe(hwlicense_tpms().tcti, Selection())["revision"]) >= tpm_memory._PIN_PASS
