"""Attached files of a request: private paths for the command, and the caller's own names in its output (I9).

A file that the caller does not have is missing at its private path too. Uploaded content is hard-linked: nothing is
copied, and the verified digest is reused.
"""

import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Attachment
from lattice_remote.server.tree.tree import TrustedDigest

__all__ = ["Attached"]

# Python's repr and JSON both double a backslash. So the output shows how a path was quoted, and the caller's own
# argument can be quoted alike.
_DIRECTORY_MARK = "\\"


class Attached:
    """Attachments of one request, on disk.

    Attributes:
        argv: the command line with the private paths.
        paths: the private paths; no other path may be read as a caller's file.
        vouched: verified digests of uploaded files, by inode.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.paths: frozenset[str] = frozenset()
        self.vouched: dict[int, TrustedDigest] = {}
        self._given: dict[str, str] = {}

    @classmethod
    def write(
        cls,
        argv: Sequence[str],
        files: Sequence[Attachment],
        directory: Path,
        uploaded: Callable[[bytes], Path],
        *,
        is_argv: bool = True,
    ) -> Self:
        """Put the files below ``directory``, which the caller empties after the command.

        ``uploaded`` returns the path of uploaded content by its digest. Without ``is_argv`` the strings are file
        arguments: one that looks like an option is not split.

        Raises:
            Rejected: an invalid index or name; REMOTE_NOT_UPLOADED for missing content.
            OSError: the disk is full.
        """
        attached = cls(list(argv))
        indexes = [file.index for file in files]
        if len(set(indexes)) != len(indexes) or any(index >= len(argv) for index in indexes):
            raise Rejected("an attached file belongs to no argument of the command", code="REMOTE_PROTOCOL")
        for file in files:
            option, given = _split(attached.argv[file.index]) if is_argv else ("", attached.argv[file.index])
            path = attached._write_one(file, directory, uploaded)
            attached._given[str(path)] = given
            attached.argv[file.index] = f"{option}{path}"
        attached.paths = frozenset(attached._given)
        return attached

    def _write_one(self, file: Attachment, directory: Path, uploaded: Callable[[bytes], Path]) -> Path:
        folder = directory / (secrets.token_hex(16) + _DIRECTORY_MARK)
        folder.mkdir(mode=0o700)
        if file.data is None and file.digest is None:
            path = folder / "missing"
        else:
            path = folder / _checked_name(file.name)
            if file.data is not None:
                path.write_bytes(file.data)
            elif file.digest is not None:
                self._link(uploaded(file.digest), path, file.size, file.digest)
        return path

    def _link(self, content: Path, path: Path, size: int, digest: bytes) -> None:
        """Hard-link uploaded content; copy it where hard links are impossible."""
        try:
            os.link(content, path, follow_symlinks=False)
        except FileNotFoundError:
            raise _not_uploaded() from None
        except OSError:
            shutil.copyfile(content, path, follow_symlinks=False)
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise _not_uploaded()
        self.vouched[status.st_ino] = TrustedDigest(size, status.st_mtime_ns, digest)

    def restore_names(self, output: bytes, *, is_json: bool) -> bytes:
        """Restore the caller's own arguments in ``output``."""
        for path, given in self._given.items():
            if is_json:
                output = output.replace(_in_json(path), _in_json(given))
            else:
                output = output.replace(repr(path).encode(), repr(given).encode("utf-8", "backslashreplace"))
                output = output.replace(path.encode(), given.encode())
        return output


def _not_uploaded() -> Rejected:
    return Rejected("a file of this command was not uploaded; send it again", code="REMOTE_NOT_UPLOADED")


def _split(argument: str) -> tuple[str, str]:
    if not argument.startswith("--"):
        return "", argument
    option, equals, given = argument.partition("=")
    return (option + equals, given) if equals else ("", argument)


def _checked_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
        raise Rejected(f"{name!r} cannot be the name of an attached file", code="REMOTE_UNSUPPORTED")
    return name


def _in_json(text: str) -> bytes:
    return json.dumps(text)[1:-1].encode()
