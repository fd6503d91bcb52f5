"""``resolve_backend``: the board that a ``lattice`` command would use."""

import json
from pathlib import Path

import pytest

from lattice_remote import LocalStorage, RemoteStorage, resolve_backend
from lattice_remote.errors import Misuse, StorageError


def project(root: Path, remote: str | None = None) -> Path:
    lattice = root / ".lattice"
    lattice.mkdir(parents=True)
    (lattice / "config.json").write_text("{}")
    if remote is not None:
        (lattice / "remote.json").write_text(remote)
    return root


REMOTE = json.dumps({"name": "origin", "url": "http://127.0.0.1:1", "project": "board"})


def test_the_nearest_project_above_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = project(tmp_path / "with spaces and ünï", REMOTE)
    inner = project(outer / "in" / "here")
    deep = inner / "a" / "b"
    deep.mkdir(parents=True)
    found = resolve_backend(deep)
    assert isinstance(found, LocalStorage) and found.root_path == inner
    found = resolve_backend(outer / "in")
    assert isinstance(found, RemoteStorage) and found.root_path == outer
    monkeypatch.chdir(deep)
    assert resolve_backend().root_path == inner
    monkeypatch.setenv("LATTICE_ROOT", "../../../..")
    assert isinstance(resolve_backend(), RemoteStorage)
    assert resolve_backend(deep).root_path == inner, "what is asked for goes before the environment"


def test_a_directory_without_a_project_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misuse, match="lattice init"):
        resolve_backend(tmp_path)
    with pytest.raises(Misuse, match="lattice init"):
        LocalStorage(tmp_path)
    with pytest.raises(Misuse, match="no remote"):
        RemoteStorage(project(tmp_path / "local"))
    with pytest.raises(StorageError, match="not valid"):
        resolve_backend(project(tmp_path / "damaged", "{"))
    monkeypatch.setenv("LATTICE_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(Misuse, match="LATTICE_ROOT"):
        resolve_backend()
