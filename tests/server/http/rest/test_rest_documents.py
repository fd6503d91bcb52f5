"""Plans, notes and resources over HTTP: exact bytes, and no overwrite of an unseen version."""

import hashlib
import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from rest_client import Rest
from server_process import Process

from lattice_remote.server.config import LimitSettings
from lattice_remote.server.tokens import TokenFile
from sandbox import wait_for

MARKDOWN = {"Content-Type": "text/markdown"}
TEXT = "# Ünïcode\r\n\n- a\ttab\n".encode()


def etag(text: bytes) -> str:
    return f'"{hashlib.sha256(text).hexdigest()}"'


@pytest.mark.parametrize("kind", ["plans", "notes"])
def test_a_text_is_stored_and_read_byte_by_byte(served: tuple[Process, Rest], kind: str) -> None:
    server, rest = served
    task = rest.ok("POST", "/tasks", status=201, json={"title": "t"})
    path = f"/{kind}/{task['short_id']}"
    condition = {"If-None-Match": "*"} if kind == "notes" else {"If-Match": rest.ask("GET", path).headers["ETag"]}
    stored = rest.ask("PUT", path, data=TEXT, headers={**MARKDOWN, **condition})
    assert (stored.status_code, stored.headers["ETag"]) == (200, etag(TEXT))
    assert stored.json()["data"] == {"task": task["id"], "etag": etag(TEXT), "outcome": "stored"}
    assert (server.data.project("web").lattice / kind / f"{task['id']}.md").read_bytes() == TEXT
    read = rest.ask("GET", f"/{kind}/{task['id']}")
    assert (read.content, read.headers["Content-Type"]) == (TEXT, "text/markdown; charset=utf-8")
    assert read.headers["X-Content-Type-Options"] == "nosniff"
    for named in (etag(TEXT), f'"x", W/{etag(TEXT)}', "*"):
        unchanged = rest.ask("GET", path, headers={"If-None-Match": named})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["ETag"]) == (304, b"", etag(TEXT))
    assert rest.ask("GET", path, headers={"If-None-Match": '"x"'}).content == TEXT


@pytest.mark.parametrize("kind", ["plans", "notes"])
def test_versions_are_listed_page_by_page_and_read(rest: Rest, kind: str) -> None:
    path = f"/{kind}/{rest.task()}"
    texts = [f"{number}\n".encode() * 3 for number in range(3)]
    for number, text in enumerate(texts):
        condition = {"If-None-Match": "*"} if kind == "notes" and not number else {"If-Match": "*"}
        rest.ok("PUT", path, data=text, headers={**MARKDOWN, **condition})
    found = rest.ok("GET", f"{path}/versions")
    assert [version["bytes"] for version in found[:3]] == [6, 6, 6]
    assert {(version["actor"], version["token_actor"]) for version in found} == {("human:ana", "human:ana")}
    for version, text in zip(found, reversed(texts), strict=False):
        read = rest.ask("GET", f"{path}/versions/{version['change']}")
        assert (read.content, read.headers["ETag"]) == (text, etag(text))
        assert read.headers["Lattice-Change"] == version["change"]
        assert rest.ask("GET", f"{path}/versions/{version['change'].rpartition('-')[2]}").content == text
    paged, cursor = [], ""
    while True:
        page = rest.ask("GET", f"{path}/versions?limit=2{cursor}").json()
        paged += page["data"]
        if "next" not in page:
            break
        cursor = f"&cursor={page['next']}"
    assert paged == found
    assert "next" not in rest.ask("GET", f"{path}/versions?limit={len(found)}").json()
    missing = (404, "REMOTE_NOT_FOUND")
    for name in ("999999", "x", "zz-1", "..%2f1", "1" * 40):
        assert rest.refused("GET", f"{path}/versions/{name}") == missing
    assert rest.refused("GET", "/plans/LAT-999/versions")[0] == 404
    assert rest.refused("GET", f"{path}/versions?cursor=x")[0] == 422


def test_a_newer_file_is_not_overwritten(rest: Rest) -> None:
    path = f"/notes/{rest.task()}"
    assert rest.ask("GET", path).status_code == 404
    rest.ok("PUT", path, data=b"one", headers={"If-None-Match": "*"})
    stale = (412, "REMOTE_STALE_BASE")
    assert rest.refused("PUT", path, data=b"two", headers={"If-None-Match": "*"}) == stale
    assert rest.refused("PUT", path, data=b"two", headers={"If-Match": etag(b"zero")}) == stale
    assert rest.refused("PUT", path, data=b"two", headers={"If-Match": f"W/{etag(b'one')}"}) == stale
    assert rest.refused("PUT", path, data=b"two", headers={"If-Match": "one"}) == stale
    assert rest.refused("PUT", path, data=b"two", headers={"If-None-Match": etag(b"one")}) == (422, "REMOTE_INVALID")
    assert rest.ok("PUT", path, data=b"one", headers={"If-Match": etag(b"one")})["outcome"] == "unchanged"
    assert rest.ok("PUT", path, data=b"two", headers={"If-Match": f'"x", {etag(b"one")}'})["outcome"] == "stored"
    rest.ok("PUT", path, data=b"", headers={"If-Match": "*"})
    assert rest.ask("GET", path).content == b""
    assert rest.refused("PUT", f"/notes/{rest.task()}", data=b"x", headers={"If-Match": "*"}) == stale


def test_of_concurrent_replacements_of_a_text_one_succeeds(rest: Rest) -> None:
    path = f"/notes/{rest.task()}"
    rest.ok("PUT", path, data=b"base", headers={"If-None-Match": "*"})

    def put(number: int) -> int:
        headers = {**dict(rest.session.headers), "If-Match": etag(b"base")}
        return requests.put(rest.url + path, data=b"%d" % number, headers=headers, timeout=30).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(put, range(8)))
    assert sorted(statuses) == [200] + [412] * 7
    assert rest.ask("GET", path).content == b"%d" % statuses.index(200)


def test_a_text_without_a_condition_is_a_save(rest: Rest) -> None:
    path = f"/notes/{rest.task()}"
    made = requests.put(rest.url + path, data=b"one\n", headers=dict(rest.session.headers), timeout=30)
    assert made.json()["data"]["outcome"] == "stored" and "Content-Type" not in made.request.headers
    as_curl = {"Content-Type": "application/x-www-form-urlencoded"}
    assert rest.ok("PUT", path, data=b"two\n", headers=as_curl)["etag"] == etag(b"two\n")
    assert rest.ok("PUT", path, data=b"two\n")["outcome"] == "unchanged"
    assert rest.ask("GET", path).content == b"two\n"
    keyed = {"Idempotency-Key": "save"}
    rest.ok("PUT", path, data=b"three\n", headers=keyed)
    rest.ok("PUT", path, data=b"four\n")
    assert rest.ok("PUT", path, data=b"three\n", headers=keyed)["outcome"] == "stored"
    assert rest.ask("GET", path).content == b"four\n"  # the repeated request was not run again


def test_saves_at_once_are_merged_by_line_and_the_last_one_wins(served: tuple[Process, Rest]) -> None:
    server, rest = served
    task = rest.ok("POST", "/tasks", status=201, json={"title": "t"})["id"]
    lines = [b"line %d\n" % number for number in range(80)]
    rest.ok("PUT", f"/notes/{task}", data=b"".join(lines))

    def save(number: int) -> tuple[bytes, str]:
        text = b"".join([*lines[: number * 10], b"saved by %d\n" % number, *lines[number * 10 + 1 :]])
        answer = requests.put(f"{rest.url}/notes/{task}", data=text, headers=dict(rest.session.headers), timeout=60)
        assert answer.status_code == 200, answer.text
        return text, answer.json()["data"]["etag"]

    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(save, range(8)))
    versions = rest.ok("GET", f"/notes/{task}/versions")
    written = {etag(rest.ask("GET", f"/notes/{task}/versions/{one['change']}").content) for one in versions}
    assert {tag for _, tag in saved} <= written
    last = rest.ask("GET", f"/notes/{task}").content
    assert (server.data.project("web").lattice / "notes" / f"{task}.md").read_bytes() == last
    assert b"saved by" in last and len(last.splitlines()) == len(lines)


def test_texts_of_archived_tasks_are_read_but_not_written(rest: Rest) -> None:
    task = rest.task()
    rest.ok("PUT", f"/plans/{task}", data=TEXT, headers={"If-Match": "*"})
    rest.ok("POST", f"/tasks/{task}/archive")
    assert rest.ask("GET", f"/plans/{task}").content == TEXT
    headers = {"If-Match": etag(TEXT)}
    assert rest.refused("PUT", f"/plans/{task}", data=b"x", headers=headers) == (409, "REMOTE_INVALID")
    assert rest.refused("PUT", f"/plans/{task}", data=b"x") == (409, "REMOTE_INVALID")


def test_a_local_edit_has_a_new_etag(served: tuple[Process, Rest]) -> None:
    server, rest = served
    task = rest.ok("POST", "/tasks", status=201, json={"title": "t"})["id"]
    file: Path = server.data.project("web").lattice / "plans" / f"{task}.md"
    file.write_bytes(b"from a shell\n")
    wait_for(lambda: rest.ask("GET", f"/plans/{task}").content == b"from a shell\n", "the edit")
    assert rest.ask("GET", f"/plans/{task}").headers["ETag"] == etag(b"from a shell\n")


def test_an_invalid_text_is_refused(rest: Rest) -> None:
    path, star = f"/plans/{rest.task()}", {"If-Match": "*"}
    assert rest.refused("PUT", path, data=b"\xff", headers=star) == (422, "REMOTE_UNSUPPORTED")
    too_long = b"x" * (LimitSettings().text_bytes + 1)
    assert rest.refused("PUT", path, data=too_long, headers=star) == (413, "REMOTE_TOO_LARGE")
    as_json = {**star, "Content-Type": "application/json"}
    assert rest.refused("PUT", path, data=b"{}", headers=as_json) == (415, "REMOTE_PROTOCOL")
    assert rest.refused("PUT", "/plans/WEB-99999", data=b"x", headers=star) == (404, "NOT_FOUND")
    assert rest.refused("GET", "/plans/what%20is%20it") == (422, "INVALID_ID")


# --- resources ---


def test_a_resource_is_made_taken_and_given_back(rest: Rest) -> None:
    task = rest.task()
    made = rest.ok("POST", "/resources/gpu", status=201, json={"ttl_seconds": 60, "description": "-d"})
    assert (made["ttl_seconds"], made["description"], made["holders"]) == (60, "-d", [])
    assert rest.refused("POST", "/resources/gpu", json={}) == (409, "CONFLICT")
    held = rest.ok("POST", "/resources/gpu/acquire", json={"task": task, "actor": "agent:a"})
    assert held["holders"][0]["actor"] == "agent:a"
    assert rest.refused("POST", "/resources/gpu/acquire") == (409, "RESOURCE_HELD")
    assert rest.refused("POST", "/resources/gpu/heartbeat") == (409, "NOT_HELD")
    rest.ok("POST", "/resources/gpu/heartbeat", json={"actor": "agent:a"})
    assert [one["name"] for one in rest.ok("GET", "/resources")["resources"]] == ["gpu"]
    assert rest.ok("POST", "/resources/gpu/acquire", json={"force": True})["holders"][0]["actor"] == "human:ana"
    assert rest.ok("POST", "/resources/gpu/release")["holders"] == []
    assert rest.ok("GET", "/resources/gpu")["holders"] == []
    assert rest.refused("GET", "/resources/nothing") == (404, "NOT_FOUND")
    assert rest.refused("POST", "/resources/a:b", json={}) == (422, "REMOTE_UNSUPPORTED")
    for name in ("gpu.0", "con", "x.json", "two words", "a..b"):
        path = f"/resources/{quote(name)}"
        made = rest.ok("POST", path, status=201, json={})
        assert rest.ok("POST", f"{path}/acquire")["name"] == name
        assert rest.ok("GET", f"{path}/{made['id']}")["holders"][0]["actor"] == "human:ana"
        assert rest.ok("POST", f"{path}/release")["holders"] == []


def test_a_resource_with_its_id_is_held_or_not(rest: Rest) -> None:
    made = rest.ok("POST", "/resources/disk", status=201)
    path = f"/resources/disk/{made['id']}"
    assert rest.ok("PATCH", path, json={"held": True})["holders"][0]["actor"] == "human:ana"
    assert rest.refused("PATCH", path, json={"held": True, "actor": "agent:b"}) == (409, "RESOURCE_HELD")
    assert rest.ok("GET", path)["holders"][0]["actor"] == "human:ana"
    assert rest.ok("PATCH", path, json={"held": False})["holders"] == []
    assert rest.refused("PATCH", path, json={"held": False}) == (409, "NOT_HELD")
    assert rest.refused("PATCH", path, json={}) == (422, "REMOTE_INVALID")
    assert rest.refused("PATCH", path, json={"held": True, "ttl_seconds": 5}) == (422, "REMOTE_INVALID")
    for wrong in ("/resources/disk/disk", f"/resources/gpu/{made['id']}", f"/resources/disk/res_{'0' * 26}"):
        assert rest.refused("GET", wrong)[0] == 404
        assert rest.refused("PATCH", wrong, json={"held": True})[0] == 404


def test_fields_of_a_resource_are_changed(served: tuple[Process, Rest]) -> None:
    server, rest = served
    made = rest.ok("POST", "/resources/press", status=201, json={"description": "old"})
    for path in ("/resources/press", f"/resources/press/{made['id']}"):
        body = {"max_holders": 2, "ttl_seconds": 90, "actor": "agent:a", "reason": "two now"}
        changed = rest.ok("PATCH", path, json=body)
        assert [changed[name] for name in ("max_holders", "ttl_seconds", "description")] == [2, 90, "old"]
    keyed = {"Idempotency-Key": "press"}
    first = rest.ask("PATCH", "/resources/press", json={"description": "new"}, headers=keyed)
    rest.ok("PATCH", "/resources/press", json={"description": None})
    again = rest.ask("PATCH", "/resources/press", json={"description": "new"}, headers=keyed)
    assert first.json() == again.json() and first.headers["Lattice-Change"] == again.headers["Lattice-Change"]
    assert rest.ok("GET", "/resources/press")["description"] is None
    log = server.data.project("web").lattice / "events" / f"{made['id']}.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(event["type"], event["actor"]) for event in events[1:3]] == [("resource_updated", "agent:a")] * 2
    assert events[1]["provenance"] == {"reason": "two now"}
    for wrong in ({}, {"max_holders": 0}, {"name": "x", "ttl_seconds": 5}, {"ttl_seconds": 5, "force": True}):
        assert rest.refused("PATCH", "/resources/press", json=wrong)[0] == 422
    assert rest.refused("PATCH", "/resources/press", json={"ttl_seconds": 5, "actor": "human:eve"})[0] == 403
    assert rest.refused("PATCH", "/resources/nothing", json={"ttl_seconds": 5}) == (404, "NOT_FOUND")


def waiting(server: Process, token: str) -> int:
    """Return the number of requests that wait for a resource, from the server's metrics."""
    headers = {"Authorization": f"Bearer {token}"}
    figures = requests.get(f"http://127.0.0.1:{server.port}/metrics", headers=headers, timeout=10).text
    found = re.search(r'^lattice_remote_queue_requests{project="web",where="resource"} (\d+)', figures, re.MULTILINE)
    assert found, figures
    return int(found[1])


def test_a_waiter_for_a_resource_gets_it_and_a_disconnected_one_does_not(served: tuple[Process, Rest]) -> None:
    server, rest = served
    metrics = TokenFile(server.data.tokens).create_for_metrics()[1]
    rest.ok("POST", "/resources/lock", status=201)
    rest.ok("POST", "/resources/lock/acquire")
    late = {"actor": "agent:late", "wait": True, "timeout": 0}
    assert rest.refused("POST", "/resources/lock/acquire", json=late) == (409, "TIMEOUT")
    body = {"actor": "agent:left", "wait": True, "timeout": 60}
    left = http.client.HTTPConnection(rest.root.removeprefix("http://"), timeout=30)
    headers = {"Authorization": str(rest.session.headers["Authorization"]), "Content-Type": "application/json"}
    left.request("POST", "/projects/web/resources/lock/acquire", json.dumps(body), headers)
    wait_for(lambda: waiting(server, metrics) == 1, "its place in line")
    left.close()
    wait_for(lambda: waiting(server, metrics) == 0, "its leaving the line")

    def stay() -> str:
        stays = {"actor": "agent:stays", "wait": True, "timeout": 60}
        answer = requests.post(f"{rest.url}/resources/lock/acquire", json=stays, headers=headers, timeout=60)
        return str(answer.json()["data"]["holders"][0]["actor"])

    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(stay)
        wait_for(lambda: waiting(server, metrics) == 1, "its place in line")
        rest.ok("POST", "/resources/lock/release")
        assert stays.result(30) == "agent:stays"
