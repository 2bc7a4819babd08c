"""Orders by files, for shell scripts: whoever makes the file `pull-dongle` in a folder pulls the simulated dongle."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

import click

from hwlicense_simulators.errors import SimulatorError
from hwlicense_simulators.process import ShortFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from hwlicense_simulators.dongle import Dongle
    from hwlicense_simulators.token import Token

VARIABLE = "HWLICENSE_SIMULATOR_CONTROL"
_SECONDS = 0.05


def orders(token: Token | None, dongle: Dongle | None) -> dict[str, Callable[[], bool]]:
    """What can be ordered, by the names of the files."""
    known: dict[str, Callable[[], bool]] = {}
    for name, hardware in (("token", token), ("dongle", dongle)):
        if hardware is not None:
            known |= {f"pull-{name}": _done(hardware.pull), f"plug-{name}": _done(hardware.plug)}
    buttons = [button for button in (token.reader if token else None, dongle) if button is not None]

    def touch() -> bool:
        wanted = next((button for button in buttons if button.awaiting_touch), None)
        if wanted is not None:
            wanted.touch()
        return wanted is not None

    return known | {"touch": touch}


def _done(do: Callable[[], None]) -> Callable[[], bool]:
    def order() -> bool:
        do()
        return True

    return order


class Control:
    """A folder for orders, as a context manager. A file is removed when its order is carried out.

    A touch waits until it is wanted. What cannot be done is said on standard error, and its file removed as well.
    """

    def __init__(self, known: Mapping[str, Callable[[], bool]]) -> None:
        self._known = known
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="simulator control", daemon=True)
        self._folder: ShortFolder | None = None

    def __enter__(self) -> Self:
        self._folder = ShortFolder()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._folder is not None:
            self._folder.close()

    @property
    def environment(self) -> dict[str, str]:
        """The variable for a child process: HWLICENSE_SIMULATOR_CONTROL."""
        return {VARIABLE: str(self._path)}

    @property
    def _path(self) -> Path:
        if self._folder is None:
            raise SimulatorError("the control folder is not in use", "use it as a context manager")
        return self._folder.path

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            # Files come and go; those that came first are first.
            with contextlib.suppress(FileNotFoundError):
                for path in sorted(self._path.iterdir(), key=lambda path: path.stat().st_mtime_ns):
                    if self._carry_out(path.name):
                        path.unlink()

    def _carry_out(self, name: str) -> bool:
        try:
            return self._order(name)()
        except SimulatorError as error:
            click.echo(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), err=True)
            return True

    def _order(self, name: str) -> Callable[[], bool]:
        if name not in self._known:
            raise SimulatorError(f"no such order: {name}", f"one of {', '.join(sorted(self._known))}")
        return self._known[name]
