"""The connections of one cache and its recent tokens, without a server."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from client_kit import make_cache, until

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.replicator import Replicator, RequestOnlySession
from lattice_remote.client.config import read_remote
from lattice_remote.client.connection import pool as pool_module
from lattice_remote.client.connection.pool import ConnectionPool, RecentTokens, digest_of_token
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import Rejected

URL = "http://127.0.0.1:1"


class Stub:
    """A connection that is never opened and records its calls."""

    def __init__(self, remote: object, session: object, token: str | None, **options: object) -> None:
        del remote
        self.session, self.token, self.options = session, token, options
        self.named: Server | None = None
        self.is_refused = self.is_waiting = False
        self.done: list[str] = []

    def start(self) -> None:
        self.done.append("start")

    async def close(self) -> None:
        self.done.append("close")

    def use_token(self, token: str | None) -> None:
        self.token, self.is_refused = token, False

    def try_again(self) -> None:
        self.done.append("try again")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    directory = make_cache(tmp_path / "ana", URL)
    made = Cache(str(directory), read_remote(str(directory)))
    made.prepare()
    return made


@pytest.fixture
async def pool(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ConnectionPool]:
    monkeypatch.setattr(pool_module, "Connection", Stub)
    made = ConnectionPool(cache.remote, Replicator(cache))
    yield made
    await made.close()


def stub(connection: object) -> Stub:
    assert isinstance(connection, Stub)
    return connection


def store(token: str | None) -> None:
    credentials.forget(URL)
    if token is not None:
        credentials.store(URL, "web", token)


# --- recent tokens ---


def age(cache: Cache, token: str, seconds: float) -> None:
    place = cache.absolute(f".remote/tokens/{digest_of_token(token)}")
    used_at = time.time() - seconds
    os.utime(place, (used_at, used_at))


def test_a_token_is_recent_for_ten_minutes_after_another_was_used(cache: Cache) -> None:
    recent = RecentTokens(cache)
    assert recent.digests() == set()
    recent.note("one")
    recent.note("two")
    assert recent.digests() == {digest_of_token("one"), digest_of_token("two")}
    age(cache, "two", 0)
    age(cache, "one", 620)
    assert recent.digests() == {digest_of_token("one"), digest_of_token("two")}
    age(cache, "one", 640)
    assert recent.digests() == {digest_of_token("two")}
    age(cache, "two", 10_000)
    assert len(recent.digests()) == 1, "the last one used is recent, however long ago"


def test_the_bound_of_a_recent_token_belongs_to_it(cache: Cache) -> None:
    recent = RecentTokens(cache)
    for token, used_at in (("one", 1_000_000), ("two", 1_000_630), ("three", 1_000_631)):
        recent.note(token)
        os.utime(cache.absolute(f".remote/tokens/{digest_of_token(token)}"), (used_at, used_at))
    assert recent.digests() == {digest_of_token("two"), digest_of_token("three")}
    recent.forget("three")
    assert recent.digests() == {digest_of_token("one"), digest_of_token("two")}


def test_a_use_is_recorded_again_after_half_a_minute(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: now))
    recent = RecentTokens(cache)
    place = cache.absolute(f".remote/tokens/{digest_of_token('one')}")
    recent.note("one")
    written_at = os.stat(place).st_mtime
    for later, is_recorded in ((29.0, False), (30.0, True), (59.0, False)):
        age(cache, "one", 100)
        now = 1000.0 + later
        recent.note("one")
        assert (os.stat(place).st_mtime >= written_at) == is_recorded, later


def test_a_forgotten_token_is_recorded_at_its_next_use(cache: Cache) -> None:
    recent = RecentTokens(cache)
    recent.note("one")
    recent.forget("one")
    recent.forget("never used")
    assert recent.digests() == set()
    recent.note("one")
    assert recent.digests() == {digest_of_token("one")}


# --- the follower's token ---


@pytest.mark.parametrize(
    ("stored", "given", "prefer_given", "expected"),
    [
        ("stored", "given", False, "stored"),
        ("stored", "given", True, "given"),
        ("stored", None, True, "stored"),
        (None, "given", False, "given"),
        (None, None, False, None),
    ],
)
async def test_the_stored_token_follows_unless_the_given_one_is_preferred(
    pool: ConnectionPool, stored: str | None, given: str | None, prefer_given: bool, expected: str | None
) -> None:
    store(stored)
    named = Server(URL)
    pool.start(given, named=named, prefer_given=prefer_given)
    following = stub(pool.following)
    assert (following.token, following.named, following.done) == (expected, named, ["start"])


@pytest.mark.parametrize(
    ("before", "follows", "stored", "given", "is_refused", "expected"),
    [
        ("old", "old", None, None, False, None),  # logged out
        ("old", "given", None, None, False, "given"),  # a command's token, which the logout does not affect
        ("old", "old", "new", "given", False, "new"),
        ("old", "old", "old", "given", False, "old"),
        ("old", "given", "new", None, False, "given"),
        (None, None, None, "given", False, "given"),
        (None, None, "new", "given", False, "new"),
        ("old", "old", "old", "given", True, "given"),
        ("old", "given", "old", "given", True, "old"),
        ("old", "old", "old", None, True, "old"),
        ("old", "old", "old", "old", True, "old"),
    ],
)
async def test_the_followers_token_changes_with_the_stored_one_or_when_it_is_refused(
    pool: ConnectionPool,
    before: str | None,
    follows: str | None,
    stored: str | None,
    given: str | None,
    is_refused: bool,
    expected: str | None,
) -> None:
    store(before)
    pool.start(None)
    following = stub(pool.following)
    following.token, following.is_refused = follows, is_refused
    store(stored)
    pool.choose(given)
    assert following.token == expected
    assert following.is_refused == (is_refused and follows == expected), "a token that was kept is not tried again"


async def test_a_server_with_a_changed_name_is_retried(pool: ConnectionPool) -> None:
    store("stored")
    first, other = Server(URL), Server(URL, headers=(("x-proxy", "1"),))
    pool.start(None, named=first)
    following = stub(pool.following)
    pool.choose(None, first)
    pool.choose(None)
    assert (following.named, following.done) == (first, ["start"])
    pool.choose(None, other)
    assert (following.named, following.done) == (other, ["start", "try again"])


async def test_a_replaced_stored_token_is_no_longer_recent(pool: ConnectionPool) -> None:
    store("old")
    pool.start(None)
    pool.note_use(None)
    assert pool.for_edits() is pool.following
    store("new")
    pool.choose(None)
    assert pool.for_edits() is None, "no command has used the new one"
    pool.note_use(None)
    assert pool.for_edits() is pool.following and stub(pool.following).token == "new"
    pool.choose(None)
    assert pool.for_edits() is pool.following, "the same token again"


async def test_a_changed_token_file_is_noticed_and_refused_connections_try_again(
    pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LOOK_INTERVAL_S", 0.01)
    store("old")
    pool.start(None)
    await asyncio.sleep(0)  # it has read the current files
    following, writer = stub(pool.following), stub(pool.writing("given"))
    accepted = stub(pool.writing("accepted"))
    writer.is_refused = True
    store("new")
    await until(lambda: following.token == "new" and "try again" in writer.done)
    assert "try again" not in accepted.done + following.done
    writer.done.clear()
    writer.is_refused = True
    trusted_servers.record(Server("http://127.0.0.1:2"))
    await until(lambda: "try again" in writer.done)


async def test_unchanged_token_files_retry_no_refused_connection(
    pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def seen() -> tuple[int]:
        nonlocal looks
        looks += 1
        return (0,)

    monkeypatch.setattr(pool_module, "LOOK_INTERVAL_S", 0.001)
    monkeypatch.setattr(pool_module, "_seen", seen)
    pool.start("given")
    stub(pool.following).is_refused = True
    await until(lambda: looks > 3)
    assert stub(pool.following).done == ["start"]


# --- writing connections ---


async def test_each_further_token_writes_over_its_own_connection(pool: ConnectionPool) -> None:
    store("stored")
    named = Server(URL)
    pool.start(None, named=named)
    assert pool.writing(None) is pool.writing("stored") is pool.following
    writer = stub(pool.writing("given"))
    assert pool.writing("given") is writer and pool.writing("another") is not writer
    assert isinstance(writer.session, RequestOnlySession)
    assert (writer.token, writer.options, writer.done) == ("given", {"named": named}, ["start"])
    await pool.close()
    assert writer.done == ["start", "close"] and "close" in stub(pool.following).done


async def test_without_a_token_a_command_suggests_login(pool: ConnectionPool) -> None:
    pool.start(None)
    with pytest.raises(Rejected, match="log in with: lattice remote login") as refused:
        pool.writing(None)
    assert refused.value.code == "REMOTE_UNAUTHORIZED"


async def test_a_bulk_connection_ends_with_its_work(pool: ConnectionPool) -> None:
    pool.start("stored")
    with pytest.raises(RuntimeError):
        async with pool.bulk("given") as connection:
            assert stub(connection).done == ["start"]
            assert pool.writing("given") is not connection
            raise RuntimeError
    assert stub(connection).done == ["start", "close"]


async def test_an_idle_writer_is_closed_unless_it_waits(pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.start("stored")
    now = 1000.0
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: now))
    idle, waiting, used = (stub(pool.writing(token)) for token in ("idle", "waiting", "used"))
    waiting.is_waiting = True
    now = 1300.0
    await pool.drop_idle()
    assert idle.done == ["start"], "not yet"
    pool.writing("used")
    now = 1300.5
    await pool.drop_idle()
    assert (idle.done, waiting.done, used.done) == (["start", "close"], ["start"], ["start"])
    assert pool.writing("waiting") is waiting and pool.writing("idle") is not idle


# --- authors of edits ---


async def test_edits_have_an_author_if_one_token_is_recent(pool: ConnectionPool, cache: Cache) -> None:
    store("stored")
    pool.start(None)
    assert pool.for_edits() is None and not pool.has_several_tokens(), "no command has run"
    pool.note_use(None)
    assert pool.for_edits() is pool.following and not pool.has_several_tokens()
    pool.note_use("given")
    assert pool.for_edits() is None and pool.has_several_tokens()
    age(cache, "stored", 1000)
    writer = pool.for_edits()
    assert writer is not None and stub(writer).token == "given" and not pool.has_several_tokens()


async def test_the_stored_token_given_by_a_command_counts_as_stored(pool: ConnectionPool) -> None:
    store("stored")
    pool.start(None)
    pool.note_use("stored")
    assert pool.for_edits() is pool.following
    store("new")
    pool.choose(None)
    pool.note_use(None)
    assert pool.for_edits() is pool.following and stub(pool.following).token == "new"


async def test_edits_wait_for_a_command_of_this_environment(pool: ConnectionPool, cache: Cache) -> None:
    store("stored")
    pool.start(None)
    RecentTokens(cache).note("of another")
    assert pool.for_edits() is None and pool.has_several_tokens()


async def test_edits_wait_if_the_token_of_the_last_command_was_removed(pool: ConnectionPool) -> None:
    store("stored")
    pool.start(None)
    pool.note_use(None)
    store(None)
    assert pool.for_edits() is None


async def test_without_any_token_no_use_is_recorded(pool: ConnectionPool) -> None:
    pool.start(None)
    pool.note_use(None)
    assert not pool.has_several_tokens() and pool.for_edits() is None


async def test_a_server_named_by_another_command_is_ignored(pool: ConnectionPool) -> None:
    trusted_servers.forget(URL)
    named = Server(URL)
    pool.start(None)
    for unnamed in (None, Server("http://127.0.0.1:2")):
        assert pool.refusal(unnamed, "given") is None, "decided where the token is sent"
    stub(pool.following).named = named
    assert pool.refusal(named, "given") is None
    refused = pool.refusal(None, "given")
    assert refused is not None and refused.code == "REMOTE_UNTRUSTED"
    trusted_servers.record(named)
    assert pool.refusal(None, "given") is None


async def test_a_pool_that_was_never_started_can_be_closed(pool: ConnectionPool) -> None:
    async with asyncio.timeout(20):
        await pool.close()
    assert stub(pool.following).done == ["close"]
