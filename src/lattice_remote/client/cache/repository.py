"""Read-only access to the git repository around a cache: tracked plans and notes, and git's content for them.

The repository may be hostile, and may be in the middle of a merge or rebase. So git runs without hooks, file system
monitor, optional locks, network or the caller's ``GIT_*`` variables, with a deadline, and only for commands that
neither write nor apply filters. Without git, or if git refuses (``safe.directory``), nothing counts as tracked.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field

__all__ = ["Blobs", "Repository"]

_DEADLINE_S = 5.0
_OPTIONS = (
    "--no-optional-locks",
    "--no-pager",
    "--no-replace-objects",
    "--literal-pathspecs",
    "-c",
    "core.fsmonitor=false",
    "-c",
    f"core.hooksPath={os.devnull}",
    "-c",
    "safe.bareRepository=explicit",
)
_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": "none",  # a partial clone would fetch missing objects, with any program its config names
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}


@dataclass(slots=True)
class Blobs:
    """A repository's content for one path: object names in the index (every stage) and in HEAD."""

    names: set[str] = field(default_factory=set)
    is_unmerged: bool = False
    """Whether a merge of this file waits for the user."""

    def have(self, text: bytes) -> bool:
        """Return whether one of them is this text, also after git's conversion of CR LF to LF."""
        algorithms = {"sha256" if len(name) == 64 else "sha1" for name in self.names}
        forms = {text, text.replace(b"\r\n", b"\n")}
        return any(_object_name(form, algorithm) in self.names for form in forms for algorithm in algorithms)


class Repository:
    """The repository that contains ``directory``, if any. The methods block: call them in a thread."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def is_there(self) -> bool:
        """Return whether a directory above has a ``.git``: a directory, or a file in a worktree or submodule."""
        place = self._directory
        while True:
            place, before = os.path.dirname(place), place
            if place == before:
                return False
            if os.path.lexists(os.path.join(place, ".git")):
                return True

    def tracked(self) -> list[str]:
        """Return the tracked paths in the directory, relative to it."""
        return [path for _, _, path in self._index(["."])] if self.is_there() else []

    def blobs(self, paths: Collection[str]) -> dict[str, Blobs]:
        """Return the repository's content for the tracked ones of ``paths``, relative to the directory."""
        found: dict[str, Blobs] = {}
        if not paths or not self.is_there():
            return found
        for name, stage, path in self._index(paths):
            blobs = found.setdefault(path, Blobs())
            blobs.names.add(name)
            blobs.is_unmerged |= stage != "0"
        if found:
            asked = "".join(f"HEAD:./{path}\n" for path in found)
            answers = self._run(["cat-file", "--batch-check=%(objectname)"], asked.encode()).decode().splitlines()
            if len(answers) == len(found):
                for blobs, answer in zip(found.values(), answers, strict=True):
                    if " " not in answer:  # "... missing" otherwise
                        blobs.names.add(answer)
        return found

    def _index(self, paths: Collection[str]) -> list[tuple[str, str, str]]:
        """Return object name, stage and path of each matching entry of the index."""
        entries = []
        for entry in self._run(["ls-files", "-s", "-z", "--", *paths]).split(b"\0"):
            fields, _, path = entry.decode(errors="surrogateescape").partition("\t")
            match fields.split():
                case [_, name, stage]:
                    entries.append((name, stage, path))
        return entries

    def _run(self, arguments: list[str], stdin: bytes = b"") -> bytes:
        git = shutil.which("git")
        if git is None or not os.path.isabs(git):  # a relative entry of PATH might lead into the repository
            return b""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        try:
            done = subprocess.run(
                [git, *_OPTIONS, *arguments],
                cwd=self._directory,
                env=environment | _ENVIRONMENT,
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_DEADLINE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return b""
        return done.stdout if done.returncode == 0 else b""


def _object_name(text: bytes, algorithm: str) -> str:
    return hashlib.new(algorithm, b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()
