"""Logins: found, ended and noticed by a server that runs."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lattice_remote.errors import StorageError
from lattice_remote.server.auth import LastUse, Login, Logins
from lattice_remote.server.tokens import TokenFile, read_last_uses


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
    """Return the objection to a client that is there already, "" when there is none."""
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


def test_a_misspelt_field_is_noticed_and_lets_nobody_in(path: Path) -> None:
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
    assert store.refresh()  # a server that looks now and then is told to look at its clients
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
