#!/bin/sh
# In the checkout: start one agent for each token of a directory, and wait for all of them. Exits with 1 if one failed.
#   start_agents.sh DIR COMMAND...      COMMAND gets ACTOR and LATTICE_TOKEN
set -u
directory=$1
shift

pids=
trap 'kill $pids 2>/dev/null; wait; exit 130' INT TERM
for file in "$directory"/*; do
    ACTOR=agent:${file##*/} LATTICE_TOKEN=$(cat "$file") "$@" </dev/null &
    pids="$pids $!"
done
code=0
for pid in $pids; do
    wait "$pid" || code=1
done
exit "$code"
