"""A network sensor: reads lines of traffic, and writes signed alerts.

    python sensor.py PACKAGE HOME FOLDER < traffic

Each line is "SOURCE DESTINATION PORT". A source that tries more ports than the model's threshold scans: that is the
alert. The model here is one number; what matters is what is recorded, and how it can be checked later:

    hwlicense vendor verify-outputs --vendor VENDOR_DIR --license LICENSE.hwlic FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import hwlicense
from hwlicense import HwlicenseError, StorageError

VENDOR = Path(__file__).with_name("vendor.pub.json")  # in a product: a constant of the program


def watch(package: str, home: str, folder: str) -> None:
    """Read the traffic to its end."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    with hwlicense.open(package, vendor=VENDOR.read_text(), home=home) as model:
        threshold = json.loads(bytes(model.read("model.json")))["ports"]
        # Where the disk is too slow, the traffic goes on, and the log says how many alerts it lacks.
        with model.outputs(folder, full="drop", heartbeat=5) as outputs:
            for line in sys.stdin.buffer:
                source, destination, port = line.decode().split()
                seen[source].add(port)
                if len(seen[source]) == threshold:
                    alert = {"alert": "port scan", "source": source, "last": destination, "ports": sorted(seen[source])}
                    outputs.append(alert, input=line)
                    print(f"port scan from {source}")
            try:
                outputs.flush(timeout=5)
            except StorageError as error:
                print(f"alerts are not on the disk yet: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        watch(*sys.argv[1:])
    except HwlicenseError as error:
        sys.exit(f"{error.reason}: {error} {error.hint}")
