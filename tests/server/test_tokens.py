"""Tokens: made, found, revoked, and noticed by a server that runs."""

import json
import os
import threading
from pathlib import Path

import pytest

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.tokens import TokenFile, TokenStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def made(path: Path, actor: str = "human:ana") -> str:
    return TokenFile(path).create(projects=["web"], actor=actor, act_as=["agent:*"])[1]


def test_only_a_digest_is_kept_and_nobody_else_can_read_it(path: Path) -> None:
    text = made(path)
    assert len(text) >= 40
    assert text not in path.read_text()
    assert text.removeprefix("ltr_") not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_token_is_found_by_its_text_only(path: Path) -> None:
    text = made(path)
    store = TokenStore(path)
    assert store.refresh()
    token = store.authenticate(text)
    assert token is not None
    assert (token.actor, token.projects, token.act_as) == ("human:ana", ["web"], ["agent:*"])
    for wrong in ("", text[:-1], text + "x", token.id, token.sha256, "\udcff"):
        assert store.authenticate(wrong) is None


@pytest.mark.parametrize("by", ["id", "text"])
def test_a_revoked_token_is_unknown_after_the_next_look(path: Path, by: str) -> None:
    token, text = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[])
    kept = made(path, "human:ben")
    store = TokenStore(path)
    store.refresh()
    TokenFile(path).revoke(token.id if by == "id" else text)
    assert store.refresh()
    assert not store.refresh()
    assert store.authenticate(text) is None
    assert not store.is_valid(token)
    assert store.authenticate(kept) is not None


def test_revoking_what_is_not_there_says_so(path: Path) -> None:
    made(path)
    with pytest.raises(Misuse, match="token list"):
        TokenFile(path).revoke("tok_none")


def test_a_damaged_file_leaves_the_tokens_as_they_were(path: Path) -> None:
    text = made(path)
    store = TokenStore(path)
    store.refresh()
    good = path.read_bytes()
    path.write_text("{")
    for _ in range(2):
        with pytest.raises(StorageError):
            store.refresh()
    assert store.authenticate(text) is not None
    path.write_bytes(good)
    assert store.refresh()


def test_a_removed_file_revokes_everything(path: Path) -> None:
    text = made(path)
    store = TokenStore(path)
    store.refresh()
    path.unlink()
    assert store.refresh()
    assert store.authenticate(text) is None


def test_commands_at_the_same_time_lose_no_token(path: Path) -> None:
    threads = [threading.Thread(target=made, args=(path,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(TokenFile(path).read()) == 12
    assert not [name for name in os.listdir(path.parent) if name.startswith(".tokens.json")]


@pytest.mark.parametrize("actor", ["bob", "human:", "robot:x", "human:a b", "human:*", "", "agent:x\n"])
def test_a_malformed_actor_is_refused(path: Path, actor: str) -> None:
    with pytest.raises(Misuse, match="bad actor"):
        TokenFile(path).create(projects=["web"], actor=actor, act_as=[])
    assert not path.exists()


@pytest.mark.parametrize("pattern", ["", "agent: x", ":", "a b"])
def test_a_malformed_pattern_is_refused(path: Path, pattern: str) -> None:
    with pytest.raises(Misuse, match="act-as"):
        TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[pattern])


def test_the_file_is_plain_json(path: Path) -> None:
    made(path)
    [token] = json.loads(path.read_text())["tokens"]
    assert set(token) == {"id", "sha256", "projects", "actor", "act_as", "created"}


def test_a_file_that_cannot_even_be_looked_at_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot read"):
        TokenStore(tmp_path / "file/tokens.json").refresh()
