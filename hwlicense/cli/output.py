"""What goes where: data alone on stdout, everything else on stderr.

An error is three lines, `error:`, `reason:` and, where there is something to do, `hint:`. Progress shows only where
stderr is a terminal. Text from files is shown without control characters, which could rewrite a terminal.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hwlicense.core.errors import HwlicenseError, Reason


_CONTROLS: Final = re.compile("[\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` with control characters spelled out."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def say(text: str = "") -> None:
    """A line of data."""
    _print(printable(text))


def note(text: str) -> None:
    """A line for a person."""
    click.echo(printable(text), err=True)


def failed(error: HwlicenseError) -> None:
    """The lines of an error, and a line for each of its notes."""
    failure(error.reason, error.what, error.hint, getattr(error, "__notes__", []))


def failure(reason: Reason, what: str, hint: str, notes: Sequence[str] = ()) -> None:
    """The three lines of an error, and the same as JSON where the command was asked for JSON."""
    note(f"error: {what}")
    note(f"reason: {reason}")
    if hint:
        note(f"hint: {hint}")
    for each in notes:
        note(f"  {each}")
    if "--json" in sys.argv:
        emit({"error": {"reason": str(reason), "what": what, "hint": hint} | ({"notes": list(notes)} if notes else {})})


def emit(value: Any, *, indent: bool = True) -> None:  # noqa: ANN401  # whatever JSON can hold
    """A JSON document, indented or on one line."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2 if indent else -1).decode()
    _print(_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))  # which JSON lets through, and terminals obey


def _print(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:  # whoever read has enough; 141 is what a shell says of that
        raise click.exceptions.Exit(141) from None


def after_interrupt() -> None:
    """Leave the line of a terminal that has just shown ^C."""
    if sys.stderr is not None and sys.stderr.isatty():
        click.echo(err=True)


def columns(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, the values aligned."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        say(f"{name:<{width}}  {value}".rstrip())


def shown(value: object) -> str:
    """A value of a report, for a person."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} = {shown(inner)}" for name, inner in value.items()) or "-"
    return (", ".join(map(str, value)) or "-") if isinstance(value, list | tuple) else str(value)


def _columns() -> int:
    """Of the terminal that stderr is: stdout may be a file."""
    with suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns
    return shutil.get_terminal_size().columns


_BESIDE_THE_BAR: Final = len("  [] 100%  1d 00:00:00  99,999 MB/s")


@contextmanager
def progress(label: str, total: int, *, in_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left, and the rate of bytes or the number of other things.

    What it gives takes how many were done since its last call.
    """
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _done: None
        return
    room = _columns() - len(label) - _BESIDE_THE_BAR
    started = time.monotonic()

    def rate(_: object) -> str:
        return f"{bar.pos / max(time.monotonic() - started, 1e-3) / 1e6:,.0f} MB/s"

    options: dict[str, Any] = {"update_min_steps": 1 << 22, "item_show_func": rate} if in_bytes else {"show_pos": True}
    bar = click.progressbar(length=total, label=label, file=sys.stderr, width=max(1, min(30, room)), **options)
    with bar:
        yield bar.update
