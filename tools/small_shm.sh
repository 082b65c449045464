#!/bin/sh
# Runs a command where /dev/shm has 64 MiB, as Docker gives by default: in private mounts, so that nobody else sees it.
# Usage: tools/small_shm.sh COMMAND…. Where that is not possible it says why, and runs nothing (exit status 0).
set -u
if ! why=$(unshare --mount sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm' 2>&1); then
    printf 'skipped, as no private mounts can be made here (%s): %s\n' "$why" "$*"
    exit 0
fi
exec unshare --mount sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm && df -h /dev/shm && exec "$@"' small_shm "$@"
