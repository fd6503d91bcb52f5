"""The agent's service of one cache, against a fake server with scripted misbehaviour."""

import asyncio
import base64
import os
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import pytest
from client_kit import MINE, PLAN, TASK, ask, make_cache, ready, run, tree, until
from fake_server import TOKEN, FakeServer, refusal_body
from websockets.asyncio.server import ServerConnection

from lattice_remote.client.agent.service import Service
from lattice_remote.client.cache.cache import LOCKS_TEXT, Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.safe_directory import Directory
from lattice_remote.client.connection.connection import MAX_SENDS
from lattice_remote.errors import ConnectionFailed, Misuse, Rejected, RemoteError, StorageError
from lattice_remote.protocol.messages import (
    Applied,
    Bye,
    Change,
    ClientFrame,
    Fetch,
    Hello,
    Part,
    Put,
    Run,
    Stored,
    encode,
)
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, DeleteFile, MoveFile, PutFile, digest_of

# --- filling and following ---


async def test_a_directory_with_only_a_remote_is_filled(server: FakeServer, service: Service, directory: Path) -> None:
    server.files["artifacts/payload/art_1.bin"] = os.urandom(10_000)
    answer = await ask(service, "ready")
    assert answer["current"] and answer["filled"]
    assert tree(directory) == server.files
    assert (directory / "locks").read_bytes() == LOCKS_TEXT and (directory / ".gitignore").read_text().startswith("#")


async def test_changes_arrive_without_a_request(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    server.put("tasks/task_2.json", b"two")
    server.append("events/task_2.jsonl", b"line\n")
    server.append("events/task_2.jsonl", b"more\n")
    server.change(MoveFile("tasks/task_2.json", "archive/tasks/task_2.json", digest_of(b"two")))
    server.change(DeleteFile("tasks/task_1.json"))
    await until(lambda: tree(directory) == server.files)


async def test_a_change_is_acknowledged_with_the_time_since_it_was_applied(
    server: FakeServer, service: Service
) -> None:
    await ready(service)
    server.put("tasks/task_2.json", b"two")
    await until(lambda: any(isinstance(frame, Applied) and frame.seq == server.seq for frame in server.frames))
    (applied,) = [frame for frame in server.frames if isinstance(frame, Applied) and frame.seq == server.seq]
    assert applied.held_s is not None and 0 <= applied.held_s < 20


async def test_an_announced_file_is_fetched(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    data = os.urandom(5000)
    server.files["artifacts/payload/big"] = data
    server.change(AnnounceFile("artifacts/payload/big", len(data), digest_of(data)))
    await until(lambda: tree(directory) == server.files)


async def test_a_command_returns_once_its_change_is_in_the_cache(
    server: FakeServer, service: Service, directory: Path
) -> None:
    answer = await run(service, "put", "tasks/task_9.json", "nine")
    assert base64.b64decode(str(answer["stdout"])) == b"put tasks/task_9.json nine"
    assert (directory / "tasks/task_9.json").read_bytes() == b"nine"


async def test_a_command_has_the_servers_exit_code(service: Service) -> None:
    assert (await run(service, "fail"))["exit_code"] == 7


async def test_a_drifted_file_is_fetched_before_the_answer(
    server: FakeServer, service: Service, directory: Path
) -> None:
    server.files["events/task_1.jsonl"] = b"one\n"
    await ready(service)
    (directory / "events/task_1.jsonl").write_bytes(b"tampered\n")
    await run(service, "append", "events/task_1.jsonl", "two\n")
    assert (directory / "events/task_1.jsonl").read_bytes() == b"one\ntwo\n"


async def test_a_restarted_service_resumes_at_its_sequence_number(server: FakeServer, directory: Path) -> None:
    first = Service(str(directory))
    first.start(TOKEN)
    await ready(first)
    server.put("tasks/task_2.json", b"two")
    await until((directory / "tasks/task_2.json").exists)
    await first.close()
    server.put("tasks/task_3.json", b"three")
    server.frames.clear()
    second = Service(str(directory))
    second.start(TOKEN)
    await ready(second)
    assert tree(directory) == server.files
    assert not [frame for frame in server.frames if isinstance(frame, Fetch)]
    await second.close()


async def test_a_new_epoch_leads_to_a_resync(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    server.put("tasks/task_2.json", b"two")
    await until((directory / "tasks/task_2.json").exists)
    server.epoch, server.changes = "epoch2", []
    server.files = {"config.json": b"restored\n"}
    server.cut()
    await until(lambda: tree(directory) == server.files)


async def test_the_age_counts_from_the_last_message(server: FakeServer, service: Service) -> None:
    await ready(service)
    await server.stop()
    await until(lambda: not service._connection.is_open)
    answer = await ask(service, "ready")
    assert not answer["current"] and answer["filled"]
    assert (
        str(answer["message"]).startswith(f"cannot reach server {server.url} (")
        and 0 <= float(str(answer["age_s"])) < 5
    )


async def test_a_cache_that_was_never_filled_is_an_error(server: FakeServer, directory: Path) -> None:
    await server.stop()
    service = Service(str(directory))
    service.start(TOKEN)
    answer = await ask(service, "ready")
    assert not answer["filled"] and answer["code"] == "REMOTE_UNREACHABLE"
    await service.close()


async def test_after_a_reboot_the_files_are_compared(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Service(str(directory))
    first.start(TOKEN)
    await ready(first)
    await first.close()
    (directory / "tasks/task_1.json").write_bytes(b"")  # possible after a power cut
    monkeypatch.setattr("lattice_remote.client.cache.cache._boot_id", "another")
    second = Service(str(directory))
    second.start(TOKEN)
    await ready(second)
    assert tree(directory) == server.files
    await second.close()


async def test_two_processes_may_follow_one_cache(server: FakeServer, directory: Path) -> None:
    services = [Service(str(directory)) for _ in range(3)]
    for service in services:
        service.start(TOKEN)
    await asyncio.gather(*(ask(service, "ready") for service in services))
    await asyncio.gather(
        *(run(service, "append", "events/x.jsonl", f"{n}\n") for n in range(10) for service in services)
    )
    await until(lambda: tree(directory) == server.files)
    assert len(server.files["events/x.jsonl"].splitlines()) == 30
    for service in services:
        await service.close()


# --- cuts ---


async def test_a_command_that_was_cut_off_runs_once(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    server.cut_before_reply = 2
    answer = await run(service, "append", "events/x.jsonl", "once\n")
    assert answer["exit_code"] == 0
    assert (directory / "events/x.jsonl").read_bytes() == b"once\n"


async def test_a_command_that_was_never_sent_reports_that(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ready(service)
    await server.stop()
    await until(lambda: not service._connection.is_open)
    monkeypatch.setattr("lattice_remote.client.connection.connection.UNSENT_PATIENCE_S", 0.3)
    with pytest.raises(
        ConnectionFailed, match=r"cannot reach server .*connection refused.*nothing was written"
    ) as error:
        await run(service, "put", "tasks/x.json", "x")
    assert error.value.code == "REMOTE_UNREACHABLE"


async def test_a_command_whose_answer_is_lost_may_have_taken_effect(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ready(service)
    monkeypatch.setattr("lattice_remote.client.connection.connection.SENT_PATIENCE_S", 0.3)
    running = asyncio.ensure_future(run(service, "slow"))
    await until(lambda: any(isinstance(frame, Run) for frame in server.frames))
    await server.stop()
    with pytest.raises(ConnectionFailed, match="may have taken effect") as error:
        await running
    assert error.value.sent and error.value.code == "REMOTE_UNKNOWN_OUTCOME"


async def test_a_command_waits_for_a_server_that_returns_in_time(server: FakeServer, service: Service) -> None:
    await ready(service)
    await server.stop()
    running = asyncio.ensure_future(run(service, "put", "tasks/x.json", "x"))
    await until(lambda: service._connection.failed_attempts > 1)
    await server.start()
    assert (await running)["exit_code"] == 0


async def test_connections_to_a_server_that_closes_them_back_off(server: FakeServer, service: Service) -> None:
    async def close(connection: ServerConnection, frame: ClientFrame) -> bool:
        connection.transport.abort()
        return True

    server.misbehave = close
    await until(lambda: any(isinstance(frame, Hello) for frame in server.frames))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await asyncio.Event().wait()
    assert sum(isinstance(frame, Hello) for frame in server.frames) <= 15


# --- tokens ---


async def test_a_refused_token_is_reported(server: FakeServer, directory: Path) -> None:
    service = Service(str(directory))
    service.start("wrong")
    with pytest.raises(Rejected, match="lattice remote login") as error:
        await run(service, "put", "tasks/x.json", "x", token="wrong")
    assert error.value.code == "REMOTE_UNAUTHORIZED"
    await service.close()


async def test_a_command_that_was_sent_before_its_token_ended_may_have_taken_effect(
    server: FakeServer, service: Service
) -> None:
    await ready(service)

    async def revoke(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Run):
            server.tokens.clear()
            await connection.send(encode(Bye("REMOTE_UNAUTHORIZED", "token tok_1 was revoked")))
        return isinstance(frame, Run)

    server.misbehave = revoke
    with pytest.raises(Rejected, match="the command may have taken effect: look before you repeat it") as error:
        await run(service, "put", "tasks/x.json", "x")
    assert error.value.code == "REMOTE_UNAUTHORIZED"


async def test_a_missing_token_suggests_login(directory: Path) -> None:
    service = Service(str(directory))
    service.start(None)
    answer = await ask(service, "ready", None)
    assert answer["code"] == "REMOTE_UNAUTHORIZED" and "lattice remote login" in str(answer["message"])
    with pytest.raises(Rejected, match="no token"):
        await run(service, "list", token=None)
    await service.close()


async def test_each_command_writes_with_its_own_token(server: FakeServer, service: Service, directory: Path) -> None:
    server.tokens["ltr_bob"] = "human:bob"
    await run(service, "put", "tasks/a.json", "a")
    await run(service, "put", "tasks/b.json", "b", token="ltr_bob")
    assert (directory / "tasks/b.json").read_bytes() == b"b"
    await run(service, "put", "tasks/c.json", "c", token="ltr_bob")
    hellos = [frame for frame in server.frames if isinstance(frame, Hello)]
    assert [hello.follow for hello in hellos] == [True, False], "one connection for each token"


async def test_a_valid_token_replaces_a_refused_one(server: FakeServer, directory: Path) -> None:
    service = Service(str(directory))
    service.start("wrong")
    await until(lambda: service._connection.is_refused)
    assert (await ask(service, "ready"))["current"]
    await service.close()


@pytest.mark.parametrize(
    ("status", "body", "code", "text"),
    [
        (403, refusal_body("REMOTE_FORBIDDEN", "not yours"), "REMOTE_FORBIDDEN", "not yours"),
        (404, refusal_body("REMOTE_NOT_FOUND", "no such project"), "REMOTE_NOT_FOUND", "no such project"),
        (503, refusal_body("REMOTE_BUSY", "full"), "REMOTE_BUSY", "full"),
        (502, b"Bad Gateway", "REMOTE_UNREACHABLE", "HTTP 502"),
        (403, refusal_body("REMOTE_FORBIDDEN", "\x1b[31m\nred"), "REMOTE_FORBIDDEN", "red"),
    ],
)
async def test_a_refusal_before_the_upgrade_is_reported(
    server: FakeServer, service: Service, status: int, body: bytes, code: str, text: str
) -> None:
    server.status, server.error_body = HTTPStatus(status), body
    await until(lambda: service._connection.error is not None)
    error = service._connection.error
    assert error is not None and error.code == code and text in error.message and error.message.isprintable()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b""),
        (403, b"<html>Sign in to the guest network</html>"),
        (403, b'{"error": {"code": 403, "message": "forbidden by policy"}}'),
        (401, b'{"error": {"code": "REMOTE_UNAUTHORIZED", "message": "not of our form"}}'),
        (404, b'{"ok": false, "error": {"code": "NOT_FOUND", "message": "another product"}}'),
        (401, b'{"ok": false, "error": "REMOTE_UNAUTHORIZED"}'),
        (407, b"[" * 100_000),
        (426, b"<html>"),
        (429, b"{}"),
        (503, b"null"),
    ],
)
async def test_a_refusal_by_a_proxy_blames_no_token_and_is_retried(
    server: FakeServer, service: Service, status: int, body: bytes
) -> None:
    """Proxies and login pages may answer temporarily instead of the server."""
    await ready(service)
    server.status, server.error_body = HTTPStatus(status), body
    server.cut()
    await until(lambda: "answers instead" in str(service._connection.error))
    error = service._connection.error
    assert (
        isinstance(error, ConnectionFailed)
        and error.code == "REMOTE_UNREACHABLE"
        and not service._connection.is_refused
    )
    expected = f"a proxy or another program answers instead, HTTP {status}; check the URL and the proxy"
    if status in (401, 403, 407):
        trust = f"lattice remote trust {service._connection.remote.url} --header 'NAME: VALUE', or --client-cert FILE"
        expected += f"; for one that authenticates: {trust}"
    assert error.message == expected
    server.status = None
    assert (await run(service, "put", "tasks/x.json", "x"))["exit_code"] == 0, "the same token, and no login"


async def test_a_goodbye_is_obeyed(server: FakeServer, service: Service) -> None:
    await ready(service)
    connection = next(iter(server.connections))
    await connection.send(encode(Bye("REMOTE_UNAUTHORIZED", "this token was revoked")))
    await until(lambda: service._connection.error is not None)
    error = service._connection.error
    assert error is not None and error.code == "REMOTE_UNAUTHORIZED" and "revoked" in error.message


# --- refusals ---


async def test_a_refused_command_is_an_error(service: Service) -> None:
    with pytest.raises(Rejected, match="may act as") as error:
        await run(service, "refuse")
    assert error.value.code == "REMOTE_FORBIDDEN"


async def test_an_argument_that_is_not_utf8_is_refused_locally(service: Service) -> None:
    with pytest.raises(Misuse, match="UTF-8"):
        await run(service, "comment", "\udcff")
    with pytest.raises(Misuse, match="too many"):
        await run(service, *["x"] * 2000)


async def test_an_unknown_request_is_refused(service: Service) -> None:
    with pytest.raises(Misuse, match="another version"):
        await ask(service, "dance")


# --- plans and notes ---


async def edited(server: FakeServer, service: Service, directory: Path) -> Path:
    """Fill a cache with a plan and edit the plan."""
    server.files[PLAN] = b"# Plan\n"
    await ready(service)
    (directory / PLAN).write_bytes(b"# Plan\nmine\n")
    return directory / PLAN


async def test_an_edit_is_sent_before_the_command(server: FakeServer, service: Service, directory: Path) -> None:
    await edited(server, service, directory)
    await run(service, "status", "x")
    sent = [frame for frame in server.frames if isinstance(frame, Put | Run)]
    assert isinstance(sent[0], Put) and sent[0].base == b"# Plan\n" and sent[0].text == b"# Plan\nmine\n"
    assert isinstance(sent[1], Run)
    assert (await ask(service, "status"))["unsent_edits"] == []
    assert (await ask(service, "verify"))["edited"] == ()


async def test_new_notes_are_sent_without_a_base(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    (directory / f"notes/{TASK}.md").write_bytes(b"note\n")
    (directory / f"notes/{TASK}.md~").write_bytes(b"an editor's backup\n")
    answer = await ask(service, "push")
    assert answer["sent"] == [{"path": f"notes/{TASK}.md", "outcome": "stored"}]
    assert server.files[f"notes/{TASK}.md"] == b"note\n"


async def test_a_merged_edit_comes_back_merged(server: FakeServer, service: Service, directory: Path) -> None:
    plan = await edited(server, service, directory)
    server.put_outcome = "merged"
    await ask(service, "push")
    await until(lambda: plan.read_bytes() == b"# Plan\nmine\ntheirs\n")
    assert (await ask(service, "status"))["unsent_edits"] == []


async def test_a_conflict_keeps_both_texts(server: FakeServer, service: Service, directory: Path) -> None:
    plan = await edited(server, service, directory)
    server.put(PLAN, b"# Plan\ntheirs\n")
    await until(lambda: service._replicator.replica.position.seq == 1)
    assert plan.read_bytes() == b"# Plan\nmine\n"  # an edited file is not overwritten
    answer = await ask(service, "push")
    assert answer["sent"] == [{"path": PLAN, "outcome": "conflict"}]
    await until(lambda: plan.read_bytes() == b"# Plan\ntheirs\n")
    assert (directory / MINE).read_bytes() == b"# Plan\nmine\n"
    assert (await ask(service, "verify"))["differing"] == ()
    assert tree(directory) == server.files


async def test_a_text_edited_while_it_is_sent_is_the_next_edit(
    server: FakeServer, service: Service, directory: Path
) -> None:
    plan = await edited(server, service, directory)

    async def edit_meanwhile(_: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put) and server.misbehave is not None:
            server.misbehave = None
            plan.write_bytes(b"# Plan\nmine\nand more\n")
        return False

    server.misbehave = edit_meanwhile
    await ask(service, "push")
    await until(lambda: server.files[PLAN] == b"# Plan\nmine\n")
    assert plan.read_bytes() == b"# Plan\nmine\nand more\n"
    await ask(service, "push")
    assert server.files[PLAN] == b"# Plan\nmine\nand more\n"
    await until(lambda: tree(directory) == server.files)


@pytest.mark.parametrize("killed", [False, True])
async def test_a_save_after_an_edit_whose_answer_was_lost_builds_on_it(
    server: FakeServer, service: Service, directory: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """I6: otherwise both are edits of the same base, and the second conflicts with the first."""
    monkeypatch.setattr("lattice_remote.client.connection.connection.SENT_PATIENCE_S", 0.3)
    plan = await edited(server, service, directory)

    async def lose_the_answer(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put):
            server.replies[frame.id] = await server._put(frame)
            server.status = HTTPStatus.SERVICE_UNAVAILABLE
            connection.transport.abort()
        return isinstance(frame, Put)

    server.misbehave = lose_the_answer  # type: ignore[assignment]
    with pytest.raises(ConnectionFailed):
        await ask(service, "push")
    assert server.files[PLAN] == b"# Plan\nmine\n"
    plan.write_bytes(b"# Plan\nmine\nand more\n")
    server.misbehave, server.status = None, None
    after = service
    if killed:
        after = Service(str(directory))
        after.start(TOKEN)
    await until(after._is_current, 20)
    assert (await ask(after, "push"))["sent"] == [{"path": PLAN, "outcome": "stored"}]
    await after.close()
    puts = [frame for frame in server.frames if isinstance(frame, Put)]
    assert len({put.id for put in puts}) == 2 and puts[-1].base == b"# Plan\nmine\n"
    assert server.files[PLAN] == plan.read_bytes() == b"# Plan\nmine\nand more\n"


async def test_an_edit_of_an_archived_plan_is_kept(server: FakeServer, service: Service, directory: Path) -> None:
    plan = await edited(server, service, directory)
    server.change(MoveFile(PLAN, f"archive/{PLAN}", digest_of(b"# Plan\n")))
    await until((directory / f"archive/{PLAN}").exists)
    assert plan.read_bytes() == b"# Plan\nmine\n"
    await ask(service, "push")
    await until(lambda: tree(directory) == server.files)
    assert (directory / MINE).read_bytes() == b"# Plan\nmine\n"


async def test_a_text_blocked_by_an_edit_is_no_file_in_transfer(
    server: FakeServer, service: Service, directory: Path
) -> None:
    plan = await edited(server, service, directory)
    server.epoch, server.changes = "epoch2", []
    server.files |= {PLAN: b"# Of another epoch\n", "tasks/task_3.json": b"{}\n"}
    server.cut()
    await until(lambda: (directory / "tasks/task_3.json").exists() and service._replicator.is_following)
    await until(lambda: set(service._replicator.replica.missing) == {PLAN})
    assert service._replicator.progress() is None
    assert plan.read_bytes() == b"# Plan\nmine\n"


async def test_a_removed_plan_is_no_edit_and_sync_restores_it(
    server: FakeServer, service: Service, directory: Path
) -> None:
    plan = await edited(server, service, directory)
    plan.unlink()
    assert (await ask(service, "push"))["sent"] == []
    assert (await ask(service, "sync"))["missing"] == (PLAN,)
    assert plan.read_bytes() == b"# Plan\n"


async def test_an_unsent_edit_survives_a_sync(server: FakeServer, service: Service, directory: Path) -> None:
    plan = await edited(server, service, directory)
    assert (await ask(service, "sync"))["edited"] == (PLAN,)
    assert plan.read_bytes() == b"# Plan\nmine\n"


# --- comparison ---


async def test_verify_lists_differences_and_changes_nothing(
    server: FakeServer, service: Service, directory: Path
) -> None:
    await ready(service)
    (directory / "config.json").write_bytes(b"tampered")
    (directory / "tasks/task_1.json").unlink()
    (directory / "tasks/task_7.json").write_bytes(b"foreign")
    before = tree(directory)
    answer = await ask(service, "verify")
    assert answer["differing"] == ("config.json",)
    assert answer["missing"] == ("tasks/task_1.json",)
    assert answer["surplus"] == ("tasks/task_7.json",)
    assert tree(directory) == before


async def test_sync_repairs(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    (directory / "config.json").write_bytes(b"tampered")
    (directory / "tasks/task_1.json").unlink()
    (directory / "tasks/task_7.json").write_bytes(b"foreign")
    await ask(service, "sync")
    assert tree(directory) == server.files
    assert (await ask(service, "verify"))["total"] == len(server.files)


# --- a hostile server ---


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def move_away(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))


def is_there(directory: Path) -> bool:
    return directory.exists()


def outside(directory: Path) -> set[str]:
    """Return every file outside the cache, without following links."""
    root = directory.parent.parent
    return {str(path.relative_to(root)) for path in root.rglob("*") if directory not in path.parents and path.is_file()}


@pytest.mark.parametrize(
    "path",
    [
        "../outside.md",
        "/tmp/outside.md",
        "tasks/../../outside",
        ".gitignore",
        "remote.json",
        "cache_state.json",
        "a\\b",
    ],
)
async def test_a_path_outside_the_cache_ends_the_connection(
    server: FakeServer, service: Service, directory: Path, path: str
) -> None:
    await ready(service)
    before, inside = outside(directory), tree(directory)
    server.broadcast(server.numbered(PutFile(path, b"evil")))
    await until(lambda: service._connection.error is not None and service._connection.error.code == "REMOTE_PROTOCOL")
    assert outside(directory) == before and tree(directory) == inside


async def test_links_in_the_way_are_never_followed(server: FakeServer, directory: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    (directory / "tasks").symlink_to(victim)
    (directory / "config.json").symlink_to(victim / "file")
    service = Service(str(directory))
    service.start(TOKEN)
    answer = await ask(service, "ready")
    assert not answer["current"] and "in the way" in str(answer["message"])
    assert [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_bytes() == b"precious"
    (directory / "tasks").unlink()
    service._connection.kick()
    await until(lambda: tree(directory) == server.files)
    assert (victim / "file").read_bytes() == b"precious" and not (directory / "config.json").is_symlink()
    await service.close()


async def test_a_gap_in_the_numbers_is_a_violation(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    server.broadcast(Change(5, b"m" * 16, "", "x", "t", "edit", "", [PutFile("tasks/x.json", b"x")]))
    await until(lambda: service._connection.failed_attempts > 0)
    await until(lambda: service._connection.is_open)
    assert tree(directory) == server.files


async def test_unrequested_parts_are_ignored(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    server.broadcast(Part("tasks/x.json", 0, 4, digest_of(b"evil"), 0, b"evil"))
    server.put("tasks/y.json", b"y")
    await until((directory / "tasks/y.json").exists)
    assert not (directory / "tasks/x.json").exists()


async def test_a_huge_announcement_allocates_no_memory(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    server.change(AnnounceFile("events/huge.jsonl", 1 << 60, digest_of(b"")))
    server.files["events/huge.jsonl"] = b"small after all"
    await until(lambda: any(isinstance(f, Fetch) and "events/huge.jsonl" in f.paths for f in server.frames))
    assert bytes_in(directory) < 10_000


async def test_an_append_that_does_not_fit_is_fetched(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    server.files["events/x.jsonl"] = b"true\n"
    server.broadcast(server.numbered(AppendBytes("events/x.jsonl", 1 << 40, digest_of(b"?"), b"y")))
    await until((directory / "events/x.jsonl").exists)
    assert (directory / "events/x.jsonl").read_bytes() == b"true\n"


@pytest.mark.parametrize("message", ["text", b"\xc1", b"", b"\x81\xa4type\xa4nope"])
async def test_a_bad_frame_ends_only_the_connection(server: FakeServer, service: Service, message: str | bytes) -> None:
    await ready(service)
    connection = next(iter(server.connections))
    await connection.send(message)
    await until(lambda: service._connection.failed_attempts > 0)
    assert (await ask(service, "ready"))["current"]


async def test_a_silent_server_times_out(server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silence(_: ServerConnection, frame: ClientFrame) -> bool:
        return True

    monkeypatch.setattr("lattice_remote.client.connection.connection.FIRST_FRAME_TIMEOUT_S", 0.2)
    server.misbehave = silence
    await until(lambda: service._connection.error is not None)
    assert service._connection.error is not None and "sends nothing" in service._connection.error.message


@pytest.mark.parametrize(
    ("answer", "says"),
    [(b"220 ready\r\n\r\n", "not a lattice-remote server"), (b"", "closes the connection without an answer")],
)
async def test_another_service_on_the_port_is_reported(tmp_path: Path, answer: bytes, says: str) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    other = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    service = Service(str(make_cache(tmp_path / "x", f"http://127.0.0.1:{port}")))
    service.start(TOKEN)
    await until(lambda: service._connection.error is not None)
    assert service._connection.error is not None and says in service._connection.error.message
    await service.close()
    other.close()
    await other.wait_closed()


# --- local failures ---


async def test_a_full_disk_is_reported_and_corrupts_nothing(
    server: FakeServer, service: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ready(service)

    def full(self: Cache, path: str, data: bytes) -> None:
        raise StorageError("cannot write the cache: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "replace", full)
        with pytest.raises(StorageError, match=r"No space left.*may have taken effect"):
            await run(service, "put", "tasks/x.json", "x")
        answer = await ask(service, "ready")
        assert not answer["current"] and "No space left" in str(answer["message"])
        assert "No space left" in str((await ask(service, "status"))["trouble"])
    service._connection.kick()
    await until(service._is_current)
    assert (await ask(service, "status"))["trouble"] is None
    assert tree(directory) == server.files


async def test_a_command_runs_at_once_when_there_is_space_again(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier failure does not prove that the disk is still full."""
    await ready(service)
    service._connection._backoff.uniform = lambda _low, _high: 300.0

    def full(self: Cache, path: str, data: bytes) -> None:
        raise StorageError("cannot write the cache: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "replace", full)
        server.put("tasks/x.json", b"x")
        await until(lambda: service._connection.failed_attempts > 0 and service._connection.welcome is None)
    assert (await run(service, "put", "tasks/y.json", "y"))["exit_code"] == 0
    assert server.files["tasks/y.json"] == b"y"


async def test_the_write_guard_is_restored_at_the_next_connection(
    server: FakeServer, service: Service, directory: Path
) -> None:
    await ask(service, "ready")
    for name in ("locks", ".gitignore"):
        (directory / name).unlink()
    server.cut()
    await until(lambda: (directory / "locks").is_file() and (directory / ".gitignore").is_file())


async def test_a_removed_directory_is_not_recreated(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    move_away(directory)
    assert service.is_stale()
    server.put("tasks/x.json", b"x")
    await until(lambda: service._connection.error is not None)
    assert not is_there(directory)


async def test_a_changed_remote_makes_a_service_stale(service: Service, directory: Path) -> None:
    from lattice_remote.client.config import Remote, write_remote

    assert not service.is_stale()
    write_remote(str(directory), Remote("origin", "http://127.0.0.1:1", "web"))
    assert service.is_stale()


async def test_status_states_its_evidence(server: FakeServer, service: Service) -> None:
    await run(service, "put", "tasks/x.json", "x")
    status = await ask(service, "status")
    assert status["connected"] and status["current"] and status["seq"] == status["server_seq"] == 1
    assert float(str(status["last_heard_s"])) < 5 and status["pid"] == os.getpid() and status["actor"] == "human:ana"
    await server.stop()
    await until(lambda: not service._connection.is_open)
    status = await ask(service, "status")
    assert not status["connected"] and status["server_seq"] is None and "refused" in str(status["error"])


async def test_a_silent_connection_is_not_reported_as_connected(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ready(service)
    monkeypatch.setattr("lattice_remote.client.connection.connection.ALIVE_S", -1.0)
    assert not service.summary()["connected"]
    with pytest.raises(RemoteError, match="cannot reach server"):
        await ask(service, "pull")


# --- bounded and unbounded retries ---


async def test_a_link_survives_any_number_of_failures(server: FakeServer, service: Service) -> None:
    await ready(service)
    service._connection._backoff.streak = 5000
    await server.stop()
    await until(lambda: service._connection.failed_attempts > 0)
    await server.start()
    service._connection.kick()
    await until(service._is_current)


async def test_a_command_that_ends_every_connection_is_abandoned(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def close(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Run):
            connection.transport.abort()
        return isinstance(frame, Run)

    await ready(service)
    server.misbehave = close  # type: ignore[assignment]
    monkeypatch.setattr("lattice_remote.client.connection.dial.MAX_DELAY_S", 0.1)
    with pytest.raises(ConnectionFailed, match="may have taken effect"):
        await run(service, "put", "tasks/x.json", "x")
    assert sum(isinstance(frame, Run) for frame in server.frames) == MAX_SENDS


async def test_parts_that_never_complete_a_file_end_the_connection(server: FakeServer, service: Service) -> None:
    async def lie(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Fetch):
            await connection.send(encode(Part(frame.paths[0], server.seq, 1, b"\0" * 32, 0, b"x")))
        return isinstance(frame, Fetch)

    await ready(service)
    server.misbehave = lie  # type: ignore[assignment]
    server.change(AnnounceFile("artifacts/payload/x", 1, digest_of(b"x")))
    await until(lambda: service._connection.error is not None)
    assert service._connection.error is not None and "keeps sending" in service._connection.error.message
    assert sum(isinstance(frame, Fetch) for frame in server.frames) <= 7


async def test_a_comparison_without_a_connection_is_an_error(server: FakeServer, service: Service) -> None:
    await ready(service)
    await server.stop()
    await until(lambda: not service._connection.is_open)
    with pytest.raises(ConnectionFailed):
        await service._replicator.compare(repair=False)


async def test_a_token_that_cannot_be_sent_is_reported(service: Service) -> None:
    await ready(service)
    with pytest.raises(RemoteError, match="not a token") as error:
        await run(service, "put", "tasks/x.json", "x", token="zwei Wörter")
    assert error.value.code == "REMOTE_UNAUTHORIZED"


# --- edits concurrent with changes ---


async def test_a_change_that_overtakes_the_answer_to_an_edit_is_not_undone(
    server: FakeServer, service: Service, directory: Path
) -> None:
    plan = await edited(server, service, directory)

    async def theirs_first(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put):
            server.put(PLAN, frame.text)
            server.put(PLAN, b"# Plan\nmine\ntheirs\n")
            await until(lambda: service._replicator.replica.position.seq == 2)
            await connection.send(encode(Stored(frame.id, 1, "stored")))
        return isinstance(frame, Put)

    server.misbehave = theirs_first  # type: ignore[assignment]
    await ask(service, "push")
    assert plan.read_bytes() == b"# Plan\nmine\ntheirs\n"
    assert Edits(service.cache).scan() == []  # sent as an edit by any process, it would undo the next change


async def test_an_edit_stays_in_the_cache_until_its_merge_arrives(
    server: FakeServer, service: Service, directory: Path
) -> None:
    plan = await edited(server, service, directory)
    server.tokens["ltr_agent"] = "agent:x"
    seen: list[bytes] = []

    async def answer_before_the_changes(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put):
            await connection.send(encode(Stored(frame.id, 2, "merged")))
            server.put(PLAN, b"# Theirs\n")
            await until(lambda: service._replicator.replica.position.seq == 1)
            seen.append(plan.read_bytes())
            server.put(PLAN, b"# Theirs\nmine\n")
        return isinstance(frame, Put)

    server.misbehave = answer_before_the_changes  # type: ignore[assignment]
    await ask(service, "push", "ltr_agent")
    await until(lambda: plan.read_bytes() == b"# Theirs\nmine\n")
    assert seen == [b"# Plan\nmine\n"]


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_save_while_a_text_is_replaced_is_an_edit(
    server: FakeServer, service: Service, directory: Path, monkeypatch: pytest.MonkeyPatch, moment: str, grows: bool
) -> None:
    await ready(service)
    server.put(PLAN, b"# Plan\n")
    await until(service._is_current)
    place, put = directory / PLAN, Directory.replace
    await until(place.exists)

    def while_an_editor_saves(
        self: Directory, path: str, data: bytes, *condition: Callable[[], bool], is_synced: bool = False
    ) -> bool:
        mine = path == PLAN and b"theirs" in data
        if mine and moment == "before":
            place.write_bytes(b"# Plan\nmine\n")
        done = put(self, path, data, *condition, is_synced=is_synced)
        if mine and moment == "after":
            place.write_bytes(b"# Plan\nmine\n")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Directory, "replace", while_an_editor_saves)
        server.append(PLAN, b"theirs\n") if grows else server.put(PLAN, b"# Plan\ntheirs\n")
        await until(lambda: service._replicator.replica.position.seq == 2)
    assert place.read_bytes() == b"# Plan\nmine\n"
    assert service._replicator.edits.scan() == [PLAN]
    assert service._replicator.edits.base(PLAN) == (b"# Plan\n" if moment == "before" else b"# Plan\ntheirs\n")
