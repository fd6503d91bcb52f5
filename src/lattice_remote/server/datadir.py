"""The server's data directory: where things are in it, and how it and its projects are made.

    config.json                     settings, see ``settings.py``
    tokens.json                     who may do what, mode 0600, see ``tokens.py``
    signing-key                     of browsers' cookies, mode 0600, see ``signing_key.py``
    tokens-used.json                when tokens were last in use, see ``lastuse.py``
    projects/<slug>/.lattice/       a plain Lattice directory, valid at every moment (I12)
    projects/<slug>/journal/        the numbered changes, see ``journal.py``
    projects/<slug>/tmp/            the worker's scratch
    projects/<slug>/uploads/        content on its way in, kept for a day, see ``staging.py``
    projects/<slug>/set-aside/      what was in the way of mending, see ``fsck.py``
    projects/<slug>/incoming/       projects that were pushed and are being checked
    projects/<slug>/adopting/       one that is being put in place, see ``adoption.py``
    archived/<slug>/                projects that nobody is served
    trash/<slug>-<time>/            projects that were deleted
    renamed.json                    what projects were called before
    .lock                           held by the running server
    status.sock                     tells how the running server is, see ``monitoring/statussocket.py``

All but ``signing-key``, ``tokens-used.json``, ``tmp/``, ``uploads/``, ``incoming/``, ``trash/``, the lock and the
socket is needed to restore a server, and nothing else is.
"""

import contextlib
import hashlib
import io
import os
import pwd
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import write_atomically
from lattice_remote.server.config import Config
from lattice_remote.server.locks import LockedElsewhere, lock

__all__ = ["DataDir", "ProjectPaths", "ProjectSummary", "administered", "default_location"]

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class ProjectSummary(msgspec.Struct, frozen=True):
    """One line of ``lattice-remote project list``."""

    slug: str
    code: str | None
    name: str | None
    tasks: int
    archived: int
    state: str
    """``active``, or ``archived``: nobody is served."""


class ProjectPaths:
    """Where one project's files are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """The directory that holds ``.lattice/``; lattice's own root."""
        self.lattice = root / ".lattice"
        self.journal = root / "journal"
        self.uploads = root / "uploads"
        self.incoming = root / "incoming"
        self.writer_lock = root / ".writer.lock"
        """Held by the project's worker process for as long as it lives."""

    def upload(self, token_id: str, digest: bytes) -> Path:
        """Return where content is that was uploaded whole with a token; any string may be a token's id."""
        owner = hashlib.sha256(token_id.encode(errors="surrogatepass")).hexdigest()[:16]
        return self.uploads / f"{owner}-{digest.hex()}"


class DataDir:
    """A data directory; it need not exist before ``create()``. Holds no state but its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = path / "tokens.json"
        self.tokens_used = path / "tokens-used.json"
        self.signing_key = path / "signing-key"
        self.projects = path / "projects"
        self.archived = path / "archived"
        self.trash = path / "trash"
        self._config = path / "config.json"
        self._renamed = path / "renamed.json"

    def create(self) -> None:
        """Make the directory, its settings and an empty ``tokens.json``.

        Raises:
            Misuse: it is a data directory already.
            StorageError: it cannot be written.
        """
        if self._config.exists():
            raise Misuse(f"{self.path} is a data directory already")
        with _storage_errors(f"cannot create {self.path}"):
            self.projects.mkdir(parents=True, exist_ok=True)
            if not self.tokens.exists():
                write_atomically(self.tokens, b'{"tokens": []}\n', mode=0o600)
            write_atomically(self._config, b"{}\n")

    def config(self) -> Config:
        """Return the settings.

        Raises:
            Misuse: the directory was never initialised, or ``config.json`` is not what it must be.
        """
        try:
            return msgspec.json.decode(self._config.read_bytes(), type=Config)
        except FileNotFoundError:
            raise Misuse(
                f"{self.path} is not a data directory; create it with: lattice-remote init {self.path}"
            ) from None
        except (msgspec.DecodeError, OSError) as error:
            raise Misuse(f"{self._config}: {error}") from error

    def writable_by_everybody(self) -> list[Path]:
        """Return what any user of the machine may change, of the files and directories that say who may do what."""
        paths = (self.path, self._config, self.tokens, self.projects)
        return [path for path in paths if path.exists() and path.stat().st_mode & stat.S_IWOTH]

    def lock(self) -> int:
        """Take the data directory for this server; return the descriptor that holds the lock.

        Raises:
            Misuse: another server runs on it.
        """
        try:
            return lock(self.path / ".lock")
        except LockedElsewhere as error:
            raise Misuse(
                f"another server (pid {error.holder}) runs on {self.path}; stop it, or use another --data"
            ) from error

    # --- projects ---

    def slugs(self) -> list[str]:
        """Return the projects' names, sorted."""
        try:
            names = sorted(os.listdir(self.projects))
        except FileNotFoundError:
            return []
        return [name for name in names if self.has_project(name)]

    def has_project(self, slug: str) -> bool:
        """Tell whether there is such a project; any string may be asked for (I9)."""
        return _is_project(self.projects, slug)

    def is_archived(self, slug: str) -> bool:
        """Tell whether there is such a project, which nobody is served; any string may be asked for."""
        return _is_project(self.archived, slug)

    def archived_slugs(self) -> list[str]:
        """Return the names of the projects that nobody is served, sorted."""
        try:
            names = sorted(os.listdir(self.archived))
        except FileNotFoundError:
            return []
        return [name for name in names if self.is_archived(name)]

    def renamed(self) -> dict[str, str]:
        """Return what projects are called now, by what they were called; empty when that can't be read."""
        try:
            return msgspec.json.decode(self._renamed.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            return {}

    def save_renamed(self, renamed: dict[str, str]) -> None:
        """Replace what ``renamed`` returns.

        Raises:
            StorageError: it can't be written.
        """
        with _storage_errors("cannot write renamed.json"):
            write_atomically(self._renamed, msgspec.json.format(msgspec.json.encode(renamed)) + b"\n")

    def project(self, slug: str) -> ProjectPaths:
        """Return where a project's files are; ``slug`` is one that ``has_project()`` knows."""
        assert _SLUG.fullmatch(slug), "a slug is checked before it becomes a path"
        return ProjectPaths(self.projects / slug)

    def create_project(self, slug: str, *, code: str, name: str | None, actor: str | None) -> None:
        """Make a project with lattice's own ``init``, in one step: a running server sees all of it or nothing.

        Args:
            slug: its name in URLs: lower case letters, digits and dashes, at most 63.
            code: the prefix of its tasks' short ids, 1 to 5 letters.
            name: a title for people.
            actor: who is taken when a command names no actor.

        Raises:
            Misuse: not a data directory, a bad slug, code or actor, or the project exists.
            StorageError: a file could not be written.
        """
        self.config()
        self.require_free(slug)
        scratch = self.projects / f".new-{secrets.token_hex(8)}"
        with _storage_errors(f"cannot create project {slug!r}"):
            scratch.mkdir(parents=True)
            try:
                _run_lattice_init(scratch, code=code, name=name or slug, actor=actor)
                os.rename(scratch, self.projects / slug)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def require_free(self, slug: str) -> None:
        """Do nothing if a project may get this name.

        Raises:
            Misuse: it is no name, or another project has it.
        """
        if _SLUG.fullmatch(slug) is None:
            raise Misuse(f"bad project name {slug!r}: use lower case letters, digits and dashes, at most 63")
        if (self.projects / slug).exists():
            raise Misuse(f"project {slug!r} exists already")
        if (self.archived / slug).exists():
            raise Misuse(f"project {slug!r} is archived; choose another name, or rename that one when it is back")

    def summary(self, slug: str) -> ProjectSummary:
        """Return what ``project list`` shows of a project, archived or not."""
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


def _is_project(directory: Path, slug: str) -> bool:
    """Whether a project lies there, or waits to be put in its place (see ``worker/adoption.py``)."""
    return _SLUG.fullmatch(slug) is not None and any(
        (directory / slug / name).is_dir() for name in (".lattice", "adopting")
    )


class _LatticeConfig(msgspec.Struct):
    project_code: str | None = None
    project_name: str | None = None


def administered(named: Path | None) -> DataDir:
    """Return the data directory that a command is to work on: the one that was named, or the default one.

    Raises:
        Misuse: root asks, and it is somebody else's, whose server could not read what root writes there.
    """
    path = named or default_location()
    if os.geteuid() == 0 and path.exists() and (owner := path.stat().st_uid) != 0:
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:  # nobody of this machine: a container's, say
            name = f"#{owner}"
        raise Misuse(
            f"{path} belongs to {name}, and so must all that is in it; begin with: sudo -u {shlex.quote(name)}"
        )
    return DataDir(path)


def default_location() -> Path:
    """Return the data directory to use when none was named: ``LATTICE_REMOTE_DATA``, else the user's own."""
    if named := os.environ.get("LATTICE_REMOTE_DATA"):
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_data_dir("lattice-remote", appauthor=False))


def _run_lattice_init(root: Path, *, code: str, name: str, actor: str | None) -> None:
    """Run ``lattice init`` in this process, quietly. Naming an actor, even an empty one, keeps it from asking.

    The command is called past its group, where our own plugin for clients sits.
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
