"""The authValues of this device's NV counters, in its home: who has one can burn the opens of its license, no more.

counters/HANDLE     32 bytes, mode 0600
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hwlicense import storage
from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.secret import SIZE, Secret

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from hwlicense.device.home import Home

LOST: Final = (
    "Restore it from a backup of the home. Without one the licenses that this counter counts never open again: "
    "enroll anew (--counted), and ask the vendor for a license or revision for that request."
)
"""What is to be done where an authValue is gone: the TPM gives it to nobody."""

_NAME: Final = "{:08x}"


class Counters:
    """A `CounterStore` in a home."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def read(self, handle: int) -> Secret | None:
        """The authValue, for whoever asks to wipe; None where none is kept. Raises DamagedError HOME_DAMAGED."""
        path = self._folder / _NAME.format(handle)
        with storage.reporting(path):
            if not path.exists():
                return None
        raw = storage.read_limited(path, SIZE)
        if len(raw) != SIZE:
            what = f"{path} is damaged: it has {len(raw)} bytes, not {SIZE}."
            raise DamagedError(Reason.HOME_DAMAGED, what, LOST)
        return Secret(bytearray(raw))

    def keep(self, handle: int, value: Secret) -> None:
        """Keep it, before the counter is made. Raises StorageError."""
        storage.make_folders(self._folder, 0o700)
        storage.atomic_write(self._folder / _NAME.format(handle), bytes(value.buffer), 0o600)

    def alone(self) -> AbstractContextManager[None]:
        """Keep installations and other enrolments of this home waiting. Raises StorageError."""
        storage.make_folders(self._home.path, 0o700)
        return storage.exclusive(self._home.path)

    def spare(self) -> list[int]:
        """Counters that were made and that no license uses; none where one cannot be read, which may use any."""
        with storage.reporting(self._folder):
            names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        kept = {int(name, 16) for name in names if len(name) == len(_NAME.format(0)) and set(name) <= _DIGITS}
        try:
            return sorted(kept - self._home.counters_in_use())
        except DamagedError:
            return []

    @property
    def _folder(self) -> Path:
        return self._home.path / "counters"


_DIGITS: Final = frozenset("0123456789abcdef")
