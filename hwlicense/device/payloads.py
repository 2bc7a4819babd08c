"""What an application gives to record: checked, and in the encoding that records have."""

from __future__ import annotations

from hashlib import sha256
from json import dumps
from typing import TYPE_CHECKING

import msgspec

from hwlicense.core.chain import PAYLOAD_LIMIT, plain_json
from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hwlicense.core.chain import Sensor, SensorSignature


def identified(
    sensors: Mapping[str, Sensor], content: bytes | None, digest: bytes | None, sensor: str | None, signature: bytes
) -> tuple[bytes | None, SensorSignature | None]:
    """The SHA-256 of an input, and its sensor's signature, verified; as `append` takes them.

    Raises DamagedError SIGNATURE_INVALID, UsageError.
    """
    _check_types(content, digest, sensor, signature)
    signed = None
    if sensor is not None or signature:
        if sensor is None or sensor not in sensors or content is None or not signature:
            what = "A sensor's signature takes input=, signature= and the name of one of the recording's sensors."
            raise UsageError(Reason.USAGE, what, "Give sensors={name: public key} to model.outputs().")
        signed = sensors[sensor].check(content, signature)
    if content is not None:
        digest = sha256(content).digest()
    if digest is not None and len(digest) != sha256().digest_size:
        raise UsageError(Reason.USAGE, "A digest of an input is a SHA-256, 32 bytes.", "Or give input= itself.")
    return digest, signed


def _check_types(content: object, digest: object, sensor: object, signature: object) -> None:
    sound = isinstance(content, bytes | bytearray | memoryview | None) and isinstance(digest, bytes | None)
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
