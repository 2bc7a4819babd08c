#!/usr/bin/env bash
# A program that is sold sealed, its secret part compiled by Cython, in an empty folder. On a simulated TPM:
#   mkdir /tmp/story && cd /tmp/story && hwlicense simulate --tpm -- .../examples/sealed/story.sh
# On a device leave `hwlicense simulate` out, and set EK_ROOT to the root certificate of the TPM's maker (PEM).
# Needs Cython, setuptools and a C compiler on the vendor's side.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ek_root=${EK_ROOT:-${HWLICENSE_SIMULATOR_EK_ROOT:?set EK_ROOT to the TPM maker root certificate}}

# the vendor: a copy of the package to compile in; where a native module lies beside a source, only that is packed
mkdir build
cp -r "$here/inspector" build/inspector
(cd build && cythonize --quiet -3 --inplace inspector/secret.py)
python3 -c 'open("weights.bin", "wb").write(bytes([100]) * 64)'
hwlicense vendor init acme --no-passphrase
hwlicense vendor pack --vendor acme --name inspector --version 1.0 -o inspector.hwpkg \
    --code build/inspector --entry inspector.program:main -OO weights.bin
hwlicense inspect inspector.hwpkg

# the device, and the vendor again
printf 'licensee = "Acme Robotics"\nproduct = "inspector"\n' >terms.toml
hwlicense device enroll --home device -o device.hwreq
hwlicense vendor issue --vendor acme --request device.hwreq --package inspector.hwpkg --terms terms.toml \
    --ek-root "$ek_root" -o device.hwlic
hwlicense device trust --home device acme/vendor.pub.json
hwlicense device install --home device device.hwlic

# what the operator does: 1 says that a part is not good
hwlicense run --home device inspector.hwpkg -- 104
hwlicense run --home device inspector.hwpkg -- 104 170 250 || echo "exit status $?"
