"""Clients that play the sessions of protocol/vectors/sessions.json step by step."""

import asyncio
import base64
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

import standalone_client
from lattice_remote.client.cache.cache import Cache, CacheState
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.config import Remote, write_remote
from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import (
    NOWHERE,
    ClientFrame,
    Position,
    Put,
    Run,
    Stored,
    Welcome,
    decode_server_frame,
)
from lattice_remote.protocol.paths import is_editable

__all__ = ["SESSIONS", "CacheDriver", "StandaloneDriver", "play"]

SESSIONS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "protocol/vectors/sessions.json").read_text())
Files = dict[str, bytes]
Sent = list[dict[str, Any]]


class StandaloneDriver:
    """The client of examples/standalone_client.py."""

    defers = False

    def __init__(self, directory: Path, before: dict[str, Any], module: Any = standalone_client) -> None:
        self.directory = directory
        self.violations = (module.Violation,)
        self._module = module
        self.client = module.Client(directory)
        tree = files_of(before["tree"])
        self.client.tree.update(tree)
        self.client.bases.update({path: text for path, text in tree.items() if is_editable(path)})
        self.client.missing = dict.fromkeys(before["missing"], 0)
        if before["position"]:
            position = Position.parse(before["position"])
            self.client.epoch, self.client.seq, self.client.mark = position.epoch, position.seq, position.mark
        self.client.save()
        self.restart()

    def restart(self) -> None:
        self.client = self._module.Client(self.directory)

    def close(self) -> None:
        self.client.lost()

    def connect(self) -> Sent:
        return self.client.connected()

    def lose(self) -> None:
        self.client.lost()

    def receive(self, data: bytes) -> Sent:
        return self.client.receive(self._module.decode(data))

    def run(self, id_: str, argv: list[str]) -> Sent:
        return self.client.run(argv, id_)

    def edit(self, id_: str, path: str, text: bytes) -> Sent:
        self.client.tree[path] = text
        return self.client.edits(id_)

    def answered(self) -> list[str]:
        answers, self.client.answers = self.client.answers, {}
        return list(answers)

    def state(self) -> dict[str, Any]:
        client = self.client
        position = str(Position(client.epoch, client.seq, client.mark)) if client.epoch else ""
        tree = {path: text for path, text in client.tree.items() if not path.endswith(".mine")}
        return {"tree": tree, "missing": sorted(client.missing), "position": position}


class CacheDriver:
    """The cache of lattice-remote on disk. The driver repeats requests as its connection does."""

    defers = True
    violations = (ProtocolError,)

    def __init__(self, directory: Path, before: dict[str, Any]) -> None:
        directory.mkdir()
        remote = Remote("origin", "http://127.0.0.1:1", "web")
        write_remote(str(directory), remote)
        self._loop = asyncio.Runner()
        self._cache = Cache(str(directory), remote)
        self._cache.prepare()
        self._replicator = Replicator(self._cache)
        position = Position.parse(before["position"]) if before["position"] else NOWHERE
        for path, text in files_of(before["tree"]).items():
            self._cache.replace(path, text)
            if is_editable(path):
                self._replicator.edits.sent(path, text)
        self._cache.save_state(CacheState(position, tuple(before["missing"])))
        self.restart()

    def restart(self) -> None:
        self._replicator = Replicator(self._cache)
        self._open: dict[str, tuple[Run | Put, bytes | None]] = {}
        self._sent: set[str] = set()
        self._answers: list[str] = []
        self._do(self._replicator.hello())  # loads the stored state
        self.lose()

    def close(self) -> None:
        self.lose()
        self._loop.close()

    def connect(self) -> Sent:
        return [as_sent(self._do(self._replicator.hello()))]

    def lose(self) -> None:
        self._do(self._replicator.disconnected())

    def receive(self, data: bytes) -> Sent:
        frame = decode_server_frame(data)
        outcome = self._do(self._replicator.receive([frame]))
        sent = outcome.to_send
        if isinstance(frame, Welcome):
            again = [(request, 1.0 if id_ in self._sent else 0.0) for id_, (request, _) in self._open.items()]
            sent = [*sent, *(msgspec.structs.replace(request, age_s=age_s) for request, age_s in again)]
            self._sent.update(self._open)
        for answer in outcome.answers:
            self._answers.append(answer.id)
            request, base = self._open.pop(answer.id, (None, None))
            if isinstance(request, Put) and isinstance(answer, Stored):
                settled, _ = self._do(self._replicator.settle(request, answer.outcome, base))
                sent = [*sent, *settled.to_send]
        return [as_sent(each) for each in sent]

    def run(self, id_: str, argv: list[str]) -> Sent:
        return self._request(Run(id_, argv), None)

    def edit(self, id_: str, path: str, text: bytes) -> Sent:
        base = self._replicator.edits.base(path)
        place = Path(self._cache.directory) / path
        place.write_bytes(text)
        return self._request(Put(id_, path, base, text), base)

    def answered(self) -> list[str]:
        answers, self._answers = self._answers, []
        return answers

    def state(self) -> dict[str, Any]:
        replica = self._replicator.replica
        position = "" if replica.position == NOWHERE else str(replica.position)
        tree = {path: self._cache.read(path) for path in self._cache.paths()}
        state = {"tree": tree, "missing": sorted(replica.missing), "position": position}
        return {**state, "deferred": sorted(replica.deferred)}

    def _request(self, request: Run | Put, base: bytes | None) -> Sent:
        self._open[request.id] = request, base
        if self._replicator.replica.welcome is None:
            return []
        self._sent.add(request.id)
        return [as_sent(request)]

    def _do[T](self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)


def files_of(tree: dict[str, str]) -> Files:
    return {path: base64.b64decode(text) for path, text in tree.items()}


def as_sent(frame: ClientFrame) -> dict[str, Any]:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(frame))


def play(driver: Any, session: dict[str, Any]) -> None:
    """Play a session. Raises ``AssertionError`` at the first step that differs."""
    state = dict(session["before"])
    for number, step in enumerate(session["steps"]):
        where = f"{session['name']}, step {number}: {step['do']}"
        sent = perform(driver, step, where)
        state |= {name: step[name] for name in state if name in step}
        found = driver.state()
        for name, value in state.items():
            expected = files_of(value) if name == "tree" else value
            assert found[name] == expected, f"{where}: {name}: {found[name]} instead of {expected}"
        assert driver.answered() == step["answers"], f"{where}: answers"
        check_sent(sent, step["sends"], where)


def check_sent(sent: Sent, expected: Sent, where: str) -> None:
    """Compare the fields that the session names. Paths of Fetches form one set; Applied is ignored."""
    for kinds in (("run", "put"), ("hello",), ("manifest",)):  # in order within each group
        found = [frame for frame in sent if frame["type"] in kinds]
        wanted = [frame for frame in expected if frame["type"] in kinds]
        assert len(found) == len(wanted), f"{where}: sends {found} instead of {wanted}"
        for frame, fields in zip(found, wanted, strict=True):
            for name, value in fields.items():
                actual = as_json(frame.get(name, 0))
                assert actual == value or (value == "above 0" and actual > 0), f"{where}: {name} is {actual}"
    fetched, missing = (
        sorted({path for frame in frames if frame["type"] == "fetch" for path in frame["paths"]})
        for frames in (sent, expected)
    )
    assert fetched == missing, f"{where}: fetches {fetched} instead of {missing}"
    assert {frame["type"] for frame in sent} <= {"run", "put", "hello", "manifest", "fetch", "applied"}


def as_json(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def perform(driver: Any, step: dict[str, Any], where: str) -> Sent:
    match step["do"]:
        case "connect":
            return driver.connect()
        case "lose":
            driver.lose()
        case "restart":
            driver.restart()
        case "run":
            return driver.run(step["id"], step["argv"])
        case "edit":
            return driver.edit(step["id"], step["path"], base64.b64decode(step["text"]))
        case "receive":
            try:
                sent = driver.receive(bytes.fromhex(step["msgpack"]))
            except driver.violations:
                assert step.get("violation"), f"{where}: the frame is no violation"
                driver.lose()
                return []
            assert not step.get("violation"), f"{where}: the frame is a violation"
            return sent
    return []
