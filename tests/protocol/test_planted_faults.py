"""Detection of faults planted in a server or a client; docs/inside/reliability.md counts them."""

import asyncio
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from planted_faults import FAULTS, Fault, module_with, source_with, vectors_notice
from session_drivers import SESSIONS, StandaloneDriver, play

from lattice_remote.conformance import Outcome, chosen, client_checks, run_checks, server_checks
from lattice_remote.conformance.client_checks import ClientTarget
from lattice_remote.conformance.probe import ServerTarget
from lying_proxy import Frame, Lies, lying
from sandbox import Sandbox, Server

pytestmark = pytest.mark.e2e


# --- a client ---


def sessions_notice(client: Any, place: Path) -> bool:
    for number, session in enumerate(SESSIONS):
        if session.get("defers"):
            continue
        try:
            with closing(StandaloneDriver(place / str(number), session["before"], client)) as driver:
                play(driver, session)
        except Exception:  # noqa: BLE001 - a fault may end in any way
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault_in_a_client_is_detected_no_later_than_stated(fault: Fault, tmp_path: Path) -> None:
    client = module_with(fault)
    layer = "vectors" if vectors_notice(client) else "sessions" if sessions_notice(client, tmp_path) else "later"
    assert ["vectors", "sessions", "later"].index(layer) <= {"vectors": 0, "sessions": 1}.get(fault.noticed_by, 2)


async def test_client_faults_missed_by_vectors_and_sessions_fail_their_check(tmp_path: Path) -> None:
    turn = asyncio.Semaphore(8)

    async def outcome(number: int, fault: Fault) -> tuple[str, list[Outcome]]:
        place = tmp_path / str(number)
        place.mkdir()
        program = place / "client.py"
        program.write_text(source_with(fault))
        target = ClientTarget([sys.executable, str(program)], place / "plays")
        async with turn:
            checks = chosen(client_checks.CHECKS, fault.check)
            return fault.name, [each async for each in run_checks(checks, target, concurrency=1)]

    faults = [fault for fault in FAULTS if fault.noticed_by == "conformance"]
    found = await asyncio.gather(*(outcome(*each) for each in enumerate(faults)))
    missed = [name for name, outcomes in found if all(each.result == "ok" for each in outcomes)]
    assert not missed, ", ".join(missed)


def test_nine_in_ten_faults_are_detected() -> None:
    noticed = sum(bool(fault.noticed_by) for fault in FAULTS)
    assert len(FAULTS) >= 20 and noticed >= 0.9 * len(FAULTS)


# --- a server ---


def of_kind(kind: str, alter: Callable[[Frame], list[Frame]]) -> Callable[[Frame], list[Frame]]:
    """Return a function that alters frames of one kind."""
    return lambda frame: alter(frame) if frame["type"] == kind else [frame]


def setting(kind: str, **fields: Any) -> Callable[[Frame], list[Frame]]:
    return of_kind(kind, lambda frame: [{**frame, **fields}])


class Held:
    """Delay of frames of one kind until a frame of another kind has passed."""

    def __init__(self, kind: str, until: str) -> None:
        self._kind, self._until = kind, until
        self._frames: list[Frame] = []

    def __call__(self, frame: Frame) -> list[Frame]:
        if frame["type"] == self._kind:
            self._frames.append(frame)
            return []
        if frame["type"] != self._until:
            return [frame]
        frames, self._frames = self._frames, []
        return [frame, *frames]


class EverySecond:
    """Alteration of every second frame of a kind."""

    def __init__(self, kind: str, alter: Callable[[Frame], list[Frame]]) -> None:
        self._kind, self._alter = kind, alter
        self._count = 0

    def __call__(self, frame: Frame) -> list[Frame]:
        if frame["type"] != self._kind:
            return [frame]
        self._count += 1
        return self._alter(frame) if self._count % 2 == 0 else [frame]


def but_the_first(kind: str) -> Callable[[Frame], list[Frame]]:
    """Return a function that drops the frames of a kind after the first on each connection, by its Hello."""
    seen: list[Frame] = []

    def drop(frame: Frame) -> list[Frame]:
        if frame["type"] != kind:
            return [frame]
        seen.append(frame)
        return [frame] if len(seen) == 1 else []

    return drop


def without(frame: Frame, *names: str) -> Frame:
    return {name: value for name, value in frame.items() if name not in names}


def ids_ignored() -> Lies:
    """Give each request its own id, even a repeated one."""
    given: dict[str, str] = {}

    def forward(frame: Frame) -> list[Frame]:
        if "id" not in frame:
            return [frame]
        id_ = secrets.token_hex(16)
        given[id_] = frame["id"]
        return [{**frame, "id": id_}]

    def back(frame: Frame) -> list[Frame]:
        return [{**frame, **{name: given.get(frame[name], frame[name]) for name in ("id", "cause") if name in frame}}]

    return Lies(to_server=forward, to_client=back)


def is_no_plan(entry: Frame) -> bool:
    return not entry["path"].startswith("plans/")


KINDS = {"run", "put", "call", "push", "fetch", "manifest", "hello", "applied", "log", "upload", "download", "replay"}
SERVER_FAULTS: list[tuple[str, str, Callable[[], Lies]]] = [
    (
        "unknown kinds are ignored",
        "Bye is the last frame",
        lambda: Lies(to_server=lambda f: [f] if f["type"] in KINDS else []),
    ),
    ("garbage is ignored", "a text message", lambda: Lies(garbage=False)),
    ("a second Hello is ignored", "a second Hello", lambda: Lies(to_server=but_the_first("hello"))),
    ("violations close with 1000", "no MessagePack", lambda: Lies(code=lambda _: 1000)),
    ("no Bye is sent", "Bye is the last frame", lambda: Lies(to_client=of_kind("bye", lambda _: []))),
    ("a frame follows Bye", "Bye is the last frame", lambda: Lies(to_client=of_kind("bye", lambda f: [f, f]))),
    (
        "an unknown token is 403",
        "an unknown token",
        lambda: Lies(status=lambda status: 403 if status == 401 else status),
    ),
    ("no ping is sent", "pings are answered", Lies),
    ("the epoch is empty", "Welcome fits", lambda: Lies(to_client=setting("welcome", epoch=""))),
    (
        "small frames only",
        "Welcome fits",
        lambda: Lies(
            to_client=of_kind("welcome", lambda f: [{**f, "limits": {**f["limits"], "max_frame_bytes": 1 << 20}}])
        ),
    ),
    (
        "each cache is continued",
        "an unknown epoch, another mark",
        lambda: Lies(to_client=setting("welcome", resync=False)),
    ),
    ("no cache is continued", "a cache continues", lambda: Lies(to_client=setting("welcome", resync=True))),
    ("the Welcome has no head", "with resync no change", lambda: Lies(to_client=setting("welcome", head=0))),
    ("replies overtake changes", "its change comes before", lambda: Lies(to_client=Held("change", "reply"))),
    ("changes are lost", "numbered without a gap", lambda: Lies(to_client=EverySecond("change", lambda _: []))),
    ("changes come twice", "numbered without a gap", lambda: Lies(to_client=EverySecond("change", lambda f: [f, f]))),
    ("changes have no cause", "its change comes before", lambda: Lies(to_client=setting("change", cause=""))),
    (
        "changes have another actor",
        "its change comes before",
        lambda: Lies(to_client=setting("change", actor="server")),
    ),
    (
        "changes differ from connection to connection",
        "the same bytes",
        lambda: Lies(to_client=of_kind("change", lambda f: [{**f, "command": secrets.token_hex(4)}])),
    ),
    (
        "changes lack operations",
        "applies every change",
        lambda: Lies(to_client=of_kind("change", lambda f: [{**f, "ops": f["ops"][:-1]}])),
    ),
    (
        "snapshots come before their logs",
        "all or nothing",
        lambda: Lies(to_client=of_kind("change", lambda f: [{**f, "ops": f["ops"][::-1]}])),
    ),
    (
        "the manifest lacks plans",
        "every file that a change wrote",
        lambda: Lies(to_client=of_kind("entries", lambda f: [{**f, "entries": [*filter(is_no_plan, f["entries"])]}])),
    ),
    (
        "the manifest is of an older number",
        "a manifest comes after",
        lambda: Lies(to_client=of_kind("entries", lambda f: [{**f, "seq": max(0, f["seq"] - 1)}])),
    ),
    (
        "parts have other bytes",
        "the manifest and the parts",
        lambda: Lies(to_client=of_kind("part", lambda f: [{**f, "data": f["data"][::-1]}])),
    ),
    (
        "a missing file is empty",
        "a file that is missing",
        lambda: Lies(to_client=of_kind("part", lambda f: [without(f, "gone")])),
    ),
    ("ids are ignored", "has the same reply and runs once", ids_ignored),
    ("the age is ignored", "older than the journal", lambda: Lies(to_server=lambda f: [without(f, "age_s")])),
    (
        "another request under an id runs",
        "an id with another request",
        lambda: Lies(
            to_client=of_kind(
                "refused",
                lambda f: [{"type": "reply", "id": f["id"], "seq": 0, "exit_code": 0, "stdout": b"", "stderr": b""}],
            )
        ),
    ),
    ("a failed command has exit code 0", "a command that fails", lambda: Lies(to_client=setting("reply", exit_code=0))),
    (
        "Put ignores its base",
        "the same line are a conflict",
        lambda: Lies(to_client=of_kind("stored", lambda f: [{**f, "outcome": "stored"}])),
    ),
    (
        "a text is stored without its last line",
        "stored, and the change",
        lambda: Lies(to_server=of_kind("put", lambda f: [{**f, "text": f["text"][:-1]}])),
    ),
    (
        "base_digest is ignored",
        "another digest is REMOTE_STALE_BASE",
        lambda: Lies(to_server=of_kind("put", lambda f: [without(f, "base_digest")])),
    ),
    (
        "follow is ignored",
        "applies every change",
        lambda: Lies(to_server=of_kind("hello", lambda f: [without(f, "follow")])),
    ),
    (
        "the log is oldest first",
        "Log: newest first",
        lambda: Lies(to_client=of_kind("log-page", lambda f: [{**f, "entries": f["entries"][::-1]}])),
    ),
    (
        "a download is cut",
        "Download: pieces",
        lambda: Lies(to_client=of_kind("downloaded", lambda f: [{**f, "data": b""}])),
    ),
    (
        "an upload begins anew",
        "Upload: pieces in order",
        lambda: Lies(to_client=of_kind("uploaded", lambda f: [{**f, "have": 0}])),
    ),
    (
        "unknown fields are violations",
        "unknown fields are ignored",
        lambda: Lies(to_server=lambda f: [f] if "later" not in f else [{"type": "shout"}]),
    ),
]

SILENT = {
    "unknown kinds are ignored",
    "garbage is ignored",
    "a second Hello is ignored",
    "no ping is sent",
    "changes are lost",
}
"""The checks of these faults wait for a frame or an end that never comes, for up to 20 s."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Sandbox() as sandbox:
        server = sandbox.server()
        server.project("scratch")
        yield server.start()


@pytest.fixture(scope="module")
def token(server: Server) -> str:
    return server.token("human:ana", "agent:*", slug="scratch")


async def tried(server: Server, token: str, lies: Lies, only: str, slug: str = "scratch") -> list[Outcome]:
    """Run checks on a server with a fault. The task that they need is created without the fault."""
    target = ServerTarget(f"{server.url}/projects/{slug}", token)
    await server_checks.prepare(target, may_be_in_use=True)
    async with lying(server.port, lies) as port:
        target.url = f"http://127.0.0.1:{port}/projects/{slug}"
        return [each async for each in run_checks(chosen(server_checks.CHECKS, only), target, concurrency=1)]


@pytest.mark.parametrize(
    ("only", "lies"), [pytest.param(*fault, id=name) for name, *fault in SERVER_FAULTS if name not in SILENT]
)
async def test_fault_in_a_server_fails_its_check(
    server: Server, token: str, only: str, lies: Callable[[], Lies]
) -> None:
    (outcome,) = await tried(server, token, lies(), only)
    assert outcome.result == "failed"


async def test_faults_that_keep_a_server_silent_fail_their_checks(server: Server) -> None:
    faults = {f"silent-{number}": fault for number, fault in enumerate(SERVER_FAULTS) if fault[0] in SILENT}
    for slug in faults:
        server.project(slug, "LAT")
    tokens = {slug: server.token("human:ana", "agent:*", slug=slug) for slug in faults}
    found = await asyncio.gather(
        *(tried(server, tokens[slug], lies(), only, slug) for slug, (_, only, lies) in faults.items())
    )
    results = {name: outcome.result for (name, *_), (outcome,) in zip(faults.values(), found, strict=True)}
    assert results == dict.fromkeys(SILENT, "failed")


async def test_an_unaltered_proxy_fails_no_check(server: Server, token: str) -> None:
    outcomes = [each for only in ("Run", "S3", "Put", "2.3") for each in await tried(server, token, Lies(), only)]
    assert [each.line() for each in outcomes if each.result == "failed"] == []
