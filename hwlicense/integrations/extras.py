"""What each framework's module asks first: that its framework is here, in a version that serves, and a model given."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def extra(name: str, *modules: str) -> Iterator[None]:
    """Around the import of `modules`, which `hwlicense[name]` installs. Raises UsageError EXTRA_MISSING."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in modules:
            raise
        what = f"{error.name} cannot be loaded: {error}."
        raise UsageError(Reason.EXTRA_MISSING, what, f'pip install "hwlicense[{name}]"') from error


def require(name: str, module: str, version: str, least: str) -> None:
    """Raises UsageError EXTRA_UNSUPPORTED for a `version` of `module` before `least`."""
    if _numbers(version) < _numbers(least):
        what = f"{module} {version} is too old for this: {least} is the oldest that serves."
        raise UsageError(Reason.EXTRA_UNSUPPORTED, what, f'pip install --upgrade "hwlicense[{name}]"')


def check_model(model: object) -> None:
    """Raises UsageError for what is no open model: above all a path, which the frameworks' own functions take."""
    if not hasattr(model, "spend"):
        path = isinstance(model, str | bytes | os.PathLike)
        given = f"{str(model)!r} is a path, and" if path else f"What was given ({type(model).__name__}) is"
        what = f"{given} no open model."
        raise UsageError(Reason.USAGE, what, "Open the package with `hwlicense.open`, and give the model and a member.")


def _numbers(version: str) -> list[int]:
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():  # rc1, dev0: the release that they come before counts
            break
        numbers.append(int(part))
    return numbers
