"""What runs in the container: it opens the package under the license that was mounted in; its account lies aside."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hwlicense

HERE = Path(__file__).parent


def main() -> int:
    """Open, read, and say what is there; a refusal ends it with the refusal's exit status."""
    vendor = (HERE / "vendor.pub.json").read_text()
    try:
        with hwlicense.open(HERE / "reader.hwpkg", vendor=vendor, state=os.environ["READER_STATE"]) as model:
            for name in model.names:
                print(name, len(model.read(name)))
    except hwlicense.HwlicenseError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
