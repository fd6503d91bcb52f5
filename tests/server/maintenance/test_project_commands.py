"""Administrative commands for whole projects: checks, tokens, and recovery from crashes."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import until
from worker_process import tree_of

from lattice_remote.errors import Misuse
from lattice_remote.server.datadir import DataDir, closed_because, closing
from lattice_remote.server.ipc import ImportProject
from lattice_remote.server.maintenance.fsck import chosen, fsck
from lattice_remote.server.maintenance.project_commands import (
    archive_project,
    delete_project,
    export_project,
    finish_renames,
    import_project,
    rename_project,
    unarchive_project,
)
from lattice_remote.server.registry import ProjectRegistry
from lattice_remote.server.tokens import TokenFile
from lattice_remote.server.worker.project_import import decide
from sample_projects import add_hooks, sample_project


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_project(tmp_path_factory.mktemp("own")).parent


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    made = DataDir(tmp_path / "data")
    made.create()
    made.create_project("web", code="WEB", name=None, actor=None)
    return made


def token(data: DataDir, *projects: str) -> str:
    return TokenFile(data.tokens).create(projects=list(projects), actor="human:ana", act_as=[])[0].id


def projects_of(data: DataDir) -> dict[str, list[str]]:
    return {token.id: token.projects for token in TokenFile(data.tokens).read()}


def entries(data: DataDir) -> list[str]:
    return sorted(os.listdir(data.projects))


# --- import ---


def test_an_import_is_checked_and_changes_nothing_until_it_is_done(data: DataDir, own: Path, tmp_path: Path) -> None:
    before = tree_of(data.project("web").lattice)
    report = import_project(data, "web", own, keep_hooks=False, dry_run=True)
    assert (report.tasks, report.archived) == (2, 1) and entries(data) == ["web"]
    assert tree_of(data.project("web").lattice) == before
    harmed = tmp_path / "harmed"
    shutil.copytree(own, harmed)
    (harmed / ".lattice/artifacts/meta").joinpath(os.listdir(own / ".lattice/artifacts/meta")[0]).write_text("{")
    with pytest.raises(Misuse, match="lattice doctor: Invalid JSON"):
        import_project(data, "web", harmed, keep_hooks=False, dry_run=False)
    assert tree_of(data.project("web").lattice) == before and entries(data) == ["web"], "no trace is left"
    import_project(data, "web", own / ".lattice", keep_hooks=False, dry_run=False)
    assert tree_of(data.project("web").lattice) == tree_of(own / ".lattice")
    for slug, why in (("web", "has 3 tasks"), ("No", "bad project name"), ("../x", "bad project name")):
        with pytest.raises(Misuse, match=why):
            import_project(data, slug, own, keep_hooks=False, dry_run=False)
    with pytest.raises(Misuse, match="no lattice project"):
        import_project(data, "new", tmp_path, keep_hooks=False, dry_run=False)


def test_hooks_come_along_only_if_they_are_asked_for(data: DataDir, own: Path, tmp_path: Path) -> None:
    hooked = tmp_path / "hooked"
    shutil.copytree(own, hooked)
    add_hooks(hooked / ".lattice")
    import_project(data, "plain", hooked, keep_hooks=False, dry_run=False)
    import_project(data, "hooked", hooked, keep_hooks=True, dry_run=False)
    kept = [json.loads((data.project(slug).lattice / "config.json").read_text()) for slug in ("plain", "hooked")]
    assert ["hooks" in config for config in kept] == [False, True]
    exported = export_project(data, "hooked", tmp_path / "out")
    assert exported.is_sound and tree_of(tmp_path / "out/.lattice") == tree_of(hooked / ".lattice")
    with pytest.raises(Misuse, match="not empty"):
        export_project(data, "hooked", tmp_path / "out")


# --- rename, archive, delete ---


def test_tokens_go_along_with_a_rename_also_when_it_was_cut_off(data: DataDir) -> None:
    both, other = token(data, "web", "else"), token(data, "else")
    assert rename_project(data, "web", "site") == 1
    assert projects_of(data) == {both: ["else", "site"], other: ["else"]}
    data.save_renamed({**data.renamed(), "site": "home"})
    os.rename(data.projects / "site", data.projects / "home")  # killed before the tokens were changed
    assert finish_renames(data) == 1
    assert projects_of(data)[both] == ["else", "home"]
    assert rename_project(data, "site", "home") == 0, "asked again, it is done"
    data.create_project("web", code="WEB", name=None, actor=None)
    mine = token(data, "web")
    assert finish_renames(data) == 0 and projects_of(data)[mine] == ["web"], "a name that is used again is no old name"


def test_names_are_guarded(data: DataDir) -> None:
    data.create_project("two", code="TWO", name=None, actor=None)
    for old, new, why in (("web", "two", "exists"), ("web", "..", "bad project"), ("none", "x", "no project")):
        with pytest.raises(Misuse, match=why):
            rename_project(data, old, new)
    archive_project(data, "web")
    for attempt in (
        lambda: rename_project(data, "web", "x"),
        lambda: rename_project(data, "two", "web"),
        lambda: data.create_project("web", code="WEB", name=None, actor=None),
        lambda: archive_project(data, "web"),
    ):
        with pytest.raises(Misuse, match="archived"):
            attempt()
    with pytest.raises(Misuse, match="no archived project"):
        delete_project(data, "../data")
    assert data.summary("web").state == "archived"
    unarchive_project(data, "web")
    assert data.slugs() == ["two", "web"] and data.archived_slugs() == []


def test_a_deleted_project_is_in_the_trash_and_in_no_token(data: DataDir) -> None:
    data.create_project("two", code="TWO", name=None, actor=None)
    token(data, "web")
    both = token(data, "two", "web")
    metrics, _ = TokenFile(data.tokens).create_for_metrics()
    with pytest.raises(Misuse, match="is in use"):
        delete_project(data, "web")
    archive_project(data, "web")
    assert len(projects_of(data)) == 3, "archived: its tokens wait"
    assert not fsck(data, chosen(data, None), repair=False).left
    place, tokens = delete_project(data, "web")
    assert (place / ".lattice" / "config.json").is_file() and tokens == 2
    assert projects_of(data) == {both: ["two"], metrics.id: []}
    assert not fsck(data, chosen(data, None), repair=False).left


# --- closing ---


def test_one_command_at_a_time_has_a_project(data: DataDir) -> None:
    root = data.project("web").root
    with closing(root, "why not"):
        assert closed_because(root) == "why not"
        with pytest.raises(Misuse, match="another command"), closing(root, "me too"):
            pass
    assert closed_because(root) is None


def test_a_command_that_is_killed_leaves_nothing_closed(data: DataDir) -> None:
    root = data.project("web").root
    held = f"""
import sys, time
from pathlib import Path
from lattice_remote.server.datadir import closing
with closing(Path({str(root)!r}), "at work"):
    print("closed", flush=True)
    time.sleep(60)
"""
    command = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE)
    assert command.stdout is not None and command.stdout.readline() == b"closed\n"
    assert closed_because(root) == "at work"
    command.kill()
    command.wait()
    command.stdout.close()
    assert closed_because(root) is None


async def test_a_running_server_releases_and_reopens_the_project(data: DataDir) -> None:
    registry = ProjectRegistry(data)
    registry.start()
    try:
        project = registry.project("web")
        await project.opened()
        writer = project._worker
        assert writer is not None
        await asyncio.to_thread(archive_project, data, "web")
        await until(lambda: "web" not in registry._projects)
        assert await writer.wait(5), "its worker has ended"
        await asyncio.to_thread(unarchive_project, data, "web")
        again = registry.project("web")
        await again.opened()
        assert again is not project and again.history.epoch == project.history.epoch, "its history goes on"
    finally:
        await registry.stop()


def test_fsck_finishes_what_was_cut_off(data: DataDir, own: Path) -> None:
    root = data.project("web").root
    shutil.copytree(own / ".lattice", root / "incoming" / "one" / ".lattice")
    decide(root, ImportProject("0" * 32, "tok_1", "human:ana", "incoming/one", 2, 1, 1))
    (root / "incoming" / "two").mkdir()
    found = fsck(data, ["web"], repair=False)
    assert {finding.where for finding in found.findings} == {"adopting", "incoming/two"}
    repaired = fsck(data, ["web"], repair=True)
    assert not repaired.left, repaired
    assert tree_of(data.project("web").lattice) == tree_of(own / ".lattice")


def test_a_project_archived_before_it_was_in_its_place_comes_back(data: DataDir) -> None:
    """As a crash between the two renames of an adoption leaves it (decision 0012)."""
    root = data.project("web").root
    (root / "adopting").mkdir()
    os.rename(root / ".lattice", root / "adopting" / ".lattice")
    archive_project(data, "web")
    assert data.archived_slugs() == ["web"]
    unarchive_project(data, "web")
    assert data.slugs() == ["web"]
