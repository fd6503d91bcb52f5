"""Tokens in their file: made, changed, rotated and revoked."""

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lattice_remote.errors import Misuse
from lattice_remote.server.tokens import TokenFile, read_last_uses


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


def test_revoking_what_is_not_there_says_so(path: Path) -> None:
    made(path)
    with pytest.raises(Misuse, match="token list"):
        TokenFile(path).revoke("tok_none")


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


def test_an_expired_token_is_not_brought_back_by_rotating_it(path: Path) -> None:
    past = datetime(2020, 1, 1, tzinfo=UTC)
    token, _ = TokenFile(path).create(projects=["web"], actor="human:ana", act_as=[], expires=past)
    before = path.read_bytes()
    with pytest.raises(Misuse, match="token create"):
        TokenFile(path).rotate(token.id)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"tok_a": "yesterday"}'])
def test_a_damaged_file_of_last_uses_is_worth_nothing_and_stops_nothing(path: Path, text: str) -> None:
    path.write_text(text)
    assert read_last_uses(path) == {}


def test_renaming_a_project_says_how_many_tokens_it_changes(path: Path) -> None:
    file = TokenFile(path)
    for projects in (["web"], ["web", "other"], ["other"]):
        file.create(projects=projects, actor="human:ana", act_as=[])
    assert file.rename_projects({"web": "site"}) == 2
    assert [token.projects for token in file.read()] == [["site"], ["other", "site"], ["other"]]
    assert file.rename_projects({"web": "site"}) == 0
