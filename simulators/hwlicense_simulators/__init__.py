"""Simulated hardware for testing products that use hwlicense. Never part of a product."""

from hwlicense_simulators.authority import CertificateAuthority
from hwlicense_simulators.dongle import Dongle
from hwlicense_simulators.errors import ProgramMissingError, SimulatorError
from hwlicense_simulators.measured_boot import DEFAULT_BOOT, predict_pcrs
from hwlicense_simulators.token import Reader, Token
from hwlicense_simulators.tpm import Tpm
from hwlicense_simulators.usb_bus import Bus
from hwlicense_simulators.wire import Exchange, Wire

__all__ = [
    "DEFAULT_BOOT",
    "Bus",
    "CertificateAuthority",
    "Dongle",
    "Exchange",
    "ProgramMissingError",
    "Reader",
    "SimulatorError",
    "Token",
    "Tpm",
    "Wire",
    "predict_pcrs",
]
__version__ = "0.1.0"
