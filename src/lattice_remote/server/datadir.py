"""Data directory of the server: layout, creation and locks.

    config.json                     settings, see ``config.py``
    tokens.json                     tokens and their rights, mode 0600, see ``tokens.py``
    signing-key                     of browsers' cookies, mode 0600, see ``auth.py``
    tokens-used.json                last use of each token, see ``auth.py``
    projects/<slug>/.lattice/       a plain Lattice directory, valid at every moment (I12)
    projects/<slug>/journal/        the numbered changes, see ``journal/``
    projects/<slug>/tmp/            the worker's scratch
    projects/<slug>/uploads/        uploads, kept for a day, see ``project/uploads.py``
    projects/<slug>/set-aside/      files moved away by a repair, see ``maintenance/fsck.py``
    projects/<slug>/incoming/       pushed projects being checked
    projects/<slug>/adopting/       a pushed project being put in place, see ``worker/project_import.py``
    projects/<slug>/copying/        a copy from another node that is not complete, see ``cluster/peer_copy.py``
    projects/<slug>/copied/         a complete one being put in place
    projects/<slug>/.writer.lock    held by the project's worker
    projects/<slug>/.closing        held by an administrative command, with a message for the project's clients
    projects/.moving-<id>/          a project of a cluster between two names, see ``cluster/places.py``
    cluster.json                    the directory's cluster, mode 0600, see ``cluster/settings.py``
    left/<slug>/                    projects of a cluster that this node has left
    archived/<slug>/                projects that are not served
    trash/<slug>-<time>/            deleted projects
    admin.log                       changes made by the command line
    renamed.json                    former names of projects
    .lock                           held by the running server
    status.sock                     status of the running server, see ``status.py``

Restoring a server needs all but ``signing-key``, ``tokens-used.json``, ``tmp/``, ``uploads/``, ``incoming/``,
``trash/``, the locks and the socket, and nothing else.

A command that needs a project for itself locks ``.closing``. A running server notices within a quarter of a second,
disconnects the clients, and ends the project's worker; the command waits for the worker's lock. The kernel releases all
locks when their holder ends in any way.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import pwd
import re
import secrets
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import SAFE, write_all, write_atomically
from lattice_remote.server.config import Config

__all__ = [
    "AdminEntry",
    "AdminLog",
    "DataDir",
    "LockedElsewhere",
    "ProjectPaths",
    "ProjectSummary",
    "administered",
    "closed_because",
    "closing",
    "default_location",
    "lock",
    "remember",
]


class LockedElsewhere(Exception):
    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is locked by process {holder or 'unknown'}")
        self.holder = holder


def lock(path: Path) -> int:
    """Lock ``path``, write this process's id into it, and return the descriptor that holds the lock.

    The lock lives until every process that inherited the descriptor has closed it or died. The file is never removed:
    that would let two processes lock two files of one name.

    Raises LockedElsewhere or OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise LockedElsewhere(path, holder) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


_MARK = ".closing"
_TIMEOUT_S = 60.0
"""A worker finishes its command first."""
_RETRY_S = 0.05


@contextlib.contextmanager
def closing(project: Path, why: str) -> Iterator[Callable[[], None]]:
    """Hold the project in this directory exclusively; it may be moved within. ``why`` is one line for its clients.

    Yields a function that releases the worker's lock early.

    Raises Misuse: another command has it; StorageError: its worker does not end.
    """
    try:
        mark = lock(project / _MARK)
    except LockedElsewhere as error:
        raise Misuse(f"project {project.name} is locked by another command; try again later") from error
    try:
        os.ftruncate(mark, 0)
        os.pwrite(mark, why.encode(), 0)
        with contextlib.ExitStack() as writer:
            writer.callback(os.close, _writer_lock(project))
            yield writer.close
    finally:
        os.close(mark)


def _writer_lock(project: Path) -> int:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return lock(ProjectPaths(project).writer_lock)
        except LockedElsewhere as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the worker (pid {error.holder}) of project {project.name} does not end; nothing was changed"
                ) from error
            time.sleep(_RETRY_S)


def closed_because(project: Path) -> str | None:
    """Return the message for clients if a command holds this project."""
    try:
        mark = os.open(project / _MARK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(mark, 1000, 0).decode(errors="replace") or "its administrator is at work on it"
    else:
        return None
    finally:
        os.close(mark)


_MAX_CODE_CHARS = 5
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class ProjectSummary(msgspec.Struct, frozen=True):
    slug: str
    code: str | None
    name: str | None
    tasks: int
    archived: int
    state: str


class ProjectPaths:
    def __init__(self, root: Path) -> None:
        self.root = root
        """Contains ``.lattice/``; lattice's own root."""
        self.lattice = root / ".lattice"
        self.journal = root / "journal"
        self.uploads = root / "uploads"
        self.incoming = root / "incoming"
        self.announced = root / "announced"
        """In a cluster: links to announced files, by digest, until the cluster has their contents."""
        self.writer_lock = root / ".writer.lock"
        """Held by the project's worker while it lives."""

    def upload(self, token_id: str, digest: bytes) -> Path:
        owner = hashlib.sha256(token_id.encode(errors="surrogatepass")).hexdigest()[:16]
        return self.uploads / f"{owner}-{digest.hex()}"


class DataDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = path / "tokens.json"
        self.tokens_used = path / "tokens-used.json"
        self.signing_key = path / "signing-key"
        self.projects = path / "projects"
        self.archived = path / "archived"
        self.trash = path / "trash"
        self.admin_log = AdminLog(path / "admin.log")
        self._config = path / "config.json"
        self._renamed = path / "renamed.json"

    def create(self) -> None:
        """Create the directory, for its user alone, its settings and an empty ``tokens.json``.

        Raises Misuse: it is a data directory already; StorageError: it cannot be written.
        """
        if self._config.exists():
            raise Misuse(f"{self.path} is already a data directory")
        with _storage_errors(f"cannot create {self.path}"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            self.projects.mkdir(exist_ok=True)
            if not self.tokens.exists():
                write_atomically(self.tokens, b'{"tokens": []}\n', mode=0o600)
            write_atomically(self._config, b"{}\n")

    def config(self) -> Config:
        """Return the settings. Raises Misuse: never initialised, or ``config.json`` is invalid."""
        try:
            return msgspec.json.decode(self._config.read_bytes(), type=Config)
        except FileNotFoundError:
            raise Misuse(
                f"{self.path} is not a data directory; create it with: lattice-remote init {self.path}"
            ) from None
        except (msgspec.DecodeError, OSError) as error:
            raise Misuse(f"{self._config}: {error}") from error

    def writable_by_everybody(self) -> list[Path]:
        paths = (self.path, self._config, self.tokens, self.projects)
        return [path for path in paths if path.exists() and path.stat().st_mode & stat.S_IWOTH]

    def lock(self) -> int:
        """Lock the directory for a server; return the descriptor. Raises Misuse: another one runs on it."""
        try:
            return lock(self.path / ".lock")
        except LockedElsewhere as error:
            raise Misuse(
                f"another server (pid {error.holder}) runs on {self.path}; stop it, or use another --data"
            ) from error

    def slugs(self) -> list[str]:
        return _projects_in(self.projects)

    def has_project(self, slug: str) -> bool:
        """Return whether a project exists, for any string (I9)."""
        return _is_project(self.projects, slug)

    def require_project(self, slug: str) -> None:
        """Raise Misuse if there is no such project."""
        if not self.has_project(slug):
            raise Misuse(f"there is no project {slug!r}; see: lattice-remote project list")

    def is_archived(self, slug: str) -> bool:
        return _is_project(self.archived, slug)

    def archived_slugs(self) -> list[str]:
        return _projects_in(self.archived)

    def renamed(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(self._renamed.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            return {}

    def save_renamed(self, renamed: dict[str, str]) -> None:
        with _storage_errors("cannot write renamed.json"):
            write_atomically(self._renamed, msgspec.json.format(msgspec.json.encode(renamed)) + b"\n")

    def project(self, slug: str) -> ProjectPaths:
        assert _SLUG.fullmatch(slug), "a slug is checked before it becomes a path"
        return ProjectPaths(self.projects / slug)

    def create_project(self, slug: str, *, code: str | None, name: str | None, actor: str | None) -> str:
        """Create a project with lattice's own ``init``, in one step, and return its code.

        Args:
            code: the prefix of its tasks' short ids, 1 to 5 letters; None: derived from the slug.

        Raises Misuse: not a data directory, a bad slug, code or actor, or the project exists; StorageError: a file
        could not be written.
        """
        self.config()
        self.require_free(slug)
        scratch = self.projects / f".new-{secrets.token_hex(8)}"
        try:
            code = self.init_project(scratch, slug, code=code, name=name, actor=actor)
            with _storage_errors(f"cannot create project {slug!r}"):
                os.rename(scratch, self.projects / slug)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return code

    def init_project(self, place: Path, slug: str, *, code: str | None, name: str | None, actor: str | None) -> str:
        """Create a project at a new path; return its code. Arguments and errors as for ``create_project``."""
        code = code or self._free_code(slug)
        with _storage_errors(f"cannot create project {slug!r}"):
            place.mkdir(parents=True)
            _run_lattice_init(place, code=code, name=name or slug, actor=actor)
        return code.upper()

    def _free_code(self, slug: str) -> str:
        """Return a code that no project has. Raises Misuse: the slug has too few letters."""
        taken = {self.summary(other).code for other in (*self.slugs(), *self.archived_slugs())}
        for code in _codes(slug):
            if code not in taken:
                return code
        raise Misuse(f"no code can be derived from {slug!r}; name one with --code, 1 to 5 letters")

    def require_free(self, slug: str) -> None:
        """Raise Misuse if the name is invalid or taken."""
        self.require_name(slug)
        if (self.projects / slug).exists():
            raise Misuse(f"project {slug!r} already exists")
        if (self.archived / slug).exists():
            raise Misuse(f"project {slug!r} is archived; choose another name, or unarchive and rename that one")

    @staticmethod
    def require_name(slug: str) -> None:
        """Raise Misuse if the name is invalid."""
        if _SLUG.fullmatch(slug) is None:
            raise Misuse(f"bad project name {slug!r}: use lower case letters, digits and dashes, at most 63")

    def summary(self, slug: str) -> ProjectSummary:
        is_archived = self.is_archived(slug) and not self.has_project(slug)
        lattice = (self.archived if is_archived else self.projects) / slug / ".lattice"
        try:
            config = msgspec.json.decode((lattice / "config.json").read_bytes(), type=_LatticeConfig)
        except (OSError, msgspec.DecodeError):
            config = _LatticeConfig()
        return ProjectSummary(
            slug,
            config.project_code,
            config.project_name,
            _count(lattice / "tasks"),
            _count(lattice / "archive/tasks"),
            "archived" if is_archived else "active",
        )


def _codes(slug: str) -> Iterator[str]:
    """Yield possible codes: initials of several words, the first letters, then the first two and a later one."""
    words = ["".join(filter(str.isalpha, word)).upper() for word in slug.split("-")]
    letters = "".join(words)
    initials = "".join(word[:1] for word in words)
    if 2 <= len(initials) <= _MAX_CODE_CHARS:
        yield initials
    yield from (letters[:length] for length in (3, 4, 5, 2, 1) if len(letters) >= length)
    yield from (letters[:2] + letter for letter in letters[3:])


def _is_project(directory: Path, slug: str) -> bool:
    """Return whether a project is here, or waits to be put in place (see ``worker/project_import.py``)."""
    return _SLUG.fullmatch(slug) is not None and any(
        (directory / slug / name).is_dir() for name in (".lattice", "adopting")
    )


def _projects_in(directory: Path) -> list[str]:
    try:
        return [name for name in sorted(os.listdir(directory)) if _is_project(directory, name)]
    except FileNotFoundError:
        return []


class _LatticeConfig(msgspec.Struct):
    project_code: str | None = None
    project_name: str | None = None


def administered(named: Path | None) -> DataDir:
    """Return the data directory of a command: the named one, or the default one.

    Raises Misuse if root runs the command and another user owns it: its server could not read root's files.
    """
    path = named or default_location()
    if os.geteuid() == 0 and path.exists() and (owner := path.stat().st_uid) != 0:
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:  # no user of this machine, for example in a container
            name = f"#{owner}"
        raise Misuse(f"{path} belongs to {name}, and so must its files; run: sudo -u {shlex.quote(name)}")
    return DataDir(path)


def default_location() -> Path:
    """Return the directory of ``LATTICE_REMOTE_DATA``, else this user's only one, else where one would be. Raises
    Misuse if there are several.
    """
    if named := os.environ.get("LATTICE_REMOTE_DATA"):
        return Path(named)
    import platformdirs

    usual = Path(platformdirs.user_data_dir("lattice-remote", appauthor=False))
    created = sorted({path for path in (usual, *_remembered()) if (path / "config.json").is_file()})
    if len(created) > 1:
        listed = ", ".join(shlex.quote(str(path)) for path in created)
        raise Misuse(f"there are several data directories: {listed}; name one with --data, or LATTICE_REMOTE_DATA")
    return created[0] if created else usual


def remember(path: Path) -> None:
    kept = [*(known for known in _remembered() if known.is_dir()), path.absolute()]
    with contextlib.suppress(OSError):
        file = _memory()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(file, msgspec.json.encode([str(known) for known in dict.fromkeys(kept)]), mode=0o600)


def _remembered() -> list[Path]:
    try:
        return [Path(text) for text in msgspec.json.decode(_memory().read_bytes(), type=list[str])]
    except (OSError, msgspec.DecodeError):
        return []


def _memory() -> Path:
    import platformdirs

    return Path(platformdirs.user_state_dir("lattice-remote", appauthor=False)) / "data-directories.json"


def _run_lattice_init(root: Path, *, code: str, name: str, actor: str | None) -> None:
    """Run ``lattice init`` in this process.

    The command is called past its group, which would load our plugin for clients.
    """
    import click
    from lattice.cli.main import init

    argv = ["--path", str(root), "--project-code", code, "--project-name", name, "--actor", actor or ""]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            init.main([*argv, "--no-setup-claude", "--no-setup-agents", "--no-seed"], "init", standalone_mode=False)
    except click.ClickException as error:
        raise Misuse(error.format_message()) from error


def _count(directory: Path) -> int:
    try:
        return sum(name.endswith(".json") and not name.startswith(".") for name in os.listdir(directory))
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what}: {error.strerror or error}") from error


class AdminEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    time: str
    user: str
    """Of the system; behind ``sudo`` the user that called it."""
    action: str
    """Such as ``token create``."""
    subject: str
    """A project's slug, or a token's id."""
    details: dict[str, str | list[str]] = {}


class AdminLog:
    def __init__(self, path: Path) -> None:
        self._path = path

    def record(self, action: str, subject: str, **details: str | list[str] | None) -> None:
        """Append one entry; it survives a power cut. Raises StorageError: the change was made, but not recorded."""
        kept = {name: value for name, value in details.items() if value}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = msgspec.json.encode(AdminEntry(now, _user(), action, subject, kept)) + b"\n"
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | SAFE, 0o600)
            try:
                write_all(file, line)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise StorageError(f"the change was made, but {self._path} cannot record it: {error.strerror}") from error

    def newest_first(self, number: int) -> list[AdminEntry]:
        """Return the last ``number`` entries, without damaged lines. Raises StorageError."""
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}") from error
        return list(_decoded(lines[::-1]))[:number]


def _decoded(lines: list[bytes]) -> Iterator[AdminEntry]:
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=AdminEntry)
        except msgspec.DecodeError:
            continue


def _user() -> str:
    called_by = os.environ.get("SUDO_USER", "")
    if called_by and called_by.isprintable():
        return called_by[:64]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # no user of this machine, for example in a container
        return f"#{os.getuid()}"
