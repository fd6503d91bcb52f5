"""Evidence that a person saved a plan or notes: a file altered by a crash, git or a copy tool is not an edit (I4).

``judge()`` classifies a file that differs from its base:

- an edit is sent;
- a file that is no edit is restored, its text rescued, and the user notified: a file filled with NULs; a content of the
  tracking git repository's index or HEAD; a file emptied or truncated while unwatched (before this boot, or before an
  agent whose predecessor was killed);
- a withheld one waits for the user: an exact earlier version of a text that others have changed since, an emptied long
  text, an unfinished git merge, a text saved on a full disk that lacks lines, many texts rewritten at once
  (``edit_sync``), and any other difference from before this boot that none of our processes saw.

A save that cannot be sent at once is recorded by digest, so it stays an edit after a reboot or a commit. The edited
file is fsynced before its record, the record and its directory before ``record()`` returns: after a power cut a
recorded digest that matches proves a whole text. The rest of a cache is not fsynced, and is compared with the server's
manifest.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lattice_remote.client.cache.cache import WATCHES_DIRECTORY, Cache, booted_at
from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.errors import StorageError
from lattice_remote.files import SAFE, Signature
from lattice_remote.protocol.operations import digest_of

__all__ = ["EDIT", "Blobs", "Evidence", "Judgement", "Repository", "takes_away"]


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
    """Object names for one path: in the index (every stage) and in HEAD."""

    names: set[str] = field(default_factory=set)
    is_unmerged: bool = False
    """Whether a merge of this file waits for the user."""

    def have(self, text: bytes) -> bool:
        algorithms = {"sha256" if len(name) == 64 else "sha1" for name in self.names}
        forms = {text, text.replace(b"\r\n", b"\n")}
        return any(_object_name(form, algorithm) in self.names for form in forms for algorithm in algorithms)


class Repository:
    """Read-only access to the git repository that contains ``directory``, if any. The methods block.

    The repository may be hostile, and may be in the middle of a merge or rebase. So git runs without hooks, file system
    monitor, optional locks, network or the caller's ``GIT_*`` variables, with a deadline, and only for commands that
    neither write nor apply filters. Without git, or if git refuses (``safe.directory``), nothing counts as tracked.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def is_there(self) -> bool:
        """Return whether a directory above has a ``.git``."""
        place = self._directory
        while True:
            place, before = os.path.dirname(place), place
            if place == before:
                return False
            if os.path.lexists(os.path.join(place, ".git")):
                return True

    def tracked(self) -> list[str]:
        return [path for _, _, path in self._index(["."])] if self.is_there() else []

    def blobs(self, paths: Collection[str]) -> dict[str, Blobs]:
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


_FILE = f"{PRIVATE_DIRECTORY}/edits.json"
_VERSIONS = f"{PRIVATE_DIRECTORY}/versions"
_DIGEST_BYTES = 16
_MAX_VERSIONS = 512
"""Most earlier versions of a text that are recognised."""
_MAX_SAVES = 4
"""Most recorded saves of one file: ``git stash`` and ``pop`` may bring one back."""
_NULS = bytes(64)
"""A person's text has no such run; a block lost in a power cut is one."""
_LONG_TEXT_BYTES = 512


class Judgement(NamedTuple):
    """Outcome for one file, with a reason (a clause about the file) unless it is an edit."""

    outcome: Literal["edit", "restored", "withheld"]
    reason: str = ""


EDIT = Judgement("edit")


class Evidence:
    """Evidence about one cache's plans and notes. Call writing methods under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.watched_since = 0.0
        """Earlier changes (seconds since 1970) were unobserved, because the last agent was killed."""
        self._watch = ""
        self._watch_handle: int | None = None
        self.cramped: dict[str, Signature | None] = {}
        """Files that were edited while the disk was full, with their signature then."""
        self._saves: dict[str, list[str]] = {}  # path -> digests of unsent texts
        # path -> digest of the text, and the reason; replaced, never altered: a thread writes while the loop reads
        self._withheld: Mapping[str, tuple[str, str]] = {}
        self._last_withheld: dict[str, str] = {}  # path -> digest; kept when the file is saved again
        self._found: dict[str, tuple[Signature, str]] = {}  # withheld files as last read
        self._loaded: Signature | None = None

    def judge(
        self, path: str, text: bytes, base: bytes | None, found: Signature, *, is_watched: bool, blobs: Blobs | None
    ) -> Judgement:
        """Classify a file that differs from its base.

        Args:
            found: the signature when the text was read.
            is_watched: whether this process has seen the file equal to its base.
            blobs: git's content for it, None if not tracked.
        """
        if self.is_saved(path, text):
            return EDIT
        written_at = found[0] / 1e9
        is_doubtful = not is_watched and written_at < max(self.watched_since, booted_at())
        is_from_before = is_doubtful and written_at < booted_at()
        is_cramped = self.cramped.get(path) == found
        is_partial = is_doubtful or is_cramped
        if (reason := self._damage(text, base, blobs, is_partial=is_partial)) is not None:
            return Judgement("restored", reason)
        if is_cramped and takes_away(base, text):
            return Judgement("withheld", "it was saved while the disk was full, and may be truncated")
        if (reason := self._doubt(path, text, base, blobs, is_from_before=is_from_before)) is not None:
            return Judgement("withheld", reason)
        return EDIT

    def _damage(self, text: bytes, base: bytes | None, blobs: Blobs | None, *, is_partial: bool) -> str | None:
        if _NULS in text or (text and not text.strip(b"\0")):
            return "it held NUL bytes instead of text, as after a power cut"
        if blobs is not None and blobs.have(text):
            return "git wrote it (checkout, stash, reset, merge)"
        if is_partial and base and base.startswith(text):
            return "it was empty or truncated, as after a crash or on a full disk"
        return None

    def _doubt(
        self, path: str, text: bytes, base: bytes | None, blobs: Blobs | None, *, is_from_before: bool
    ) -> str | None:
        if blobs is not None and blobs.is_unmerged:
            return "git has not finished merging it"
        if is_from_before:
            return "it was changed before this machine was started, while no agent ran"
        if self._is_earlier(path, text):
            return "it is an earlier version, which others have changed since"
        if not text.strip() and base is not None and len(base) >= _LONG_TEXT_BYTES:
            return "it empties a long text"
        return None

    # --- watching ---

    def begin_watch(self) -> None:
        """Start to watch the files, and find out whether an earlier agent was killed.

        Each agent keeps a locked file; a killed process leaves an unlocked one.
        """
        place = self._cache.absolute(WATCHES_DIRECTORY)
        with contextlib.suppress(OSError):  # no room, or a read-only mount: the files count as unwatched
            for name in os.listdir(place):
                if (handle := _locked(os.path.join(place, name), os.O_RDONLY)) is not None:
                    self.watched_since = time.time()
                    os.unlink(os.path.join(place, name))
                    os.close(handle)
            self._watch = os.path.join(place, os.urandom(8).hex())
            self._watch_handle = _locked(self._watch, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            if self._watch_handle is not None:  # agents of other users of the directory lock it too
                os.fchmod(self._watch_handle, os.stat(self._cache.directory).st_mode & 0o666)

    def end_watch(self) -> None:
        if self._watch_handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._watch)
            os.close(self._watch_handle)
            self._watch_handle = None

    # --- unsent saves ---

    def is_saved(self, path: str, text: bytes) -> bool:
        self._load()
        return _digest(text) in self._saves.get(path, ())

    def record(self, saves: Iterable[tuple[str, bytes]]) -> None:
        """Record these texts, by path, as a person's saves. Durable on return; the files are fsynced first."""
        self._load()
        new = [(path, _digest(text)) for path, text in saves]
        self._cache.sync(path for path, _ in new)
        for path, digest in new:
            self._saves[path] = [*(d for d in self._saves.get(path, []) if d != digest), digest][-_MAX_SAVES:]
        if new:
            self._withheld = _without(self._withheld, [path for path, _ in new])
            self._store()

    def settled(self, path: str, text: bytes) -> None:
        """Forget this save and earlier ones."""
        self._load()
        self.cramped.pop(path, None)
        digest, saves = _digest(text), self._saves.get(path, [])
        self._last_withheld.pop(path, None)
        if digest in saves:
            self._saves[path] = saves[saves.index(digest) + 1 :]
        is_withheld = self._withheld.get(path, ("", ""))[0] == digest
        if is_withheld:
            self._withheld = _without(self._withheld, [path])
        if digest in saves or is_withheld:
            self._store()

    # --- withheld texts ---

    def withhold(self, texts: Iterable[tuple[str, bytes, str]]) -> None:
        self._load()
        before = self._withheld
        self._withheld = {**before, **{path: (_digest(text), reason) for path, text, reason in texts}}
        self._last_withheld |= {path: digest for path, (digest, _) in self._withheld.items()}
        if self._withheld != before:
            self._store()

    def withheld(self) -> dict[str, str]:
        self._load()
        return {path: reason for path, (digest, reason) in self._withheld.items() if self._holds(path, digest)}

    def is_last_withheld(self, path: str, text: bytes) -> bool:
        """Return whether this text was withheld last: the file's next save builds on it."""
        self._load()
        return self._last_withheld.get(path) == _digest(text)

    def withheld_reason(self, path: str, text: bytes) -> str | None:
        self._load()
        digest, reason = self._withheld.get(path, ("", ""))
        return reason if digest == _digest(text) else None

    def _holds(self, path: str, digest: str) -> bool:
        found = self._cache.signature(path)
        if found is None or self._found.get(path) == (found, digest):
            return found is not None
        try:
            holds = _digest(self._cache.read(path)) == digest
        except (StorageError, OSError):
            return False
        if holds:
            self._found[path] = found, digest
        return holds

    # --- earlier versions ---

    def replaced(self, path: str, text: bytes) -> None:
        digest = digest_of(text)[:_DIGEST_BYTES]
        before = self._versions(path)
        if digest not in before:
            self._cache.replace(f"{_VERSIONS}/{path}", b"".join([*before, digest][-_MAX_VERSIONS:]))

    def forget_versions(self, path: str) -> None:
        self._cache.delete(f"{_VERSIONS}/{path}")

    def _is_earlier(self, path: str, text: bytes) -> bool:
        return digest_of(text)[:_DIGEST_BYTES] in self._versions(path)

    def _versions(self, path: str) -> list[bytes]:
        place = f"{_VERSIONS}/{path}"
        data = b"" if self._cache.size(place) is None else self._cache.read(place)
        return [data[at : at + _DIGEST_BYTES] for at in range(0, len(data), _DIGEST_BYTES)]

    # --- the file ---

    def _load(self) -> None:
        found = self._cache.signature(_FILE)
        if found == self._loaded:
            return
        self._loaded = found
        self._saves, self._withheld = {}, {}
        try:
            data = json.loads(self._cache.read(_FILE)) if found is not None else {"saves": {}, "withheld": {}}
            saves = {str(path): [str(digest) for digest in digests] for path, digests in data["saves"].items()}
            withheld = {str(path): (str(digest), str(why)) for path, (digest, why) in data["withheld"].items()}
        except (StorageError, ValueError, KeyError, TypeError, AttributeError):
            return  # damaged: without evidence, a difference from before this boot is withheld
        self._saves, self._withheld = saves, withheld
        self._last_withheld |= {path: digest for path, (digest, _) in withheld.items()}

    def _store(self) -> None:
        self._withheld = {path: each for path, each in self._withheld.items() if self._holds(path, each[0])}
        self._saves = {path: saves for path, saves in self._saves.items() if saves}
        data = {"saves": self._saves, "withheld": self._withheld, "time": time.time()}
        self._cache.store(_FILE, (json.dumps(data, indent=0, sort_keys=True) + "\n").encode())
        self._loaded = self._cache.signature(_FILE)


def takes_away(base: bytes | None, text: bytes) -> bool:
    return base is not None and bool(Counter(base.splitlines()) - Counter(text.splitlines()))


def _locked(place: str, flags: int) -> int | None:
    try:
        handle = os.open(place, flags | SAFE, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _without(withheld: Mapping[str, tuple[str, str]], paths: Collection[str]) -> dict[str, tuple[str, str]]:
    return {path: each for path, each in withheld.items() if path not in paths}


def _digest(text: bytes) -> str:
    return digest_of(text)[:_DIGEST_BYTES].hex()
