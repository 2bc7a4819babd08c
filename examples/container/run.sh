#!/bin/sh
# Starts the container of this folder with what it needs and nothing else, by docker or, with ENGINE=podman, by podman.
#   run.sh IMAGE HOME_DIR STATE_DIR
set -eu
image=$1 home=$2 state=$3
exec "${ENGINE:-docker}" run --rm --init \
    --device /dev/tpmrm0 --group-add "$(getent group tss | cut -d: -f3)" \
    --mount "type=bind,src=$home,dst=/license,readonly" \
    --mount "type=bind,src=$state,dst=/state" \
    --ulimit memlock=-1:-1 --ulimit core=0 --memory "${MEMORY:-2g}" --memory-swap "${MEMORY:-2g}" \
    --read-only --tmpfs /tmp:size=16m,noexec,nosuid,nodev \
    --cap-drop ALL --security-opt no-new-privileges --network none \
    "$image"
