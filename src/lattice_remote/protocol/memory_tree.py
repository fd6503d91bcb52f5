"""A tree in memory: what the vectors and the tests apply operations to."""

__all__ = ["MemoryTree"]


class MemoryTree:
    """The ``operations.Tree`` of a dictionary, path to content; the dictionary itself is changed."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files: dict[str, bytes] = {} if files is None else files

    def size(self, path: str) -> int | None:
        """Return the content's length in bytes, None where there is no file."""
        return len(self.files[path]) if path in self.files else None

    def read(self, path: str, offset: int = 0) -> bytes:
        """Return the content from ``offset`` on."""
        return self.files[path][offset:]

    def replace(self, path: str, data: bytes) -> None:
        """Make the content ``data``."""
        self.files[path] = data

    def append(self, path: str, data: bytes) -> None:
        """Add ``data`` at the end."""
        self.files[path] = self.files.get(path, b"") + data

    def move(self, path: str, to: str) -> None:
        """Rename, replacing what is at ``to``."""
        self.files[to] = self.files.pop(path)

    def delete(self, path: str) -> None:
        """Remove; nothing happens where there is no file."""
        self.files.pop(path, None)
