"""What holds for all tests: none is skipped in silence, and examples are not hurried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

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
