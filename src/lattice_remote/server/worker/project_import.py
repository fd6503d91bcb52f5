"""Crash-safe replacement of an empty project by a checked candidate.

A rename to ``adopting/`` decides: every later start of a worker continues until the replacement is done. The worker
that renames exits at once and the next one finishes, so a crash takes the path of the normal case.

    adopting/cause       the request, with the reply to send
    adopting/states      sizes, digests and signatures of the files, from the check
    adopting/.lattice    the new project, until it is in place
    adopting/replaced    the empty project, once moved away

On a node of a cluster the candidate's files are one change instead, see ``install``.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.files import write_all
from lattice_remote.output import counted
from lattice_remote.protocol.bundle import first_sign_of_use
from lattice_remote.protocol.messages import Pushed
from lattice_remote.protocol.operations import AnnounceFile
from lattice_remote.server.ipc import ImportProject
from lattice_remote.server.tree.tree import FileState, ProjectTree, TreeDiff, sync, sync_directory
from lattice_remote.server.worker.store import ChangeOrigin

__all__ = [
    "STATES",
    "answer_to",
    "cause_of",
    "decide",
    "finish",
    "first_difference",
    "install",
    "is_adopting",
    "put_in_place",
    "require_empty",
    "save_states",
    "states_of",
]

_SETTINGS = "config.json"
STATES = "states"
_states_decoder = msgspec.msgpack.Decoder(dict[str, FileState])
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ImportProject)


def require_empty(lattice: Path, sizes: Mapping[str, int]) -> None:
    """Raise Rejected if the project was ever used, by its files and its short ids."""
    used = first_sign_of_use(sizes.items())
    if used is None and _has_ids(lattice / "ids.json"):
        used = "short ids that were given out"
    if used is not None:
        raise Rejected(
            f"the project on the server has {used}; only an empty project takes a whole one, and nothing was changed",
            code="REMOTE_UNSUPPORTED",
        )


def _has_ids(index: Path) -> bool:
    try:
        return bool(msgspec.json.decode(index.read_bytes(), type=_Ids).map)
    except FileNotFoundError:
        return False
    except msgspec.DecodeError:
        return True


class _Ids(msgspec.Struct):
    map: dict[str, str] = {}


def decide(project: Path, request: ImportProject) -> None:
    """Commit to the candidate, even after a crash. The calling worker must exit. Raises OSError if nothing has
    happened.
    """
    candidate = project / request.candidate
    descriptor = os.open(candidate / "cause", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        write_all(descriptor, _encoder.encode(request))
        sync(descriptor)
    finally:
        os.close(descriptor)
    sync_directory(candidate)
    os.rename(candidate, project / "adopting")
    sync_directory(project)


def save_states(candidate: Path, states: Mapping[str, FileState]) -> None:
    """Leave the states of a candidate's files, which its worker need not read then. The caller makes them durable."""
    (candidate / STATES).write_bytes(_encoder.encode(states))


def states_of(project: Path) -> dict[str, FileState]:
    """Return the states of a project being put in place; empty if there are none."""
    try:
        return _states_decoder.decode((project / "adopting" / STATES).read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def is_adopting(project: Path) -> bool:
    return (project / "adopting").is_dir()


def install(candidate: Path, tree: ProjectTree, unwatched: Callable[[], AbstractContextManager[None]]) -> None:
    """Replace the files of an empty project by the candidate's, within a transaction; the candidate stays.

    On a node of a cluster a push is one change, which the others apply like any other. ``unwatched`` suspends the watch
    for files outside the project. Raises OSError.
    """
    with unwatched():
        files = [path for path, _ in ProjectTree(candidate, {}).scan()]
    for path in tree.files.keys() - set(files):
        os.unlink(tree.absolute(path))
    for path in files:
        directory, name = os.path.split(tree.absolute(path))
        if not os.path.isdir(directory):
            os.makedirs(directory)
        scratch = os.path.join(directory, f".tmp.import.{name}")
        with unwatched():
            source = (candidate / path).open("rb")
        with source, open(scratch, "wb") as copy:
            shutil.copyfileobj(source, copy)
        os.replace(scratch, tree.absolute(path))


def put_in_place(project: Path) -> ImportProject | None:
    """Put a waiting candidate in place; return its request, if there is one. Idempotent after a crash.

    The caller starts a new epoch, then calls ``finish``. Raises OSError; the next start tries again.
    """
    if not is_adopting(project):
        return None
    waiting, here = project / "adopting", project / ".lattice"
    request = _decoder.decode((waiting / "cause").read_bytes())
    if (waiting / ".lattice").is_dir():
        if here.is_dir():
            os.rename(here, waiting / "replaced")
        os.rename(waiting / ".lattice", here)
        sync_directory(waiting)
        sync_directory(project)
    return request


def cause_of(request: ImportProject) -> ChangeOrigin:
    what = f"{counted(request.tasks, 'task')}, {request.archived} archived, {counted(request.files, 'file')}"
    command = f"remote push: {what}" if request.token_id else f"lattice-remote import: {what}"
    return ChangeOrigin(
        request.id, request.token_id, request.actor, request.id, command, request.actor, request.fingerprint
    )


def answer_to(request: ImportProject, seq: int) -> Pushed:
    return Pushed(request.id, seq, request.tasks, request.archived, request.files, request.notes)


def first_difference(tree: ProjectTree) -> TreeDiff:
    """Return the first change of the new epoch, which records the import."""
    content = tree.read(_SETTINGS, None)
    assert content is not None, "no project is taken in without its settings"
    operation = AnnounceFile(_SETTINGS, content.state.size, content.state.digest)
    return TreeDiff([operation], [_SETTINGS], {_SETTINGS: content.state})


def finish(project: Path) -> None:
    shutil.rmtree(project / "adopting")
    sync_directory(project)
