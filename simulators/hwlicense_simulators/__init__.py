"""Simulated hardware for testing products that use hwlicense. Never part of a product."""

from hwlicense_simulators.authority import CertificateAuthority
from hwlicense_simulators.errors import ProgramMissingError, SimulatorError
from hwlicense_simulators.measured_boot import DEFAULT_BOOT, predict_pcrs
from hwlicense_simulators.tpm import Tpm
from hwlicense_simulators.wire import Exchange, Wire

__all__ = [
    "DEFAULT_BOOT",
    "CertificateAuthority",
    "Exchange",
    "ProgramMissingError",
    "SimulatorError",
    "Tpm",
    "Wire",
    "predict_pcrs",
]
__version__ = "0.1.0"
