#!/usr/bin/env bash
# From a file of weights to a licensed inference, in an empty folder. On a simulated TPM:
#   mkdir /tmp/story && cd /tmp/story && hwlicense simulate --tpm -- .../examples/own_model/story.sh
# On a device leave `hwlicense simulate` out, and set EK_ROOT to the root certificate of the TPM's maker (PEM).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ek_root=${EK_ROOT:-${HWLICENSE_SIMULATOR_EK_ROOT:?set EK_ROOT to the TPM maker root certificate}}

# the vendor
hwlicense vendor init acme --no-passphrase
python3 -c 'import numpy; numpy.arange(12, dtype="<f4").tofile("weights.bin")'
hwlicense vendor pack --vendor acme --name own-model --version 1.0 -o own-model.hwpkg weights.bin
# the device says what it is
hwlicense device enroll --home device -o device.hwreq
# the vendor again
hwlicense vendor issue --vendor acme --request device.hwreq --package own-model.hwpkg --terms "$here/terms.toml" \
    --ek-root "$ek_root" -o device.hwlic
# the device
hwlicense device trust --home device acme/vendor.pub.json
hwlicense device install --home device device.hwlic
python3 "$here/quickstart.py"
