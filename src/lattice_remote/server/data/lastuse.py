"""``tokens-used.json``: when each token was last in use. It informs only, and nothing is lost with it.

The running server writes it, at most once a minute and at its end, beside ``tokens.json`` but apart from it: a file
that decides who comes in should change only when somebody changes it.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from lattice_remote.server.data.datadir import write_atomically

__all__ = ["SAVE_EVERY_S", "LastUse", "read_last_uses"]

SAVE_EVERY_S = 60.0
"""How often a running server writes what has changed."""

_log = logging.getLogger(__name__)


def read_last_uses(path: Path) -> dict[str, datetime]:
    """Return when each token, by its id, was last used; nothing when that is not known."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Annotated[datetime, Meta(tz=True)]])
    except (OSError, msgspec.DecodeError):
        return {}


class LastUse:
    """The file, as its one writer knows it. All methods belong to the event loop's thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._uses = read_last_uses(path)
        self._changed = False

    def used(self, token_ids: Iterable[str]) -> None:
        """Note that these tokens are in use now."""
        now = datetime.now(UTC).replace(microsecond=0)
        for token_id in token_ids:
            self._uses[token_id] = now
            self._changed = True

    async def save(self, known: set[str]) -> None:
        """Write what has changed, without tokens that are not ``known`` any more. A failure is logged."""
        if not self._changed:
            return
        self._changed = False
        self._uses = {token_id: at for token_id, at in self._uses.items() if token_id in known}
        data = msgspec.json.format(msgspec.json.encode(self._uses)) + b"\n"
        try:
            await asyncio.to_thread(write_atomically, self._path, data, mode=0o600)
        except OSError as error:
            _log.warning("cannot write %s: %s", self._path, error.strerror)
