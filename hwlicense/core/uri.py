"""PKCS#11 URIs (RFC 7512): which token, which key and, where a person wrote it, which module."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from hwlicense.core.errors import Reason, UsageError

LIMIT: Final = 1000
_PATH: Final = ("manufacturer", "model", "serial", "token", "object", "id")
_IGNORED: Final = ("type", "slot-id", "slot-description", "slot-manufacturer", "library-manufacturer")
_IGNORED_LIBRARY: Final = ("library-description", "library-version")
_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_VALUE: Final = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=&/?|]|%[0-9A-Fa-f]{2})*")
_PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_SHAPE: Final = "Write it like pkcs11:token=NAME;serial=NUMBER?module-path=/usr/lib/MODULE.so"


class TokenUri(NamedTuple):
    """What a URI names; None matches anything. `module` is the path of the module, for people's own URIs alone."""

    manufacturer: str | None = None
    model: str | None = None
    serial: str | None = None
    token: str | None = None
    object: str | None = None
    id: bytes | None = None
    module: str | None = None

    @classmethod
    def parse(cls, text: str) -> TokenUri:
        """A URI that a person wrote, or that was configured. Raises UsageError, also for one that holds a PIN."""
        if len(text) > LIMIT or not text.startswith("pkcs11:"):
            raise UsageError(Reason.USAGE, f"{_shown(text)} is not a PKCS#11 URI.", _SHAPE)
        path, _, query = text.removeprefix("pkcs11:").partition("?")
        attributes = _attributes(path, ";", text)
        asked = _attributes(query, "&", text)
        if {"pin-value", "pin-source"} & asked.keys():  # the text is not repeated: it may end in a log
            what = "The PKCS#11 URI holds a PIN, or says where one is."
            raise UsageError(Reason.USAGE, what, "Leave it out: give the PIN at the prompt or with --pin-file.")
        module = asked.pop("module-path", None)
        unknown = sorted({*asked, *attributes} - {*_PATH, *_IGNORED, *_IGNORED_LIBRARY})
        if unknown:
            what = f"The PKCS#11 URI has attributes that are not known here: {', '.join(unknown)}."
            raise UsageError(Reason.USAGE, what, _SHAPE)
        identifier = attributes.pop("id", None)
        names = {name: _text(attributes[name], text) for name in _PATH if name in attributes}
        path_of_module = None if module is None else _text(module, text)
        if path_of_module is not None and not path_of_module.startswith("/"):
            # A bare name would be searched for, in places that whoever sets the environment may choose.
            raise UsageError(Reason.USAGE, f"module-path={path_of_module!r} is not an absolute path.", _SHAPE)
        return cls(**names, id=identifier, module=path_of_module)

    @classmethod
    def parse_hint(cls, text: str) -> TokenUri:
        """A URI from a request or license: hints for finding a token, and nothing else. Raises UsageError.

        Whoever wrote that file does not choose native code for this process to load.
        """
        if "?" in text:
            what = "The PKCS#11 URI in the file names a module or a PIN, which no file may choose."
            raise UsageError(Reason.USAGE, what, "Ask whoever made the file for one without.")
        return cls.parse(text)

    def matches(self, other: TokenUri) -> bool:
        """Whether everything that this URI says of the token (not of the key) is so in `other`."""
        pairs = zip(self[:4], other[:4], strict=True)
        return all(wanted is None or wanted == found for wanted, found in pairs)

    def __str__(self) -> str:
        named = zip(_PATH, self[:5], strict=False)
        parts = [f"{name}={_escaped(value.encode())}" for name, value in named if value is not None]
        if self.id is not None:
            parts.append("id=" + "".join(f"%{byte:02X}" for byte in self.id))
        query = "" if self.module is None else f"?module-path={_escaped(self.module.encode(), frozenset(b'/'))}"
        return "pkcs11:" + ";".join(parts) + query


def _attributes(text: str, separator: str, whole: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else []:
        name, equals, value = part.partition("=")
        if not equals or name in found or not _VALUE.fullmatch(value):
            raise UsageError(Reason.USAGE, f"{_shown(whole)} is not a PKCS#11 URI.", _SHAPE)
        found[name] = _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), value.encode())
    return found


def _text(value: bytes, whole: str) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(Reason.USAGE, f"{_shown(whole)} is not a PKCS#11 URI in UTF-8.", _SHAPE)
    return text


def _shown(uri: str) -> str:
    """A text in an error, unless a PIN may be in it: what is shown may end in a log."""
    return "That" if "?" in uri or "pin" in uri.lower() else repr(uri[:200])


def _escaped(value: bytes, plain: frozenset[int] = frozenset()) -> str:
    return "".join(chr(byte) if byte in _PLAIN | plain else f"%{byte:02X}" for byte in value)
