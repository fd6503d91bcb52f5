"""Template process of a server: it has lattice and the code of workers and readers loaded, and forks each of them.

    python -P -X utf8 -m lattice_remote.server.worker.template --fd 5

A request is one message on the socket (``SOCK_SEQPACKET``): module and arguments, as msgpack, with the descriptors that
the child keeps, first its connection to the server. The reply is the child's process id, with its pidfd, or an error
number. The child begins once it has received ``GO``: only a child that the server knows touches a project (I1). The
process has one thread and no child's descriptors. It exits when the server is gone; its children do so by themselves.
"""

import argparse
import errno
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import NoReturn

import msgspec

__all__ = ["GO", "MAX_REQUEST_BYTES", "main"]

MAX_REQUEST_BYTES = 65536
GO = b"\0"
_MAX_DESCRIPTORS = 4
_SEVERAL_THREADS = "an installed plugin has started a thread: workers cannot be forked"

Main = Callable[[list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    """Fork children until the server is gone; return the exit code."""
    parser = argparse.ArgumentParser(prog="lattice-remote-template")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("room", nargs="?", help="blanks; the command lines of children are written there")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process, as it does a worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.disable()  # a collection would leave holes in pages that children share
    control = socket.socket(fileno=options.fd)
    programs = _preload()
    if len(os.listdir("/proc/self/task")) > 1:
        print(_SEVERAL_THREADS, file=sys.stderr)  # noqa: T201 - the server's log
        return 1
    gc.collect()
    gc.freeze()
    _serve(control, programs)
    return 0


def _preload() -> dict[str, Main]:
    """Import all that workers and readers use, and the plugins; return their entry points by module."""
    os.environ["LATTICE_REMOTE_SERVER"] = "1"
    os.environ.pop("_LATTICE_COMPLETE", None)  # see Executor
    import mimetypes

    import lattice.cli.main
    import lattice.dashboard.git_reader
    import lattice.dashboard.server  # noqa: F401

    from lattice_remote.server.worker import main as worker
    from lattice_remote.server.worker import reader

    mimetypes.init()
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
            request, kept, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, _MAX_DESCRIPTORS)
            if not request:
                return
            try:
                pid = os.fork()
            except OSError as error:  # no memory, or too many processes
                pid, reply, descriptors = -1, error.errno or errno.EAGAIN, []
            if pid == 0:
                _run_child(
                    programs, msgspec.msgpack.decode(request, type=list[str]), kept, [control.fileno(), *children]
                )
            for number in kept:
                os.close(number)
            if pid > 0:
                reply, descriptors = pid, [os.pidfd_open(pid)]
                children[descriptors[0]] = pid
                poll.register(descriptors[0], select.POLLIN)
            with suppress(OSError):  # the server is gone: its end is the next message
                socket.send_fds(control, [msgspec.msgpack.encode(reply)], descriptors)


def _run_child(programs: dict[str, Main], request: list[str], kept: list[int], unused: Collection[int]) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)  # as the server's other children
        for descriptor in unused:
            os.close(descriptor)
        if socket.socket(fileno=os.dup(kept[0])).recv(1) != GO:
            os._exit(0)
        module, *arguments = request
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
