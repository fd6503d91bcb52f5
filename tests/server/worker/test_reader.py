"""One read at a time: the result of a command or page, its tag, its difference and its compression; no process."""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_lists import put_together
from worker_process import make_project

from lattice_remote.server.ipc import ListIndex, ReadCommand, ReadPage, ReadResult
from lattice_remote.server.tree.capture import AccessDenied
from lattice_remote.server.worker.executor import CommandOutcome
from lattice_remote.server.worker.reader import NoWrites, Reads, laid_out, tag_of

LISTED = ReadCommand("list", ("list", "--json"), ("data",))


class StubExecutor:
    """Executor stub that runs operations, and commands as the test says."""

    def __init__(self) -> None:
        self.outcome = CommandOutcome()
        self.veto = ""
        self.asked: list[tuple[object, ...]] = []

    def run(self, *args: object, **options: object) -> CommandOutcome:
        self.asked.append((*args, options))
        if self.veto:
            raise AccessDenied(self.veto)
        return self.outcome

    def call(self, run: Callable[[], object], label: str) -> CommandOutcome:
        self.asked.append((label,))
        run()
        return self.outcome


class StubCapture:
    def __init__(self) -> None:
        self.watched = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        self.watched += 1
        yield


class Place:
    def __init__(self, lattice: Path) -> None:
        self.lattice = lattice
        self.executor, self.capture = StubExecutor(), StubCapture()
        stubs: tuple[Any, Any] = (self.executor, self.capture)
        self.reads = Reads(*stubs, lattice)

    def task(self, number: int, **fields: object) -> None:
        id_ = f"task_{number:026d}"
        snapshot = {"id": id_, "short_id": f"LAT-{number}", "title": f"Task {number}", "status": "backlog"}
        (self.lattice / "tasks" / f"{id_}.json").write_text(json.dumps(snapshot | fields))

    def page(self, path: str, **fields: Any) -> ReadResult:
        return self.reads.answer(ReadPage(path, **fields))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(make_project(tmp_path / "web") / ".lattice")


# --- commands ---


def test_a_command_gives_its_code_its_output_and_its_errors(place: Place) -> None:
    for code in (0, 1):
        place.executor.outcome = CommandOutcome(code, b"out", b"err \xff")
        found = place.reads.answer(ReadCommand("show", ("show", "LAT-1")))
        assert found == ReadResult(code, b"out", message="err �")
    assert place.executor.asked[0] == (("show", "LAT-1"), "show", {"last_try": True})
    assert place.capture.watched == 2


def test_a_list_comes_with_the_place_of_each_item(place: Place) -> None:
    envelope = {"ok": True, "data": [{"id": "one"}, {"title": "no id"}, {"id": "three", "x": "é"}]}
    place.executor.outcome = CommandOutcome(0, json.dumps(envelope).encode(), b"note")
    found = place.reads.answer(LISTED)
    assert json.loads(found.body) == envelope and (found.status, found.message) == (0, "note")
    assert found.items is not None and found.items.ids == ["one", "", "three"]
    starts = [found.items.start, *(end + 1 for end in found.items.ends[:-1])]
    items = [json.loads(found.body[start:end]) for start, end in zip(starts, found.items.ends, strict=True)]
    assert items == envelope["data"]


def test_an_empty_list_has_no_items() -> None:
    body, items = laid_out(b'{"data": {"entries": []}, "ok": true}', ("data", "entries"))
    assert body == b'{"ok":true,"data":[]}' and items == ListIndex(len(b'{"ok":true,"data":['), [], [])


@pytest.mark.parametrize(
    "output", [b"", b"text", b"\xff", b"{}", b'{"data": 5}', b'{"data": {"x": []}}', b'{"data": [5]}', b"[]"]
)
def test_output_without_a_list_is_a_failure(place: Place, output: bytes) -> None:
    place.executor.outcome = CommandOutcome(0, output)
    found = place.reads.answer(LISTED)
    assert (found.status, found.body, found.items) == (500, b"", None)
    assert found.message == "there is no list at data in the command's output"
    place.executor.outcome = CommandOutcome(1, output, b"err")
    assert place.reads.answer(LISTED) == ReadResult(1, output, message="err"), "a failed command has no list"


def test_a_breakdown_is_a_failure(place: Place) -> None:
    place.executor.outcome = CommandOutcome(1, b"half", failure="boom")
    for request in (LISTED, ReadPage("/api/config"), ReadPage("/api/tasks")):
        assert place.reads.answer(request) == ReadResult(500, b"", message="boom")


def test_a_forbidden_access_is_a_failure(place: Place) -> None:
    place.executor.veto = "write a file"
    assert place.reads.answer(LISTED) == ReadResult(
        500, b"", message="the command tried to write a file, which the server does not allow"
    )


@pytest.mark.parametrize(
    "change",
    ["keep_for_append", "keep_for_rewrite", "keep_for_replace", "keep_for_move", "keep_directory"],
)
def test_every_change_of_a_file_is_refused(change: str) -> None:
    with pytest.raises(AccessDenied, match="write a file"):
        getattr(NoWrites(), change)("/somewhere", None)


# --- pages ---


@pytest.mark.parametrize("path", ["/api/config", "/api/tasks", "/api/graph"])
def test_a_page_has_a_tag_and_is_not_sent_twice(place: Place, path: str) -> None:
    place.task(1)
    first = place.page(path)
    assert (first.status, first.etag) == (200, tag_of(first.body))
    assert first.content_type.startswith("application/json") and json.loads(first.body)["ok"] is True
    again = place.page(path, base=first.etag, takes_difference=True)
    assert (again.status, again.body, again.etag) == (HTTPStatus.NOT_MODIFIED, b"", first.etag)
    assert place.page(path, base='"other"', takes_difference=True) == first
    assert place.executor.asked == [("dashboard: GET",)] * 3


@pytest.mark.parametrize("takes_difference", [True, False])
def test_a_changed_list_is_sent_as_a_difference_if_that_is_taken(place: Place, takes_difference: bool) -> None:
    for number in range(40):
        place.task(number)
    first = place.page("/api/tasks")
    place.task(7, title="Another title")
    second = place.page("/api/tasks", base=first.etag, takes_difference=takes_difference)
    whole = place.page("/api/tasks")
    assert whole.status == 200 and b"Another title" in whole.body and second.etag == whole.etag
    if takes_difference:
        assert second.status == HTTPStatus.IM_USED and len(second.body) < len(whole.body) / 4
        assert put_together(first.body, second.body) == whole.body
    else:
        assert second == whole


def test_a_changed_page_that_is_no_list_is_sent_whole(place: Place) -> None:
    first = place.page("/api/config")
    config = place.lattice / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"project_name": "Other"}))
    second = place.page("/api/config", base=first.etag, takes_difference=True)
    assert second.status == 200 and b"Other" in second.body


def test_a_missing_resource_has_no_entity_tag(place: Place) -> None:
    found = place.page("/api/tasks/task_00000000000000000000000009")
    assert (found.status, found.etag) == (404, "") and found.body
    assert place.page("/api/tasks/task_00000000000000000000000009", base=found.etag).body == found.body


def test_a_long_body_is_compressed_if_that_is_taken(place: Place) -> None:
    short = place.page("/api/tasks", gzip=True)
    assert len(short.body) < 2048 and not short.is_gzip
    for number in range(20):
        place.task(number, description="x" * 200)
    plain, packed = place.page("/api/tasks"), place.page("/api/tasks", gzip=True)
    assert len(plain.body) >= 2048 and not plain.is_gzip
    assert packed.is_gzip and gzip.decompress(packed.body) == plain.body and packed.etag == plain.etag
    assert packed.body[4:8] == b"\0\0\0\0", "equal lists have equal bodies: no time"


@pytest.mark.parametrize(("length", "is_gzip"), [(2047, False), (2048, True)])
def test_a_body_is_compressed_from_2048_bytes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch, length: int, is_gzip: bool
) -> None:
    body = b"x" * length
    monkeypatch.setattr(place.reads, "_shortened", lambda _, found: msgspec.structs.replace(found, body=body))
    assert place.page("/api/config", gzip=True).is_gzip == is_gzip
