"""Template process of a server: it has lattice and the code of workers and readers loaded, and forks each of them.

    python -P -X utf8 -m lattice_remote.server.worker.template --fd 5 [--immortal]

A request is one message on the socket (``SOCK_SEQPACKET``): module and arguments, as msgpack, with the descriptors that
the child keeps, first its connection to the server. The reply is the child's process id, with its pidfd, or an error
number. The child begins once it has received ``GO``: only a child that the server knows touches a project (I1). The
process has one thread and no child's descriptors. It exits when the server is gone; its children do so by themselves.
"""

import argparse
import ctypes
import errno
import gc
import os
import select
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable, Collection
from contextlib import suppress
from types import CodeType
from typing import NoReturn

import msgspec

from lattice_remote.memory import return_large_buffers
from lattice_remote.server.ipc import GO, MAX_FORK_REQUEST_BYTES
from lattice_remote.server.worker.executor import load_lattice

__all__ = ["main", "make_immortal"]

_MAX_DESCRIPTORS = 4
_IMMORTAL = 0xFFFFFFFF
_ALL_MEMORY = 1 << 46
"""Words of 4 bytes in the address space of a process."""
_SEVERAL_THREADS = "an installed plugin has started a thread: workers cannot be forked"

Main = Callable[[list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lattice-remote-template")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--immortal", action="store_true", help="share more memory, for 0.2 s of processor time")
    parser.add_argument("room", nargs="?", help="blanks; the command lines of children are written there")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process, as it does a worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ.pop("NOTIFY_SOCKET", None)  # the service manager hears the server alone
    return_large_buffers()
    gc.disable()  # a collection would leave holes in pages that children share
    control = socket.socket(fileno=options.fd)
    programs = _preload()
    if len(os.listdir("/proc/self/task")) > 1:
        print(_SEVERAL_THREADS, file=sys.stderr)  # noqa: T201 - the server's log
        return 1
    gc.collect()
    if options.immortal:
        make_immortal(gc.get_objects())
    gc.freeze()
    _serve(control, programs)
    return 0


def _preload() -> dict[str, Main]:
    """Import all that workers and readers use, and the plugins; return their entry points by module."""
    load_lattice()
    import lattice.dashboard.git_reader
    import lattice.dashboard.server  # noqa: F401

    from lattice_remote.server.worker import main as worker
    from lattice_remote.server.worker import reader

    sysconfig.get_paths()  # loads the installation's variables
    return {worker.__name__: worker.main, reader.__name__: reader.main}


def _serve(control: socket.socket, programs: dict[str, Main]) -> None:
    children: dict[int, int] = {}  # process ids by pidfd
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in children:
                poll.unregister(descriptor)
                os.close(descriptor)
                os.waitpid(children.pop(descriptor), 0)
                continue
            request, kept, _, _ = socket.recv_fds(control, MAX_FORK_REQUEST_BYTES, _MAX_DESCRIPTORS)
            if not request:
                return
            reply, descriptors = -1, list[int]()
            try:
                pid = os.fork()
            except OSError as error:  # no memory, or too many processes
                pid, reply = -1, error.errno or errno.EAGAIN
            if pid == 0:
                _run_child(programs, request, kept, [control.fileno(), *children])
            for number in kept:
                os.close(number)
            if pid > 0:
                reply, descriptors = pid, [os.pidfd_open(pid)]
                children[descriptors[0]] = pid
                poll.register(descriptors[0], select.POLLIN)
            with suppress(OSError):  # the server is gone: its end is the next message
                socket.send_fds(control, [msgspec.msgpack.encode(reply)], descriptors)


# --- shared memory ---


def make_immortal(tracked: list[object]) -> None:
    """Make objects of the collector and what they refer to immortal, as Python's own constants are (PEP 683).

    Otherwise a child gets a copy of each page that it only reads, because it counts references there: twice the memory.
    Python has no function for it: the count is written to the object's address.
    """
    if not _counts_as_expected():
        return
    objects = [*tracked, *gc.get_referents(*tracked)]
    untracked = {id(each): each for each in objects if type(each) is dict or type(each) is tuple}
    objects += gc.get_referents(*untracked.values())
    codes = {id(each): each for each in objects if type(each) is CodeType}
    while codes:
        parts = [part for code in codes.values() for part in _parts_of(code)]
        objects += parts
        codes = {id(each): each for each in parts if type(each) is CodeType}
    memory = (ctypes.c_uint32 * _ALL_MEMORY).from_address(0)
    for address in map(id, objects):
        memory[address >> 2] = _IMMORTAL


def _parts_of(code: CodeType) -> list[object]:
    own = (code.co_consts, code.co_names, code.co_varnames, code.co_name, code.co_qualname)
    return [*own, *code.co_consts, *code.co_names]


def _counts_as_expected() -> bool:
    """Return whether this interpreter has the reference count of PEP 683 at the start of an object."""
    is_known = sys.implementation.name == "cpython" and (3, 12) <= sys.version_info < (3, 15)
    if not is_known or sys.maxsize < 1 << 32:
        return False
    probe, other = object(), object()
    references = [probe] * 1000
    more, less = (ctypes.c_uint32.from_address(id(each)).value for each in (probe, other))
    return more - less == len(references) and sys.getrefcount(None) >= 1 << 30


# --- in the child ---


def _run_child(programs: dict[str, Main], request: bytes, kept: list[int], unused: Collection[int]) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)  # as the server's other children
        for descriptor in unused:
            os.close(descriptor)
        if socket.socket(fileno=os.dup(kept[0])).recv(1) != GO:
            os._exit(0)
        module, *arguments = msgspec.msgpack.decode(request, type=list[str])
        _show_as([*sys.orig_argv[: sys.orig_argv.index("-m") + 1], module, *arguments])
        gc.enable()
        code = programs[module]([*arguments, "--fd", str(kept[0])])
    except BaseException:  # noqa: BLE001 - nothing may return into the template's loop
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _show_as(command: list[str]) -> None:
    """Have ``ps`` show this command line, in the memory that the kernel reads it from."""
    with suppress(OSError, ValueError, IndexError):  # without /proc it shows the template's
        with open("/proc/self/stat", "rb") as status:
            start, end = map(int, status.read().rpartition(b")")[2].split()[45:47])
        line = b"".join(os.fsencode(part) + b"\0" for part in command)[: end - start - 1]
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(line.ljust(end - start, b"\0"))


if __name__ == "__main__":
    sys.exit(main())
