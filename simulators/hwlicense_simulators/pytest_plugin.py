"""Fixtures for tests that need hardware. Loading this plugin changes nothing; a missing simulator is a failed test."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # imported in the fixtures, so that other test suites do not pay for it
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense_simulators import CertificateAuthority, Tpm


@pytest.fixture(scope="session")
def hwlicense_authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    """The certificate authority of this session's simulated TPMs."""
    from hwlicense_simulators import CertificateAuthority  # noqa: PLC0415

    return CertificateAuthority(tmp_path_factory.mktemp("simulated-tpm-maker") / "authority")


@pytest.fixture
def hwlicense_ek_root(hwlicense_authority: CertificateAuthority) -> Path:
    """PEM file with the root of the EK certificates of this session's simulated TPMs."""
    return hwlicense_authority.root


@pytest.fixture
def hwlicense_tpms(hwlicense_authority: CertificateAuthority) -> Iterator[Callable[..., Tpm]]:
    """A function that makes a simulated TPM, switched on; it takes what `Tpm` takes. All end with the test."""
    from hwlicense_simulators import Tpm  # noqa: PLC0415

    with contextlib.ExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> Tpm:  # noqa: ANN401  as Tpm has them
            return stack.enter_context(Tpm(*arguments, **{"authority": hwlicense_authority, **options}))

        yield make


@pytest.fixture
def hwlicense_tpm(hwlicense_tpms: Callable[..., Tpm], monkeypatch: pytest.MonkeyPatch) -> Tpm:
    """A new simulated TPM, switched on. During the test HWLICENSE_TPM and TPM2TOOLS_TCTI name it."""
    tpm = hwlicense_tpms()
    for name, value in tpm.environment.items():
        monkeypatch.setenv(name, value)
    return tpm
