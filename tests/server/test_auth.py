"""Authentication: lookup and expiry of tokens, and changes seen by a running server."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path

import pytest

from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Bye
from lattice_remote.server.auth import Authenticator, LastUse, Login, Logins, signing_key
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.tokens import TokenFile, read_last_uses
from lattice_remote.server.transport.api_error import ApiError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def made(path: Path, actor: str = "human:ana") -> str:
    return TokenFile(path).create(projects=["web"], actor=actor, act_as=["agent:*"])[1]


def found(store: Logins, text: str) -> Login:
    login = store.find(text)
    assert login is not None
    return login


def why(store: Logins, login: Login) -> str:
    """Return the objection to an open client; "" if there is none."""
    bye = store.objection(login)
    assert bye is None or bye.code == "REMOTE_UNAUTHORIZED"
    return "" if bye is None else bye.reason


class Clock:
    """The time, as a test sets it."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def test_a_token_is_found_by_its_text_only(path: Path) -> None:
    text = made(path)
    store = Logins(path)
    assert store.refresh()
    login = store.find(text)
    assert login is not None
    token = login.token
    assert store.objection(login) is None
    assert (token.actor, token.projects, token.act_as) == ("human:ana", ["web"], ["agent:*"])
    for wrong in ("", text[:-1], text + "x", token.id, token.sha256, "\udcff"):
        assert store.find(wrong) is None


@pytest.mark.parametrize("by", ["id", "text"])
def test_a_revoked_token_is_unknown_after_the_next_look(path: Path, by: str) -> None:
    token, text = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[])
    kept = made(path, "human:ben")
    store = Logins(path)
    store.refresh()
    login = found(store, text)
    TokenFile(path).revoke(token.id if by == "id" else text)
    assert store.refresh()
    assert not store.refresh()
    assert store.find(text) is None
    assert why(store, login) == f"token {token.id} was revoked"
    assert store.find(kept) is not None


@pytest.mark.parametrize(
    "damaged", ["{", "", "{}", "[]", "null", '{"tokens": null}', '{"token": []}', '{"tokens": [], "more": 1}']
)
def test_a_damaged_file_leaves_the_tokens_as_they_were(path: Path, damaged: str) -> None:
    text = made(path)
    store = Logins(path)
    store.refresh()
    good = path.read_bytes()
    path.write_text(damaged)
    for _ in range(2):
        with pytest.raises(StorageError):
            store.refresh()
        with pytest.raises(StorageError):
            made(path)
    assert path.read_text() == damaged
    assert store.find(text) is not None
    path.write_bytes(good)
    assert store.refresh()


def test_a_removed_file_revokes_everything(path: Path) -> None:
    text = made(path)
    store = Logins(path)
    store.refresh()
    path.unlink()
    assert store.refresh()
    assert store.find(text) is None


def test_a_misspelt_field_is_reported_and_admits_no_client(path: Path) -> None:
    text = made(path)
    path.write_text(path.read_text().replace('"created"', '"expire": "2000-01-01T00:00:00Z", "created"'))
    store = Logins(path)
    with pytest.raises(StorageError, match="expire"):
        store.refresh()
    assert store.find(text) is None


def test_a_token_is_valid_until_the_moment_at_which_it_expires(path: Path) -> None:
    clock = Clock()
    end = clock.now + timedelta(days=90)
    token, text = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[], expires=end)
    store = Logins(path, now=clock)
    store.refresh()
    login = found(store, text)
    clock.now = end - timedelta(microseconds=1)
    assert not store.refresh()
    assert not why(store, login)
    clock.now = end
    assert store.refresh()  # the periodic check of the server
    assert not store.refresh()
    assert why(store, login) == f"token {token.id} expired at 2030-04-01T00:00:00Z; ask for another"
    assert why(store, found(store, text)).startswith(f"token {token.id} expired")


def test_tokens_expire_while_their_file_cannot_be_read(path: Path) -> None:
    clock = Clock()
    end = clock.now + timedelta(hours=1)
    _, text = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[], expires=end)
    store = Logins(path, now=clock)
    store.refresh()
    login = found(store, text)
    path.write_text("{")
    clock.now = end
    with pytest.raises(StorageError):
        store.refresh()
    assert "expired" in why(store, login)


def test_a_rotated_token_has_a_new_text_and_keeps_the_rest(path: Path) -> None:
    token, old = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=["agent:*"])
    store = Logins(path)
    store.refresh()
    login = found(store, old)
    renewed, new = TokenFile(path).rotate(token.id)
    assert new != old
    kept = ("id", "projects", "actor", "act_as", "created", "expires")
    assert [getattr(renewed, name) for name in kept] == [getattr(token, name) for name in kept]
    assert store.refresh()
    assert why(store, login) == why(store, found(store, old)) == f"token {token.id} was rotated; use its new text"
    assert not why(store, found(store, new))


def test_the_old_text_lasts_for_its_grace(path: Path) -> None:
    _, old = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[])
    _, new = TokenFile(path).rotate(old, grace=timedelta(hours=1))
    clock = Clock()
    clock.now = datetime.now(UTC)
    store = Logins(path, now=clock)
    store.refresh()
    logins = [found(store, text) for text in (old, new)]
    assert [why(store, login) for login in logins] == ["", ""]
    clock.now += timedelta(hours=1)
    assert store.refresh()
    assert "was rotated" in why(store, logins[0])
    assert not why(store, logins[1])


def test_rotating_again_ends_the_text_before_the_last(path: Path) -> None:
    token, first = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[])
    _, second = TokenFile(path).rotate(token.id, grace=timedelta(hours=1))
    _, third = TokenFile(path).rotate(token.id, grace=timedelta(hours=1))
    store = Logins(path)
    store.refresh()
    assert store.find(first) is None
    assert not why(store, found(store, second))
    assert not why(store, found(store, third))


def test_a_token_whose_rights_were_edited_sends_its_clients_back(path: Path) -> None:
    _, text = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=["agent:*"])
    store = Logins(path)
    store.refresh()
    login = found(store, text)
    path.write_text(path.read_text().replace("agent:*", "agent:x"))
    assert store.refresh()
    bye = store.objection(login)
    assert bye is not None
    assert bye.retry_after_s == 1.0
    assert not why(store, found(store, text))


def test_last_uses_are_kept_of_known_tokens_over_restarts(path: Path) -> None:
    uses = LastUse(path)
    asyncio.run(uses.save(set()))
    assert not path.exists()
    uses.used(["tok_a", "tok_b"])
    asyncio.run(uses.save({"tok_a", "tok_b"}))
    again = LastUse(path)
    again.used(["tok_c"])
    asyncio.run(again.save({"tok_a", "tok_c"}))
    assert set(read_last_uses(path)) == {"tok_a", "tok_c"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_even_be_looked_at_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot read"):
        Logins(tmp_path / "file/tokens.json").refresh()


# --- a running server's logins ---


class Quota:
    """A connection's quota: it counts failed logins, and objects from the third on."""

    def __init__(self) -> None:
        self.failures = 0

    def failed(self) -> ApiError | None:
        self.failures += 1
        return ApiError(HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_BUSY", "too many") if self.failures > 2 else None


class Board:
    """An authenticator with one token."""

    def __init__(self, place: Path) -> None:
        data = DataDir(place)
        data.create()
        self.path, self.used, self.key = data.tokens, data.tokens_used, data.signing_key
        self.token, self.text = TokenFile(self.path).create(projects=["web"], actor="human:ana", act_as=[])
        self.authenticator = Authenticator(data)
        self.authenticator.start()
        self.quota = Quota()

    def identify(self, text: str) -> Login | ApiError:
        return self.authenticator.identify(self.quota, text)  # type: ignore[arg-type]

    def login(self) -> Login:
        login = self.identify(self.text)
        assert isinstance(login, Login)
        return login


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def refusal(found: Login | ApiError | None) -> tuple[int, str]:
    assert isinstance(found, ApiError)
    return found.status, found.message


def test_failed_logins_are_counted_until_the_connection_must_wait(board: Board) -> None:
    assert board.login().token.id == board.token.id and board.quota.failures == 0
    assert [refusal(board.identify(text))[0] for text in ("", "ltr_x", "ltr_x")] == [401, 401, 429]


def test_a_token_made_or_revoked_while_the_server_runs_counts_at_once(board: Board) -> None:
    login = board.login()
    other, text = TokenFile(board.path).create(projects=["web"], actor="human:ben", act_as=[])
    assert isinstance(board.identify(text), Login)
    assert board.authenticator.shown([f"Bearer {text}"]) == other.id
    assert board.authenticator.ended(login) is None
    TokenFile(board.path).revoke(board.token.id)
    assert "was revoked" in refusal(board.authenticator.ended(login))[1]
    assert refusal(board.identify(board.text))[0] == 401
    assert "was revoked" in refusal(board.authenticator.identify_again(board.token.id, login.sha256))[1]
    assert board.quota.failures == 1, "a token shown before is no failed login"


def test_a_valid_token_is_known_in_headers_and_by_its_digest(board: Board) -> None:
    login, authenticator = board.login(), board.authenticator
    assert isinstance(authenticator.identify_again(board.token.id, login.sha256), Login)
    for header in (f"Bearer {board.text}", f"bearer  {board.text} "):
        assert authenticator.shown([header]) == board.token.id
    for headers in ([], ["Bearer x"], [f"Basic {board.text}"], [board.text], [f"Bearer {board.text}"] * 2):
        assert authenticator.shown(headers) == ""
    assert authenticator.shown_before(board.token.id, login.sha256) == board.token.id
    assert authenticator.shown_before("tok_none", login.sha256) == ""
    TokenFile(board.path).rotate(board.token.id)
    authenticator.refresh()
    assert (
        authenticator.shown([f"Bearer {board.text}"]) == authenticator.shown_before(board.token.id, login.sha256) == ""
    )
    assert "was rotated" in refusal(authenticator.identify_again(board.token.id, login.sha256))[1]


def test_a_server_that_stops_admits_no_client(board: Board) -> None:
    login = board.login()
    board.authenticator.stopping = True
    for found in (board.identify(board.text), board.authenticator.identify_again(board.token.id, login.sha256)):
        assert isinstance(found, ApiError)
        assert (found.status, found.code, found.retry_after_s) == (503, "REMOTE_SHUTDOWN", 1)


def test_a_client_that_stays_ends_with_its_token_and_no_other(board: Board) -> None:
    _, other = TokenFile(board.path).create(projects=["web"], actor="human:ben", act_as=[])
    login, byes, others = board.login(), list[Bye](), list[Bye]()
    ben = board.identify(other)
    assert isinstance(ben, Login)
    with board.authenticator.staying(login, byes.append), board.authenticator.staying(ben, others.append):
        board.authenticator.refresh()
        assert byes == []
        TokenFile(board.path).revoke(board.token.id)
        board.authenticator.refresh()
        assert [bye.reason for bye in byes] == [f"token {board.token.id} was revoked"] and others == []
    with board.authenticator.staying(login, byes.append):
        assert len(byes) == 2, "its token ended between admission and stay"
        board.authenticator.end_all(Bye("REMOTE_SHUTDOWN", "stopping"))
    board.authenticator.end_all(Bye("REMOTE_SHUTDOWN", "stopping"))
    assert len(byes) == 3 and others == []


def test_a_damaged_file_of_tokens_is_logged_once_and_again_after_a_repair(
    board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    good = board.path.read_bytes()
    for _ in range(2):
        board.path.write_text("{")
        for _ in range(3):
            assert board.login().token.id == board.token.id, "the previous tokens stay"
        board.path.write_bytes(good)
        board.login()
    messages = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 2 and all(message.startswith("keeping the previous tokens: ") for message in messages)


def test_a_client_ends_when_its_token_expires_though_the_file_is_damaged(board: Board) -> None:
    clock, byes = Clock(), list[Bye]()
    board.authenticator._logins._now = clock
    TokenFile(board.path).edit(board.token.id, expires=clock.now + timedelta(hours=1))
    with board.authenticator.staying(board.login(), byes.append):
        board.path.write_text("{")
        board.authenticator.refresh()
        assert byes == []
        clock.now += timedelta(hours=1)
        board.authenticator.refresh()
        assert ["expired at" in bye.reason for bye in byes] == [True]


def test_the_use_of_a_token_is_noted_where_it_was_valid(board: Board) -> None:
    board.identify("ltr_x")
    asyncio.run(board.authenticator.save_uses())
    assert not board.used.exists()
    board.login()
    asyncio.run(board.authenticator.save_uses())
    assert set(read_last_uses(board.used)) == {board.token.id}


def test_the_signing_key_stays_unless_it_is_damaged_or_others_could_read_it(board: Board) -> None:
    key = signing_key(board.key)
    assert len(key) == 32 and signing_key(board.key) == key == board.authenticator.signing_key
    board.key.chmod(0o640)
    other = signing_key(board.key)
    assert other != key and board.key.stat().st_mode & 0o777 == 0o600
    board.key.write_bytes(other[1:])
    assert len(signing_key(board.key)) == 32
    board.key.unlink()
    assert signing_key(board.key) == signing_key(board.key)
