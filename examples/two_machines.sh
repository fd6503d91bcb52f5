#!/bin/sh
# What a team types, on one machine: a server, and Ana's and Ben's directories. Everything happens in a temporary
# directory, which is removed at the end. Run it after `make venv`: sh examples/two_machines.sh
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
PATH="${VIRTUAL_ENV:-$here/.venv}/bin:$PATH"
play=$(mktemp -d)
export LATTICE_REMOTE_DATA="$play/data" XDG_CONFIG_HOME="$play/config" LATTICE_REMOTE_RUNTIME_DIR="$play/run"
export XDG_RUNTIME_DIR="$play/run"
mkdir -m 700 "$play/run"

say() { printf '\n$ %s\n' "$*"; "$@"; }

finish() {
    lattice remote agent stop >/dev/null 2>&1 || true
    [ -z "${server:-}" ] || kill "$server" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$play"
}
trap finish EXIT
trap 'exit 130' INT TERM

# --- on the server ---
say lattice-remote init "$LATTICE_REMOTE_DATA"
say lattice-remote project create board --code LAT --name "Our board"
ana=$(lattice-remote token create --project board --actor human:ana --act-as 'agent:*')
ben=$(lattice-remote token create --project board --actor human:ben --act-as 'agent:*')
say lattice-remote token list
lattice-remote start --port 0 >"$play/listening" &
server=$!
until grep -q Listening "$play/listening"; do
    kill -0 "$server" || exit 1
    sleep 0.05
done
url=$(sed 's/^Listening on //' "$play/listening")
cat "$play/listening"

# --- on Ana's machine ---
mkdir "$play/ana" "$play/ben"
cd "$play/ana"
printf '%s\n' "$ana" | lattice remote login "$url"
say lattice remote add origin "$url/board"
say lattice create "Write the parser" --actor human:ana
say lattice remote status

# --- on Ben's machine ---
cd "$play/ben"
export LATTICE_TOKEN="$ben"
say lattice remote add origin "$url" --project board
say lattice list
say lattice comment LAT-1 "I can take this one" --actor human:ben
say lattice status LAT-1 in_planning --actor human:ben

# --- and back on Ana's ---
unset LATTICE_TOKEN
cd "$play/ana"
say lattice show LAT-1
say lattice remote verify
