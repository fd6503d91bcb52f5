"""Tasks over HTTP: reads return lattice's output, writes are numbered like commands."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from rest_client import Rest
from server_process import Process
from test_server import make_token

from lattice_remote.server.tokens import TokenFile
from sandbox import wait_for

_PRINTING = """
import json, sys
from click.testing import CliRunner
from lattice.cli.main import cli
print(json.dumps([json.loads(CliRunner().invoke(cli, [*argv, "--json"]).stdout) for argv in json.load(sys.stdin)]))
"""


def lattice(server: Process, *lines: tuple[str, ...]) -> Any:
    """Return the output of plain lattice for these command lines in the server's own directory."""
    printed = subprocess.run(
        [sys.executable, "-c", _PRINTING],
        input=json.dumps(lines),
        env={**os.environ, "LATTICE_ROOT": str(server.data.project("web").root), "LATTICE_REMOTE_SERVER": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(printed.stdout)


# --- reading and writing ---


def test_responses_equal_the_output_of_lattice(served: tuple[Process, Rest]) -> None:
    server, rest = served
    made = rest.ok("POST", "/tasks", status=201, json={"title": "--help me", "tags": ["a", "b"], "priority": "high"})
    assert (made["title"], made["tags"], made["created_by"]) == ("--help me", ["a", "b"], "human:ana")
    rest.ok("POST", f"/tasks/{made['id']}/comments", status=201, json={"body": "--yes"})
    lines = {
        "/tasks?priority=high": ("list", "--priority=high"),
        f"/tasks/{made['short_id']}": ("show", made["id"]),
        f"/tasks/{made['short_id'].lower()}/comments": ("comments", made["id"]),
        "/resources": ("resource", "list"),
    }
    assert [rest.ask("GET", path).json() for path in lines] == lattice(server, *lines.values())
    events = rest.ok("GET", f"/tasks/{made['id']}/events")
    assert [event["type"] for event in events] == ["task_created", "comment_added"]
    assert rest.ok("GET", f"/tasks/{made['id']}/comments")[0]["body"] == "--yes"


def test_a_write_returns_the_change_that_its_answer_reflects(rest: Rest) -> None:
    answer = rest.ask("POST", "/tasks", json={"title": "t"})
    epoch, number, _ = answer.headers["Lattice-Change"].split("-")
    described = rest.session.get(rest.url).json()
    assert (described["epoch"], described["head"]) == (epoch, int(number))


def test_a_task_is_commented_completed_archived_and_brought_back(rest: Rest) -> None:
    task = rest.task(planned=True)
    assert rest.ok("POST", f"/tasks/{task}/claim")["status"] == "in_progress"
    first = rest.ok("GET", f"/tasks/{task}/events")[-1]["id"]
    said = rest.ok("POST", f"/tasks/{task}/comments", status=201, json={"body": "a", "triggered_by": first})
    reply = {"body": "b", "reply_to": said["last_event_id"], "actor": "agent:bot"}
    assert rest.ok("POST", f"/tasks/{task}/comments", status=201, json=reply)["comment_count"] == 2
    comment = rest.ok("GET", f"/tasks/{task}/comments")[0]
    assert [(answer["author"], answer["body"]) for answer in comment["replies"]] == [("agent:bot", "b")]
    assert rest.ok("POST", f"/tasks/{task}/complete", json={"review": "well done"})["status"] == "done"
    assert rest.ok("POST", f"/tasks/{task}/archive")["type"] == "task_archived"
    assert rest.refused("POST", f"/tasks/{task}/archive") == (409, "CONFLICT")
    assert rest.ok("GET", f"/tasks/{task}")["archived"] is True
    assert rest.ok("POST", f"/tasks/{task}/unarchive", json={"reason": "too early"})["type"] == "task_unarchived"
    assert "archived" not in rest.ok("GET", f"/tasks/{task}")


# --- all or none ---


def test_a_patch_changes_status_assignment_and_fields_in_one_change(rest: Rest) -> None:
    task = rest.task(description="old")
    before = rest.head
    changes = {
        "title": "-t=new",
        "description": "",
        "tags": ["x", "y"],
        "custom_fields": {"size": "a=b"},
        "assigned_to": "agent:z",
        "status": "in_planning",
        "actor": "agent:boss",
        "reason": "because",
    }
    changed = rest.ok("PATCH", f"/tasks/{task}", json=changes)
    assert rest.head == before + 1
    for name in ("title", "description", "tags", "custom_fields", "assigned_to", "status"):
        assert changed[name] == changes[name], name
    events = rest.ok("GET", f"/tasks/{task}/events")[1:]
    assert {(event["actor"], event["provenance"]["reason"]) for event in events} == {("agent:boss", "because")}
    unassigned = rest.ok("PATCH", f"/tasks/{task}", json={"assigned_to": None, "title": "-t=new"})
    assert (unassigned["assigned_to"], unassigned["title"]) == (None, "-t=new")
    assert rest.head == before + 2
    assert rest.ok("PATCH", f"/tasks/{task}", json={"title": "-t=new"})["title"] == "-t=new"
    assert rest.head == before + 2, "where all is as it is to be, nothing is numbered"


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"status": "done"}, "INVALID_TRANSITION"),
        ({"status": "done", "force": True}, "VALIDATION_ERROR"),
        ({"status": "nonsense"}, "VALIDATION_ERROR"),
        ({"assigned_to": "nobody known"}, "INVALID_ACTOR"),
        ({"priority": "none"}, "VALIDATION_ERROR"),
        ({"status": "in_progress", "force": True, "reason": "r", "title": "a\0b"}, "REMOTE_UNSUPPORTED"),
    ],
)
def test_a_patch_that_is_refused_in_part_changes_nothing(rest: Rest, wrong: dict[str, Any], code: str) -> None:
    task = rest.task("as it was")
    before = rest.ask("GET", f"/tasks/{task}").json()
    changes = {"title": "new", "assigned_to": "agent:z", "status": "in_planning", **wrong}
    assert rest.refused("PATCH", f"/tasks/{task}", json=changes) == (422, code)
    assert rest.ask("GET", f"/tasks/{task}").json() == before


def edit(rest: Rest, path: Path, text: str) -> None:
    """Replace a file on the server as a whole, and wait until the change has its number.

    A file that is seen half written would get a second number at any later moment.
    """
    before = rest.head
    (made := path.parents[1] / "edited").write_text(text)
    made.replace(path)
    wait_for(lambda: rest.head > before, "the edit's number")


def test_a_policy_counts_what_the_same_patch_does_before_it(served: tuple[Process, Rest]) -> None:
    server, rest = served
    path = server.data.project("web").lattice / "config.json"
    config = json.loads(path.read_text())
    config["workflow"]["completion_policies"] = {"review": {"require_assigned": True}}
    task = rest.task(planned=True, status="in_progress")
    edit(rest, path, json.dumps(config))
    try:
        assert rest.ask("PATCH", f"/tasks/{task}", json={"status": "review"}).json()["error"]["code"] == (
            "COMPLETION_BLOCKED"
        )
        both = {"status": "review", "assigned_to": "agent:z"}
        assert rest.ok("PATCH", f"/tasks/{task}", json=both)["status"] == "review"
        forced = rest.task(planned=True, status="in_progress")
        rest.ok("PATCH", f"/tasks/{forced}", json={"status": "review", "force": True, "reason": "a hurry"})
    finally:
        del config["workflow"]["completion_policies"]
        edit(rest, path, json.dumps(config))


def test_of_many_concurrent_claims_one_succeeds(rest: Rest) -> None:
    task = rest.task(planned=True)
    rest.task(planned=True, priority="critical")  # not the one that next would pick

    def claim(number: int) -> int:
        return requests.post(
            f"{rest.url}/tasks/{task}/claim",
            json={"actor": f"agent:a{number}"},
            headers=dict(rest.session.headers),
            timeout=30,
        ).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(claim, range(8)))
    assert sorted(statuses) == [200] + [409] * 7
    winner = f"agent:a{statuses.index(200)}"
    assert rest.ok("GET", f"/tasks/{task}")["assigned_to"] == winner
    before = rest.head
    again = rest.ok("POST", f"/tasks/{task}/claim", json={"actor": winner})
    assert (again["status"], again["plan_content"] is not None, rest.head) == ("in_progress", True, before)
    assert rest.refused("POST", "/tasks/WEB-99999/claim") == (404, "NOT_FOUND")
    assert rest.refused("POST", f"/tasks/{rest.task()}/claim") == (422, "PLAN_REQUIRED")


def test_concurrent_requests_for_the_next_task_get_different_tasks(rest: Rest) -> None:
    ready = {rest.task(planned=True, status="planned", priority="critical", urgency="immediate") for _ in range(5)}

    def ask(number: int) -> str:
        body = {"actor": f"agent:n{number}", "status": ["planned"]}
        answer = requests.post(f"{rest.url}/next", json=body, headers=dict(rest.session.headers), timeout=30)
        return str(answer.json()["data"]["short_id"]) if answer.status_code == 200 else f"{answer.status_code}"

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(ask, range(16)))
    assert sorted(got) == sorted([*ready, *["204"] * 11])


def test_the_next_task_is_claimed_until_there_is_none(rest: Rest) -> None:
    task = rest.task(planned=True, priority="critical", urgency="immediate", status="planned", assigned_to="agent:only")
    only = {"actor": "agent:only", "status": ["planned"]}
    claimed = rest.ok("POST", "/next", json=only)
    assert (claimed["short_id"], claimed["status"], claimed["assigned_to"]) == (task, "in_progress", "agent:only")
    assert rest.ok("POST", "/next", json=only)["short_id"] == task, "what is begun is gone on with"
    rest.ok("POST", f"/tasks/{task}/complete", json={"review": "fine", "actor": "agent:only"})
    nothing = rest.ask("POST", "/next", json={"actor": "agent:only", "status": ["no_such"]})
    assert (nothing.status_code, nothing.content) == (204, b"")


# --- lists ---


def test_lists_filter_as_lattice_does(served: tuple[Process, Rest]) -> None:
    server, rest = served
    rest.task("bug", type="bug", tags=["ui"], assigned_to="agent:f", status="backlog", priority="low")
    rest.ok("POST", f"/tasks/{rest.task('old', type='bug')}/archive")
    lines = {
        "status=backlog": ("list", "--status=backlog"),
        "assigned=agent:f": ("list", "--assigned=agent:f"),
        "tag=ui&type=bug": ("list", "--tag=ui", "--type=bug"),
        "priority=low&compact=true": ("list", "--priority=low", "--compact"),
        "include_archived=true&type=bug": ("list", "--include-archived", "--type=bug"),
        "status=unheard-of": ("list", "--status=unheard-of"),
        "tag=--help": ("list", "--tag=--help"),
    }
    assert [rest.ask("GET", f"/tasks?{query}").json() for query in lines] == lattice(server, *lines.values())
    for wrong in ("include_archived=perhaps", "limit=0", "limit=1001", "limit=x", "page=1", "limit=1&limit=2"):
        assert rest.refused("GET", f"/tasks?{wrong}") == (422, "REMOTE_INVALID"), wrong


def test_pages_omit_and_repeat_no_item(rest: Rest) -> None:
    made = [rest.task(tags=["paged"]) for _ in range(7)]
    seen: list[str] = []
    query = "/tasks?tag=paged&limit=2"
    page = rest.ask("GET", query).json()
    while True:
        seen += [task["short_id"] for task in page["data"]]
        if len(seen) == 4:  # between two pages the last one that was seen goes, and another comes
            rest.ok("POST", f"/tasks/{seen[-1]}/archive")
            made.append(rest.task(tags=["paged"]))
        if "next" not in page:
            break
        page = rest.ask("GET", f"{query}&cursor={page['next']}").json()
    assert seen == made
    for number in range(3):
        rest.ok("POST", f"/tasks/{made[0]}/comments", status=201, json={"body": f"c{number}"})
    first = rest.ask("GET", f"/tasks/{made[0]}/events?limit=3").json()
    rest_of_it = rest.ask("GET", f"/tasks/{made[0]}/events?limit=3&cursor={first['next']}").json()
    assert (len(first["data"]), len(rest_of_it["data"]), "next" in rest_of_it) == (3, 1, False)
    assert rest.refused("GET", f"/tasks/{made[0]}/events?cursor={page_of_nothing()}") == (422, "REMOTE_INVALID")


def page_of_nothing() -> str:
    return "ZXZfMDE="  # ev_01, which no log has


# --- once ---


def keyed(rest: Rest, key: str, **options: Any) -> requests.Response:
    """Request a new task on a separate connection."""
    headers = {**dict(rest.session.headers), "Idempotency-Key": key}
    return requests.post(f"{rest.url}/tasks", headers=headers, timeout=30, **options)


def test_the_same_request_with_the_same_key_happens_once(rest: Rest) -> None:
    before = rest.head
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: keyed(rest, "one", json={"title": "x"}), range(8)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert rest.head == before + 1
    refused = keyed(rest, "no", json={"title": "x", "status": "nonsense"})
    assert keyed(rest, "no", json={"title": "x", "status": "nonsense"}).content == refused.content
    assert rest.head == before + 1


def test_a_key_that_comes_with_another_request_is_refused(served: tuple[Process, Rest]) -> None:
    server, rest = served
    with ThreadPoolExecutor(8) as pool:  # some while the first is under way, some later
        answers = list(pool.map(lambda number: keyed(rest, "two", json={"title": f"{number}"}), range(8)))
    assert sorted(answer.status_code for answer in answers) == [201] + [422] * 7
    first = next(answer.json()["data"] for answer in answers if answer.status_code == 201)
    headers = {"Idempotency-Key": "two"}
    same = {"title": first["title"]}
    assert rest.ok("POST", "/tasks", status=201, headers=headers, json=same) == first
    assert rest.refused("POST", "/tasks?x=1", headers=headers, json=same) == (422, "REMOTE_INVALID")
    assert rest.refused("POST", "/next", headers=headers, json={}) == (422, "REMOTE_INVALID")
    assert rest.refused("PATCH", f"/tasks/{first['id']}", headers=headers, json=same) == (422, "REMOTE_INVALID")
    other = Rest(server.port, make_token(server.data))
    with other.session:
        made = other.ok("POST", "/tasks", status=201, headers=headers, json=same)
    assert made["id"] != first["id"], "another token's keys are its own"


def test_a_change_that_is_made_once_stays_made_when_it_is_asked_again_later(rest: Rest) -> None:
    task, headers = rest.task(), {"Idempotency-Key": "patch"}
    changed = rest.ok("PATCH", f"/tasks/{task}", headers=headers, json={"title": "one"})
    rest.ok("PATCH", f"/tasks/{task}", json={"title": "two"})
    assert rest.ok("PATCH", f"/tasks/{task}", headers=headers, json={"title": "one"}) == changed
    assert rest.ok("GET", f"/tasks/{task}")["title"] == "two"
    path = f"/plans/{task}"
    same = {"Idempotency-Key": "same"}
    first = rest.ask("PATCH", f"/tasks/{task}", headers=same, json={"title": "two", "assigned_to": None})
    assert f"-{rest.head}-" in first.headers["Lattice-Change"], "nothing was changed, and that is an answer too"
    rest.ok("PATCH", f"/tasks/{task}", json={"title": "three"})
    again = rest.ask("PATCH", f"/tasks/{task}", headers=same, json={"title": "two", "assigned_to": None})
    assert (again.status_code, again.content) == (200, first.content)
    put = {"Idempotency-Key": "put", "If-Match": rest.ask("GET", path).headers["ETag"]}
    stored = rest.ok("PUT", path, headers=put, data=b"one")
    rest.ok("PUT", path, headers={"If-Match": "*"}, data=b"two")
    assert rest.ok("PUT", path, headers=put, data=b"one") == stored, "not 412: it was done before the text was another"
    assert rest.refused("PUT", path, headers={**put, "If-Match": "*"}, data=b"one") == (422, "REMOTE_INVALID")
    assert rest.ask("GET", path).content == b"two"
    any_ = {"Idempotency-Key": "any", "If-Match": "*"}
    replaced = rest.ok("PUT", path, headers=any_, data=b"three")
    rest.ok("POST", f"/tasks/{task}/archive")
    assert rest.ok("PUT", path, headers=put, data=b"one") == stored, "not 409: it was done before the task was archived"
    assert rest.ok("PUT", path, headers=any_, data=b"three") == replaced


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "\xe4"])
def test_a_key_is_bounded(rest: Rest, key: str) -> None:
    headers = {"Idempotency-Key": key.encode("latin-1")}
    assert rest.refused("POST", "/tasks", headers=headers, json={"title": "x"}) == (400, "REMOTE_PROTOCOL")


# --- actors and errors ---


def test_a_token_acts_as_itself_and_those_that_it_names(rest: Rest) -> None:
    task = rest.task()
    for path, body in (
        (f"/tasks/{task}/comments", {"body": "x"}),
        (f"/tasks/{task}/claim", {}),
        (f"/tasks/{task}/complete", {"review": "x"}),
        (f"/tasks/{task}/archive", {}),
        ("/next", {}),
        ("/tasks", {"title": "x"}),
        ("/resources/r", {}),
    ):
        assert rest.refused("POST", path, json={**body, "actor": "human:bob"}) == (403, "REMOTE_FORBIDDEN"), path
    changes = {"title": "x", "status": "in_planning", "actor": "human:bob"}
    assert rest.refused("PATCH", f"/tasks/{task}", json=changes) == (403, "REMOTE_FORBIDDEN")
    assert rest.refused("POST", "/tasks", json={"title": "x", "name": "Nobody-1"}) == (422, "SESSION_NOT_FOUND")


def test_a_token_that_ends_while_its_request_is_sent_writes_nothing(served: tuple[Process, Rest]) -> None:
    server, rest = served
    before = rest.head
    token, text = TokenFile(server.data.tokens).create(projects=["web"], actor="human:eve", act_as=[])
    lines = ["POST /projects/web/tasks HTTP/1.1", "Host: x", f"Authorization: Bearer {text}"]
    head = "\r\n".join([*lines, "Content-Type: application/json", "Content-Length: 15", "Expect: 100-continue"])
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(f"{head}\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 100 ")  # she was let in, and her request is waited for
        TokenFile(server.data.tokens).revoke(token.id)
        raw.sendall(b'{"title":"one"}')
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 401 "), answer
    assert f"token {token.id} was revoked".encode() in answer
    assert rest.head == before


def test_no_request_exceeds_the_rights_of_its_token(served: tuple[Process, Rest]) -> None:
    server, rest = served
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic x"}):
        answer = requests.get(f"{rest.url}/tasks", headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "REMOTE_UNAUTHORIZED")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    _, elsewhere = TokenFile(server.data.tokens).create(projects=["other"], actor="human:eve", act_as=[])
    for method, path in (("GET", "/tasks"), ("POST", "/next"), ("PUT", "/notes/WEB-1"), ("PATCH", "/tasks/WEB-1")):
        headers = {"Authorization": f"Bearer {elsewhere}"}
        answer = requests.request(method, rest.url + path, headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "REMOTE_FORBIDDEN")
        answer = requests.request(method, f"{rest.root}/projects/other{path}", headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "REMOTE_NOT_FOUND")


DEEP = b'{"title":' + b"[" * 10_000 + b"]" * 10_000 + b"}"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "REMOTE_PROTOCOL"),
        (b'{"title": "\xff"}', 400, "REMOTE_PROTOCOL"),
        (b'{"title": "\\ud800"}', 400, "REMOTE_PROTOCOL"),
        (b'{"title": NaN}', 400, "REMOTE_PROTOCOL"),
        (DEEP, 422, "REMOTE_INVALID"),
        (DEEP[9:-1], 422, "REMOTE_INVALID"),
        (b'{"custom_fields": {"a": ' + DEEP + b"}}", 422, "REMOTE_INVALID"),
        (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, 422, "REMOTE_INVALID"),
        (b"[]", 422, "REMOTE_INVALID"),
        (b'{"title": 7}', 422, "REMOTE_INVALID"),
        (b'{"title": "x", "tite": "y"}', 422, "REMOTE_INVALID"),
        (b'{"tags": ["a,b"]}', 422, "REMOTE_INVALID"),
        (b'{"title": "x", "title": "y"}', 422, "REMOTE_INVALID"),
        (b'{"custom_fields": {"a": "x", "a": "y"}}', 422, "REMOTE_INVALID"),
        (b"{}", 422, "REMOTE_INVALID"),
        (b'{"title": "a\\u0000b"}', 422, "REMOTE_UNSUPPORTED"),
        (b" " * 2_000_000, 413, "REMOTE_TOO_LARGE"),
    ],
    ids=range(17),
)
def test_a_body_that_is_wrong_is_refused_in_one_line(rest: Rest, body: bytes, status: int, code: str) -> None:
    task = rest.task()
    headers = {"Content-Type": "application/json"}
    assert rest.refused("PATCH", f"/tasks/{task}", data=body, headers=headers) == (status, code)


def test_other_errors_have_their_status(rest: Rest) -> None:
    for method, path, options, status, code in (
        ("POST", "/tasks", {"data": "title=x"}, 415, "REMOTE_PROTOCOL"),
        ("POST", "/tasks", {"json": {}}, 422, "REMOTE_INVALID"),
        ("POST", "/tasks", {"json": {"title": "x"}, "headers": {"Content-Encoding": "gzip"}}, 415, "REMOTE_PROTOCOL"),
        ("GET", "/tasks", {"data": b"x"}, 413, "REMOTE_TOO_LARGE"),
        ("GET", "/tasks/WEB-99999", {}, 404, "NOT_FOUND"),
        ("GET", f"/tasks/task_{'0' * 26}", {}, 404, "NOT_FOUND"),
        ("GET", "/tasks/what%20is%20it", {}, 422, "INVALID_ID"),
        ("GET", "/tasks/%0a", {}, 404, "REMOTE_NOT_FOUND"),
        ("POST", "/tasks/WEB-1%0a/archive", {}, 404, "REMOTE_NOT_FOUND"),
        ("GET", "/plans/%00", {}, 404, "REMOTE_NOT_FOUND"),
        ("POST", "/tasks/a,b/archive", {}, 422, "INVALID_ID"),
        ("POST", "/tasks/%20/archive", {}, 422, "INVALID_ID"),
        ("POST", "/tasks", {"json": {"title": "x", "id": "not_valid"}}, 422, "INVALID_ID"),
        ("POST", "/tasks", {"json": {"title": "x", "id": "../../etc/passwd"}}, 422, "INVALID_ID"),
        ("POST", "/tasks", {"json": {"title": "x", "id": f"res_{'0' * 26}"}}, 422, "INVALID_ID"),
        ("POST", "/tasks", {"json": {"title": "x", "id": f"task_{'0' * 26}\n"}}, 422, "REMOTE_UNSUPPORTED"),
        ("POST", "/resources/gpu", {"json": {"id": "not_valid"}}, 422, "INVALID_ID"),
        ("GET", "/tasks/WEB-1/nothing", {}, 404, "REMOTE_NOT_FOUND"),
    ):
        assert rest.refused(method, path, **options) == (status, code), (method, path)
    answer = rest.ask("DELETE", "/tasks")
    assert (answer.status_code, set(answer.headers["Allow"].split(", "))) == (405, {"GET", "HEAD", "POST"})
    assert answer.json()["error"]["message"].endswith(f"this path allows {answer.headers['Allow']} only")


def test_a_refusal_does_not_end_the_connection(rest: Rest) -> None:
    assert rest.ask("GET", "/tasks/WEB-99999").headers.get("Connection") != "close"
    assert rest.ask("POST", "/tasks", json={}).headers.get("Connection") != "close"
    assert rest.ask("POST", "/tasks", json={"title": "x", "actor": "human:bob"}).headers.get("Connection") != "close"
