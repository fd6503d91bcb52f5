"""A model of a power cut: files and names that were not fsynced may be as of any earlier moment, or damaged.

A worker is started with ``TRACED_WORKER``: it keeps a record of each fsync in a directory of its own. ``Disk`` then
knows for each file below a project which content and which name were durable, and ``cut`` leaves the project as a disk
may be found after a power cut:

- a durable file under a durable name is as it was;
- a file that was appended to keeps its durable part; the rest is there, is missing, or is filled with NULs;
- any other file is as at an observed moment since its last durable one: also with an old name, or with none; or it has
  the right name and is empty, cut short, or filled with NULs;
- the journal's end may be torn behind its durable part.

``touch`` changes the files' times and modes, as people do before they start a server again: none is an edit.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Disk", "make_image", "mounted", "touch", "trace_fsyncs", "traced_worker"]

_TREE = ".lattice"


def traced_worker(trace: Path, boot: str) -> Sequence[str]:
    """Return the command of a worker that records its fsyncs in ``trace``, and runs in the boot of this name."""
    return (sys.executable, "-X", "utf8", str(Path(__file__).resolve()), str(trace), boot)


# --- in the worker ---


def trace_fsyncs(directory: Path) -> None:
    """Record the durable state after each fsync of this process."""
    fsync = os.fsync
    recorder = ThreadPoolExecutor(1)  # a command's own thread may open nothing outside its project

    def record(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        path = f"/proc/self/fd/{descriptor}"
        if os.path.isdir(path):
            names = {entry.name: entry.inode() for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)}
            _save(directory / f"{inode}.names", json.dumps(names).encode())
        else:
            _save(directory / f"{inode}.content", Path(path).read_bytes())

    def traced(descriptor: int) -> None:
        fsync(descriptor)
        recorder.submit(record, descriptor).result()

    recorder.submit(int).result()
    os.fsync = traced
    os.fdatasync = traced


def _save(path: Path, data: bytes) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_bytes(data)
    scratch.replace(path)


# --- the disk ---


@dataclass
class _File:
    """Possible contents of one path after a power cut: those since the last durable one, None for no file."""

    versions: list[bytes | None] = field(default_factory=list)
    appendable: bytes = b""
    """What is durable of the file that now has this name."""


class Disk:
    """Durable state of a project. All files that exist at its creation are durable.

    Args:
        project: its directory.
        trace: the directory that the traced worker writes to, new.
    """

    def __init__(self, project: Path, trace: Path) -> None:
        trace.mkdir()
        self._project, self._trace = project, trace
        self._files: dict[str, _File] = {}
        self._names: dict[str, dict[str, int]] = {}  # of each directory, as it was in the beginning
        self._contents: dict[int, bytes] = {}
        for folder, names in self._folders():
            entries = {name: os.stat(Path(folder, name)).st_ino for name in names}
            self._names[folder] = entries
            self._contents |= {inode: Path(folder, name).read_bytes() for name, inode in entries.items()}
        self.observe()

    def observe(self) -> None:
        """Take in the files as they are: a power cut may bring this moment back until others are durable."""
        durable, now = self._durable(), self._now()
        for path in self._files.keys() | durable.keys() | now.keys():
            file = self._files.setdefault(path, _File([None]))
            data = now[path][1] if path in now else None
            if path in durable and path in now and durable[path] == now[path]:
                file.versions = [data]
            elif path not in durable and path not in now and self._is_known(path):
                file.versions = [None]
            elif file.versions[-1] != data:
                file.versions.append(data)
            file.appendable = self._content(now[path][0]) or b"" if path in now else b""

    def cut(self, rng: random.Random, *, damage: float = 0.7) -> list[str]:
        """Leave the project as a power cut may; return the paths that are not as they were.

        The traced worker must be dead. ``damage`` is the share of the files that lose something, of those that may.
        """
        self.observe()
        damaged = []
        for path, file in sorted(self._files.items()):
            if path.startswith("journal/") and not path.endswith(".log"):
                self._cut_own(rng, path, file)
            elif path.endswith(".log"):
                self._cut_journal(rng, path, file)
            elif len(file.versions) > 1 and rng.random() < damage and self._put(path, self._choose(rng, file)):
                damaged.append(path)
        return damaged

    # --- the present state ---

    def _folders(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the directories that count, and the names of the files in each."""
        for top in (_TREE, "journal"):
            for folder, _, names in os.walk(self._project / top):
                if not folder.startswith(f"{self._project}/{_TREE}/locks"):
                    yield folder, [name for name in names if ".tmp." not in name and not name.endswith(".new")]

    def _now(self) -> dict[str, tuple[int, bytes]]:
        found = {}
        for folder, names in self._folders():
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # the worker goes on
                    found[str(path.relative_to(self._project))] = (path.stat().st_ino, path.read_bytes())
        return found

    def _durable(self) -> dict[str, tuple[int, bytes]]:
        found = {}
        for folder, _ in self._folders():
            for name, inode in self._names_in(folder).items():
                content = self._content(inode)
                if content is not None:
                    found[str(Path(folder, name).relative_to(self._project))] = (inode, content)
        return found

    def _names_in(self, folder: str) -> dict[str, int]:
        try:
            names: dict[str, int] = json.loads((self._trace / f"{os.stat(folder).st_ino}.names").read_bytes())
        except FileNotFoundError:
            return self._names.get(folder, {})
        return names

    def _is_known(self, path: str) -> bool:
        return (self._trace / f"{os.stat((self._project / path).parent).st_ino}.names").exists()

    def _content(self, inode: int) -> bytes | None:
        try:
            return (self._trace / f"{inode}.content").read_bytes()
        except FileNotFoundError:
            return self._contents.get(inode)

    # --- the state after the cut ---

    def _choose(self, rng: random.Random, file: _File) -> bytes | None:
        last, durable = file.versions[-1], file.appendable
        if last is not None and durable and last.startswith(durable):  # only appended to since
            length = rng.randint(len(durable), len(last))
            return rng.choice([last[:length], last[:length] + bytes(len(last) - length)])
        chosen = rng.choice(file.versions)
        if chosen is None or chosen == file.versions[0]:
            return chosen
        return rng.choice([chosen, chosen, chosen[: rng.randint(0, len(chosen))], b"", bytes(len(chosen))])

    def _put(self, path: str, data: bytes | None) -> bool:
        """Make a file this; return whether it was anything else."""
        target = self._project / path
        before = target.read_bytes() if target.exists() else None
        if data is None:
            target.unlink(missing_ok=True)
        elif data != before:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return data != before

    def _cut_journal(self, rng: random.Random, path: str, file: _File) -> None:
        data, size = file.versions[-1], len(file.appendable)
        if data is not None and len(data) > size:
            kept = rng.randint(size, len(data))
            hole = data[:size] + bytes(kept - size) + data[kept:]
            self._put(path, rng.choice([data[:kept], data[:kept], data[:kept] + bytes(rng.randint(0, 40)), hole]))

    def _cut_own(self, rng: random.Random, path: str, file: _File) -> None:
        if len(file.versions) > 1:
            whole = [version for version in file.versions if path != "journal/undo" or version is not None]
            self._put(path, rng.choice(whole))


# --- a real file system ---


@contextlib.contextmanager
def mounted(image: Path, place: Path, options: str) -> Iterator[None]:
    """Mount an image of a file system.

    Raises:
        OSError: it can't be, for example without root's rights or loop devices.
    """
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", f"loop,{options}", image, place], capture_output=True, check=False)
    if done.returncode:
        raise OSError(f"cannot mount an image: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def make_image(path: Path) -> None:
    """Make a small ext4 file system.

    Raises:
        OSError: it can't be made.
    """
    with path.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    done = subprocess.run(["mkfs.ext4", "-q", path], capture_output=True, check=False)
    if done.returncode:
        raise OSError(f"cannot make a file system: {done.stderr.decode(errors='replace').strip()}")


# --- before the next start ---


def touch(rng: random.Random, lattice: Path) -> str:
    """Change times or modes of all files, as people do before a restart; return the name of the change."""
    name = rng.choice(["nothing", "chmod", "touch", "setxattr", "rsync"])
    for folder, _, names in os.walk(lattice):
        for path in [Path(folder, name_) for name_ in names]:
            if name == "chmod":
                path.chmod(0o640)
                os.chown(path, path.stat().st_uid, path.stat().st_gid)
            elif name == "touch":
                os.utime(path)
            elif name == "setxattr":
                os.setxattr(path, "user.label", b"restored")
            elif name == "rsync":
                data, status = path.read_bytes(), path.stat()
                path.unlink()
                path.write_bytes(data)
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return name


if __name__ == "__main__":
    from lattice_remote.server.worker import main, recovery

    boot_file = Path(sys.argv[1], "boot")
    boot_file.write_text(sys.argv[2])
    recovery._BOOT_ID = boot_file
    trace_fsyncs(Path(sys.argv[1]))
    sys.exit(main.main(sys.argv[3:]))
