"""One's own model, licensed: any file is a model, here the weights of one layer. `story.sh` sells and installs it."""

from pathlib import Path

import numpy as np

import hwlicense

# In a product this text is a constant in the source: who can replace it chooses whom the application trusts.
VENDOR = Path("acme/vendor.pub.json").read_text(encoding="utf-8")

with hwlicense.open("own-model.hwpkg", vendor=VENDOR, home="device") as model:
    weights = np.frombuffer(model.read("weights.bin"), dtype="<f4").reshape(3, 4)  # a view: no copy, no file
    print(weights @ np.ones(4, dtype="<f4"))
    del weights  # the plaintext is wiped when the last borrowed buffer is returned
