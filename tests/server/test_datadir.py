"""Data directory: creation, lookup and locking, never left half made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import write_atomically
from lattice_remote.server.datadir import DataDir, administered, default_location, remember
from lattice_remote.server.registry import ProjectRegistry


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    made = DataDir(tmp_path / "data")
    made.create()
    return made


def test_the_directory_has_the_documented_contents(data: DataDir) -> None:
    assert sorted(os.listdir(data.path)) == ["config.json", "projects", "tokens.json"]
    assert data.tokens.stat().st_mode & 0o777 == 0o600
    assert data.config().hooks
    assert data.slugs() == []


def test_creating_it_twice_is_refused(data: DataDir) -> None:
    with pytest.raises(Misuse, match="already"):
        data.create()


def test_the_error_for_a_missing_directory_names_the_command_that_creates_it(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match=f"lattice-remote init {tmp_path}"):
        DataDir(tmp_path).config()


def test_root_leaves_nothing_in_a_directory_of_another_user(data: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        assert administered(data.path).path == data.path, "root's own"
        os.chown(data.path, 54321, -1)
        expected = "sudo -u '#54321'"
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        expected = "sudo -u "
    with pytest.raises(Misuse, match=expected):
        administered(data.path)
    assert administered(data.path / "new").path == data.path / "new"


@pytest.mark.parametrize("name", [".", "config.json", "tokens.json", "projects"])
async def test_the_server_warns_of_world_writable_files(
    data: DataDir, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def warnings() -> list[str]:
        caplog.clear()
        registry = ProjectRegistry(data)
        registry.start()
        await registry.stop()
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert await warnings() == []
    path = data.path / name
    mode = path.stat().st_mode
    path.chmod(mode | 0o002)
    assert await warnings() == [f"any user on this machine can change {path}; run: chmod o-w {path}"]
    path.chmod(mode | 0o020)  # a group has been chosen
    assert await warnings() == []


@pytest.mark.parametrize("text", ["{", '{"hoks": true}', '{"hooks": 3}', "[]"])
def test_invalid_settings_are_reported(data: DataDir, text: str) -> None:
    (data.path / "config.json").write_text(text)
    with pytest.raises(Misuse, match=r"config\.json"):
        data.config()


def test_a_project_is_what_lattice_itself_would_make(data: DataDir, tmp_path: Path) -> None:
    data.create_project("web", code="web", name=None, actor=None)
    own = tmp_path / "own" / "web"
    own.mkdir(parents=True)
    named = ["--path", own, "--project-code", "WEB", "--project-name", "web", "--actor", ""]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "lattice.cli.main",
            "init",
            *named,
            "--no-setup-claude",
            "--no-setup-agents",
            "--no-seed",
        ],
        check=True,
        capture_output=True,
    )
    made, expected = _files(data.project("web").lattice), _files(own / ".lattice")
    for files in (made, expected):
        config = json.loads(files["config.json"])
        del config["instance_id"]
        files["config.json"] = json.dumps(config)
    assert made == expected
    assert os.listdir(data.path / "projects") == ["web"]


def _files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() if path.is_file() else "" for path in root.rglob("*")}


@pytest.mark.parametrize("slug", ["", "-a", "A", "a b", "../x", ".", "a/b", "a" * 64, "ä", "web\n", ".new-1"])
def test_a_slug_out_of_the_grammar_is_refused_and_never_found(data: DataDir, slug: str) -> None:
    assert not data.has_project(slug)
    with pytest.raises(Misuse, match="bad project name"):
        data.create_project(slug, code="WEB", name=None, actor=None)
    assert os.listdir(data.path / "projects") == []


def test_a_project_that_lattice_refuses_leaves_nothing(data: DataDir) -> None:
    with pytest.raises(Misuse, match="project code"):
        data.create_project("web", code="TOOLONG", name=None, actor=None)
    with pytest.raises(Misuse, match="actor"):
        data.create_project("web", code="WEB", name=None, actor="nobody")
    assert os.listdir(data.path / "projects") == []


def test_a_project_is_not_made_over_another(data: DataDir) -> None:
    data.create_project("web", code="WEB", name=None, actor=None)
    with pytest.raises(Misuse, match="exists"):
        data.create_project("web", code="WEB", name=None, actor=None)


def test_a_summary_counts_the_tasks(data: DataDir) -> None:
    data.create_project("web", code="WEB", name="The web", actor="human:ana")
    tasks = data.project("web").lattice / "tasks"
    for name in ("task_1.json", "task_2.json", ".tmp.x.json"):
        (tasks / name).write_text("{}")
    summary = data.summary("web")
    assert (summary.slug, summary.code, summary.name, summary.tasks, summary.archived) == (
        "web",
        "WEB",
        "The web",
        2,
        0,
    )


def test_one_server_locks_the_directory_until_it_ends(data: DataDir) -> None:
    lock = data.lock()
    with pytest.raises(Misuse, match=f"pid {os.getpid()}"):
        data.lock()
    os.close(lock)
    os.close(data.lock())


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_DATA", str(tmp_path))
    assert default_location() == tmp_path
    monkeypatch.delenv("LATTICE_REMOTE_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert default_location().name == "lattice-remote"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, "text")  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot create"):
        DataDir(tmp_path / "file" / "data").create()


def test_the_only_data_directory_of_a_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATTICE_REMOTE_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    first, second = tmp_path / "first", tmp_path / "second"
    DataDir(first).create()
    assert first.stat().st_mode & 0o777 == 0o700
    remember(first)
    assert default_location() == first
    DataDir(second).create()
    remember(second)
    with pytest.raises(Misuse, match=r"several data directories: .*first, .*second; name one with --data"):
        default_location()
    shutil.rmtree(first)
    assert default_location() == second


@pytest.mark.parametrize(
    ("slug", "taken", "code"),
    [
        ("lattice", (), "LAT"),
        ("lattice", ("LAT",), "LATT"),
        ("lattice", ("LAT", "LATT", "LATTI"), "LA"),
        ("web-site", (), "WS"),
        ("web-site", ("WS",), "WEB"),
        ("my-big-new-app", (), "MBNA"),
        ("a1", (), "A"),
    ],
)
def test_a_code_is_derived_from_the_slug_and_unique(
    data: DataDir, slug: str, taken: tuple[str, ...], code: str
) -> None:
    for number, other in enumerate(taken):
        data.create_project(f"other-{number}", code=other, name=None, actor=None)
    assert data.create_project(slug, code=None, name=None, actor=None) == code
    assert data.summary(slug).code == code


def test_a_slug_without_letters_needs_a_code(data: DataDir) -> None:
    with pytest.raises(Misuse, match="--code"):
        data.create_project("2024", code=None, name=None, actor=None)
    assert data.slugs() == []
