"""Random hostile storage writes from a seed; after each accepted one the project is valid."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from place import Place
from values import ACTORS, CONTROL, JSONS, PATHS, TEXTS, UNICODE
from worker_process import ANA, WorkerProcess

from lattice_remote.protocol.messages import Refused, Returned

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "storage"))
from boards import beginning, event, of_resource, require_sound

CALLS = 150
NAMES = ("write-task", "write-resource", "write-plan", "write-notes")
_OTHERS: tuple[Any, ...] = (None, True, False, 0, -1, 2**63, 2**200, 1.5, [], {}, [[]], {"a": {"b": [1]}}, "x" * 5000)
VALUES: tuple[Any, ...] = (*PATHS, *UNICODE, *CONTROL, *TEXTS, *ACTORS, *_OTHERS)


class Sender:
    """Makes payloads for ``storage`` from valid ones; most contain a fault."""

    def __init__(self, rng: random.Random, worker: WorkerProcess) -> None:
        self._rng = rng
        self._lattice = worker.project / ".lattice"

    def next(self) -> tuple[str, bytes]:
        """Return the name of a write and its payload."""
        rng = self._rng
        name, payload = rng.choice((self._task, self._task, self._task, self._resource, self._text))()
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            payload = self._spoilt(payload)
        if rng.random() < 0.03:
            return rng.choice((*NAMES, "write-config", "", "../x")), rng.choice(JSONS).encode("utf-8", "surrogatepass")
        text = json.dumps(payload)
        if rng.random() < 0.05:
            text = text.replace("null", rng.choice(("NaN", "Infinity", "1e999", "9" * 5000)), 1)
        return name, text.encode()

    def _task(self) -> tuple[str, Any]:
        rng, tasks = self._rng, self._snapshots("tasks/*.json")
        if not tasks or rng.random() < 0.15:
            first = beginning(rng.choice(("A", "B")), tags=["a"], custom_fields={"k": None})
            return "write-task", {"task": first["task_id"], "events": [first], "base": None}
        task = rng.choice(tasks)
        data = {
            "comment_added": {"body": "said"},
            "status_changed": {"from": task["status"], "to": rng.choice(("planned", "in_planning", "cancelled"))},
            "assignment_changed": {"from": task["assigned_to"], "to": rng.choice(("agent:x", None))},
            "field_updated": {"field": "title", "from": task["title"], "to": rng.choice("XYZ")},
            "relationship_added": {"type": "blocks", "target_task_id": rng.choice(tasks)["id"]},
            "branch_linked": {"branch": rng.choice("bcd")},
            "artifact_attached": {"artifact_id": "art_" + "0" * 26},
            "task_archived": {},
            "x_custom": {"k": [None, {"deep": 1}]},
        }
        kinds = rng.choices(list(data), k=rng.choice((1, 1, 2)))
        events = [event(kind, task, data[kind]) for kind in kinds]
        return "write-task", {"task": task["id"], "events": events, "base": task["last_event_id"]}

    def _resource(self) -> tuple[str, Any]:
        rng, there = self._rng, self._snapshots("resources/*/resource.json")
        name = rng.choice(("lamp", "Lamp", "camera", "..", "a/b", "index"))
        known = next((one for one in there if one["name"] == name), None)
        if known is None:
            made = {"name": name, "max_holders": 1, "ttl_seconds": 300}
            first = of_resource("resource_created", "res_" + "".join(rng.choices("0123456789ABCDEF", k=26)), made)
            return "write-resource", {"resource": name, "events": [first], "base": None}
        data = {
            "resource_acquired": {"holder": "human:ana"},
            "resource_released": {"holder": "human:ana"},
            "resource_updated": {"field": rng.choice(("ttl_seconds", "max_holders", "id")), "new_value": 7},
            "resource_expired": {
                "holder": "human:ana",
                "expired_at": "2020-01-01T00:00:00Z",
                "reclaimed_by": "human:ana",
            },
        }
        kind = rng.choice(list(data))
        events = [of_resource(kind, known, data[kind])]
        return "write-resource", {"resource": name, "events": events, "base": known["last_event_id"]}

    def _text(self) -> tuple[str, Any]:
        rng, tasks = self._rng, self._snapshots("tasks/*.json")
        task = rng.choice(tasks)["id"] if tasks else "LAT-1"
        return rng.choice(NAMES[2:]), {"task": task, "text": rng.choice("abc") * 3, "base": rng.choice((None, "aaa"))}

    def _snapshots(self, pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self._lattice.glob(pattern))]

    def _spoilt(self, value: Any) -> Any:
        """Replace, remove, repeat or add a value at a random depth."""
        rng = self._rng
        if isinstance(value, dict) and value and rng.random() < 0.85:
            key = rng.choice(list(value))
            what = rng.random()
            if what < 0.7:
                return {**value, key: self._spoilt(value[key])}
            if what < 0.8:
                return {name: part for name, part in value.items() if name != key}
            return {**value, rng.choice(("id", "task_id", "short_id", "last_event_id", "__proto__", "")): value[key]}
        if isinstance(value, list) and value and rng.random() < 0.85:
            spoilt = [*value]
            index = rng.randrange(len(value))
            spoilt[index] = self._spoilt(value[index])
            return spoilt if rng.random() < 0.8 else value * rng.choice((2, 300))
        return rng.choice(VALUES)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_an_accepted_call_leaves_a_valid_project_and_writes_nothing_outside(seed: str, tmp_path: Path) -> None:
    """I9: each reply is one that the protocol defines, and after each write lattice finds no fault."""
    place, rng = Place(tmp_path / "place"), random.Random(seed)
    statuses: dict[int, int] = {}
    with place.worker() as worker:
        worker.ok("create", "By a command", *ANA)
        sender = Sender(rng, worker)
        for _ in range(CALLS):
            name, payload = sender.next()
            answer = worker.call("storage", name, payload)[1]
            status = 0 if isinstance(answer, Refused) else answer.status
            statuses[status] = statuses.get(status, 0) + 1
            assert status in (0, 200, 409, 422), (name, payload[:500], answer)
            assert isinstance(answer, Refused) or len(answer.payload) < 1 << 20
            if status == 200:
                require_sound(worker.project / ".lattice", tmp_path)
                require_own_name(worker.project / ".lattice")
    place.check()
    assert statuses[200] >= 20 and statuses[422] >= 10 and statuses[0] >= 10, statuses


def require_own_name(lattice: Path) -> None:
    for log in lattice.glob("events/*.jsonl"):
        for line in log.read_text().splitlines():
            assert json.loads(line)["actor"] == "human:ana", line


def test_a_repeated_request_has_the_same_reply_and_writes_nothing_twice(tmp_path: Path) -> None:
    """I6."""
    place = Place(tmp_path / "place")
    first = beginning("Once")
    payload = {"task": first["task_id"], "events": [first], "base": None}
    with place.worker() as worker:
        answers = [worker.call("storage", "write-task", payload, id="0" * 32)[1] for _ in range(2)]
        assert isinstance(answers[0], Returned) and answers[0] == answers[1]
        log = worker.project / ".lattice" / "events" / f"{first['task_id']}.jsonl"
        assert len(log.read_text().splitlines()) == 1
        (conflict,) = (worker.call("storage", "write-task", payload)[1],)
        assert isinstance(conflict, Returned) and conflict.status == 409


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b"{}", b"\xff", b'{"task": 1}', b"[" * 100_000, b'{"task":"LAT-1","events":[],"base":null,"more":1}'],
)
def test_a_payload_of_another_form_is_refused(small_worker: WorkerProcess, payload: bytes) -> None:
    for name in NAMES:
        answer = small_worker.call("storage", name, payload)[1]
        assert isinstance(answer, Refused), answer
        assert answer.code in ("REMOTE_PROTOCOL", "REMOTE_UNSUPPORTED", "REMOTE_INVALID")


def test_a_hundred_thousand_invalid_events_are_refused(small_worker: WorkerProcess) -> None:
    first = beginning()
    events = json.dumps([{"a": 1}] * 100_000)
    payload = f'{{"task": "{first["task_id"]}", "events": {events}, "base": null}}'.encode()
    answer = small_worker.call("storage", "write-task", payload)[1]
    assert isinstance(answer, Refused) and answer.code == "REMOTE_INVALID", answer


@pytest.fixture(scope="module")
def small_worker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Place(tmp_path_factory.mktemp("small") / "place").worker() as worker:
        yield worker
