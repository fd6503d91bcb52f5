"""Writes on a node that does not own the project, forwarded over real sockets."""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trustme
from harness import Running, make_data, serving, tree_of, until
from nodes import (
    SECRET,
    Follower,
    Requester,
    command,
    following,
    owner_process,
    serve_cluster,
)

from lattice_remote.errors import ConnectionFailed, Misuse
from lattice_remote.protocol.messages import Attachment, Refused, Reply, encode
from lattice_remote.server.cluster.peer_access import PeerAccess
from lattice_remote.server.config import Config, LimitSettings
from lattice_remote.server.ipc import Edit, Ready, RunCall, RunCommand
from lattice_remote.server.project.metrics import RequestOutcome
from lattice_remote.server.project.queue import QueueLimits
from lattice_remote.server.transport.listener import Certificate

Message = RunCommand | RunCall | Edit


@dataclass
class Pair:
    """An owner and a follower of the project ``web``."""

    owner: Running
    owned: set[str]
    follower: Follower

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.owner.port}"

    @property
    def runs(self) -> list[str]:
        """Ids of the requests in the order in which the owner's worker ran them."""
        return (self.owner.data.project("web").root / "runs").read_text().split()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    data, token = make_data(tmp_path / "a")
    limits = LimitSettings(attachment_bytes=8 * 1024 * 1024)
    async with serving(data, token, config=Config(limits=limits)) as owner:
        owned = serve_cluster(owner.registry)
        project = owner.registry.project("web")
        await project.opened()
        async with following(tmp_path / "b") as follower:
            follower.follow(project)
            pair = Pair(owner, owned, follower)
            follower.forwarder.owner_is(pair.url)
            yield pair


async def test_forwarded_commands_of_each_client_run_in_their_order(pair: Pair) -> None:
    clients = [Requester(f"client {number}") for number in range(5)]
    requests = [[command("put", f"f{n}-{i}", "x", holder=f"t{n}") for i in range(40)] for n in range(5)]
    for row in zip(*requests, strict=True):
        for client, request in zip(clients, row, strict=True):
            pair.follower.forwarder.submit(request, client)
    await until(lambda: all(len(client.answers) == 40 for client in clients))
    ran = pair.runs
    for client, own in zip(clients, requests, strict=True):
        ids = [request.id for request in own]
        assert [id_ for id_ in ran if id_ in set(ids)] == ids
        assert list(client.answers) == ids
    assert len(ran) == 200


async def test_an_answer_waits_for_its_change_in_the_local_history(pair: Pair) -> None:
    pair.follower.is_held = True
    client = Requester()
    request, after = command("put", "a", "1"), command("noop")
    pair.follower.forwarder.submit(request, client)
    await until(lambda: pair.follower.forwarder.held == 1)
    assert client.answers == {}
    pair.follower.catch_up()
    await until(lambda: request.id in client.answers)
    answer = await pair.follower.run(after, client)
    assert isinstance(answer, Reply)
    assert answer.seq == pair.follower.project.history.head == 1


async def test_a_reply_that_names_a_change_of_a_former_epoch_is_delivered(pair: Pair) -> None:
    pair.follower.is_held = True
    client, request = Requester(), command("put", "a", "1")
    pair.follower.forwarder.submit(request, client)
    await until(lambda: pair.follower.forwarder.held == 1)
    assert client.answers == {}
    pair.follower.begin(Ready("another", 0, b"", 0, "fake", []))
    await until(lambda: request.id in client.answers)


async def test_a_request_of_32_mib_is_forwarded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    data = secrets.token_bytes(32 * 1024 * 1024 - 64 * 1024)
    large = RunCommand(secrets.token_hex(16), ["put", "a", "1"], [Attachment(2, "f", data)], "t", "human:ana", [])
    arrived: list[Message] = []

    def take(message: Message, requester: Requester, _: object) -> None:
        arrived.append(msgspec.structs.replace(message, first_sent_at=None))
        requester.answer(message.id, encode(Reply(message.id, 0, 0, data, b"")))

    monkeypatch.setattr(pair.owner.registry.project("web"), "submit", take)
    answer = await pair.follower.run(large, Requester())
    assert isinstance(answer, Reply)
    assert answer.stdout == data
    assert arrived == [large]


async def test_a_repeated_id_runs_once_and_answers_every_requester(pair: Pair) -> None:
    first, second = Requester("first"), Requester("second")
    request = command("slow", "a", "1")
    pair.follower.forwarder.submit(request, first)
    pair.follower.forwarder.submit(request, second)
    await until(lambda: first.answers and second.answers)
    assert pair.runs == [request.id]
    stranger, other = Requester(), msgspec.structs.replace(command("slow", "b", "1"))
    pair.follower.forwarder.submit(other, first)
    pair.follower.forwarder.submit(msgspec.structs.replace(other, token_id="another"), stranger)
    assert isinstance(refused := stranger.answers[other.id], Refused)
    assert refused.code == "REMOTE_FORBIDDEN"


async def test_the_outcome_reaches_the_listener_before_the_reply(pair: Pair) -> None:
    client, request = Requester(), command("put", "a", "1")
    heard: list[tuple[RequestOutcome, bool]] = []
    pair.follower.forwarder.submit(request, client, lambda found: heard.append((found, request.id in client.answers)))
    await until(lambda: request.id in client.answers)
    [(outcome, was_answered)] = heard
    assert (outcome.outcome, outcome.seq, was_answered) == ("done", 1, False)


async def test_an_upload_reaches_the_owner_before_its_command(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    content = secrets.token_bytes(3 * 1024 * 1024 + 17)
    file = _staged(pair.follower, content)
    request = RunCommand(secrets.token_hex(16), ["put", "a", "1"], [file], "t", "human:ana", [])
    project = pair.owner.registry.project("web")
    arrived, submit, at_submission = project.paths.upload("t", file.digest or b""), project.submit, list[bytes]()

    def noting(message: Message, *rest: object) -> None:
        if message.id == request.id:
            at_submission.append(arrived.read_bytes())
        submit(message, *rest)  # type: ignore[arg-type] # as it came

    monkeypatch.setattr(project, "submit", noting)
    client = Requester()
    later = command("put", "b", "1")
    pair.follower.forwarder.submit(request, client)
    pair.follower.forwarder.submit(later, client)
    other = Requester("other")
    pair.follower.forwarder.submit(command("put", "c", "1", holder="o"), other)
    await until(lambda: len(client.answers) == 2 and other.answers)
    assert list(client.answers) == [request.id, later.id]
    assert at_submission == [content]


async def test_an_upload_that_the_owner_refuses_refuses_its_command(pair: Pair) -> None:
    file = _staged(pair.follower, bytes(9 * 1024 * 1024))
    request = RunCommand(secrets.token_hex(16), ["put", "a", "1"], [file], "t", "human:ana", [])
    answer = await pair.follower.run(request, Requester())
    assert isinstance(answer, Refused)
    assert answer.code == "REMOTE_TOO_LARGE"
    assert isinstance(await pair.follower.run(command("put", "b", "1"), Requester()), Reply)
    assert request.id not in pair.runs


def _staged(follower: Follower, content: bytes, token_id: str = "t") -> Attachment:  # noqa: S107 - an id
    digest = hashlib.sha256(content).digest()
    path = follower.project.paths.upload(token_id, digest)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return Attachment(2, "f", digest=digest, size=len(content))


async def test_a_wait_survives_another_connection_and_ends_with_its_client(pair: Pair) -> None:
    client, request = Requester(), command("want", "printer", "60")
    pair.follower.forwarder.submit(request, client)
    project = pair.owner.registry.project("web")
    await until(lambda: project.load.waiting == 1)
    pair.follower.forwarder.owner_is(None)
    await until(lambda: project.load.waiting == 0)
    pair.follower.forwarder.owner_is(pair.url)
    await until(lambda: project.load.waiting == 1)
    pair.follower.forwarder.submit(command("put", "resources/printer/free", "1"), client)
    await until(lambda: request.id in client.answers)
    assert client.answers[request.id].seq == 2  # type: ignore[union-attr]
    gone = command("want", "printer", "60")
    pair.follower.forwarder.submit(gone, client)
    await until(lambda: project.load.waiting == 1)
    pair.follower.forwarder.forget(client, {gone.id})
    await until(lambda: project.load.waiting == 0)


async def test_a_request_of_a_revoked_token_is_withdrawn_unless_it_may_have_run(pair: Pair) -> None:
    client = Requester()
    waiting = command("want", "printer", "60")
    pair.follower.forwarder.submit(waiting, client)
    await until(lambda: pair.owner.registry.project("web").load.waiting == 1)
    assert not pair.follower.forwarder.withdraw(client, waiting.id, "REMOTE_UNAUTHORIZED")
    await until(lambda: waiting.id in client.answers)
    assert isinstance(refused := client.answers[waiting.id], Refused)
    assert refused.code == "REMOTE_UNAUTHORIZED"
    pair.follower.forwarder.owner_is(None)
    unsent = command("put", "a", "1")
    pair.follower.forwarder.submit(unsent, client)
    repeated = msgspec.structs.replace(command("put", "b", "1"), first_sent_at=1.0)
    pair.follower.forwarder.submit(repeated, client)
    assert pair.follower.forwarder.withdraw(client, unsent.id, "REMOTE_UNAUTHORIZED")
    assert not pair.follower.forwarder.withdraw(client, repeated.id, "REMOTE_UNAUTHORIZED")
    pair.follower.forwarder.owner_is(pair.url)
    assert isinstance(await pair.follower.run(command("put", "c", "1"), client), Reply)
    assert unsent.id not in pair.runs


async def test_a_node_that_is_no_longer_the_owner_runs_nothing(pair: Pair, tmp_path: Path) -> None:
    client = Requester()
    assert isinstance(await pair.follower.run(command("put", "a", "1"), client), Reply)
    pair.owned.clear()
    request = command("put", "b", "1")
    pair.follower.forwarder.submit(request, client)
    data, token = make_data(tmp_path / "c")
    async with serving(data, token) as successor:
        serve_cluster(successor.registry)
        await successor.registry.project("web").opened()
        pair.follower.follow(successor.registry.project("web"))
        pair.follower.forwarder.owner_is(f"http://127.0.0.1:{successor.port}")
        await until(lambda: request.id in client.answers)
        assert (data.project("web").root / "runs").read_text().split() == [request.id]
        assert len(pair.runs) == 1
        pair.follower.forwarder.owner_is(None)


async def test_an_owner_that_becomes_one_later_gets_the_waiting_requests(pair: Pair) -> None:
    pair.owned.clear()
    client, request = Requester(), command("put", "a", "1")
    pair.follower.forwarder.submit(request, client)
    pair.follower.forwarder.owner_is(pair.url)
    pair.owned.add("web")
    await until(lambda: request.id in client.answers)


async def test_a_killed_owner_runs_every_request_once(tmp_path: Path) -> None:
    data, token = make_data(tmp_path / "a")
    async with following(tmp_path / "b") as follower:
        client = Requester()
        requests = [command("put", f"f{number}", "x") for number in range(300)]
        with owner_process(data) as owner:
            port = owner.port
            # Its history is never behind: this test has no order of changes.
            follower.begin(Ready(await asyncio.to_thread(owner.epoch, token), 1_000_000, b"", 1, "fake", []))
            follower.forwarder.owner_is(owner.url)
            for request in requests[:200]:
                follower.forwarder.submit(request, client)
            await until(lambda: len(client.answers) > 20)
            owner.kill()
            answered = len(client.answers)
            for request in requests[200:]:
                follower.forwarder.submit(request, client)
        assert answered < 200
        with owner_process(data, port):
            await until(lambda: len(client.answers) == 300)
        assert all(isinstance(answer, Reply) for answer in client.answers.values())
        seqs = [answer.seq for answer in client.answers.values()]
        assert sorted(seqs) == list(range(1, 301))
        assert len(tree_of(data.project("web").lattice)) == 1 + 300


async def test_requests_beyond_the_bounds_are_refused_as_busy(tmp_path: Path) -> None:
    async with following(tmp_path / "b", bounds=QueueLimits(per_token=3)) as follower:
        client = Requester()
        requests = [command("put", "a", "1") for _ in range(4)]
        for request in requests:
            follower.forwarder.submit(request, client)
        assert [answer.code for answer in client.answers.values()] == ["REMOTE_BUSY"]  # type: ignore[union-attr]
        assert list(client.answers) == [requests[3].id]


async def test_without_an_owner_unsent_requests_are_refused_and_others_are_unknown(tmp_path: Path) -> None:
    async with following(tmp_path / "b", patience_s=0.1) as follower:
        first, second = Requester(), Requester()
        unsent, repeated = (
            command("put", "a", "1"),
            msgspec.structs.replace(command("put", "b", "1"), first_sent_at=1.0),
        )
        follower.forwarder.submit(unsent, first)
        follower.forwarder.submit(repeated, second)
        await until(lambda: first.answers and second.byes)
        assert isinstance(refused := first.answers[unsent.id], Refused)
        assert refused.code == "REMOTE_BUSY"
        assert not second.answers


async def test_the_requests_are_handed_over_in_their_order(pair: Pair) -> None:
    client = Requester()
    waiting = command("want", "printer", "60")
    pair.follower.forwarder.submit(waiting, client)
    await until(lambda: pair.owner.registry.project("web").load.waiting == 1)
    pair.follower.forwarder.owner_is(None)
    unsent = command("put", "a", "1")
    pair.follower.forwarder.submit(unsent, client)
    passed: list[tuple[Message, object]] = []
    pair.follower.forwarder.hand_over(lambda message, requester, _: passed.append((message, requester)))
    assert [(message.id, requester) for message, requester in passed] == [(waiting.id, client), (unsent.id, client)]
    assert [message.first_sent_at is None for message, _ in passed] == [False, True]
    assert pair.follower.forwarder.requesters() == []


@pytest.mark.parametrize(
    ("secret", "path", "shift_s"),
    [(b"t" * 32, "/cluster/web", 0.0), (SECRET, "/cluster/other", 0.0), (SECRET, "/cluster/web", 61.0)],
)
async def test_a_node_without_a_valid_proof_is_refused(
    pair: Pair, secret: bytes, path: str, shift_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    access = PeerAccess("b", secret, now=lambda: time.time() - shift_s)
    monkeypatch.setattr(access, "proof", lambda _, proof=access.proof: proof(path))
    with pytest.raises(ConnectionFailed, match="401"):
        await access.connect(pair.url, "/cluster/web")


async def test_a_server_outside_a_cluster_has_no_such_path(tmp_path: Path) -> None:
    data, token = make_data(tmp_path / "a")
    async with serving(data, token) as server:
        with pytest.raises(ConnectionFailed, match="404"):
            await PeerAccess("b", SECRET).connect(f"http://127.0.0.1:{server.port}", "/cluster/web")


async def test_a_stalled_client_of_one_node_delays_no_other(pair: Pair) -> None:
    """Its requests fill its own share; those of another client are answered (I10)."""
    stalled, other = Requester("stalled"), Requester("other")
    waits = [command("want", "printer", "60", holder="s") for _ in range(400)]
    for request in waits:
        pair.follower.forwarder.submit(request, stalled)
    answers = await asyncio.gather(*(pair.follower.run(command("noop", holder="o"), other) for _ in range(20)))
    assert all(isinstance(answer, Reply) for answer in answers)
    assert stalled.answers == {}


async def test_nodes_connect_over_tls_with_the_named_authorities(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued, authorities = authority.issue_cert("127.0.0.1"), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(authorities)
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o600)
    data, token = make_data(tmp_path / "a")
    certificate = Certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    async with serving(data, token, certificate=certificate) as owner:
        serve_cluster(owner.registry)
        url = f"https://127.0.0.1:{owner.port}"
        async with await PeerAccess("b", SECRET, authorities=authorities).connect(url, "/cluster/web"):
            pass
        with pytest.raises(ConnectionFailed, match="certificate"):
            await PeerAccess("b", SECRET).connect(url, "/cluster/web")
    with pytest.raises(Misuse, match="cannot read the certificates"):
        PeerAccess("b", SECRET, authorities=tmp_path / "missing.pem")
