"""Runs of pytest in forks of one process that has imported the libraries, but not the package.

``mutants.py`` starts it with its clone's Python. A line of the input is a JSON list of arguments. Two lines answer it:
the run's process id, which is that of its group, and when it has ended, its exit code. Its output replaces the file
named as the first argument.
"""

import json
import os
import sys

import hypothesis  # noqa: F401
import lattice.cli.main  # noqa: F401
import msgspec  # noqa: F401
import pytest
import starlette.applications  # noqa: F401
import uvicorn  # noqa: F401
import websockets.asyncio.client  # noqa: F401

_LOADED_BY_LATTICE = {"lattice_remote", "lattice_remote.client", "lattice_remote.client.plugin"}


def run(output: str, arguments: list[str]) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return int(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments]))


def main() -> None:
    loaded = {name for name in sys.modules if name.partition(".")[0] == "lattice_remote"}
    assert loaded <= _LOADED_BY_LATTICE, f"a change of {loaded - _LOADED_BY_LATTICE} would have no effect"
    for line in sys.stdin:
        output, *arguments = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.setsid()
                code = run(output, arguments)
                sys.stdout.flush()
            finally:
                os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
