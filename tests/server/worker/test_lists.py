"""Lists of the dashboard that are read again: the same text as lattice's, and differences that lead to it."""

import json
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.server.worker.calls.dashboard import handler_class
from lattice_remote.server.worker.reader import CachedTasks, Differences, difference, encode_json, installed, tag_of
from sample_projects import sample_project

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_the_text_is_that_of_lattices_encoder(data: Any) -> None:
    assert encode_json(data) == json.dumps(data, sort_keys=True, indent=2)


def test_values_that_the_fast_encoder_refuses_are_encoded_as_by_lattice() -> None:
    for data in ({"big": 2**70}, {"nan": float("nan")}, {"half": "\ud800"}):
        assert json.loads(encode_json(data)).keys() == json.loads(json.dumps(data)).keys()


def put_together(old: bytes, steps: bytes) -> bytes:
    """Apply steps as requests.js does."""
    text = old.decode("ascii")
    for step in msgspec.json.decode(steps):
        text = "".join(part if isinstance(part, str) else text[part[0] : part[1]] for part in step)
    return text.encode("ascii")


items = st.lists(st.integers(0, 30).map(lambda n: {"id": n, "tags": [{"n": n}] * (n % 3)}), max_size=12)


def listed(found: list[dict[str, Any]]) -> bytes:
    return (json.dumps({"data": found, "ok": True}, sort_keys=True, indent=2) + "\n").encode()


@given(items, items)
def test_a_difference_leads_from_any_list_to_any_other(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    steps = msgspec.json.encode([difference(listed(old), listed(new))])
    assert put_together(listed(old), steps) == listed(new)


def test_the_difference_of_one_change_is_short() -> None:
    old = [{"id": n, "title": f"Task {n}", "status": "backlog"} for n in range(5000)]
    new = [*old[:100], *old[101:2500], {**old[2500], "status": "done"}, *old[2501:], {"id": 5000}]
    assert len(msgspec.json.encode(difference(listed(old), listed(new)))) < 1000


def test_steps_lead_from_every_version_that_is_kept() -> None:
    found, versions = Differences(), [listed([{"id": n} for n in range(size)]) for size in range(3000, 3030)]
    for body in versions:
        found.since("", "/api/tasks", tag_of(body), body)
    last = versions[-1]
    for body in versions[:-1]:
        steps = found.since(tag_of(body), "/api/tasks", tag_of(last), last)
        assert steps is not None
        assert put_together(body, steps) == last
    assert found.since('"unknown"', "/api/tasks", tag_of(last), last) is None
    assert found.since(tag_of(versions[3]), "/api/graph", tag_of(last), last) is None


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return sample_project(tmp_path / "project")


def test_random_changes_of_files_are_seen_as_by_lattice(project: Path) -> None:
    """Files are replaced, created, removed, broken and made unreadable as JSON."""
    handler, cached, choice = handler_class(project), CachedTasks(project), random.Random(1)
    seed = json.loads(next(iter((project / "tasks").glob("*.json"))).read_text())
    for number in range(120):
        names = sorted((project / "tasks").glob("*.json"))
        file = choice.choice([*names, project / "tasks" / f"task_{number:026d}.json"])
        match choice.randrange(5):
            case 0 if len(names) > 1:
                file.unlink(missing_ok=True)
            case 1:
                file.write_text("{ broken")
            case _:
                others = [{"type": "blocks", "target_task_id": name.stem} for name in names[:2]]
                changed = {**seed, "id": file.stem, "title": f"Täsk {number}", "relationships_out": others}
                file.with_suffix(".new").write_text(json.dumps(changed))
                file.with_suffix(".new").replace(file)
                if choice.random() < 0.7:
                    os.utime(file, ns=(number, number))
        for path in ("/api/tasks", "/api/graph"):
            own, ours = handler(path, b""), handler(path, b"")
            ours._lattice_dir = cached
            own.get()
            with installed():
                ours.get()
            assert (own.status, own.wfile.getvalue()) == (ours.status, ours.wfile.getvalue())
