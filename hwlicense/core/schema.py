"""What every document is made of: field types, and the one strict decoder.

A payload has exactly one encoding: compact JSON with the fields in the order of its struct, bytes in padded base64
(RFC 4648, section 4). Decoding refuses unknown fields, wrong types, absurd sizes and anything that does not encode
back to the same bytes, duplicate keys and odd spacing among them.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from hwlicense.core.errors import DamagedError, Reason, UsageError

SCHEMA: Final = 1
"""Version of every schema here. A device refuses versions that it does not know."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Blob = Annotated[bytes, msgspec.Meta(max_length=4096)]
Identifier = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
Generation = Annotated[int, msgspec.Meta(ge=1, lt=2**32)]


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct: immutable, and closed to fields that the schema does not name."""


# ---- encoding --------------------------------------------------------------------------------------------

D = TypeVar("D", bound=msgspec.Struct)

SIZE_LIMITS: Final[dict[type[msgspec.Struct], int]] = {}
"""Bytes of a payload, where a module says that 1 MiB is not enough or too much."""

DEFAULT_SIZE_LIMIT: Final = 1 << 20

FILE_LIMIT: Final = 4 << 20
"""Bytes of any file of the project but a package: an envelope is a third longer than its payload."""

COPY_AGAIN: Final = "Copy the file again from where it was made; it must not be edited."


def encode(document: msgspec.Struct) -> bytes:
    """The one encoding of a document."""
    return msgspec.json.encode(document)


def check(document: Document) -> None:
    """Refuse to make what `decode` would refuse to read. Raises UsageError."""
    try:
        decode(encode(document), type(document))
    except (DamagedError, UnicodeEncodeError) as error:
        why = error.what if isinstance(error, DamagedError) else "A text is not in UTF-8."
        what = f"The {_title(type(document))} cannot be made. {why}"
        raise UsageError(Reason.USAGE, what, "Names have 1 to 200 characters; lists have the limits shown.") from None


def decode(raw: bytes, kind: type[D], *, spaced: bool = False) -> D:
    """Decode `raw` strictly. `spaced` lets through white space between tokens, for files that people edit.

    Raises DamagedError: DOCUMENT_TOO_LARGE, SCHEMA_UNSUPPORTED, DOCUMENT_MALFORMED.
    """
    what = _title(kind)
    limit = SIZE_LIMITS.get(kind, DEFAULT_SIZE_LIMIT)
    if len(raw) > limit:
        raise DamagedError(
            Reason.DOCUMENT_TOO_LARGE, f"The {what} is larger than {limit:,} bytes.", "Check the file's name."
        )
    try:
        if spaced:
            raw = msgspec.json.format(raw.strip(), indent=-1)
        version = msgspec.json.decode(raw, type=_Schema).schema
        if version != SCHEMA:
            raise DamagedError(
                Reason.SCHEMA_UNSUPPORTED,
                f"The {what} has schema {version}; this release reads schema {SCHEMA}.",
                "Use a release of hwlicense that knows this schema.",
            )
        document = msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(
            Reason.DOCUMENT_MALFORMED,
            f"The {what} does not fit its schema: {error}.",
            COPY_AGAIN,
        ) from None
    if encode(document) != raw:  # duplicate keys, other spacing and other spellings of one value
        raise DamagedError(
            Reason.DOCUMENT_MALFORMED,
            f"The {what} is not in its one encoding (duplicate keys, odd spacing or base64).",
            COPY_AGAIN,
        )
    return document


class _Schema(msgspec.Struct):
    schema: int = SCHEMA


def prepare(*kinds: type[msgspec.Struct]) -> None:
    """Have msgspec learn these types now. Modules call it as they are imported, which one thread at a time does.

    Left to the first decoding, two threads that come at once crash the process (msgspec 0.22).
    """
    for kind in kinds:
        msgspec.json.Decoder(kind)


prepare(_Schema)


def _title(kind: type[msgspec.Struct]) -> str:
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).strip()
