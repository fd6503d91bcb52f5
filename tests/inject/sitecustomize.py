"""Loaded by every Python that has this directory on its path: lets a project's worker fail where a test wants it.

The directory ``LATTICE_TEST_FAULTS`` holds what is to happen:

- ``fsync-fails``: while this file is there, every fsync raises EIO, as one does after the disk has lost something;
- ``worker-dies-PID``, ``server-dies-PID``: the worker with this process id, or its server, is killed after as many more
  file operations as this file has bytes.
- ``boot``: holds the name of the boot in which the worker seems to run;
- ``trace``: holds the directory in which the worker records its fsyncs (``power_cut.py``).

File operations are what is opened for writing, renamed, removed or made, and each fsync, once before and once after.
Nothing here does what a command in the worker may not do: it only looks whether there are such files.
"""

import errno
import functools
import importlib.util
import os
import pathlib
import signal
import sys

_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate"}
_directory = os.environ.get("LATTICE_TEST_FAULTS")
_steps: dict[str, int] = {}
_processes: dict[str, int] = {}


def _step() -> None:
    """Count one file operation; after the last one, somebody dies."""
    for name, process in _processes.items():
        try:
            size = os.stat(name).st_size
        except FileNotFoundError:
            continue
        _steps[name] = _steps.get(name, 0) + 1
        if _steps[name] == size + 1:
            signal.pidfd_send_signal(process, signal.SIGKILL)


def _hook(event: str, args: tuple) -> None:
    if event in _EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        _step()


def _watched(real):
    def call(descriptor: int) -> None:
        if os.path.exists(f"{_directory}/fsync-fails"):
            raise OSError(errno.EIO, "Input/output error")
        _step()
        real(descriptor)
        _step()

    return call


def _begin(server: int) -> None:
    """Obey the files from here on, in the worker of this server."""
    _processes[f"{_directory}/worker-dies-{os.getpid()}"] = os.pidfd_open(os.getpid())
    _processes[f"{_directory}/server-dies-{os.getpid()}"] = os.pidfd_open(server)
    if os.path.exists(f"{_directory}/boot"):
        from lattice_remote.server.worker import recovery

        recovery._BOOT_ID = pathlib.Path(_directory, "boot")
    if os.path.exists(f"{_directory}/trace"):
        tests = pathlib.Path(__file__).resolve().parent.parent
        spec = importlib.util.spec_from_file_location("power_cut", tests / "power_cut.py")
        power_cut = importlib.util.module_from_spec(spec)
        sys.modules["power_cut"] = power_cut
        spec.loader.exec_module(power_cut)
        power_cut.trace_fsyncs(pathlib.Path(pathlib.Path(_directory, "trace").read_text()))


_is_worker = "lattice_remote.server.worker.main" in sys.orig_argv
_is_template = "lattice_remote.server.worker.template" in sys.orig_argv
if _directory and (_is_worker or _is_template):
    os.fsync = _watched(os.fsync)
    os.fdatasync = _watched(os.fdatasync)
    sys.addaudithook(_hook)
    if _is_worker:
        _begin(os.getppid())
    else:
        os.register_at_fork(after_in_child=functools.partial(_begin, os.getppid()))
