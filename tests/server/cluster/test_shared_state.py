"""Tokens of a cluster: changed on one node, valid on all; with a real engine and the real command line."""

import asyncio
import json
import secrets
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from harness import farewell, hello, make_data, serving, until
from nats_servers import NatsCluster
from server_process import COMMAND

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.cluster import shared_state
from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.settings import ClusterSettings, save_settings
from lattice_remote.server.cluster.shared_state import SharedState, shared_tokens
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.tokens import Token, TokenFile


@pytest.fixture
async def state(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> SharedState:
    """The state of a cluster of its own."""
    monkeypatch.setattr(shared_state, "_BUCKET", f"shared-{secrets.token_hex(4)}")
    return await SharedState.open(engine)


def _settings(servers: list[str], node: str = "a") -> ClusterSettings:
    return ClusterSettings(servers=servers, node=node, advertise="http://127.0.0.1:1", replicas=1)


def _ids(data: DataDir) -> set[str]:
    return {token.id for token in TokenFile(data.tokens).read()}


class Mirrored:
    """Two data directories that follow the state."""

    def __init__(self, state: SharedState, first: DataDir, second: DataDir, settings: ClusterSettings) -> None:
        self.state, self.first, self.second = state, first, second
        self.tokens = TokenFile(first.tokens, lambda: shared_tokens(settings))


@pytest.fixture
async def mirrored(state: SharedState, one_server: NatsCluster, tmp_path: Path) -> AsyncIterator[Mirrored]:
    (first, _), (second, _) = make_data(tmp_path / "a"), make_data(tmp_path / "b")
    await state.enter(first)
    await state.enter(second)
    tasks = [asyncio.create_task(state.mirror(data)) for data in (first, second)]
    yield Mirrored(state, first, second, _settings(one_server.urls))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_nodes_bring_their_tokens_and_share_one_key(mirrored: Mirrored) -> None:
    await until(lambda: len(_ids(mirrored.first)) == 2)
    assert _ids(mirrored.first) == _ids(mirrored.second)
    assert mirrored.first.signing_key.read_bytes() == mirrored.second.signing_key.read_bytes()
    assert mirrored.second.signing_key.stat().st_mode & 0o777 == 0o600
    assert mirrored.second.tokens.stat().st_mode & 0o777 == 0o600


async def test_a_token_made_on_one_node_is_valid_on_the_other_until_it_is_revoked(mirrored: Mirrored) -> None:
    token, text = await asyncio.to_thread(
        lambda: mirrored.tokens.create(projects=["web"], actor="human:bo", act_as=["agent:*"])
    )
    assert token.id in _ids(mirrored.first)
    await until(lambda: token.id in _ids(mirrored.second))
    async with serving(mirrored.second, text) as server, server.connected() as client:
        await client.send(hello())
        await client.recv()
        await asyncio.to_thread(mirrored.tokens.revoke, token.id)
        bye, _ = await farewell(client)
        assert bye is not None
        assert bye.code == "REMOTE_UNAUTHORIZED"


async def test_changes_of_two_nodes_at_once_are_all_kept(mirrored: Mirrored, one_server: NatsCluster) -> None:
    others = TokenFile(mirrored.second.tokens, lambda: shared_tokens(_settings(one_server.urls, "b")))

    def make(file: TokenFile) -> set[str]:
        made = (file.create(projects=["web"], actor="human:bo", act_as=[]) for _ in range(8))
        return {token.id for token, _ in made}

    first, second = await asyncio.gather(asyncio.to_thread(make, mirrored.tokens), asyncio.to_thread(make, others))
    await until(lambda: first | second <= _ids(mirrored.first) & _ids(mirrored.second))


async def test_a_node_that_was_away_restores_no_revoked_token(state: SharedState, tmp_path: Path) -> None:
    (first, _), (second, _) = make_data(tmp_path / "a"), make_data(tmp_path / "b")
    await state.enter(first)
    await state.enter(second)
    before = second.tokens.read_bytes()
    tokens, revision = await state.tokens()
    TokenFile(first.tokens).revoke(tokens[0].id)
    assert await state.store_tokens([*TokenFile(first.tokens).read_all(), tokens[1]], revision)
    second.tokens.write_bytes(before)
    await state.enter(second)
    assert _ids(second) == {tokens[1].id}


async def test_a_change_of_tokens_that_have_changed_since_is_refused(state: SharedState, tmp_path: Path) -> None:
    data, _ = make_data(tmp_path / "a")
    await state.enter(data)
    tokens, revision = await state.tokens()
    assert await state.store_tokens([], revision)
    assert not await state.store_tokens(tokens, revision)


async def test_more_tokens_than_the_engine_takes_are_refused(state: SharedState, tmp_path: Path) -> None:
    data, _ = make_data(tmp_path / "a")
    await state.enter(data)
    tokens, revision = await state.tokens()
    many = [_renamed(tokens[0], number) for number in range(6000)]
    with pytest.raises(Misuse, match="nothing was changed"):
        await state.store_tokens(many, revision)
    assert await state.tokens() == (tokens, revision)


def _renamed(token: Token, number: int) -> Token:
    return msgspec.structs.replace(token, id=f"tok_{number:012x}")


def _run(data: DataDir, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--data", str(data.path), *argv], capture_output=True, text=True, check=False, timeout=120
    )


async def test_the_command_line_changes_the_tokens_of_the_cluster(
    engine: Engine, one_server: NatsCluster, tmp_path: Path
) -> None:
    data, _ = make_data(tmp_path / "a")
    state = await SharedState.open(engine)
    save_settings(data.path, _settings(one_server.urls))
    argv = ("token", "create", "--project", "web", "--actor", "human:cy", "--json")
    made = await asyncio.to_thread(_run, data, *argv)
    assert made.returncode == 0, made.stderr
    token_id = json.loads(made.stdout)["id"]
    tokens, _ = await state.tokens()
    assert token_id in {token.id for token in tokens}
    assert token_id in _ids(data)


def test_without_the_engine_a_command_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "_COMMAND_S", 0.5)
    data, _ = make_data(tmp_path / "a")
    before = data.tokens.read_bytes()
    file = TokenFile(data.tokens, lambda: shared_tokens(_settings(["nats://127.0.0.1:1"])))
    with pytest.raises(StorageError, match="nothing was changed"):
        file.create(projects=["web"], actor="human:cy", act_as=[])
    assert data.tokens.read_bytes() == before
