"""Projects visible to a token, and the server's readiness."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from harness import make_data as make_data_and_token
from harness import serving, until
from server_process import Process
from test_server import make_data

from lattice_remote.server.datadir import closing
from lattice_remote.server.tokens import TokenFile
from sandbox import descendants, wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    data = make_data(tmp_path_factory.mktemp("listing") / "data")
    for slug in ("other", "secret"):
        data.create_project(slug, code=slug[:3].upper(), name=f"The {slug} one", actor=None)
    started = Process(data)
    yield started
    assert started.end() == 0


@pytest.fixture(scope="module")
def session(server: Process) -> Iterator[requests.Session]:
    projects = ["web", "other", "gone"]
    with requests.Session() as made:
        _, token = TokenFile(server.data.tokens).create(projects=projects, actor="human:ana", act_as=[])
        made.headers["Authorization"] = f"Bearer {token}"
        yield made


def at(server: Process, path: str) -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def listed(server: Process, session: requests.Session) -> dict[str, dict]:
    answer = session.get(at(server, "/projects"), timeout=10)
    assert answer.status_code == 200, answer.text
    return {project["slug"]: project for project in answer.json()["data"]}


def test_a_token_sees_its_own_projects_that_are_there(server: Process, session: requests.Session) -> None:
    assert list(listed(server, session)) == ["other", "web"]
    assert requests.get(at(server, "/projects"), timeout=10).status_code == 401


def test_the_dashboard_of_the_only_project_or_the_list(server: Process, session: requests.Session) -> None:
    several = session.get(at(server, "/dashboard"), timeout=10)
    assert several.url == at(server, "/") and [each.status_code for each in several.history] == [308, 303]
    _, token = TokenFile(server.data.tokens).create(projects=["gone", "web"], actor="human:ben", act_as=[])
    one = requests.get(at(server, "/dashboard/"), headers={"Authorization": f"Bearer {token}"}, timeout=30)
    assert one.url == at(server, "/projects/web/dashboard/") and one.status_code == 200
    assert requests.get(at(server, "/dashboard/"), timeout=10).status_code == 401


def test_counts_and_last_activity_follow_the_changes(server: Process, session: requests.Session) -> None:
    before = listed(server, session)["other"]
    assert (before["tasks"], before["archived"], before["last"]) == (0, 0, None)
    for title in ("one", "two"):
        made = session.post(at(server, "/projects/other/tasks"), json={"title": title}, timeout=30)
        assert made.status_code == 201
    wait_for(lambda: listed(server, session)["other"]["tasks"] == 2, "the list to be fresh", 30)
    project = listed(server, session)["other"]
    assert (project["name"], project["code"], project["state"]) == ("The other one", "OTH", "ready")
    assert project["statuses"] == {"backlog": 2}
    assert (project["last"]["actor"], project["last"]["tasks"]) == ("human:ana", [made.json()["data"]["id"]])
    assert project["last"]["command"].startswith("create")


def test_a_special_file_hides_no_project(server: Process, session: requests.Session) -> None:
    tasks = server.data.project("web").lattice / "tasks"
    odd = [tasks / f"task_{number:026}.json" for number in range(3)]
    odd[0].symlink_to("/etc/passwd")
    odd[1].mkdir()
    os.mkfifo(odd[2])
    try:
        wait_for(lambda: listed(server, session)["web"]["tasks"] == 3, "the list to be fresh", 30)
        assert listed(server, session)["web"]["statuses"] == {"unknown": 3}
    finally:
        odd[0].unlink()
        odd[1].rmdir()
        odd[2].unlink()


def test_nothing_is_started_for_a_list(server: Process, session: requests.Session) -> None:
    before = descendants(server.process.pid)
    listed(server, session)
    assert descendants(server.process.pid) == before


def test_ready_means_that_every_project_can_be_used(server: Process) -> None:
    def ready() -> tuple[int, list[str]]:
        answer = requests.get(at(server, "/readyz"), timeout=10)
        assert "secret" not in answer.text
        return answer.status_code, answer.json()["reasons"]

    assert ready() == (200, [])
    let_go = threading.Event()

    def hold() -> None:
        with closing(server.data.project("secret").root, "it is being moved"):
            let_go.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        wait_for(lambda: ready()[0] == 503, "the closed project to be noticed", 60)
        assert ready()[1] == ["closed: the project is in use by an administrator's command (1 of 3)"]
    finally:
        let_go.set()
        holder.join()
    wait_for(lambda: ready() == (200, []), "the project to be open again", 60)


async def test_a_project_whose_worker_does_not_start_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_remote.server.project.project._RESTART_DELAYS_S", (0.001,))
    data, token = make_data_and_token(tmp_path / "data")
    tried = tmp_path / "tried"
    script = f'while ! test -e "{tried}"; do sleep 0.02; done; exit 1'
    async with serving(data, token, worker=("/bin/sh", "-c", script)) as running:

        def get(path: str) -> requests.Response:
            headers = {"Authorization": f"Bearer {token}"}
            return requests.get(f"http://127.0.0.1:{running.port}{path}", headers=headers, timeout=60)

        asking = asyncio.create_task(asyncio.to_thread(get, "/projects/web"))
        await until(lambda: running.registry.projects)
        starting = await asyncio.to_thread(get, "/readyz")
        assert (starting.status_code, starting.json()["reasons"][0].split(":")[0]) == (503, "starting")
        tried.touch()
        assert (await asking).status_code == 503
        failed = await asyncio.to_thread(get, "/readyz")
        assert (failed.status_code, failed.json()["reasons"][0].split(":")[0]) == (503, "failed")
        assert (await asyncio.to_thread(get, "/projects/web")).status_code == 503
