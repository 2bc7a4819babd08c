"""What runs as a service or in a container: it opens the package under the license of its home, and reads it.

The environment says where things are: HWLICENSE_HOME the home, READER_STATE the folder for what changes where the home
is read-only, CREDENTIALS_DIRECTORY (systemd's) a file `pin`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hwlicense

HERE = Path(__file__).parent
A_PERSON_MUST_ACT = 77  # EX_NOPERM of sysexits.h: a wrong PIN that is tried again and again locks TPM and token


def main() -> int:
    """Open, read, and say what is there; a refusal ends it with the refusal's exit status."""
    vendor = (HERE / "vendor.pub.json").read_text()
    state = os.environ.get("READER_STATE")
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", HERE), "pin")
    pin = (lambda _prompt: bytearray(credential.read_bytes())) if credential.exists() else None
    try:
        with hwlicense.open(HERE / "reader.hwpkg", vendor=vendor, state=state, pin=pin) as model:
            print("bytes of keys that this process alone can read:", model.protection.secret)
            for name in model.names:
                print(name, len(model.read(name)))
    except hwlicense.HwlicenseError as error:
        print(f"{error}\nreason: {error.reason}\nhint: {error.hint}", file=sys.stderr)
        return A_PERSON_MUST_ACT if error.reason.startswith("PIN_") else error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
