"""Tokens in their file: made, changed, rotated and revoked."""

import json
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lattice_remote.errors import Misuse
from lattice_remote.server.tokens import Token, TokenFile, mark_of_server, read_last_uses


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def made(path: Path, actor: str = "human:ana") -> str:
    return TokenFile(path).create(projects=["web"], actor=actor, act_as=["agent:*"])[1]


def test_only_a_digest_is_kept_readable_by_the_owner_alone(path: Path) -> None:
    text = made(path)
    assert len(text) >= 40
    assert text not in path.read_text()
    assert text.removeprefix("ltr_") not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_revoking_a_missing_token_is_reported(path: Path) -> None:
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


@pytest.mark.parametrize("pattern", ["", "agent: x", ":", "a b", "agent"])
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


def test_renaming_leaves_the_file_alone_where_no_token_is_for_the_project(path: Path) -> None:
    made(path)
    before = path.stat().st_ino
    assert TokenFile(path).rename_projects({"other": "site"}) == 0 and path.stat().st_ino == before


# --- changed rights ---


def everyone(path: Path) -> dict[str, Token]:
    """Return the tokens by id, the revoked ones too."""
    return {token.id: token for token in TokenFile(path).read_all()}


def test_only_the_named_rights_of_a_token_change(path: Path) -> None:
    file = TokenFile(path)
    end, later = datetime(2090, 1, 1, tzinfo=UTC), datetime(2091, 1, 1, tzinfo=UTC)
    token, text = file.create(projects=["web", "b"], actor="human:ana", act_as=["agent:*"], expires=end)
    other = file.create(projects=["web"], actor="human:ben", act_as=[])[0]
    changes: list[tuple[dict[str, Any], dict[str, object]]] = [
        ({}, {}),
        ({"add_projects": ["a"]}, {"projects": ["a", "b", "web"]}),
        ({"remove_projects": ["a", "b"]}, {"projects": ["web"]}),
        ({"act_as": []}, {"act_as": []}),
        ({"act_as": ["human:x"]}, {"act_as": ["human:x"]}),
        ({"read_only": True}, {"read_only": True}),
        ({"expires": later}, {"expires": later}),
        ({"read_only": False}, {"read_only": False}),
        ({"expires": None}, {"expires": None}),
    ]
    for named, expected in changes:
        before = everyone(path)[token.id]
        changed = file.edit(text, **named)
        assert changed == everyone(path)[token.id] == msgspec.structs.replace(before, **expected), named
    assert everyone(path)[other.id] == other


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ({"remove_projects": ["web"]}, "no project left; revoke it"),
        ({"remove_projects": ["other"]}, "not for project 'other'"),
        ({"act_as": ["a b"]}, "act-as"),
    ],
)
def test_a_change_that_leaves_no_usable_token_is_refused(path: Path, named: dict[str, Any], why: str) -> None:
    text = made(path)
    before = path.read_bytes()
    with pytest.raises(Misuse, match=why):
        TokenFile(path).edit(text, **named)
    assert path.read_bytes() == before


def test_of_a_token_for_metrics_only_the_expiry_changes(path: Path) -> None:
    file = TokenFile(path)
    token, _ = file.create_for_metrics()
    for named in ({"add_projects": ["web"]}, {"remove_projects": ["web"]}, {"act_as": []}, {"read_only": False}):
        with pytest.raises(Misuse, match="is for metrics"):
            file.edit(token.id, **named)  # type: ignore[arg-type]
    end = datetime(2090, 1, 1, tzinfo=UTC)
    assert file.edit(token.id, expires=end) == msgspec.structs.replace(token, expires=end)


def test_a_revoked_token_can_not_be_changed_again(path: Path) -> None:
    file = TokenFile(path)
    token = file.revoke(made(path))
    assert token.revoked is not None and token.revoked.microsecond == 0 and not file.read()
    with pytest.raises(Misuse, match="token not found"):
        file.edit(token.id, read_only=True)


def test_removing_a_project_revokes_the_tokens_that_were_for_it_alone(path: Path) -> None:
    file = TokenFile(path)
    alone, both, other, gone = (
        file.create(projects=projects, actor="human:ana", act_as=[])[0].id
        for projects in (["web"], ["a", "web"], ["a"], ["a"])
    )
    metrics = file.create_for_metrics()[0]
    file.revoke(gone)
    before = everyone(path)
    assert file.forget_project("web") == 2
    after = everyone(path)
    assert after[alone].projects == [] and after[alone].revoked is not None
    assert (after[both].projects, after[both].revoked) == (["a"], None)
    assert [after[id_] == before[id_] for id_ in (other, gone, metrics.id)] == [True] * 3
    assert file.forget_project("web") == 0 and everyone(path) == after


@pytest.mark.parametrize("server", ["", "https://board.example"])
def test_a_tokens_text_says_for_which_server_it_is(path: Path, server: str) -> None:
    file = TokenFile(path)
    token, text = file.create(projects=["web", "web"], actor="human:ana", act_as=[], server=server)
    assert token.projects == ["web"] and token.server == server
    for each in (text, file.rotate(token.id)[1]):
        assert each.startswith("ltr_") and each.endswith(mark_of_server(server)) == bool(server)
        assert ("." in each) == bool(server)


@pytest.mark.parametrize(("projects", "server", "why"), [([], "", "--project"), (["web"], "board", "bad --for")])
def test_a_token_for_nothing_is_refused(path: Path, projects: list[str], server: str, why: str) -> None:
    with pytest.raises(Misuse, match=why):
        TokenFile(path).create(projects=projects, actor="human:ana", act_as=[], server=server)
    assert not path.exists()


def test_a_grace_without_end_is_refused(path: Path) -> None:
    text = made(path)
    with pytest.raises(Misuse, match="too long"):
        TokenFile(path).rotate(text, grace=timedelta.max)
