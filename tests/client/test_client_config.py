"""remote.json, the grammar of URLs, tokens, and the agent's runtime directory."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lattice_remote.client import agent_runtime, credentials
from lattice_remote.client.config import Remote, check_name, parse_url, read_remote, write_remote
from lattice_remote.errors import Misuse, StorageError


@pytest.mark.parametrize(
    ("text", "project", "expected"),
    [
        ("http://127.0.0.1:8443", None, ("http://127.0.0.1:8443", None)),
        ("http://127.0.0.1:8443/", "web", ("http://127.0.0.1:8443", "web")),
        ("HTTPS://Host.Example/web", None, ("https://host.example", "web")),
        ("https://host/projects/web/", "web", ("https://host", "web")),
        ("http://[::1]:80/a-b", None, ("http://[::1]:80", "a-b")),
        (" http://host:08443 ", None, ("http://host:8443", None)),
        ("https://Host/Lattice/", None, ("https://host/Lattice/", None)),
        ("https://host/lattice/", "lattice", ("https://host/lattice/", "lattice")),
        ("https://host/a/b/web", None, ("https://host/a/b/", "web")),
        ("https://host/a/projects/web/dashboard/?x=1#y", None, ("https://host/a/", "web")),
        ("https://host/projects/web/dashboard/#/tasks", "web", ("https://host", "web")),
        ("https://host/projects", None, ("https://host", "projects")),
    ],
)
def test_urls_have_one_form(text: str, project: str | None, expected: tuple[str, str | None]) -> None:
    assert parse_url(text, project) == expected


@pytest.mark.parametrize(
    ("text", "project"),
    [
        ("host:8443", None),
        ("ftp://host", None),
        ("http://", None),
        ("http://host:0", None),
        ("http://host:65536", None),
        ("http://user:secret@host", None),
        ("http://host/../b", None),
        ("http://host/a/./b/", None),
        ("http://host/a//b", None),
        ("http://host/a%2fb/web", None),
        ("http://host/a/?x", None),
        ("http://host/lattice", "web"),
        ("http://host/Web", None),
        ("http://host/web", "other"),
        ("http://host", "../x"),
        ("http://host/web?x=1", None),
        ("http://host", "a" * 64),
    ],
)
def test_malformed_urls_are_refused(text: str, project: str | None) -> None:
    with pytest.raises(Misuse):
        parse_url(text, project)


def test_a_remote_is_read_as_it_was_written(tmp_path: Path) -> None:
    remote = Remote("origin", "https://host:1", "web")
    write_remote(str(tmp_path), remote)
    assert read_remote(str(tmp_path)) == remote
    assert remote.websocket_url == "wss://host:1/projects/web/ws"
    below = Remote("origin", "https://host/a/", "a")
    write_remote(str(tmp_path), below)
    assert read_remote(str(tmp_path)) == below and parse_url(below.place) == ("https://host/a/", "a")
    assert below.websocket_url == "wss://host/a/projects/a/ws"
    assert {path.name for path in tmp_path.iterdir()} == {"remote.json", "home"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 1, "url": "http://h", "project": "p"}', "\0", '{"url": 7}'])
def test_a_malformed_remote_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "remote.json").write_text(text)
    with pytest.raises(StorageError, match=r"remote\.json is not valid"):
        read_remote(str(tmp_path))


def test_the_error_for_a_malformed_remote_suggests_its_repair(tmp_path: Path) -> None:
    (tmp_path / "remote.json").write_text("<<<<<<< HEAD\n")
    (tmp_path / "cache_state.json").write_text('{"url": "http://h:1", "project": "board"}')
    with pytest.raises(
        StorageError, match="remove the file, then run: lattice remote add origin http://h:1 --project board"
    ):
        read_remote(str(tmp_path))


def test_the_error_for_a_missing_remote_suggests_adding_one(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="lattice remote add origin"):
        read_remote(str(tmp_path))
    with pytest.raises(Misuse):
        check_name("a b")


# --- tokens ---


def test_tokens_are_readable_by_this_user_only(home: Path) -> None:
    credentials.store("http://h", "web", "one")
    credentials.store("http://h", "*", "any")
    path = Path(credentials.tokens_path())
    assert path == home / "config/lattice/tokens.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {p.name for p in path.parent.iterdir()} == {"tokens.json", ".tokens.json.lock"}
    assert credentials.stored("http://h", "web") == "one"
    assert credentials.stored("http://h", "other") == "any"
    assert credentials.stored("http://elsewhere", "web") is None


def test_tokens_are_forgotten_per_project_and_per_server(home: Path) -> None:
    credentials.store("http://h", "web", "one")
    credentials.store("http://h", "app", "two")
    assert credentials.forget("http://h", "web") == 1
    assert credentials.stored("http://h", "app") == "two"
    assert credentials.forget("http://h") == 1
    assert json.loads(Path(credentials.tokens_path()).read_text()) == {"tokens": {}}


@pytest.mark.parametrize(
    "text", ['{"http://h": "ltr_x"}', '{"http://h/": "ltr_x"}', '{"tokens": {"http://h": "ltr_x"}}']
)
def test_a_file_of_tokens_written_by_hand_is_read_and_kept(home: Path, text: str) -> None:
    path = tokens_file(text)
    assert credentials.stored("http://h", "web") == "ltr_x"
    credentials.store("http://h", "api", "ltr_y")
    assert json.loads(path.read_text()) == {"tokens": {"http://h": {"*": "ltr_x", "api": "ltr_y"}}}


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "ümlaut", "x" * 513])
def test_a_token_that_cannot_be_sent_is_refused(token: str) -> None:
    with pytest.raises(Misuse) as error:
        credentials.store("http://h", "web", token)
    assert not token or token not in error.value.message


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"tokens": 1}', '{"tokens": {"http://h": ["ltr_x"]}}', '{"h": "ltr_x"}', "[" * 100_000, "\xff"]
)
def test_a_damaged_file_of_tokens_is_not_overwritten(home: Path, text: str) -> None:
    path = tokens_file(text)
    with pytest.raises(StorageError, match="not valid") as error:
        credentials.store("http://h", "web", "one")
    assert path.read_text() == text and "ltr_x" not in error.value.message


def tokens_file(text: str = '{"tokens": {"http://h": {"web": "ltr_x"}}}') -> Path:
    path = Path(credentials.tokens_path())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o604])
def test_tokens_accessible_to_others_are_refused(home: Path, mode: int) -> None:
    tokens_file().chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        credentials.stored("http://h", "web")


def test_a_token_file_of_another_user_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(tokens_file(), 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StorageError, match="belongs to another user"):
        credentials.stored("http://h", "web")


def test_a_link_or_a_pipe_that_replaces_the_tokens_is_refused(home: Path) -> None:
    path = tokens_file()
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    for act in (lambda: credentials.stored("http://h", "web"), lambda: credentials.store("http://h", "web", "one")):
        with pytest.raises(StorageError, match="is a link"):
            act()
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(StorageError, match="not a plain file"):
        credentials.stored("http://h", "web")


def test_concurrent_writers_of_tokens_lose_no_update(home: Path) -> None:
    program = (
        "import sys; from lattice_remote.client import credentials\n"
        "for n in range(10): credentials.store('http://h', f's{sys.argv[1]}-{n}', 'x')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(n)]) for n in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    kept = json.loads(Path(credentials.tokens_path()).read_text())["tokens"]["http://h"]
    assert sorted(kept) == sorted(f"s{writer}-{n}" for writer in range(4) for n in range(10))


def test_the_environment_has_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials.from_environment() is None
    monkeypatch.setenv("LATTICE_TOKEN", " ltr_x\n")
    assert credentials.from_environment() == "ltr_x"


# --- the agent's runtime directory ---


def test_the_runtime_directory_is_accessible_to_this_user_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_runtime, "_MAX_SOCKET_PATH_BYTES", 1000)
    place = agent_runtime.locate()
    assert place.directory == str(home / "run")
    os.mkdir(place.directory)
    os.chmod(place.directory, 0o755)  # noqa: S103
    agent_runtime.prepare(place)
    assert stat.S_IMODE(os.stat(place.directory).st_mode) == 0o700


def test_a_runtime_directory_that_is_a_link_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_runtime, "_MAX_SOCKET_PATH_BYTES", 1000)
    (home / "elsewhere").mkdir()
    (home / "run").symlink_to(home / "elsewhere")
    with pytest.raises(StorageError, match="not a directory of this user"):
        agent_runtime.prepare(agent_runtime.locate())


def test_a_long_socket_path_is_replaced_by_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_RUNTIME_DIR", "/" + "x" * 150)
    place = agent_runtime.locate()
    assert len(place.socket) < 108 and place.socket == agent_runtime.locate().socket
