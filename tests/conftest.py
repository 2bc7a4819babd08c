"""What holds for all tests: none is skipped in silence, and examples are not hurried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from hwlicense_simulators import Tpm
    from tests.world import Device, Vendor

# Deadlines measure how busy the machine is. Examples are found anew in each run, and reproduced from what is printed.
hypothesis.settings.register_profile("hwlicense", deadline=None, print_blob=True)
hypothesis.settings.load_profile("hwlicense")


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A test that did not run is a hole in what the project promises, so it counts as a failure."""
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"Skipped, which is not allowed here: {report.longrepr}"
        if hasattr(report, "wasxfail"):
            del report.wasxfail


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn skipped and expectedly failing tests into failures."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn skipped modules into errors."""
    report = yield
    _fail_if_skipped(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the documentation's blocks that were left out, with their reasons."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    left_out = [str(value) for report in reports for key, value in report.user_properties if key == "not run"]
    if left_out:
        terminalreporter.section(f"documentation blocks not run: {len(left_out)}")
        for line in left_out:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Vendor:
    """A vendor that many tests share; those that approve states make one of their own."""
    from tests.world import Vendor  # noqa: PLC0415  # this file also stands alone, in the test of its hooks

    return Vendor(tmp_path_factory.mktemp("acme"), remember=False)


@pytest.fixture
def own_vendor(tmp_path: Path) -> Vendor:
    """A vendor for one test."""
    from tests.world import Vendor  # noqa: PLC0415

    (tmp_path / "acme").mkdir()
    return Vendor(tmp_path / "acme")


@pytest.fixture
def device(tmp_path: Path, hwlicense_tpms: Callable[..., Tpm]) -> Device:
    """A device with a home and a TPM, not enrolled."""
    from hwlicense.device.home import Home  # noqa: PLC0415
    from tests.world import Device  # noqa: PLC0415

    return Device(Home(tmp_path / "home"), hwlicense_tpms())
