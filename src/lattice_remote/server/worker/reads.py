"""What is read of a project for others than its clients: lattice's own commands and the dashboard's own pages.

Both run lattice's code on the files as they lie there, at any moment: lattice replaces a file as a whole, so what is
read is what a local reader would see. The server returns it once that is committed (``project/reader.py``). Whatever
would write, start a program or use the network is refused (I9).
"""

from pathlib import Path
from typing import NoReturn

from lattice_remote.server.data.read_ipc import Found, Read, ReadCommand
from lattice_remote.server.tree.capture import Capture, Vetoed
from lattice_remote.server.worker.executor import Executor
from lattice_remote.server.worker.lists import laid_out
from lattice_remote.server.worker.surfaces.lattice_handler import handler_class

__all__ = ["NoWrites", "Reads"]


class NoWrites:
    """Refuses every change before it is made; see ``tree.capture.PreImages``."""

    def keep_for_append(self, path: str) -> NoReturn:  # noqa: ARG002 - the protocol's signature
        raise Vetoed("write a file")

    keep_for_rewrite = keep_for_replace = keep_for_move = keep_directory = keep_for_append


class Reads:
    """Answers reads in the project whose ``.lattice`` is ``lattice_dir``, a real path."""

    def __init__(self, executor: Executor, capture: Capture, lattice_dir: Path) -> None:
        self._executor = executor
        self._capture = capture
        self._lattice_dir = lattice_dir

    def answer(self, asked: Read) -> Found:
        """Read; never raises an ``Exception``. What broke down, or tried what it must not, has status 500."""
        try:
            with self._capture.watch():
                return self._command(asked) if isinstance(asked, ReadCommand) else self._page(asked.path)
        except Vetoed as veto:
            return Found(500, b"", message=f"it tried to {veto}, which the server does not allow")

    def _command(self, asked: ReadCommand) -> Found:
        outcome = self._executor.run(asked.argv, asked.path, last_try=True)
        if outcome.failure is not None:
            return Found(500, b"", message=outcome.failure)
        message = outcome.stderr.decode(errors="replace")
        if asked.list_at and not outcome.exit_code:
            try:
                body, items = laid_out(outcome.stdout, asked.list_at)
            except ValueError as error:
                return Found(500, b"", message=str(error))
            return Found(0, body, message=message, items=items)
        return Found(outcome.exit_code, outcome.stdout, message=message)

    def _page(self, path: str) -> Found:
        request = handler_class(self._lattice_dir)(path, b"")
        outcome = self._executor.call(request.get, "dashboard: GET")
        if outcome.failure is not None:
            return Found(500, b"", message=outcome.failure)
        return Found(request.status, request.wfile.getvalue(), content_type=request.content_type, etag=request.etag)
