#!/bin/sh
# One agent: claims a task, holds the resource "gpu" while a command works on it, completes it, and takes the next one.
# Exits with 0 when no task is left, with 1 when a command fails; started again, it resumes its task.
#   ACTOR=agent:NAME LATTICE_TOKEN=... agent.sh COMMAND...      COMMAND gets the task's id as its last argument
set -eu

holds=
trap '[ -z "$holds" ] || lattice resource release gpu --quiet --actor "$ACTOR"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

while true; do
    task=$(lattice next --claim --quiet --actor "$ACTOR")
    [ -n "$task" ] || exit 0
    lattice resource acquire gpu --wait --timeout 3600 --task "$task" --quiet --actor "$ACTOR" >&2
    holds=1
    "$@" "$task"
    lattice resource release gpu --quiet --actor "$ACTOR" >&2
    holds=
    lattice complete "$task" --review "Done by $ACTOR." --quiet --actor "$ACTOR"
done
