"""What an application gives to record: checked, and in the encoding that records have."""

from __future__ import annotations

from json import dumps

import msgspec

from hwlicense.core.chain import PAYLOAD_LIMIT, plain_json
from hwlicense.core.errors import Reason, UsageError


def check_types(input_: object, digest: object, sensor: object, signature: object) -> None:
    """Raises UsageError for other types than `Outputs.append` says."""
    sound = isinstance(input_, bytes | bytearray | memoryview | None) and isinstance(digest, bytes | None)
    if not (sound and isinstance(sensor, str | None) and isinstance(signature, bytes)):
        what = "An input is bytes, and so are its digest and a signature; a sensor is named by text."
        raise UsageError(Reason.USAGE, what, "Encode text first: input.encode().")


def encoded(payload: object) -> tuple[bytes | None, bytes | None]:
    """JSON or data. Raises UsageError for what is neither, or too large."""
    if payload is None:
        return None, None
    if isinstance(payload, bytes | bytearray | memoryview):
        data = bytes(payload)
        if len(data) <= PAYLOAD_LIMIT:
            return None, data
    else:
        try:
            json = msgspec.json.encode(payload)
            if b"null" in json:  # which is also what the encoder makes of NaN
                dumps(msgspec.to_builtins(payload, str_keys=True), allow_nan=False)
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            what = f"The payload is nothing that JSON can hold: {error}."
            raise UsageError(Reason.USAGE, what, "Give text, numbers, lists and dicts, or bytes.") from error
        if plain_json(json):
            return json, None
    what = f"The payload is larger than {PAYLOAD_LIMIT:,} bytes, or holds what JSON cannot."
    raise UsageError(Reason.USAGE, what, "Record the SHA-256 of large things, and keep them elsewhere.")
