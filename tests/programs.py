"""Programs of the system that some tests need (``make system`` installs them), and the signals that programs inherit.

Without one of them a test is skipped and the last lines of the run name it. In CI nothing is skipped: there the test
fails.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

__all__ = ["find", "heed_signals", "program", "python", "skipped_line"]

_MISSING = "not installed: "


def find(name: str) -> str | None:
    """Return the path of a program, which may be one for administrators, such as nginx; None if not installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def program(name: str) -> str:
    """Return the path of a program; skip the test if it is not installed.

    Raises:
        RuntimeError: it is not installed, and ``CI`` is set.
    """
    if (found := find(name)) is not None:
        return found
    if os.environ.get("CI"):
        raise RuntimeError(f"{_MISSING}{name}; install it with: make system")
    pytest.skip(f"{_MISSING}{name}")


def python(version: str) -> Path:
    """Return an interpreter of a minor version, for example ``3.13``; skip the test if there is none.

    It is looked for where ``scripts/bootstrap.sh`` looks. The last line of the run names a missing one, in CI too.
    """
    running = Path(sys.executable).resolve()
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [
        running if running.name == f"python{version}" else None,
        find(f"python{version}"),
        *pyenv.glob(f"{version}*/bin/python{version}"),
        *(Path(directory, f"python{version}") for directory in ("/usr/local/bin", "/opt/homebrew/bin")),
    ]
    test = "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != sys.argv[1])"
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            tried = subprocess.run([candidate, "-c", test, version], capture_output=True, check=False)
            if tried.returncode == 0:  # a program of pyenv may stand for no interpreter
                return Path(candidate)
    pytest.skip(f"{_MISSING}Python {version}")


def skipped_line(reasons: Iterable[str]) -> str | None:
    """Return one line about the tests that ``program()`` has skipped for these reasons, None when there are none."""
    missing = [reason.partition(_MISSING)[2] for reason in reasons if _MISSING in reason]
    if not missing:
        return None
    tests = "1 test was" if len(missing) == 1 else f"{len(missing)} tests were"
    names = ", ".join(sorted(set(missing)))
    return f"{tests} skipped without {names}; to run all: install them (make system), then make test"


def heed_signals() -> None:
    """Stop ignoring the signals that end programs: children inherit ignored signals.

    It may have been started with nohup, or in the background of a script.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
