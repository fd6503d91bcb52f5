"""``watch --exec``: the user's own command, run here for one change after the other."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

__all__ = ["run_for"]

_LEAVE_S = 2.0


def run_for(command: str, record: dict[str, Any], line: str, timeout_s: float) -> str | None:
    """Run ``command`` in a shell with ``line`` on its standard input; return what went wrong, None when nothing did.

    It has a process group of its own, so that all of it ends when its time is over, or with Ctrl-C here; the
    ``KeyboardInterrupt`` then passes through.
    """
    environment = {
        **os.environ,
        "LATTICE_CHANGE": str(record["seq"]),
        "LATTICE_EPOCH": record["epoch"],
        "LATTICE_POSITION": record["position"],
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        with _ctrl_c_held_back():
            started.append(
                subprocess.Popen(  # noqa: S602 - the user's own command, from the user's own command line
                    command, shell=True, stdin=subprocess.PIPE, env=environment, start_new_session=True
                )
            )
        process = started[0]
        process.communicate(line.encode(), timeout=timeout_s)
    except (OSError, ValueError) as error:
        return f"the command could not start: {error}"
    except subprocess.TimeoutExpired:
        _end(started[0], signal.SIGKILL)
        return f"the command took longer than {timeout_s:g} s and was ended"
    except BaseException:
        for process in started:
            _end(process, signal.SIGTERM)
        raise
    if process.returncode < 0:
        return f"the command was ended by signal {-process.returncode}"
    return f"the command ended with {process.returncode}" if process.returncode else None


def _end(process: "subprocess.Popen[bytes]", sign: signal.Signals) -> None:
    """End a command with all that it has started; what does not listen is ended all the same."""
    for each in (sign, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, each)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_LEAVE_S)
            return


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until a process that is being started is known: nobody could end it otherwise."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
