"""What a grant says of the process that opens a package: what the guard refuses, and which code may be loaded."""

# Annotations are no texts, as in `documents`

from collections.abc import Mapping
from typing import Annotated, Final, Literal, get_args

import msgspec

from hwlicense.core.schema import Digest, Document

Check = Literal["debugger", "tracing", "preloaded", "environment", "site", "replaced", "swap", "shadowed"]
"""What the guard looks for. docs/guard.md says what each finds."""

CHECKS: Final[tuple[Check, ...]] = get_args(Check)

PRELOADS: Final = ("LD_PRELOAD", "LD_AUDIT")
"""Variables by which the dynamic linker loads libraries before those that a program names."""

FILE_LIMIT: Final = 4096
"""Files that one license can name."""

LONGEST_INTERVAL: Final = 3600
"""Seconds between two looks of the guard, at the most."""


def isolated(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables with which `hwlicense run` starts: without those of Python and of the dynamic linker's preloads."""
    return {
        name: value for name, value in environment.items() if not name.startswith("PYTHON") and name not in PRELOADS
    }


class Guard(Document, frozen=True):
    """Findings of the checks in `refuse` refuse the opening, and later end the use; `interval` in seconds."""

    refuse: Annotated[list[Check], msgspec.Meta(min_length=1, max_length=len(CHECKS))]
    interval: Annotated[int, msgspec.Meta(ge=1, le=LONGEST_INTERVAL)]


class File(Document, frozen=True, omit_defaults=True):
    """A file that may be loaded, by SHA-256 of its content; the name is for people. `required`: it must be loaded."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    digest: Digest
    required: bool = False


class Application(Document, frozen=True):
    """All that the process may have loaded: interpreter, native libraries, files of Python modules."""

    files: Annotated[list[File], msgspec.Meta(min_length=1, max_length=FILE_LIMIT)]
