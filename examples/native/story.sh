#!/usr/bin/env bash
# Licensed weights under a C program, in an empty folder. On a simulated TPM:
#   mkdir /tmp/story && cd /tmp/story && hwlicense simulate --tpm -- .../examples/native/story.sh
# On a device leave `hwlicense simulate` out, and set EK_ROOT to the root certificate of the TPM's maker (PEM).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ek_root=${EK_ROOT:-${HWLICENSE_SIMULATOR_EK_ROOT:?set EK_ROOT to the TPM maker root certificate}}

# the vendor
hwlicense vendor init acme --no-passphrase
python3 -c 'import struct; open("weights.bin", "wb").write(struct.pack("<12f", *range(12)))'
hwlicense vendor pack --vendor acme --name native --version 1.0 -o native.hwpkg weights.bin
cc -O2 -Wall -I"$(hwlicense exec --include-dir)" "$here/layer.c" -o layer
# the device says what it is
hwlicense device enroll --home device -o device.hwreq
# the vendor again
hwlicense vendor issue --vendor acme --request device.hwreq --package native.hwpkg --terms "$here/terms.toml" \
    --ek-root "$ek_root" -o device.hwlic
# the device: the same program over files in a folder, and over descriptors
hwlicense device trust --home device acme/vendor.pub.json
hwlicense device install --home device device.hwlic
mkdir --parents model
printf '1 1 1 1\n0 0 0 1\n' | hwlicense exec native.hwpkg --home device --at model -- ./layer model/weights.bin
printf '1 0 0 0\n1 1 0 0\n' | hwlicense exec native.hwpkg --home device --fd -- ./layer '{weights.bin}'
