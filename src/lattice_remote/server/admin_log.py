"""``admin.log``: what the command line changed on this server, when, and which system user ran it.

One JSON object a line, appended and fsynced after the change. It is a record among administrators, not a proof:
whoever may write the data directory may edit it.
"""

import os
import pwd
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.files import SAFE, write_all

__all__ = ["AdminEntry", "AdminLog"]


class AdminEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One administrative change."""

    time: str
    user: str
    """The system user that ran the command; behind ``sudo`` the user that called it."""
    action: str
    """The command's words, such as ``token create``."""
    subject: str
    """The project's slug, or the token's id."""
    details: dict[str, str | list[str]] = {}


class AdminLog:
    """The file in a data directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def record(self, action: str, subject: str, **details: str | list[str] | None) -> None:
        """Append one entry. It survives a power cut once this returns.

        Raises StorageError: the change was made, but not recorded.
        """
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
        """Return the last ``number`` entries. A damaged line is skipped.

        Raises StorageError if the file cannot be read.
        """
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
