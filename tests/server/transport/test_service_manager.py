"""Notifications to the service manager: the server is ready, and it stops."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import make_data
from server_process import Process

from lattice_remote.server.transport.listener import notify, service_manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20)
        yield listening


def test_the_service_manager_is_notified_of_start_and_end(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    process = Process(make_data(tmp_path / "data")[0])
    try:
        assert manager.recv(100) == b"READY=1"
        assert process.get("/healthz")[0] == 200
    finally:
        assert process.end() == 0
    assert manager.recv(100) == b"STOPPING=1"


def test_workers_and_hooks_do_not_inherit_it(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    service_manager()("READY=1")
    assert manager.recv(100) == b"READY=1"
    assert "NOTIFY_SOCKET" not in os.environ


def test_an_abstract_socket_is_supported() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0lattice-remote-{os.getpid()}")
        manager.settimeout(20)
        notify(f"@lattice-remote-{os.getpid()}", "STOPPING=1")
        assert manager.recv(100) == b"STOPPING=1"


def test_a_missing_service_manager_is_logged_and_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notify(str(tmp_path / "gone"), "READY=1")
    assert "cannot report READY=1 to" in caplog.text and "No such file" in caplog.text


def test_without_a_service_manager_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    notify("", "READY=1")
    assert caplog.text == ""
