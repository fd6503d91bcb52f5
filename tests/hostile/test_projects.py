"""Hostile projects: each is refused with a reason, and touches nothing outside."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattice_remote.protocol.bundle import END, MAGIC, head_of
from lattice_remote.protocol.messages import Entry
from lattice_remote.server.project.bundle_check import ImportReport
from preloaded_programs import warm
from sample_projects import entry_of, pack_of, sample_project
from sandbox import tree_of

Files = dict[str, bytes]
ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return tree_of(sample_project(tmp_path_factory.mktemp("own")))


def checked(tmp_path: Path, *source: str, max_bytes: int = 1 << 26) -> tuple[ImportReport, Path]:
    """Build a candidate and check it as the server does; return the report and its directory."""
    place = tmp_path / secrets.token_hex(4) / "candidate"
    place.mkdir(parents=True)
    out, err = place.parent / "report", place.parent / "said"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        argv = ["--into", str(place), *source, "--max-bytes", str(max_bytes)]
        process = warm().start("intake", argv, cwd=tmp_path, env=dict(os.environ), stdout=stdout, stderr=stderr)
        assert process.wait(120) == 0, err.read_text()[-2000:]
    return msgspec.json.decode(out.read_bytes(), type=ImportReport), place


def taken(tmp_path: Path, pack: bytes, **options: int) -> tuple[ImportReport, Path]:
    path = tmp_path / secrets.token_hex(4)
    path.write_bytes(pack)
    return checked(tmp_path, "--pack", str(path), **options)


def test_a_valid_project_is_accepted_unchanged(tmp_path: Path, own: Files) -> None:
    report, place = taken(tmp_path, pack_of(own))
    assert not report.refused and not report.rebuilt and not report.warnings, report
    assert tree_of(place / ".lattice") == own
    assert sorted(os.listdir(place)) == [".lattice", "states"], "nothing else is left"


def log_of(own: Files) -> str:
    return next(path for path in own if path.startswith("events/task_"))


def changed(own: Files, path: str, **fields: object) -> Files:
    """Return the project with these fields in the first event of a log."""
    first, *rest = own[path].splitlines(keepends=True)
    event = {**json.loads(first), **fields}
    return {**own, path: json.dumps(event).encode() + b"\n" + b"".join(rest)}


def resource_log(own: Files) -> str:
    return next(path for path in own if path.startswith("events/res_"))


HOSTILE = {
    "a path that goes up": lambda own: {**own, "../../tokens.json": b"{}"},
    "an absolute path": lambda own: {**own, "/tmp/x": b"x"},
    "a file in place of a directory": lambda own: {**own, "tasks": b"x"},
    "two spellings of one name": lambda own: {**own, "CONFIG.json": b"{}"},
    "no id": lambda own: {**own, "tasks/foo.json": b"{}"},
    "an id in small letters": lambda own: {**own, f"events/task_{ULID.lower()}.jsonl": b""},
    "our own bookkeeping": lambda own: {**own, "remote.json": b"{}"},
    "a name with a line break": lambda own: {**own, "notes/a\nb.md": b""},
    "no settings": lambda own: {path: data for path, data in own.items() if path != "config.json"},
    "settings that are a list": lambda own: {**own, "config.json": b"[]"},
    "settings nested without end": lambda own: {**own, "config.json": b"[" * 200_000},
    "settings of strange types": lambda own: {**own, "config.json": b'{"statuses": 7, "workflow": []}'},
    "settings with which nothing can be created": lambda own: {
        **own,
        "config.json": json.dumps({**json.loads(own["config.json"]), "task_types": 5}).encode(),
    },
    "a snapshot without a log": lambda own: {**own, f"tasks/task_{ULID}.json": own[log_of(own)][:0] + b'{"id": 1}'},
    "a log that is empty": lambda own: {**own, f"events/task_{ULID}.jsonl": b""},
    "a log that is no JSON": lambda own: {**own, log_of(own): b"{\n{\n"},
    "a log of lists": lambda own: {**own, log_of(own): b"[]\n[]\n"},
    "a log of numbers without end": lambda own: {**own, log_of(own): b"1" * 100_000 + b"\n"},
    "a log nested without end": lambda own: {**own, log_of(own): b'{"a":' * 100_000 + b"\n"},
    "events of another task": lambda own: changed(own, log_of(own), task_id=f"task_{ULID}"),
    "events without data": lambda own: changed(own, log_of(own), data=None),
    "a title that is no text": lambda own: changed(own, log_of(own), data={"title": {"a": 1}, "status": []}),
    "a priority that is a number": lambda own: changed(
        own, log_of(own), data={"title": "x", "status": "backlog", "type": "task", "priority": 5}
    ),
    "a resource called like a way out": lambda own: changed(
        own, resource_log(own), data={"name": "../../../../outside", "max_holders": 1}
    ),
    "a resource with an absolute name": lambda own: changed(
        own, resource_log(own), data={"name": "/tmp/outside-of-everything", "max_holders": 1}
    ),
    "a session that is a list": lambda own: {**own, "sessions/index.json": b"[]"},
    "counters of sessions that are texts": lambda own: {
        **own,
        "sessions/index.json": b'{"serial_counters": {"Zed": "x"}, "active_sessions": {}}',
    },
    "a session that would end as config.json": lambda own: {
        **own,
        "sessions/Zed-1.json": b'{"name": "Zed-1", "session": "x/../../../config", "status": "active"}',
        "sessions/archive/Zed-1_x/y.json": b"{}",
    },
    "a session of another name": lambda own: {**own, "sessions/Zed-1.json": own["sessions/Argus-1.json"]},
    "short ids that are a list": lambda own: {**own, "ids.json": b"[]"},
    "a text of 65 MiB": lambda own: {**own, "context.md": bytes(65 << 20)},
    "not UTF-8": lambda own: {**own, log_of(own): b"\xff\xfe\n"},
}
MAY_PASS = {"short ids that are a list", "events of another task", "events without data"}
"""Faults that a rebuild repairs or lattice accepts; the result must be valid."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_project_is_refused_with_a_reason(tmp_path: Path, own: Files, name: str) -> None:
    """I9."""
    outside = tmp_path / "outside"
    report, place = taken(tmp_path, pack_of(HOSTILE[name](own)), max_bytes=1 << 27)
    assert not outside.exists() and not Path("/tmp/outside-of-everything").exists()
    assert sorted(os.listdir(place.parent)) == ["candidate", "report", "said"]
    if report.refused:
        assert len(report.refused) < 1000 and report.refused.isprintable() and str(place) not in report.refused
    else:
        assert name in MAY_PASS, "it was taken"


def test_an_inconsistent_pack_is_refused(tmp_path: Path, own: Files) -> None:
    whole = pack_of(own)
    config = entry_of("config.json", own["config.json"])
    huge = Entry("config.json", 1 << 62, bytes(32))
    lies: Mapping[str, bytes] = {
        "cut short": whole[:-1],
        "cut in a file": whole[: len(whole) // 2],
        "twice": MAGIC + (head_of(config) + own["config.json"]) * 2 + END,
        "a size without end": MAGIC + head_of(huge) + own["config.json"],
        "another digest": MAGIC + head_of(Entry("config.json", 3, bytes(32))) + b"{}\n" + END,
        "a tar": b"config.json" + bytes(1024),
    }
    for name, pack in lies.items():
        report, place = taken(tmp_path, pack)
        assert report.refused, name
        assert not [path for path in place.rglob("*") if path.is_file()], "nothing was written"


def test_a_project_over_the_servers_limits_is_refused_before_it_is_written(tmp_path: Path, own: Files) -> None:
    big = {**own, f"artifacts/payload/art_{ULID}.bin": bytes(3 << 20)}
    report, place = taken(tmp_path, pack_of(big), max_bytes=2 << 20)
    assert "limit of 2 MiB" in report.refused
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) < 2 << 20


def test_symlinks_and_devices_in_a_directory_are_omitted_and_never_followed(tmp_path: Path, own: Files) -> None:
    """I9."""
    secret = tmp_path / "secret.md"
    secret.write_text("not for the board")
    source = tmp_path / "source" / ".lattice"
    for path, data in own.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    (source / "notes" / "link.md").symlink_to(secret)
    (source / "linked").symlink_to(tmp_path)
    os.mkfifo(source / "notes" / "pipe.md")
    os.link(secret, source / "notes" / "hard.md")
    report, place = checked(tmp_path, "--from", str(source))
    assert not report.refused, report
    assert report.omitted == ["linked", "notes/link.md", "notes/pipe.md"]
    assert tree_of(place / ".lattice") == {**own, "notes/hard.md": b"not for the board"}
    assert (place / ".lattice/notes/hard.md").stat().st_nlink == 1, "a file of its own"


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_refused_or_repaired(tmp_path: Path, own: Files, data: st.DataObject) -> None:
    """After any damage to its bytes a project is refused, or the accepted part is valid and stays unchanged."""
    path = data.draw(st.sampled_from(sorted(own)))
    content = own[path]
    at = data.draw(st.integers(0, len(content)))
    noise = data.draw(st.one_of(st.binary(max_size=40), st.sampled_from([b"null", b"{}", b'"', b"\n\n", b"-1e999"])))
    harmed = {**own, path: content[:at] + noise + content[at + data.draw(st.integers(0, 40)) :]}
    report, place = taken(tmp_path, pack_of(harmed))
    if report.refused:
        return
    again, second = taken(tmp_path, pack_of(tree_of(place / ".lattice")))
    assert not again.refused and not again.rebuilt, (path, harmed[path], again)
    assert tree_of(second / ".lattice") == tree_of(place / ".lattice")
