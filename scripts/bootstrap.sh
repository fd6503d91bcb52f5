#!/bin/sh
# Make .venv with this project and its tools, exactly as pinned in constraints.txt. Does nothing when it is up to date.
#
# Needs Python >= 3.12, which need not be the default one: set PYTHON=... to name it, else it is looked for.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.installed

fingerprint() {  # the directory belongs to it: a copied .venv still points at where it came from
    { pwd -P; cat pyproject.toml constraints.txt scripts/bootstrap.sh; } | cksum
}

is_usable() {  # Python >= 3.12 that can make an environment with pip
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_usable "$PYTHON" && echo "$PYTHON" && return
        echo "PYTHON=$PYTHON is no Python >= 3.12 with ensurepip and venv." >&2
        return 1
    fi
    for python in python3.13 python3.12 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3.1[2-9] \
        /usr/local/bin/python3.1[2-9] /opt/homebrew/bin/python3.1[2-9] \
        python3.14 python3.15 "$(uv python find '>=3.12' 2>/dev/null || true)"
    do
        if [ -n "$python" ] && is_usable "$python"; then
            echo "$python"
            return
        fi
    done
    cat >&2 <<'END'
No Python >= 3.12 was found (in PATH, under ~/.pyenv/versions, or by uv). Any one of these provides it:
    uv python install 3.13          https://docs.astral.sh/uv/
    pyenv install 3.13              https://github.com/pyenv/pyenv
    your system's package, for example python3.13 with python3.13-venv on Debian and Ubuntu
Then run make again; or name one yourself: make PYTHON=/path/to/python3.13
END
    return 1
}

if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
    exit 0
fi
python=$(find_python)
echo "Making .venv with $("$python" --version) ($python)"
rm -f "$stamp"
"$python" -m venv --clear .venv
# Old and new versions of pip read the constraints of the build's own packages from different variables.
PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt \
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --editable '.[dev]'
fingerprint > "$stamp"
