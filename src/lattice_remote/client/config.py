"""Configuration of one cache: its remote (``.lattice/remote.json``) and its settings. Standard library only."""

import contextlib
import json
import os
import re
from typing import Any, NamedTuple

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import READ, write_atomically

__all__ = [
    "CHOICES",
    "PRIVATE_DIRECTORY",
    "REMOTE_FILE",
    "SETTINGS_FILE",
    "STATE_FILE",
    "UNPUSHED_FILE",
    "Remote",
    "below",
    "change_setting",
    "check_command",
    "check_name",
    "detachment",
    "identify",
    "is_cache",
    "is_unpushed",
    "lost_remote",
    "parse_url",
    "read_remote",
    "read_settings",
    "write_remote",
]

REMOTE_FILE = "remote.json"
STATE_FILE = "cache_state.json"
"""Marks a directory as a cache, also without its ``remote.json``."""
PRIVATE_DIRECTORY = ".remote"
"""Holds all other files of ours in a cache, as ``.git`` does for git."""
UNPUSHED_FILE = f"{PRIVATE_DIRECTORY}/unpushed.json"
"""Replaces ``remote.json`` while a local project waits to be pushed: other programs see a local project."""
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?(?P<path>/[^?#\s]*)?(?P<rest>[?#]\S*)?",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"(?:/(?!\.\.?/)[A-Za-z0-9._~-]{1,100}){0,8}/")
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_COMMAND = re.compile(r"[\w-]{1,50}(?: [\w-]{1,50}){0,3}")
_MAX_COMMANDS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Remote(NamedTuple):  # a dataclass would take twice the time to define, in every command
    """Project on a server, as in ``remote.json``, which may be committed and never holds a token."""

    name: str
    """The user's name for it, usually ``origin``."""
    url: str
    """Scheme, host and port of the server; below a path of a proxy also that path, with a slash at the end."""
    project: str
    commands: tuple[str, ...] = ()
    """Plugin commands that run on the server, for example ``deploy note``."""

    @property
    def place(self) -> str:
        """Server and project as one URL, the inverse of ``parse_url``."""
        return below(self.url, self.project) if self.project else self.url

    @property
    def websocket_url(self) -> str:
        return below(f"ws{self.url.removeprefix('http')}", f"projects/{self.project}/ws")


def below(url: str, path: str) -> str:
    return f"{url.rstrip('/')}/{path}"


def parse_url(text: str, project: str | None = None) -> tuple[str, str | None]:
    """Return a server's normalized URL, and the slug: passed separately, or of the path.

    The path is ``/SLUG``, or a page of the project such as ``/projects/SLUG/dashboard``. A path with a slash at the end
    is a proxy's, below which the server is; ``/PATH/SLUG`` and its pages are below it too.

    Raises:
        Misuse: not an http or https URL, a malformed slug, or two different slugs.
    """
    match = _URL.fullmatch(text.strip())
    prefix, page, rest = (match["path"] or "" if match else "").partition("/projects/")
    if match is not None and match["rest"] and not page:
        match = None  # only the address of a page has a query
    if match is None and "@" in text:  # this part may be a password: it is not repeated
        raise Misuse("a server's URL holds no user and no password; store a token with: lattice remote login URL")
    if match is None:
        raise Misuse(f"not a server's URL: {text!r}; it looks like http://host:8443 or https://host/project")
    port = match["port"]
    if port is not None and not 0 < int(port) < 65536:
        raise Misuse(f"port {port} in {text!r} is out of range")
    url = f"{match['scheme'].lower()}://{match['host'].lower()}" + (f":{int(port)}" if port else "")
    if page and rest.strip("/"):
        prefix, slug = f"{prefix}/", rest.strip("/").partition("/")[0]
    else:
        prefix, slash, slug = (match["path"] or "").rpartition("/")
        prefix += slash
    slug = slug or None
    if slug and project and slug != project:
        raise Misuse(
            f"the URL names project {slug!r}, but --project says {project!r}; a server below a path has a URL with a "
            f"slash at the end: {url}{prefix}{slug}/"
        )
    if prefix and not _PREFIX.fullmatch(prefix):
        raise Misuse(f"not a server's path: {prefix!r}; it looks like https://host/path/")
    slug = slug or project
    if slug is not None and not _SLUG.fullmatch(slug):
        raise Misuse(f"not a project's slug: {slug!r}; lower-case letters, digits and dashes, at most 63")
    return url + (prefix if prefix != "/" else ""), slug


def is_unpushed(directory: str) -> bool:
    return os.path.isfile(os.path.join(directory, UNPUSHED_FILE)) and not os.path.exists(
        os.path.join(directory, REMOTE_FILE)
    )


def is_cache(directory: str) -> bool:
    return any(os.path.isfile(os.path.join(directory, name)) for name in (REMOTE_FILE, STATE_FILE))


def detachment(directory: str) -> str | None:
    """Return problem and remedy of a cache without ``remote.json``; None for other directories."""
    if os.path.exists(os.path.join(directory, REMOTE_FILE)) or not is_cache(directory) or is_unpushed(directory):
        return None
    lost = lost_remote(directory)
    of = "a project on a server" if lost is None else f"project {lost.project} on {lost.url}"
    where = "URL --project SLUG" if lost is None else f"{lost.url} --project {lost.project}"
    return (
        f"this directory is a cache of {of}, but its remote.json is gone (git may have removed it): nothing can be "
        f"written; restore the file, or run: lattice remote add origin {where}"
    )


def lost_remote(directory: str) -> Remote | None:
    try:
        with open(os.path.join(directory, STATE_FILE), "rb") as file:
            found = json.load(file)
        url, slug = parse_url(found["url"], found["project"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, Misuse):
        return None
    return None if slug is None else Remote(name="origin", url=url, project=slug)


def read_remote(directory: str, name: str = REMOTE_FILE) -> Remote:
    """Return the remote in the file ``name``.

    Raises:
        Misuse: there is none; code ``REMOTE_GUARD`` if the directory is a cache all the same.
        StorageError: it cannot be read, or is invalid.
    """
    path = os.path.join(directory, name)
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(65536))
        called, (url, slug) = check_name(found.get("name", "origin")), parse_url(found["url"], found["project"])
        commands = tuple(check_command(command) for command in list(found.get("commands", []))[:_MAX_COMMANDS])
    except FileNotFoundError:
        if name == REMOTE_FILE and (why := detachment(directory)) is not None:
            raise Misuse(why, code="REMOTE_GUARD") from None
        raise Misuse("this project has no remote; add one with: lattice remote add origin URL --project SLUG") from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, Misuse) as error:
        lost = lost_remote(directory)
        where = "URL --project SLUG" if lost is None else f"{lost.url} --project {lost.project}"
        repair = f"remove the file, then run: lattice remote add origin {where}"
        raise StorageError(f"{path} is not valid; it needs url and project ({error}); {repair}") from error
    if slug is None:
        raise StorageError(f"{path} names no project")
    return Remote(name=called, url=url, project=slug, commands=commands)


def identify(directory: str) -> list[int | str]:
    """Return a cache's device and inode, server and project. Raises Misuse, StorageError."""
    remote = read_remote(directory)
    try:
        found = os.stat(directory)
    except OSError as error:
        raise StorageError(f"cannot read {directory}: {error.strerror}") from error
    return [found.st_dev, found.st_ino, remote.url, remote.project]


def check_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Misuse(f"not a remote's name: {name!r}; letters, digits, dots and dashes, at most 63")
    return name


def check_command(command: object) -> str:
    """Return a routable command's words, separated by spaces. Raises Misuse."""
    if not isinstance(command, str) or not _COMMAND.fullmatch(command):
        raise Misuse(f"not a command of lattice: {command!r}; its words without options, as in: deploy note")
    return command


def write_remote(directory: str, remote: Remote, name: str = REMOTE_FILE) -> None:
    """Write the file ``name`` atomically. Raises StorageError."""
    fields: dict[str, object] = {"name": remote.name, "project": remote.project, "url": remote.url}
    if remote.commands:
        fields["commands"] = remote.commands
    _write(os.path.join(directory, name), fields, mode=0o666)


def _write(path: str, fields: dict[str, Any], *, mode: int = 0o644) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomically(path, text.encode(), mode=mode, temporary=f"{path}.{os.getpid()}.tmp", sync=None)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


SETTINGS_FILE = f"{PRIVATE_DIRECTORY}/settings.json"
CHOICES = {"payloads": ("background", "on-demand")}
"""Every setting with its values; the first is the default."""
_MAX_BYTES = 64 * 1024


def read_settings(directory: str) -> dict[str, str]:
    found: object = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        handle = os.open(os.path.join(directory, SETTINGS_FILE), READ)
        with open(handle, "rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
    given = found if isinstance(found, dict) else {}
    return {name: given[name] if given.get(name) in values else values[0] for name, values in CHOICES.items()}


def change_setting(directory: str, name: str, value: str) -> None:
    """Change one setting atomically. Raises Misuse, StorageError."""
    if name not in CHOICES:
        raise Misuse(f"there is no setting {name!r}; there is {', '.join(CHOICES)}")
    if value not in CHOICES[name]:
        raise Misuse(f"{name} is one of {', '.join(CHOICES[name])}; not {value!r}")
    _write(os.path.join(directory, SETTINGS_FILE), {**read_settings(directory), name: value})
