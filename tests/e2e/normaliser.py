"""Normalises outputs and files of two projects, which differ by ids, times and directories."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Normaliser"]

_ULID = re.compile(r"(?<![A-Za-z0-9])(task|ev|art|res|sess|inst)_[0-9A-HJKMNP-TV-Z]{26}(?![A-Za-z0-9])")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_AGO = re.compile(r"\b\d+[sm] ago|in \d+m ?\d*s?|\d+m \d+s|(?<=expires )\d+[sm]|\b\d+\.\d+(?=h|d|s| hours| days)")
_DAYS = re.compile(r'(?<="days_ago": )[\d.e-]+')
_NEAR = re.compile(r"(?<=lattice dashboard --port )\d+")


@dataclass
class Normaliser:
    """Replaces ids by their order of appearance, times by a word, and this side's directories."""

    places: dict[str, str]
    seen: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        for place, word in self.places.items():
            text = text.replace(place, word)
        text = _ULID.sub(self._name, text)
        text = _DAYS.sub("DAYS", _NEAR.sub("PORT", text))
        return _AGO.sub("AGO", _DATE.sub("DATE", _TIME.sub("TIME", text)))

    def files(self, tree: Mapping[str, bytes]) -> dict[str, str]:
        """Return files with normalised names and contents, to compare two projects."""
        order = sorted(tree, key=lambda path: (path.startswith(("artifacts", "resources", "sessions")), path))
        return {self(path): self(tree[path].decode(errors="surrogateescape")) for path in order}

    def _name(self, match: re.Match[str]) -> str:
        return self.seen.setdefault(match[0], f"{match[1]}#{len(self.seen)}")
