"""Workers and readers forked from a template: descriptors, names, exits, and failures of the template."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from harness import FAKE_WORKER, until
from server_process import is_gone
from worker_process import make_project

from lattice_remote.server.ipc import Ready, ReceivedFrames, Stop, ToServer, encode_frames
from lattice_remote.server.project import child_process
from lattice_remote.server.project.child_process import PYTHON, ChildProcess, Template
from lattice_remote.server.project.worker_process import WORKER_COMMAND
from sandbox import descendants

READER_COMMAND = (*PYTHON, "lattice_remote.server.worker.reader")


@pytest.fixture
async def template() -> AsyncIterator[Template]:
    made = Template(is_for_many=True)
    yield made
    made.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "web")


@pytest.fixture
def run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let each Python process run this code first."""

    def place(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return place


async def is_ready(connection: socket.socket) -> None:
    """Wait until a worker reports that it has opened its project."""

    def receive() -> ToServer | None:
        frame = next(iter(ReceivedFrames(connection)), None)
        return msgspec.msgpack.decode(frame, type=ToServer) if frame is not None else None

    assert isinstance(await asyncio.to_thread(receive), Ready)


async def ended(child: ChildProcess) -> None:
    await until(child.has_ended)
    assert child.has_ended(), "it stays so"


def is_forked(child: ChildProcess, template: Template) -> bool:
    assert template.pid is not None
    return child.pid in descendants(template.pid)


def command_line(child: ChildProcess) -> list[bytes]:
    return Path(f"/proc/{child.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")


def opened_by(pid: int) -> list[str]:
    """Return the files and sockets that a process has open."""
    return [os.readlink(place) for place in Path(f"/proc/{pid}/fd").iterdir()]


async def test_a_worker_is_named_detected_and_stopped_like_one_that_is_started(
    template: Template, project: Path
) -> None:
    child, connection = await template.start_child(WORKER_COMMAND, project, "web")
    with connection:
        await is_ready(connection)
        assert is_forked(child, template) and not child.has_ended()
        shown = command_line(child)
        assert shown[5] == b"lattice_remote.server.worker.main"
        assert shown[-1] == b"web" and os.fsencode(project) in shown
        assert os.getpgid(child.pid) == child.pid
        connection.sendall(encode_frames(Stop()))
        await ended(child)
        assert not connection.recv(1)
    await until(lambda: is_gone(child.pid))
    child.kill()  # has no effect on the process that may have its number


async def test_a_killed_child_is_noticed_and_the_template_forks_on(template: Template, project: Path) -> None:
    first, connection = await template.start_child(READER_COMMAND, project, "web")
    with connection:
        first.kill()
        await ended(first)
    second, connection = await template.start_child(READER_COMMAND, project, "web")
    with connection:
        assert is_forked(second, template)
        second.end()
        assert second.has_ended()


async def test_a_child_has_no_descriptor_of_another_project(template: Template, tmp_path: Path) -> None:
    projects = [make_project(tmp_path / name) for name in ("one", "two", "three")]
    locks = [os.open(project / "lock", os.O_CREAT | os.O_RDWR) for project in projects]
    started = [
        await template.start_child(WORKER_COMMAND, project, project.name, inherited=[held])
        for project, held in zip(projects, locks, strict=True)
    ]
    for _, connection in started:
        await is_ready(connection)
    for project, (child, _) in zip(projects, started, strict=True):
        opened = opened_by(child.pid)
        assert sum(name.startswith("socket:") for name in opened) == 1
        assert str(project / "lock") in opened
        assert not [name for name in opened if str(tmp_path) in name and not name.startswith(str(project))]
    assert template.pid is not None
    assert not [name for name in opened_by(template.pid) if str(tmp_path) in name]
    for held, (child, connection) in zip(locks, started, strict=True):
        os.close(held)
        connection.close()
        await ended(child)


async def test_twelve_projects_are_opened_at_once(template: Template, tmp_path: Path) -> None:
    projects = [make_project(tmp_path / str(number)) for number in range(12)]
    started = await asyncio.gather(*(template.start_child(WORKER_COMMAND, each, each.name) for each in projects))
    for child, connection in started:
        await is_ready(connection)
        assert is_forked(child, template)
        connection.close()
    for child, _ in started:
        await ended(child)


async def test_a_killed_template_takes_no_child_with_it_and_is_replaced(
    template: Template, project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_process, "_RESTART_S", 3600.0)
    first, connection = await template.start_child(READER_COMMAND, project, "web")
    before = template.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    await until(lambda: template.pid is None)
    assert not first.has_ended()
    second, other = await template.start_child(READER_COMMAND, project, "web")  # at once: without a template
    assert template.pid is None and second.pid in descendants(os.getpid())
    assert "a process is started without it" in caplog.text
    monkeypatch.setattr(child_process, "_RESTART_S", 0.0)
    third, another = await template.start_child(READER_COMMAND, project, "web")
    assert template.pid not in (None, before) and is_forked(third, template)
    for child, each in ((first, connection), (second, other), (third, another)):
        each.close()
        await ended(child)


async def test_a_template_that_is_killed_over_a_request_does_not_fail_it(template: Template, project: Path) -> None:
    template.prepare()
    pid = template.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    starting = [asyncio.create_task(template.start_child(READER_COMMAND, project, "web")) for _ in range(3)]
    await until(lambda: len(template._replies) == 3)
    starting.pop().cancel()
    os.kill(pid, signal.SIGKILL)
    for child, connection in await asyncio.gather(*starting):
        connection.close()
        await ended(child)


async def test_a_child_that_the_server_does_not_know_touches_nothing(template: Template, project: Path) -> None:
    """Its successor may have the project by then, with the lock that both inherit (I1)."""
    template.prepare()
    pid = template.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    starting = asyncio.create_task(template.start_child(WORKER_COMMAND, project, "web"))
    await until(lambda: template._replies)
    starting.cancel()
    os.kill(pid, signal.SIGCONT)
    await until(lambda: not template._replies)  # forked, for a caller that is gone
    await until(lambda: not descendants(pid))
    assert not (project / "journal").exists() and not (project / "tmp").exists()


async def test_another_program_is_started_as_before(template: Template, project: Path) -> None:
    child, connection = await template.start_child(FAKE_WORKER, project, "web")
    with connection:
        assert template.pid is None
    await ended(child)


async def test_a_failed_fork_is_the_callers_error_alone(
    template: Template, project: Path, tmp_path: Path, run_first: Callable[[str], None]
) -> None:
    run_first(
        "import os\n"
        "fork = os.fork\n"
        "def refuse():\n"
        f"    if os.path.exists({str(tmp_path / 'full')!r}):\n"
        "        raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "    return fork()\n"
        "os.fork = refuse\n"
    )
    (tmp_path / "full").touch()
    with pytest.raises(OSError, match="temporarily unavailable"):
        await template.start_child(READER_COMMAND, project, "web")
    (tmp_path / "full").unlink()
    child, connection = await template.start_child(READER_COMMAND, project, "web")
    connection.close()
    assert is_forked(child, template) or child.has_ended()
    await ended(child)


async def test_beside_a_plugin_with_a_thread_nothing_is_forked(
    template: Template, project: Path, run_first: Callable[[str], None]
) -> None:
    run_first(
        "import sys, threading, time\n"
        "if 'lattice_remote.server.worker.template' in sys.orig_argv:\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    child, connection = await template.start_child(READER_COMMAND, project, "web")
    assert template.pid is None
    connection.close()
    await ended(child)


async def test_a_template_ends_with_its_server_and_its_children_too(project: Path) -> None:
    template = Template()
    child, connection = await template.start_child(WORKER_COMMAND, project, "web")
    await is_ready(connection)
    pid = template.pid
    assert pid is not None
    template.close()
    template.close()
    assert is_gone(pid) and not child.has_ended(), "a worker ends with its own connection"
    connection.close()
    await ended(child)


def test_loaded_objects_are_immortal_in_the_template() -> None:
    """No reference to them is counted, so a child gets no copies of the pages that it reads."""
    program = (
        "import gc, sys\n"
        "from lattice_remote.server.worker.template import make_immortal\n"
        "import json.decoder\n"
        "function = json.decoder.JSONDecoder.decode\n"
        "objects = [json.decoder, function, function.__code__, *function.__code__.co_consts, json.decoder.NaN]\n"
        "make_immortal([each for each in gc.get_objects() if each is not objects])\n"
        "assert all(sys.getrefcount(each) >= 1 << 30 for each in objects), [*map(sys.getrefcount, objects)]\n"
        "assert json.loads('[NaN, {}]')[1] == {}\n"
        "gc.collect()\n"
        "objects.clear()\n"
        "print('ok')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr
