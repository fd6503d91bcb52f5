"""A node's worker applies an owner's records: the same tree and journal, after kills and outside changes too."""

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from harness import tree_of, until
from random_commands import command_lines

from lattice_remote.protocol.messages import Bye, Refused, Reply, decode_server_frame
from lattice_remote.server.datadir import DataDir, ProjectPaths
from lattice_remote.server.ipc import ApplyRecords, Edit, Ready, RequestDone, RunCommand
from lattice_remote.server.journal.segment import JournalReader, next_number
from lattice_remote.server.project.order import EmbeddedOrder
from lattice_remote.server.project.project import Project
from lattice_remote.server.worker.caller import OWNERS_FILE
from lattice_remote.server.worker.recovery import Membership


class Node(EmbeddedOrder):
    """A node without an engine: the test is the order."""

    is_shared = True

    def __init__(self, project: Path, *, is_owner: bool) -> None:
        self.is_owner = is_owner
        self.membership = Membership()
        self.records: list[bytes] = []
        self.missing: list[str] = []
        self.project = Project("web", ProjectPaths(project), hooks=None, order=self)

    async def prepare(self) -> Sequence[str]:
        return ("--member", msgspec.json.encode(self.membership).decode())

    def opened(self, ready: Ready) -> None:
        del ready
        if self.is_owner:
            self.project.lead(keeps_edits=True)

    def pass_on(self, deliver: Callable[[], None], done: RequestDone | None = None) -> None:
        if done is not None and done.record:
            self.records.append(done.record)
        deliver()

    def copy_missing(self, reason: str) -> None:
        self.missing.append(reason)

    # --- a requester ---

    fairness_key = None

    def answer(self, request_id: str, reply: bytes) -> None:
        self.answers[request_id] = decode_server_frame(reply)

    def end(self, bye: Bye) -> None:
        del bye

    async def run(self, *argv: str) -> Reply | Refused:
        return await self.ask(RunCommand(secrets.token_hex(16), list(argv), [], "t", "human:ana", ["agent:*"]))

    async def ask(self, request: RunCommand | Edit) -> Reply | Refused:
        self.answers: dict[str, object] = {}
        self.project.submit(request, self)
        await until(lambda: request.id in self.answers)
        return self.answers[request.id]  # type: ignore[return-value]

    def apply(self, records: Sequence[bytes]) -> None:
        self.project.apply(ApplyRecords(list(records)))

    @property
    def tree(self) -> dict[str, bytes]:
        return tree_of(self.project.paths.lattice)

    @property
    def journal(self) -> list[bytes]:
        return [payload for _, payload in JournalReader(self.project.paths.journal).payloads(0)]


@contextlib.asynccontextmanager
async def started(project: Path, *, is_owner: bool, membership: Membership | None = None) -> AsyncIterator[Node]:
    node = Node(project, is_owner=is_owner)
    node.membership = membership or Membership()
    node.project.start()
    await node.project.opened()
    try:
        yield node
    finally:
        await node.project.drain(10)
        await node.project.stop(10)


@pytest.fixture
async def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Return two directories with the same new project."""
    data = DataDir(tmp_path / "a")
    data.create()
    data.create_project("web", code="WEB", name=None, actor="human:ana")
    project = data.project("web").root
    alone = Project("web", data.project("web"), hooks=None)
    alone.start()
    await alone.opened()
    await alone.drain(10)
    await alone.stop(10)
    shutil.copytree(project, tmp_path / "b")
    return project, tmp_path / "b"


async def random_work(node: Node, seed: int, count: int) -> None:
    for argv, files in command_lines(random.Random(seed), count, node.project.paths.lattice):
        await node.ask(RunCommand(secrets.token_hex(16), argv, files, "t", "human:ana", ["agent:*"]))


async def test_a_follower_has_the_owners_tree_and_journal(pair: tuple[Path, Path]) -> None:
    async with started(pair[0], is_owner=True) as owner, started(pair[1], is_owner=False) as follower:
        await random_work(owner, 1, 60)
        follower.apply(owner.records)
        await until(lambda: follower.project.history.head == owner.project.history.head)
        assert follower.tree == owner.tree
        assert follower.project.history.files == owner.project.history.files
        assert follower.journal[-len(owner.records) :] == owner.records
        assert not follower.missing


async def test_a_killed_follower_goes_on_where_it_was(pair: tuple[Path, Path]) -> None:
    async with started(pair[0], is_owner=True) as owner:
        await random_work(owner, 2, 40)
        records = list(owner.records)
        at = 0
        for number in range(6):
            async with started(pair[1], is_owner=False) as follower:
                at = len(follower.journal)
                follower.apply(records[at:])
                await asyncio.sleep(0.004 * number)
                if (pid := follower.project.load.worker_pid) is not None:
                    os.kill(pid, signal.SIGKILL)
                    await until(lambda pid=pid: follower.project.load.worker_pid not in (None, pid))
        async with started(pair[1], is_owner=False) as follower:
            follower.apply(records[len(follower.journal) :])
            await until(lambda: follower.project.history.head == owner.project.history.head)
            assert follower.tree == owner.tree
            assert not follower.missing


async def test_an_edit_on_a_follower_is_set_aside_and_restored(pair: tuple[Path, Path]) -> None:
    async with started(pair[0], is_owner=True) as owner, started(pair[1], is_owner=False) as follower:
        await owner.run("create", "Plan", "--actor", "human:ana")
        follower.apply(owner.records)
        await until(lambda: follower.project.history.head == owner.project.history.head)
        plan = next((follower.project.paths.lattice / "plans").glob("*.md"))
        (owner.project.paths.lattice / "plans" / plan.name).write_bytes(b"by the owner\n")
        owner.project.files_touched({f"plans/{plan.name}"})
        await until(lambda: owner.project.history.head == 2)
        follower.apply(owner.records[1:])
        await until(lambda: follower.project.history.head == 2)
        right = b"by the owner\n"
        assert plan.read_bytes() == right
        plan.write_bytes(b"by hand\n")
        follower.project.files_touched({f"plans/{plan.name}"})
        await until(lambda: plan.read_bytes() == right)
        assert [path.read_bytes() for path in pair[1].glob(f"set-aside/*/plans/{plan.name}")] == [b"by hand\n"]
        assert not follower.missing
        assert follower.project.history.head == owner.project.history.head


async def test_records_that_the_cluster_lacks_are_cut(pair: tuple[Path, Path]) -> None:
    async with started(pair[0], is_owner=True) as owner:
        await random_work(owner, 3, 30)
        kept, tree, head = len(owner.records), owner.tree, owner.project.history.head
        plan = next((owner.project.paths.lattice / "plans").glob("*.md"))
        edit = Edit(
            secrets.token_hex(16), f"plans/{plan.name}", plan.read_bytes(), b"never acknowledged\n", "t", "human:ana"
        )
        await owner.ask(edit)
        await random_work(owner, 4, 30)
        assert owner.project.history.head > head
        surplus = len(owner.records) - kept
    before = [number for number, _ in JournalReader(pair[0] / "journal").payloads(0)]
    cut = Membership(cut=before[-surplus])
    async with started(pair[0], is_owner=False, membership=cut) as node:
        assert node.project.history.head == head
        assert node.tree == tree
        assert next_number(pair[0] / "journal") == cut.cut
        node.membership = Membership()
        node.is_owner = True
        node.project.lead(keeps_edits=False)
        await node.run("create", "After", "--actor", "human:ana")
        assert node.project.history.head == head + 1


async def test_a_follower_becomes_the_owner(pair: tuple[Path, Path]) -> None:
    async with started(pair[0], is_owner=True) as first, started(pair[1], is_owner=False) as second:
        reply = await first.run("create", "One", "--actor", "human:ana")
        second.apply(first.records)
        await until(lambda: second.project.history.head == first.project.history.head)
        second.is_owner = True
        second.project.lead(keeps_edits=False)
        await second.run("create", "Two", "--actor", "human:ana")
        assert [record for record in second.journal if record in first.records] == first.records
        again = RunCommand(reply.id, ["create", "One", "--actor", "human:ana"], [], "t", "human:ana", ["agent:*"])
        assert await second.ask(again) == reply, "a repeated request gets the same reply from the next owner"


async def test_a_follower_knows_who_has_started_a_session(pair: tuple[Path, Path]) -> None:
    async with started(pair[0], is_owner=True) as owner, started(pair[1], is_owner=False) as follower:
        reply = await owner.run("session", "start", "--name", "Argus", "--model", "m", "--framework", "f")
        assert isinstance(reply, Reply) and reply.exit_code == 0, reply
        follower.apply(owner.records)
        await until(lambda: follower.project.history.head == owner.project.history.head)
        assert (pair[1] / OWNERS_FILE).read_bytes() == (pair[0] / OWNERS_FILE).read_bytes()
