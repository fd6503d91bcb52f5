"""What a client's command line may do (I9)."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattice.cli.main import cli
from worker_process import WorkerProcess, answer_of, make_project, tree_of

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Reply
from lattice_remote.server.worker import policy
from lattice_remote.server.worker.caller import Identity
from lattice_remote.server.worker.policy import (
    MAX_CHARS,
    ROUTED,
    Command,
    command_words,
    describe_command,
    describe_paths,
    parse,
)

ANA = Identity("human:ana", ["agent:*", "team:web-*-x"])
AS_ANA = ("--actor", "human:ana")
PRIVATE = "/private/0123\\/given.txt"


NAMES = ("gpu.0", "con", "x.json", "x.tmp.y", "two words", "a..b", "~", "-x", "x" * 240, "\u00e9" * 120, "COM1.")
"""Lattice takes these for the name of a resource, and no rule of paths forbids them."""


def check(lattice_dir: Path, *argv: str, identity: Identity = ANA, files: tuple[str, ...] = ()) -> Command:
    return parse(cli, argv, identity, files=files, lattice_dir=lattice_dir)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(make_project(tmp_path_factory.mktemp("policy") / "web")) as process:
        process.ok("create", "a task", *AS_ANA)
        yield process


def refused(lattice_dir: Path, *argv: str, identity: Identity = ANA, files: tuple[str, ...] = ()) -> Rejected:
    with pytest.raises(Rejected) as caught:
        check(lattice_dir, *argv, identity=identity, files=files)
    return caught.value


def test_the_table_names_every_parameter_of_every_routed_command() -> None:
    for path, kinds in ROUTED.items():
        command: click.Command = cli
        for word in path.split():
            assert isinstance(command, click.Group)
            command = command.commands[word]
        assert kinds.keys() == {parameter.name for parameter in command.params}, path


def test_additions_of_a_newer_lattice_are_refused_until_the_table_has_them(tmp_path: Path) -> None:
    newer = click.Group(params=[click.Option(["--root"])])
    newer.add_command(click.Command("next", params=[click.Option(["--from"]), click.Option(["--also"], multiple=True)]))
    newer.add_command(click.Command("import", params=[click.Argument(["path"])]))
    for line in (["next", "--from", "x"], ["next", "--also", "x"], ["import", "x"], ["--root", "/", "next"]):
        with pytest.raises(Rejected) as caught:
            parse(newer, line, ANA, files=(), lattice_dir=tmp_path)
        assert caught.value.code == "REMOTE_UNSUPPORTED"
    assert parse(newer, ["next"], ANA, files=(), lattice_dir=tmp_path).path == "next"


@pytest.mark.parametrize(
    "argv",
    [
        ["create", "a title; rm -rf /", "--actor", "human:ana", "--description", "../../etc/passwd\n"],
        ["comment", "LAT-1", "hi", "--actor", "agent:anything"],
        ["comment", "nonsense id!", "hi", "--actor", "human:ana"],
        ["archive", "LAT-1, LAT-2", "LAT-3", "--actor", "human:ana"],
        ["resource", "create", "gpu-1_ä", "--actor", "team:web-7-x"],
        *(["resource", "create", "--actor", "human:ana", "--", name] for name in NAMES),
        ["resource", "acquire", "x" * 240, "--actor", "human:ana"],
        ["session", "start", "--name", "Argus.1", "--model", "m", "--framework", "f"],
        ["session", "end", "Argus.1-1"],
        ["comment", "LAT-1", "x", "--name", "no session"],
        ["session", "start", "--name", "Argus", "--model", "m", "--framework", "f"],
        ["session", "end", "Argus-1"],
        ["attach", "LAT-1", "https://example.org/../x", "--actor", "human:ana"],
        ["next"],
        ["doctor", "--fix"],
        ["rebuild", "task_01M8173J64RGGH4YR2NPR23QWA"],
        ["backfill-ids"],
        ["event", "LAT-1", "x_y", "--data", '{"a": "{[{[", "b": [[1.5e3, "\\u00e9"]]}', "--actor", "human:ana"],
        ["event", "LAT-1", "x_y", "--data", "no json", "--actor", "human:ana"],
        ["create", "x", "--id", "task_01M8173J64RGGH4YR2NPR23QWA", "--actor", "human:ana"],
    ],
)
def test_ordinary_command_lines_pass(tmp_path: Path, argv: list[str]) -> None:
    assert check(tmp_path, *argv).path == " ".join(argv[: 2 if argv[0] in ("resource", "session") else 1])


@pytest.mark.parametrize(
    "argv",
    [
        ["session", "end", "../config"],
        ["session", "end", "index"],
        ["session", "end", "Argus-1\n"],
        ["session", "end", "a/b-1"],
        ["session", "end", ""],
        ["session", "start", "--name", ".x", "--model", "human"],
        ["comment", "LAT-1", "x", "--name", "../x"],
        ["comment", "LAT-1", "x", "--name=../x-1"],
        ["comment", "LAT-1", "x", "--name", "index"],
        ["next", "--name", "../tasks/task_x-1"],
        ["rebuild", "../../x"],
        ["rebuild", "_lifecycle.x"],
        ["rebuild", "_lifecycle"],
        ["rebuild", "x" * 250],
        ["session", "start", "--name", "x:y", "--model", "human"],
        ["session", "start", "--name", "x\n", "--model", "human"],
        ["session", "start", "--agent-type", ".x", "--model", "human"],
        ["session", "start", "--name", "x" * 217, "--model", "human"],
        ["session", "end", "INDEX"],
        ["session", "end", ".hidden-1"],
        ["session", "end", "x" * 217 + "-1"],
        ["resource", "create", ".hidden", "--actor", "human:ana"],
        ["resource", "create", "..", "--actor", "human:ana"],
        ["resource", "create", "", "--actor", "human:ana"],
        ["resource", "acquire", "a/../../x", "--actor", "human:ana"],
        ["resource", "acquire", ".tmp.x", "--actor", "human:ana"],
        ["resource", "release", "a\\b", "--actor", "human:ana"],
        ["archive", "LAT-1,task_01M8173J64RGGH4YR2NPR23QW\u212a", "--actor", "human:ana"],
        ["resource", "create", "../x", "--actor", "human:ana"],
        ["resource", "create", "x" * 241, "--actor", "human:ana"],
        ["resource", "acquire", "x/../y", "--actor", "human:ana"],
        ["create", "x", "--id", "task_01M8173J64RGGH4YR2NPR23QWA\n", "--actor", "human:ana"],
        ["create", "x", "--id", "task_01m8173j64rggh4yr2npr23qwa", "--actor", "human:ana"],
        ["create", "x", "--id", "task_01M8173J64RGGH4YR2NPR23QW\u212a", "--actor", "human:ana"],
        ["resource", "create", "e\u0301te", "--actor", "human:ana"],
        ["resource", "create", "\u212aey", "--actor", "human:ana"],
        ["create", "x", "--actor", "agent:a\nb"],
        ["create", "x", "--actor", "agent:a\u202eb"],
        ["create", "x", "--actor", "agent:a "],
        ["create", "x", "--actor", "agent:" + "a" * 251],
        ["event", "LAT-1", "x_y", "--data", '{"a":' * 65 + "1" + "}" * 65],
        ["event", "LAT-1", "x_y", "--data", '{"a": NaN}'],
        ["event", "LAT-1", "x_y", "--data", '{"a": 1e999}'],
        ["event", "LAT-1", "x_y", "--data", '{"a": "\\ud800"}'],
        ["event", "LAT-1", "x_y", "--data", '{"a": 1' + "0" * 5000 + "}"],
        ["set-project-code", "ABC\n"],
        ["attach", "LAT-1", "/etc/passwd", "--actor", "human:ana"],
        ["attach", "LAT-1", "file:///etc/passwd", "--actor", "human:ana"],
        ["comment", "LAT-1", "--file", "/etc/passwd", "--actor", "human:ana"],
        ["comment", "LAT-1", "--file=/etc/passwd", "--actor", "human:ana"],
        ["comment", "LAT-1", "nul\0", "--actor", "human:ana"],
        ["comment", "LAT-1", "x" * 1024 * 1024 + "x", "--actor", "human:ana"],
        ["list"],
        ["init"],
        ["dashboard"],
        ["demo", "init"],
        ["setup-claude"],
        ["resource", "list"],
        ["resource", "nope"],
        ["nope"],
    ],
)
def test_unrouted_commands_and_paths_to_other_files_are_refused(tmp_path: Path, argv: list[str]) -> None:
    assert refused(tmp_path, *argv).code == "REMOTE_UNSUPPORTED"


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["create", "x", "--id", "not_valid", *AS_ANA], "INVALID_ID"),
        (["create", "x", "--id", "../../x", *AS_ANA], "INVALID_ID"),
        (["attach", "LAT-1", "--inline", "x", "--id", "bad_id", *AS_ANA], "INVALID_ID"),
        (["event", "LAT-1", "x_y", "--id", "task_01M8173J64RGGH4YR2NPR23QWA", *AS_ANA], "INVALID_ID"),
        (["resource", "create", "x", "--id", "nope", *AS_ANA], "INVALID_ID"),
        (["status", "../x", "done", *AS_ANA], "INVALID_ID"),
        (["status", "LAT\uff0d1", "done", *AS_ANA], "INVALID_ID"),
        (["status", "", "done", *AS_ANA], "INVALID_ID"),
        (["link", "LAT-1", "blocks", "../../etc/passwd", *AS_ANA], "INVALID_ID"),
        (["unlink", "a\\b", "blocks", "LAT-1", *AS_ANA], "INVALID_ID"),
        (["archive", "../../etc/passwd", *AS_ANA], "INVALID_ID"),
        (["resource", "acquire", "con", "--task", "../x", *AS_ANA], "INVALID_ID"),
        (["resource", "acquire", "gpu.9", *AS_ANA], "NOT_FOUND"),
        (["set-project-code", "../x"], "VALIDATION_ERROR"),
        (["backfill-ids", "--code", "../x", *AS_ANA], "VALIDATION_ERROR"),
        (["session", "start", "--name", "../x", "--model", "human"], "VALIDATION_ERROR"),
        (["session", "start", "--name", "Argus-3", "--model", "human"], "VALIDATION_ERROR"),
        (["session", "start", "--name", "", "--model", "human"], "VALIDATION_ERROR"),
        (["session", "start", "--agent-type", "a b", "--model", "human"], "VALIDATION_ERROR"),
        (["session", "end", "nobody"], "NOT_FOUND"),
        (["comment", "LAT-1", "x", "--name", "no session"], "SESSION_NOT_FOUND"),
        (["comment", "LAT-1", "x", "--actor", "bob"], "INVALID_ACTOR"),
        (["rebuild", "no.such-task"], "NOT_FOUND"),
    ],
)
def test_command_lines_that_lattice_refuses_get_its_own_message(
    worker: WorkerProcess, argv: list[str], code: str
) -> None:
    """Lattice refuses before it touches anything."""
    before = tree_of(worker.project / ".lattice")
    answer = answer_of(worker.run(*argv, *(["--json"] if argv[0] != "set-project-code" else [])))
    assert isinstance(answer, Reply), answer
    assert answer.exit_code != 0
    if argv[0] != "set-project-code":
        assert json.loads(answer.stdout)["error"]["code"] == code
    assert tree_of(worker.project / ".lattice") == before


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_lattice_takes_works_from_its_beginning_to_its_end(worker: WorkerProcess, name: str) -> None:
    for verb in ("create", "acquire", "heartbeat", "release"):
        worker.ok("resource", verb, *AS_ANA, "--", name)
    snapshot = worker.project / ".lattice/resources" / name / "resource.json"
    assert json.loads(snapshot.read_text())["name"] == name


@pytest.mark.parametrize("name", ["Argus.1", "x.json", "a..b", "con", "\u00e9", "index", "~"])
def test_a_session_of_any_name_that_lattice_takes_can_be_used_and_ended(worker: WorkerProcess, name: str) -> None:
    session = json.loads(worker.ok("session", "start", "--name", name, "--model", "human", "--json", act_as=["*"]))
    assert session["data"]["name"] == f"{name}-1"
    worker.ok("comment", "LAT-1", "from a session", "--name", f"{name}-1", act_as=["*"])
    worker.ok("session", "end", f"{name}-1", act_as=["*"])


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["--version"], ["comment", "--help"], ["resource"], ["comment", "--nope"], ["--nope"]]
)
def test_help_and_errors_of_usage_are_left_to_click(tmp_path: Path, argv: list[str]) -> None:
    assert check(tmp_path, *argv) == Command("", {})


def test_a_forbidden_actor_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    error = refused(tmp_path, "comment", "LAT-1", "x", "--actor", "human:bob")
    assert error.code == "REMOTE_FORBIDDEN"
    assert error.message == "token may act as human:ana, agent:*, team:web-*-x; not as human:bob"
    assert refused(tmp_path, "backfill-ids", "--actor", "human:bob").code == "REMOTE_FORBIDDEN"
    left_out = refused(tmp_path, "backfill-ids", identity=Identity("human:ana"))
    assert left_out.message == "token may act as human:ana; not as agent:lattice-migration"
    assert check(tmp_path, "backfill-ids", "--actor", "human:ana", identity=Identity("human:ana")).actor == "human:ana"
    assert refused(tmp_path, "next", "--actor=human:bob").code == "REMOTE_FORBIDDEN"
    assert refused(tmp_path, "comment", "LAT-1", "x", "--actor", "human:ana", "--actor", "human:bob")


@pytest.mark.parametrize("actor", ["human:anax", "xhuman:ana", "human:ana\n", "agentx", "team:web-x", "Agent:a", ""])
def test_patterns_match_the_whole_actor(actor: str) -> None:
    assert not ANA.may_act_as(actor)


def test_a_star_in_the_tokens_own_actor_is_only_a_star() -> None:
    assert not Identity("human:*").may_act_as("human:bob")


def test_the_actor_behind_a_session_counts(tmp_path: Path) -> None:
    (tmp_path / "sessions").mkdir()
    for name, model in (("Ana", "human"), ("Bob", "human"), ("Bob2", "claude")):
        session = {"name": f"{name}-1", "base_name": name, "serial": 1, "session": "s", "model": model}
        (tmp_path / "sessions" / f"{name}-1.json").write_text(json.dumps(session))
    assert check(tmp_path, "comment", "LAT-1", "x", "--name", "Ana-1").actor == "human:Ana"
    assert check(tmp_path, "comment", "LAT-1", "x", "--name", "Bob2-1").actor == "agent:Bob2"
    assert check(tmp_path, "comment", "LAT-1", "x", "--name", "Nobody-1").actor is None
    for line in (
        ["comment", "LAT-1", "x", "--name", "Bob-1"],
        ["next", "--name", "Bob-1"],
        ["session", "end", "Bob-1"],
    ):
        assert refused(tmp_path, *line).code == "REMOTE_FORBIDDEN"
    assert refused(tmp_path, "comment", "LAT-1", "x", "--name", "Ana-1", "--actor", "human:bob")


def test_a_session_starts_only_as_an_actor_that_the_token_allows(tmp_path: Path) -> None:
    start = ["session", "start", "--model"]
    assert check(tmp_path, *start, "human", "--name", "Ana").actor == "human:Ana"
    assert refused(tmp_path, *start, "human", "--name", "Bob").code == "REMOTE_FORBIDDEN"
    assert refused(tmp_path, *start, "human").code == "REMOTE_FORBIDDEN"
    assert check(tmp_path, *start, "claude").actor == "agent:*"
    assert refused(tmp_path, *start, "claude", identity=Identity("agent:one")).code == "REMOTE_FORBIDDEN"


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'"x"',
        b"{}",
        b"\xff",
        b"[" * 200_000,
        b'{"name": "Bob-1", "base_name": "Ana", "serial": 1, "session": "s", "model": "human"}',
        b'{"name": "Ana-1", "base_name": "Bob", "serial": 1, "session": "s", "model": "human"}',
        b'{"name": "Ana-1", "base_name": "Ana", "serial": "1\\n", "session": "s", "model": "human"}',
        b'{"name": {}, "base_name": "Ana", "serial": 1, "session": "s", "model": "human"}',
    ],
)
def test_a_session_file_whose_content_contradicts_its_name_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions/Ana-1.json").write_bytes(content)
    assert refused(tmp_path, "comment", "LAT-1", "x", "--name", "Ana-1").code == "REMOTE_UNSUPPORTED"
    assert refused(tmp_path, "session", "end", "Ana-1").code == "REMOTE_UNSUPPORTED"


def test_sessions_behind_a_link_are_not_read(tmp_path: Path) -> None:
    session = {"name": "Ana-1", "base_name": "Ana", "serial": 1, "session": "s", "model": "human"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/Ana-1.json").write_text(json.dumps(session))
    (tmp_path / ".lattice").mkdir()
    (tmp_path / ".lattice/sessions").symlink_to("../elsewhere")
    error = refused(tmp_path / ".lattice", "comment", "LAT-1", "x", "--name", "Ana-1")
    assert "not a regular file" in error.message


def test_letters_that_only_look_alike_are_not_the_same_actor() -> None:
    for actor in ("human:\u017fam", "human:\u212aim", "human:SAM "):
        assert not Identity("human:sam", ["human:kim\u0301"]).may_act_as(actor, ignore_case=True)
    assert Identity("human:sam").may_act_as("human:SAM", ignore_case=True)
    assert not Identity("human:sam").may_act_as("human:SAM")


def test_names_that_some_file_systems_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    for path in ("resources/gpu/resource.json", "sessions/Argus-1.json", "sessions/index.json"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    start = ["session", "start", "--model", "m", "--framework", "f"]
    assert "only in case" in refused(tmp_path, "resource", "create", "GPU", "--actor", "human:ana").message
    assert "only in case" in refused(tmp_path, *start, "--name", "ARGUS").message
    assert check(tmp_path, *start, "--agent-type", "argus").actor == "agent:Argus"
    assert check(tmp_path, "resource", "create", "gpu", "--actor", "human:ana")
    assert check(tmp_path, *start, "--name", "Argus")


def test_an_archived_task_is_not_made_a_second_time(tmp_path: Path) -> None:
    id_ = "task_01M8173J64RGGH4YR2NPR23QWA"
    (tmp_path / "archive/tasks").mkdir(parents=True)
    (tmp_path / f"archive/tasks/{id_}.json").write_text("{}")
    assert "unarchive it" in refused(tmp_path, "create", "x", "--id", id_, "--actor", "human:ana").message


def test_only_files_that_came_with_the_request_are_read(tmp_path: Path) -> None:
    attach = ["attach", "LAT-1", PRIVATE, "--actor", "human:ana"]
    assert check(tmp_path, *attach, files=(PRIVATE,)).values["source"] == PRIVATE
    comment = ["comment", "LAT-1", f"--file={PRIVATE}", "--actor", "human:ana"]
    assert check(tmp_path, *comment, files=(PRIVATE,))
    assert refused(tmp_path, "comment", "LAT-1", PRIVATE, "--actor", "human:ana", files=(PRIVATE,))
    assert refused(tmp_path, "comment", "LAT-1", "--file", "https://x/y", "--actor", "human:ana")


def test_a_session_that_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sessions/Dir-1.json").mkdir(parents=True)
    os.mkfifo(tmp_path / "sessions/Pipe-1.json")
    for name in ("Dir-1", "Pipe-1"):
        assert "not a regular file" in refused(tmp_path, "comment", "LAT-1", "x", "--name", name).message


# --- who a token may be ---

WORD = st.text(st.characters(exclude_characters="*"), max_size=8)


def agrees(pattern: str, actor: str) -> bool:
    """Return whether ``actor`` is the pieces of the pattern, in order, with anything between; written without regex."""
    first, *rest = pattern.split("*")
    if not rest:
        return actor == first
    if not actor.startswith(first):
        return False
    at = len(first)
    for piece in rest[:-1]:
        at = actor.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return len(actor) - at >= len(rest[-1]) and actor.endswith(rest[-1])


@given(st.lists(WORD, min_size=1, max_size=5), st.data())
def test_a_star_stands_for_anything_and_nothing_else_for_more_than_itself(
    pieces: list[str], data: st.DataObject
) -> None:
    pattern = "*".join(pieces)
    between = [data.draw(WORD) for _ in pieces[1:]]
    inside = pieces[0] + "".join(gap + piece for gap, piece in zip(between, pieces[1:], strict=True))
    assert Identity("human:ana", [pattern]).may_act_as(inside)
    other = data.draw(
        st.one_of(st.text(max_size=20), st.just(inside + "x"), st.just("x" + inside), st.just(inside[1:]))
    )
    assert Identity("human:ana", [pattern]).may_act_as(other) == (other == "human:ana" or agrees(pattern, other))


@pytest.mark.parametrize(
    ("pattern", "actor", "may"),
    [
        ("agent:*", "agent:", True),
        ("agent:*", "agent:a\nb", True),
        ("agent:*", "Agent:a", False),
        ("agent:*", "human:agent:a", False),
        ("agent:a.c", "agent:abc", False),
        ("agent:a.c", "agent:a.c", True),
        ("agent:[ab]", "agent:a", False),
        ("agent:(a|b)+", "agent:a", False),
        ("agent:a?", "agent:", False),
        ("agent:\\w", "agent:w", False),
        ("agent:a*b", "agent:ab", True),
        ("agent:a*b", "agent:axxb", True),
        ("agent:a*b", "agent:axxbc", False),
        ("agent:ä", "agent:a\u0308", False),
        ("agent:k", "agent:\u212a", False),  # the sign for Kelvin, which is a k when case is ignored
        ("agent:ß", "agent:ss", False),
        ("*", "human:eve", True),
    ],
)
def test_text_that_looks_like_a_pattern_is_only_text(pattern: str, actor: str, may: bool) -> None:
    assert Identity("human:ana", [pattern]).may_act_as(actor) is may


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    began = time.process_time()
    assert not Identity("human:ana", ["agent:" + "*a" * 40 + "b"]).may_act_as("agent:" + "a" * 4000)
    assert time.process_time() - began < 5


def test_a_plugins_command_that_takes_a_file_is_refused_also_as_one_of_several_values() -> None:
    several = click.Option(["--several"], type=click.Tuple([str, click.Path()]))
    texts = click.Option(["--texts"], type=click.Tuple([str, str]))
    newer = click.Group(commands={"bad": click.Command("bad", params=[several])})
    newer.add_command(click.Command("good", params=[texts, click.Option(["--actor"])]))
    with pytest.raises(Rejected, match="takes a file, several"):
        policy._kinds_of_plugins(newer, "bad")
    assert policy._kinds_of_plugins(newer, "good") == {"texts": policy.Kind.TEXT, "actor": policy.Kind.ACTOR}


def test_only_a_plugins_command_can_be_allowed_by_the_administrator(tmp_path: Path) -> None:
    assert "plugin_commands" not in refused(tmp_path, "init").message
    newer = click.Group(commands={"extra": click.Command("extra", callback=lambda: None)})
    with pytest.raises(Rejected, match="plugin_commands"):
        parse(newer, ("extra",), ANA, files=(), lattice_dir=tmp_path)


@pytest.mark.parametrize(
    ("opening", "levels"), [('{"a":', 64), ("[", 64), ("[[],", 63), ("[{},", 63), ('["]",', 64), ('["\\"]",', 64)]
)
def test_json_is_nested_up_to_a_bound(tmp_path: Path, opening: str, levels: int) -> None:
    def event(depth: int) -> tuple[str, ...]:
        closing = "}" if opening[0] == "{" else "]"
        return ("event", "LAT-1", "x_deep", "--data", opening * depth + "1" + closing * depth, *AS_ANA)

    check(tmp_path, *event(levels))
    assert "nested deeper" in refused(tmp_path, *event(levels + 1)).message


# --- descriptions in the log ---


def test_a_description_names_a_few_paths_and_counts_the_rest() -> None:
    paths = [f"p{number}" for number in range(7)]
    assert describe_paths(paths[:5]) == "changed p0, p1, p2, p3, p4"
    assert describe_paths(paths[:6]) == "changed p0, p1, p2, p3, p4, and 1 more"
    assert describe_paths(paths) == "changed p0, p1, p2, p3, p4, and 2 more"
    long = [letter * 100 for letter in "abcdef"]
    assert len(describe_paths(long[:5])) == len(describe_paths(long)) == MAX_CHARS
    assert describe_paths(long[:5]).endswith("…") and describe_paths(long).endswith(", and 1 more")


def test_a_description_of_a_command_is_as_typed_and_bounded() -> None:
    assert describe_command(["comment", "LAT-1", "it's", "--token", "x"]).startswith("comment LAT-1 'it'\"'\"'s'")
    assert describe_command(["x" * MAX_CHARS]) == "x" * MAX_CHARS
    assert describe_command(["x" * MAX_CHARS + "y"]) == "x" * (MAX_CHARS - 1) + "…"
    assert len(describe_command(["a" * 1000] * 1000)) == MAX_CHARS
    assert describe_command(["a", "", "b"]) == "a '' b"


def test_the_words_of_a_command_end_at_its_arguments() -> None:
    lines = {"list --json": "list", "resource acquire gpu": "resource acquire", "resource": "resource", "no list": ""}
    assert {line: command_words(cli, line.split()) for line in lines} == lines
