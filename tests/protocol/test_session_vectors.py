"""Published sessions: every client sends the same frames and has the same files (SPEC section 5, I3)."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from session_drivers import SESSIONS, CacheDriver, StandaloneDriver, play


def fits(session: dict[str, Any], *, defers: bool) -> bool:
    return session.get("defers", defers) == defers


def named(sessions: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("session", sessions, ids=[session["name"] for session in sessions])


@named([session for session in SESSIONS if fits(session, defers=StandaloneDriver.defers)])
def test_standalone_client_plays_the_session(session: dict[str, Any], tmp_path: Path) -> None:
    with closing(StandaloneDriver(tmp_path / ".lattice", session["before"])) as driver:
        play(driver, session)


@named([session for session in SESSIONS if fits(session, defers=CacheDriver.defers)])
def test_cache_on_disk_plays_the_session(session: dict[str, Any], tmp_path: Path) -> None:
    with closing(CacheDriver(tmp_path / ".lattice", session["before"])) as driver:
        play(driver, session)
