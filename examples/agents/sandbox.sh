#!/bin/sh
# Run a command that has no network, and can write to the current directory and to a /tmp of its own only. This needs
# bubblewrap. Without it unshare makes the home read-only, and removes the network.
#   sandbox.sh [--network] COMMAND...      --network keeps the network: lattice can write then
set -eu
network=--unshare-net
if [ "$1" = --network ]; then
    network=
    shift
fi

if command -v bwrap >/dev/null; then
    # shellcheck disable=SC2086 # one option or none
    exec bwrap --ro-bind / / --dev /dev --tmpfs /tmp --bind "$PWD" "$PWD" $network --die-with-parent -- "$@"
fi
# shellcheck disable=SC2086
exec unshare --map-root-user --mount ${network:+--net} sh -euc '
    mount --rbind "$HOME" "$HOME"
    mount --bind "$PWD" "$PWD"
    mount -o remount,ro,bind "$HOME"
    exec "$@"' sh "$@"
