#!/bin/sh
# On the server: create a token for each of the actors agent:1 ... agent:COUNT of a project, as files DIR/1 ... DIR/COUNT
# that only you can read. A token that is there already is kept.
#   make_tokens.sh PROJECT COUNT DIR
set -eu
project=$1 count=$2 directory=$3

umask 077
mkdir -p "$directory"
number=0
while [ "$number" -lt "$count" ]; do
    number=$((number + 1))
    file=$directory/$number
    if [ ! -e "$file" ]; then
        lattice-remote token create --project "$project" --actor "agent:$number" >"$file.new"
        mv "$file.new" "$file"
    fi
done
