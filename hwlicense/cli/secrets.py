"""Passphrases and PINs: from a prompt, a file or a file descriptor, never from the arguments or the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from hwlicense.cli import output
from hwlicense.core.errors import Reason, RefusedError, UsageError
from hwlicense.core.hardware import PinPrompt, last_try_refused
from hwlicense.core.secret import Secret
from hwlicense.storage import reporting

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hwlicense.core.hardware import PinSource
    from hwlicense.vendor.folder import Folder
    from hwlicense.vendor.signing import Keys

LIMIT: Final = 1024

passphrase_option = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path, readable=False),
    help="Read the passphrase of the vendor's keys from this file (/dev/fd/N for a file descriptor).",
)
pin_option = click.option(
    "--pin-file",
    type=click.Path(path_type=Path, readable=False),
    help="Read the PIN from this file (/dev/fd/N for a file descriptor).",
)


last_try_option = click.option(
    "--last-try",
    is_flag=True,
    help="With --pin-file: try the PIN even if a wrong one would lock the token.",
)


token_pin_option = click.option(
    "--token-pin-file",
    type=click.Path(path_type=Path, readable=False),
    help="Read the token's PIN from this file, where the license's TPM asks for another.",
)


def pin_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--pin-file and --last-try, for what a token asks."""
    return pin_option(last_try_option(function))


def from_file(path: Path) -> Secret:
    """The first line of a file, a pipe included. Raises UsageError where it is empty or longer than 1,024 bytes."""
    with Secret(bytearray(LIMIT + 1)) as buffer, reporting(path):
        fd, size = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
        try:
            while size <= LIMIT and (got := os.readv(fd, [memoryview(buffer.buffer)[size:]])):
                size += got
        finally:
            os.close(fd)
        end = buffer.buffer.find(b"\n", 0, size)
        length = size if end < 0 else end
        if length and buffer.buffer[length - 1] == ord("\r"):  # of a file that was written on Windows
            length -= 1
        if not 0 < length <= LIMIT:
            what = f"{path} holds no secret of 1 to {LIMIT:,} bytes in its first line."
            raise UsageError(Reason.USAGE, what, "Put the secret alone into the file.")
        return Secret(buffer.buffer[:length])


def from_prompt(text: str, *, confirm: bool = False) -> Secret | None:
    """What a person types, or None where nobody is at a terminal."""
    if not _at_terminal():
        return None
    return Secret(bytearray(click.prompt(text, hide_input=True, confirmation_prompt=confirm, err=True), "utf-8"))


def new_passphrase(path: Path | None) -> Secret:
    """For new keys. Raises RefusedError PASSPHRASE_NEEDED."""
    found = from_file(path) if path else from_prompt("New passphrase for the vendor's keys", confirm=True)
    if found is None:
        what = "New keys need a passphrase, and there is no terminal to ask for it."
        raise RefusedError(
            Reason.PASSPHRASE_NEEDED, what, "Give --passphrase-file, or --no-passphrase for keys in the clear."
        )
    return found


def unlock(folder: Folder, path: Path | None) -> Keys:
    """The vendor's keys, with the passphrase where there is one."""
    if not folder.locked:
        return folder.unlock(None)
    found = from_file(path) if path else from_prompt(f"Passphrase for {folder.path}")
    try:
        return folder.unlock(found)
    finally:
        if found:
            found.wipe()


def pin_source(path: Path | None, token_path: Path | None = None, *, last_try: bool = False) -> PinSource | None:
    """Where PINs come from; None where there is neither a file nor a terminal.

    A file holds the PIN of one piece of hardware: `token_path` that of the token where `path` is for the TPM. At a
    terminal the last try takes a second yes there; a file takes `last_try`.
    """
    agreed = last_try
    if not path and not token_path:
        return _asked if _at_terminal() else None

    def read(prompt: str, /, *, last_try: bool = False) -> Secret:
        if last_try and not agreed:
            raise last_try_refused(prompt)
        chosen = path
        if isinstance(prompt, PinPrompt):
            if prompt.alike > 1 or (prompt.pieces > 1 and not (path and token_path)):
                what = f"{prompt.pieces} pieces of the license's hardware ask for PINs, and a file holds one piece's."
                hint = "Give the token's with --token-pin-file beside --pin-file for the TPM's; else use a terminal."
                raise RefusedError(Reason.PIN_NEEDED, what, hint)
            if prompt.kind == "pkcs11" and token_path:
                chosen = token_path
        return from_file(chosen) if chosen else _asked(prompt, last_try=last_try)

    return read


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()  # services may start with it closed


def _asked(prompt: str, /, *, last_try: bool = False) -> Secret:
    if last_try:
        output.note(prompt)
        question = "One try is left: a wrong PIN locks it. Go on, and be asked for the PIN?"
        if not click.confirm(question, default=False, err=True):
            raise last_try_refused(prompt)
    found = from_prompt("PIN" if last_try else output.printable(prompt))
    if found is None:
        raise RefusedError(Reason.PIN_NEEDED, "The license asks for a PIN.", "Give --pin-file, or use a terminal.")
    return found
