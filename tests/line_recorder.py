"""Recorder of the package's executed lines, by test, in every process. ``mutants.py`` installs it in its own clone.

A ``.pth`` file of the clone's environment calls ``begin()`` as each Python starts. The file ``current`` names the
running test, and without it nothing is recorded. A process that a test starts records for that test to its end. A line
is written as soon as it is first executed, because many of these processes are killed. PYTEST_DONT_REWRITE: it is
imported before pytest.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

__all__ = ["begin", "durations", "recorded"]

_TOOL = 4
_write = os.write  # which a test may replace
_directory = ""
_package = ""
_output = -1


def begin(directory: str, package: str) -> None:
    """Record from now on: lines of modules below ``package``, to files in ``directory``."""
    global _directory, _package
    if not os.path.exists(f"{directory}/current"):
        return
    _directory, _package = directory, package
    events = sys.monitoring.events
    sys.monitoring.use_tool_id(_TOOL, "mutants")
    sys.monitoring.register_callback(_TOOL, events.LINE, _executed)
    sys.monitoring.set_events(_TOOL, events.LINE)
    os.register_at_fork(after_in_child=_restart)
    _restart()


def _restart() -> None:
    global _output  # noqa: PLW0603
    if _output >= 0:
        os.close(_output)
    with open(f"{_directory}/current", "rb") as file:
        test = file.read()
    name = hashlib.sha256(test).hexdigest()[:24]
    _output = os.open(f"{_directory}/{name}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    _write(_output, test + b"\n")
    sys.monitoring.restart_events()


def _executed(code: CodeType, line: int) -> Any:
    if code.co_filename.startswith(_package):
        _write(_output, f"{code.co_filename[len(_package) :]}:{line}\n".encode())
    return sys.monitoring.DISABLE


def pytest_runtest_logstart(nodeid: str) -> None:
    """Name the running test for this process and those that it starts."""
    if _directory:
        temporary = f"{_directory}/current.new"
        Path(temporary).write_text(nodeid)
        os.replace(temporary, f"{_directory}/current")
        _restart()


def pytest_runtest_logreport(report: Any) -> None:
    with open(f"{_directory}/durations", "a") as file:
        file.write(f"{report.duration if report.passed else -1}\t{report.nodeid}\n")


def durations(directory: Path) -> dict[str, float]:
    """Return the duration of each test that passed, in seconds."""
    found: dict[str, float] = {}
    failed = set()
    for line in (directory / "durations").read_text().splitlines():
        seconds, _, test = line.partition("\t")
        found[test] = found.get(test, 0.0) + float(seconds)
        failed |= {test} if float(seconds) < 0 else set()
    return {test: seconds for test, seconds in found.items() if test not in failed}


def recorded(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each test with lines that one process executed for it, as ``MODULE.py:LINE``."""
    for path in directory.glob("*.*"):
        test, _, lines = path.read_text().partition("\n")  # empty if its process was killed at once
        yield test, [line for line in lines.splitlines() if line.rpartition(":")[2].isdigit()]
