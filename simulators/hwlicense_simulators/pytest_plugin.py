"""Fixtures for tests that need hardware. Loading this plugin changes nothing; a missing simulator is a failed test."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # imported in the fixtures, so that other test suites do not pay for it
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hwlicense_simulators import CertificateAuthority, Dongle, Reader, Token, Tpm


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


@pytest.fixture
def hwlicense_reader() -> Iterator[Reader]:
    """A new PKCS#11 module without tokens, in which things go wrong on demand; its tokens end with the test."""
    from hwlicense_simulators import Reader  # noqa: PLC0415

    with Reader() as reader:
        yield reader


@pytest.fixture
def hwlicense_tokens(hwlicense_reader: Reader) -> Callable[..., Token]:
    """A function that makes a simulated token; it takes what `Reader.token` takes. All are in `hwlicense_reader`."""
    return hwlicense_reader.token


@pytest.fixture
def hwlicense_token(hwlicense_tokens: Callable[..., Token], monkeypatch: pytest.MonkeyPatch) -> Token:
    """A new simulated token, plugged in, with the PIN 123456. During the test HWLICENSE_TOKEN names it."""
    token = hwlicense_tokens()
    for name, value in token.environment.items():
        monkeypatch.setenv(name, value)
    return token


@pytest.fixture
def hwlicense_dongles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Dongle]]:
    """A function that makes a simulated dongle, plugged in; it takes what `Dongle` takes. All end with the test.

    They are on one bus, which during the test pyusb finds, in this process and in those that it starts.
    """
    from hwlicense_simulators import Bus, Dongle  # noqa: PLC0415

    bus = Bus()
    with contextlib.ExitStack() as stack:
        stack.enter_context(bus.serve())
        stack.enter_context(bus.installed())
        for name, value in bus.environment.items():
            monkeypatch.setenv(name, value)

        def make(*arguments: Any, **options: Any) -> Dongle:  # noqa: ANN401  as Dongle has them
            return stack.enter_context(Dongle(*arguments, **{"bus": bus, **options}))

        yield make


@pytest.fixture
def hwlicense_dongle(hwlicense_dongles: Callable[..., Dongle], monkeypatch: pytest.MonkeyPatch) -> Dongle:
    """A new simulated dongle, plugged in, with a secret in slot 2. During the test HWLICENSE_USB names it."""
    dongle = hwlicense_dongles()
    monkeypatch.setenv("HWLICENSE_USB", dongle.selector)
    return dongle
