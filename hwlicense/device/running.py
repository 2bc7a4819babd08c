"""A sealed program: where it begins, and the model that it was started with."""

from __future__ import annotations

import importlib
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hwlicense.core import code
from hwlicense.core.errors import Reason, UsageError
from hwlicense.device import sealed_code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwlicense.core.documents import Manifest
    from hwlicense.device.model import Model

_HINT = "`hwlicense inspect` shows where a package's program begins; --entry names another place."
_started: list[Model] = []


def entry_of(manifest: Manifest, given: str | None = None) -> code.Entry:
    """Where the program begins: as `given`, else as packed. Needs no key.

    Raises UsageError: CODE_ABSENT, PYTHON_UNSUPPORTED, ENTRY_ABSENT.
    """
    sealed_code.check_python(manifest)
    text = given if given is not None else manifest.code.entry if manifest.code else None
    if text is None:
        raise UsageError(Reason.ENTRY_ABSENT, f"The package {manifest.name!r} says no place to begin.", _HINT)
    entry = code.parse_entry(text)
    tree = code.Tree((member.name for member in manifest.members), sealed_code.SUFFIXES)
    found = tree.find(entry.module)
    if found is None or found.member is None:
        what = f"The code in {manifest.name!r} has no module {entry.module!r} to begin in."
        raise UsageError(Reason.ENTRY_ABSENT, what, _HINT)
    return entry


def begin(entry: code.Entry) -> Any:  # noqa: ANN401  # whatever the program returns
    """Import the entry's module and call it; what it returns. Raises UsageError ENTRY_ABSENT, and what it raises."""
    found: Any = importlib.import_module(entry.module)
    for name in entry.function.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            what = f"The module {entry.module!r} has no {entry.function!r} to begin with."
            raise UsageError(Reason.ENTRY_ABSENT, what, _HINT) from None
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        what = f"The program begins in {entry.module}:{entry.function}, which cannot be called: {error}."
        raise UsageError(Reason.ENTRY_ABSENT, what, "It must be a function without arguments that it needs.") from None
    except ValueError:  # one that does not say what it takes
        pass
    return found()


@contextmanager
def started(model: Model) -> Iterator[None]:
    """Have `current` give this model meanwhile."""
    _started.append(model)
    try:
        yield
    finally:
        _started.remove(model)


def current() -> Model:
    """The model of the package that this program was started from. See `hwlicense.current`."""
    if not _started:
        what = "This process was not started by `hwlicense run`, or is a child that was started afresh."
        hint = "Start it so, or open the package: `hwlicense.open`. A forked child has its parent's model."
        raise UsageError(Reason.USAGE, what, hint)
    return _started[-1]
