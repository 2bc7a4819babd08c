"""Runs at the start of each Python under `hwlicense simulate --dongle`: pyusb shall find the simulated bus.

It imports nothing of pyusb and nothing of the simulators before pyusb itself looks for libusb, and it hands over to
the sitecustomize that would have run without it. Nothing of this is known to, or part of, the product.
"""  # noqa: INP001  a folder for PYTHONPATH, not a package

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_SOCKET = "HWLICENSE_SIMULATOR_USB"
_TARGET = "usb.backend.libusb1"
_HERE = Path(__file__).resolve().parent


class _Loader:
    """Loads pyusb's module for libusb, then replaces what it offers."""

    def __init__(self, loader: Any) -> None:  # noqa: ANN401  any loader
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  of any loader
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from hwlicense_simulators.usb_backend import install_remote  # noqa: PLC0415  not before it is needed

        install_remote(module, os.environ[_SOCKET])


class _Finder:
    """Finds that module as the others do, with the loader above."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # a loader by its methods
                return spec
        return None


def _hand_over() -> None:
    others = [folder for folder in sys.path if Path(folder or ".").resolve() != _HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get(_SOCKET):
    sys.meta_path.insert(0, _Finder())
_hand_over()
