"""What a file of a signed log says, whoever wrote it: for `hwlicense inspect`."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from hwlicense.core.auditing import moment
from hwlicense.core.chain import End, Gap, Input, Output, Part, Start, TpmCertificate, parse
from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.schema import COPY_AGAIN
from hwlicense.core.tpm.structures import Public
from hwlicense.core.wording import quantity
from hwlicense.vendor import logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hwlicense.core.chain import AnyRecord, Certificate

UNCHECKED: Final = "nothing is checked: `vendor verify-outputs` does that"
_BEGINNINGS: Final = (b'{"kind":"start"', b'{"kind":"part"')


def begins(start: bytes) -> bool:
    """Whether a file that starts so is of a log."""
    return start.startswith(_BEGINNINGS)


def document(path: Path) -> dict[str, Any]:
    """What the file holds, for JSON. Raises DamagedError for what is no record, UsageError, StorageError."""
    first: AnyRecord | None = None
    last: AnyRecord | None = None
    kinds, dropped, torn = Counter[type](), 0, False
    for number, line, whole in logs.lines(path):
        if not whole:
            torn = True
            break
        try:
            last = parse(line)
        except DamagedError as error:
            error.what = f"Line {number}: {error.what}"
            raise
        first = first or last
        kinds[type(last)] += 1
        dropped += last.dropped if isinstance(last, Gap) else 0
    if first is None or last is None:
        raise DamagedError(Reason.OUTPUTS_DAMAGED, "The file has not one whole record.", COPY_AGAIN)
    return {
        **_beginning(first),
        "from": moment(first.wall),
        "to": moment(last.wall),
        "records": kinds.total(),
        "outputs": kinds[Output],
        "inputs": kinds[Input],
        "dropped": dropped,
        "torn": torn,
        "end": _end(last) if isinstance(last, End) else None,
    }


def _beginning(first: AnyRecord) -> dict[str, Any]:
    if isinstance(first, Start):
        said = first.statement
        return {
            "vendor": said.vendor,
            "license": said.license,
            "revision": said.revision,
            "package": said.package,
            "log": said.log,
            "recording": said.recording,
            "part": 1,
            "certified": _certified(first.certificate),
        }
    if isinstance(first, Part):
        return {"part": first.part, "start": first.start.hex()}
    what = "The file begins with neither a recording nor a part of one: its first records are missing."
    raise DamagedError(Reason.OUTPUTS_DAMAGED, what, COPY_AGAIN)


def _certified(certificate: Certificate) -> dict[str, Any]:
    """By what, and which it is: a TPM's attestation key by its Name, a token's key by its SHA-256."""
    if isinstance(certificate, TpmCertificate):
        name = Public.parse(certificate.attestation_key).name.hex()
        return {"by": "tpm", "key": name, "pcrs": {f"{p.bank}:{p.index}": p.value.hex() for p in certificate.pcrs}}
    return {"by": "pkcs11", "key": hashlib.sha256(certificate.key).hexdigest(), "pcrs": {}}


def _end(record: End) -> dict[str, Any]:
    certified = _certified(record.certificate) if record.certificate else None
    return {"certified": certified, "refusal": record.refusal}


def lines(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same for a person."""
    if "license" in said:
        yield from [("vendor", said["vendor"]), ("license", f"{said['license']}, revision {said['revision']}")]
        yield from [("package", said["package"]), ("log", said["log"]), ("recording", str(said["recording"]))]
        yield "certified by", _hardware(said["certified"])
        yield from [(f"PCR {name}", value) for name, value in said["certified"]["pcrs"].items()]
    else:
        yield "part", f"{said['part']} of the recording that starts with {said['start']}"
    yield from [("from", said["from"]), ("to", said["to"])]
    found = ", ".join((quantity(said["outputs"], "output"), quantity(said["inputs"], "input")))
    yield "records", f"{said['records']:,}: {found}"
    yield "dropped", f"{said['dropped']:,}"
    end = said["end"]
    if end is None:
        yield "end", "not in this file" + ("; it ends in the middle of a record" if said["torn"] else "")
    elif end["certified"] is None:
        yield "end", f"not certified ({end['refusal']})"
    else:
        yield "end", f"certified by {_hardware(end['certified'])}"


def _hardware(certified: dict[str, Any]) -> str:
    return f"{'TPM, AK' if certified['by'] == 'tpm' else 'token, key'} {certified['key']}"
