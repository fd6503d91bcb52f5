"""What ``lattice-remote fsck`` finds: one thing that is wrong, where, and what mending does about it."""

import msgspec

__all__ = ["Finding"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not as it must be."""

    project: str
    """Its slug; "" for what belongs to the server."""
    where: str
    """A path, relative to the project's directory or to the data directory."""
    what: str
    mend: str = ""
    """What ``--mend`` does; "" when a person has to decide."""
    mended: bool = False

    def line(self) -> str:
        """Return it as one line for a terminal."""
        place = f"{self.project}: {self.where}" if self.project else self.where
        if self.mended:
            return f"{place}: {self.what}; mended: {self.mend}"
        return f"{place}: {self.what}" + (f"; --mend: {self.mend}" if self.mend else "")
