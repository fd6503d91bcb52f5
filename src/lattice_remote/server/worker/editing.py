"""Plans and notes that somebody has edited on a client, put in place here (SPEC: Put)."""

import os
from pathlib import Path

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Stored
from lattice_remote.protocol.operations import digest_of
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.data.ipc import Edit
from lattice_remote.server.tree.capture import Vetoed
from lattice_remote.server.tree.tree import Difference
from lattice_remote.server.worker.attribution import describe_edit
from lattice_remote.server.worker.running import cannot_store
from lattice_remote.server.worker.store import Cause, Store
from lattice_remote.textmerge import merge_text

__all__ = ["Editor"]


class Editor:
    """Stores edited texts of one project; ``lattice_dir`` is its ``.lattice``."""

    def __init__(self, store: Store, lattice_dir: Path) -> None:
        self._store = store
        self._lattice_dir = lattice_dir

    def edit(self, request: Edit) -> None:
        """Merge an edit into the file and commit it with its answer, which may be that there is a conflict.

        Raises:
            Rejected: it is no text that can be stored, or the disk can't take it; nothing was changed.
            OSError: the storage failed.
        """
        if not is_editable(request.path):
            raise Rejected(f"{request.path!r} is not a plan or notes of a task", code="REMOTE_UNSUPPORTED")
        if not _is_utf8(request.text):  # lattice reads it in status and next, which would break down for everybody
            raise Rejected(f"{request.path} is no UTF-8 text: save it as UTF-8 to send it", code="REMOTE_UNSUPPORTED")
        path = self._store.tree.absolute(request.path)
        if self._store.tree.status(request.path) is None and os.path.lexists(path):
            raise Rejected(f"{request.path} is not a plain file on the server", code="REMOTE_UNSUPPORTED")
        current = self._current(path)
        base = current if request.base_digest else request.base
        if request.base_digest and (base is None or digest_of(base) != request.base_digest):
            raise Rejected(f"{request.path} is another text by now than the one named", code="REMOTE_STALE_BASE")
        outcome, text = merge_text(base, request.text, current)
        if outcome in ("stored", "merged") and not self._is_active(request.path):
            outcome = "conflict"  # archived meanwhile, or no such task: the text stays with the client
        difference = Difference()
        if outcome in ("stored", "merged"):
            assert text is not None, "there is a text whenever something is to be stored"
            difference = self._replace(request.path, text)
        else:
            difference = self._store.tree.reconcile([request.path])
        command = describe_edit(request.path)
        who = request.actor
        cause = Cause(request.id, request.token_id, who, request.id, command, who, request.fingerprint)
        self._store.commit(difference, cause, lambda seq: Stored(request.id, seq, outcome))

    def _current(self, path: str) -> bytes | None:
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise cannot_store("the text", error) from error

    def _replace(self, path: str, text: bytes) -> Difference:
        """Put ``text`` in place of a plan or notes, or leave everything as it was.

        Raises:
            Rejected: that is not possible: the disk is full, or somebody put something else there.
        """
        failure: OSError | Vetoed | None = None
        with self._store.transaction() as touched:
            try:
                _replace(self._store.tree.absolute(path), text)
            except (OSError, Vetoed) as error:
                failure = error
        if failure is not None:
            self._store.roll_back()
            raise cannot_store(path, failure) from failure
        return self._store.difference(touched)

    def _is_active(self, path: str) -> bool:
        return (self._lattice_dir / "tasks" / f"{Path(path).stem}.json").is_file()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _replace(path: str, text: bytes) -> None:
    """Replace a plan or notes atomically; the journal makes it durable."""
    scratch = os.path.join(os.path.dirname(path), f".tmp.edit.{os.path.basename(path)}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(scratch).write_bytes(text)
    os.replace(scratch, path)
