#!/bin/sh
# Step of a CI job: run a command, and comment its result on the task that the branch names, for example LAT-42-parser.
# Exits with the command's code. The job has ACTOR, the secret LATTICE_TOKEN, and LATTICE_REMOTE_URL, the server's address.
#   ci.sh BRANCH COMMAND...
set -eu
branch=$1
shift

code=0
"$@" || code=$?
task=$(printf '%s\n' "$branch" | grep -oE '[A-Z]+-[0-9]+' | head -n 1) || true
if [ -n "$task" ]; then
    result=passed
    [ "$code" -eq 0 ] || result="failed with $code"
    lattice comment "$task" "CI: $* $result" --quiet --actor "$ACTOR" >/dev/null || echo "The board was not updated." >&2
fi
exit "$code"
