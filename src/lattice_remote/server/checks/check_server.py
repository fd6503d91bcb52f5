"""Checks what belongs to the whole server: settings, tokens, leftovers, permissions. Changes nothing."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.checks.findings import Finding
from lattice_remote.server.data.datadir import DataDir
from lattice_remote.server.data.tokens import METRICS_ACTOR, Token, TokenFile, check_actor

__all__ = ["CHMOD_600", "TAKE_AWAY", "check_server", "server_leftovers"]

CHMOD_600 = "make it readable for its owner alone"
TAKE_AWAY = "take that permission away"
_SCRATCH = re.compile(r"\.[a-z-]+\.json\.[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_server(data: DataDir) -> Iterator[Finding]:
    """Yield what is wrong outside the projects."""
    try:
        data.config()
    except Misuse as error:
        yield Finding("", "config.json", error.message)
    yield from _tokens(data)
    for path in server_leftovers(data):
        where = str(path.relative_to(data.path))
        yield Finding("", where, "left behind by a command that ended too early", "set aside")
    for path in data.writable_by_everybody():
        if path != data.tokens:  # of which more is asked above
            where = "." if path == data.path else path.name
            yield Finding("", where, "everybody on this machine may write to it", TAKE_AWAY)


def server_leftovers(data: DataDir) -> list[Path]:
    """Return what an unfinished ``project create``, or an unfinished write, has left."""
    scratch = [path for path in data.path.glob(".*") if _SCRATCH.fullmatch(path.name)]
    return sorted([*scratch, *(data.path / "projects").glob(".new-*")])


def _tokens(data: DataDir) -> Iterator[Finding]:
    if not data.tokens.exists():
        yield Finding("", "tokens.json", "it is missing: nobody can come in; see: lattice-remote token create")
        return
    if data.tokens.stat().st_mode & 0o077:
        yield Finding("", "tokens.json", "others may read or write it", CHMOD_600)
    try:
        tokens = TokenFile(data.tokens).read()
    except StorageError as error:
        yield Finding("", "tokens.json", f"it can't be read: {error.message}")
        return
    for kind, values in (("id", [t.id for t in tokens]), ("digest", [t.sha256 for t in tokens])):
        for value, count in Counter(values).items():
            if count > 1:
                shown = value if kind == "id" else value[:8] + "..."
                yield Finding("", "tokens.json", f"{count} tokens have the {kind} {shown}")
    for token in tokens:
        for wrong in _wrong_with(token, data):
            yield Finding("", "tokens.json", f"token {token.id} {wrong}")


def _wrong_with(token: Token, data: DataDir) -> Iterator[str]:
    if not _SHA256.fullmatch(token.sha256):
        yield "has no digest: nobody can use it; revoke it"
    if token.metrics:  # METRICS_ACTOR is no actor of lattice, so that the token can't write
        if (token.actor, token.act_as, token.projects) != (METRICS_ACTOR, [], []):
            yield "is malformed: a token for metrics has no actor and no projects; revoke it and make another"
        return
    try:
        check_actor(token.actor, token.act_as)
    except Misuse as error:
        yield f"is malformed: {error.message}"
    for slug in token.projects:
        if not data.has_project(slug) and not data.is_archived(slug):
            yield f"is for project {slug!r}, which does not exist"
