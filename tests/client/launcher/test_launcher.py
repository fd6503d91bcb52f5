"""The launcher matches ``lattice`` in output, exit codes, signals and process attributes (I13)."""

import contextlib
import json
import os
import pty
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lattice_remote.client.launcher import script
from launcher_programs import LauncherPrograms, install, wait_until_warm, warm_processes
from preloaded_programs import warm
from sandbox import BIN, Client, Server, board, wait_for

pytestmark = pytest.mark.e2e

ANA = ("--actor", "human:ana")


class Launched:
    """A client with a launcher, which can also run commands with the real ``lattice``."""

    def __init__(self, server: Server, client: Client, programs: LauncherPrograms) -> None:
        self.server, self.client, self.programs = server, client, programs

    def run(self, *argv: str, real: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
        settings: dict[str, object] = {"cwd": self.client.dir, "env": self.client.env, "stdin": subprocess.DEVNULL}
        program = BIN / "lattice" if real else self.programs.launcher
        everything = {"capture_output": True, "text": True, **settings, **options}
        return subprocess.run([program, *argv], check=False, **everything)  # type: ignore[call-overload]

    def executes(self, *argv: str, **options: object) -> bool:
        """Return whether the launcher leaves a command to the real ``lattice``."""
        before = len(self.programs.executed())
        self.run(*argv, **options)
        return len(self.programs.executed()) > before

    def start(self, *argv: str, **options: object) -> subprocess.Popen[bytes]:
        settings: dict[str, object] = {"cwd": self.client.dir, "env": self.client.env, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(
            [self.programs.launcher, *argv],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings, **options},  # type: ignore[call-overload]
        )

    def run_in_shell(self, script: str, **options: object) -> subprocess.CompletedProcess[str]:
        settings: dict[str, object] = {"cwd": self.client.dir, "env": self.client.env, "stdin": subprocess.DEVNULL}
        everything = {"capture_output": True, "text": True, "timeout": 60, **settings, **options}
        return subprocess.run(["bash", "-c", script], check=False, **everything)  # type: ignore[call-overload]

    def warm_process(self) -> int:
        """Return the process id of the warm process. Starts it if necessary."""
        wait_until_warm(self.client, self.programs)
        return int(json.loads(self.client.run("remote", "launcher", "status", "--json").stdout)["data"]["warm"]["pid"])

    def children(self) -> list[int]:
        """Return the process ids of the running commands."""
        return [child for pid in warm_processes(self.client) for child in _children_of(pid)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    with board("ana", programs=warm()) as (server, (ana,)):
        ana.ok("create", "First", *ANA)
        programs = install(tmp_path_factory.mktemp("launcher"))
        wait_until_warm(ana, programs)
        yield Launched(server, ana, programs)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Create a private directory with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="warm-") as directory:
        yield Path(directory)


@pytest.mark.parametrize(
    "argv",
    [
        ("list",),
        ("list", "--json"),
        ("show", "LAT-1"),
        ("show", "LAT-999"),
        ("show", "LAT-999", "--json"),
        ("--help",),
        ("list", "--help"),
        ("--version",),
        ("nonsense",),
        ("list", "--nonsense"),
        ("comment", "LAT-1"),
        ("status", "LAT-1", "nowhere", *ANA),
        ("resource", "status", "none"),
        ("comment", "LAT-1", "x", "--actor", "human:ben"),
    ],
    ids=" ".join,
)
def test_output_and_exit_code_are_those_of_lattice(launched: Launched, argv: tuple[str, ...]) -> None:
    before = len(launched.programs.executed())
    ours, theirs = launched.run(*argv), launched.run(*argv, real=True)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert len(launched.programs.executed()) == before, "the warm process was not used"


def test_a_write_is_applied_once_under_the_callers_name(launched: Launched) -> None:
    assert not launched.executes("comment", "LAT-1", "by the launcher", *ANA)
    comments = json.loads(launched.run("comments", "LAT-1", "--json").stdout)["data"]
    assert [c["author"] for c in comments if c["body"] == "by the launcher"] == ["human:ana"]


@pytest.mark.parametrize(
    "argv",
    [
        ("attach", "LAT-1", "FILE", *ANA),
        ("comment", "LAT-1", "--file", "FILE", *ANA),
        ("remote", "status"),
        ("plugins",),
        ("dashboard", "--port", "nonsense"),
        ("init", "--path", "/nowhere"),
        ("setup-prompt",),
        (),
    ],
    ids=lambda argv: " ".join(argv) or "nothing",
)
def test_a_command_that_reads_files_or_serves_runs_in_its_own_process(
    launched: Launched, tmp_path: Path, argv: tuple[str, ...]
) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    assert launched.executes(*(str(file) if part == "FILE" else part for part in argv))


def test_a_directory_without_a_remote_is_left_to_lattice(launched: Launched, tmp_path: Path) -> None:
    assert launched.executes("list", cwd=tmp_path)
    assert launched.executes("list", env={**launched.client.env, "LATTICE_ROOT": str(tmp_path)})
    assert launched.executes("list", env={**launched.client.env, "LATTICE_ROOT": ""})
    assert not launched.executes("list", cwd="/", env={**launched.client.env, "LATTICE_ROOT": str(launched.client.dir)})
    below = launched.client.dir / "below"
    below.mkdir()
    assert not launched.executes("list", cwd=below)


def test_each_environment_has_its_own_warm_process(launched: Launched) -> None:
    """These are variables that an interpreter reads at its start. All others are sent with the command."""
    env = launched.client.env
    assert launched.executes("list", env={**env, "PYTHONIOENCODING": "latin-1"})
    assert not launched.executes("list", env={**env, "COLUMNS": "40", "TZ": "Asia/Tokyo"})
    assert launched.executes("list", env={**env, "LATTICE_REMOTE_LAUNCHER": "off"})


def test_bytes_that_are_not_utf8_arrive_unchanged(launched: Launched) -> None:
    odd = os.fsdecode(b"odd \xff\xfe \xc3\xa9")
    ours, theirs = launched.run("show", odd), launched.run("show", odd, real=True)
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    long = "x" * 120_000
    assert launched.run("comment", "LAT-1", long, *ANA).returncode == 0
    assert long in launched.run("comments", "LAT-1").stdout


def test_a_closed_descriptor_is_left_to_lattice(launched: Launched) -> None:
    for redirection in ("<&-", ">&-", "2>&-"):
        before = len(launched.programs.executed())
        subprocess.run(
            ["sh", "-c", f"{launched.programs.launcher} list {redirection}"],
            cwd=launched.client.dir,
            env=launched.client.env,
            capture_output=True,
            check=False,
        )
        assert len(launched.programs.executed()) == before + 1


def test_a_closed_pipe_ends_a_command_as_lattice_ends(launched: Launched) -> None:
    def exit_code(program: Path) -> int:
        reader, writer = os.pipe()
        os.close(reader)
        with contextlib.closing(os.fdopen(writer, "wb")) as pipe:
            return subprocess.run(
                [program, "list"], cwd=launched.client.dir, env=launched.client.env, stdout=pipe, check=False
            ).returncode

    assert exit_code(launched.programs.launcher) == exit_code(BIN / "lattice")


def test_output_that_cannot_be_written_ends_a_command_as_lattice_ends(launched: Launched) -> None:
    def ended(program: Path, command: str) -> tuple[int, list[str]]:
        done = launched.run_in_shell(f"{program} {command}")
        return done.returncode, done.stderr.splitlines()[-2:]  # a traceback shows the program's own frames

    for command in ("list >/dev/full", "list --json >/dev/full", "list >/dev/full 2>&1", "nonsense 2>/dev/full"):
        assert ended(launched.programs.launcher, command) == ended(BIN / "lattice", command)


@pytest.mark.parametrize("redirection", [">/dev/full", ">/dev/full 2>&1", ">/dev/full 2>/dev/full", "2>&1 | true"])
def test_a_write_whose_output_is_lost_runs_once(launched: Launched, redirection: str) -> None:
    launched.warm_process()
    body = f"lost {redirection}"
    launched.run_in_shell(f"{launched.programs.launcher} comment LAT-1 '{body}' {' '.join(ANA)} {redirection}")
    comments = json.loads(launched.run("comments", "LAT-1", "--json").stdout)["data"]
    assert [comment["body"] for comment in comments].count(body) == 1


def test_process_attributes_are_the_callers(launched: Launched, tmp_path: Path) -> None:
    """``show`` runs the caller's ``git``, which here reports the attributes of its parent's process."""
    probe = tmp_path / "git"
    probe.write_text(
        f"#!{sys.executable} -IS\n"
        "import os, sys\n"
        "pid = os.getppid()\n"
        "status = open(f'/proc/{pid}/status').read()\n"
        "kept = [line for line in status.splitlines() if line.startswith(('Umask', 'SigIgn', 'SigBlk', 'Uid', 'Gid',"
        " 'Groups', 'Cap', 'NoNewPrivs', 'Cpus_allowed_list'))]\n"
        "limits = open(f'/proc/{pid}/limits').read()\n"
        "nice = os.getpriority(os.PRIO_PROCESS, pid)\n"
        "cwd = os.readlink(f'/proc/{pid}/cwd')\n"
        f"open({str(tmp_path / 'probed')!r}, 'w').write(repr((kept, limits, nice, cwd, sorted(os.environ.items()))))\n"
    )
    probe.chmod(0o755)
    env = {**launched.client.env, "PATH": f"{tmp_path}:{launched.client.env['PATH']}", "TZ": "Asia/Tokyo"}

    def restrict() -> None:
        os.umask(0o027)
        os.nice(3)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    found = []
    for real in (False, True):
        before = len(launched.programs.executed())
        done = launched.run("show", "LAT-1", real=real, env=env, preexec_fn=restrict)
        assert done.returncode == 0, done.stderr
        assert len(launched.programs.executed()) == before
        kept, limits, nice, cwd, environ = eval((tmp_path / "probed").read_text())  # noqa: S307 - written above
        found.append((kept, limits, nice, cwd, [pair for pair in environ if pair[0] != "_"]))
    assert found[0] == found[1]


def test_a_caller_with_more_rights_replaces_the_warm_process(launched: Launched) -> None:
    """A warm process that started under a lower limit cannot raise it."""
    before = launched.warm_process()
    resource.prlimit(before, resource.RLIMIT_NOFILE, (100, 100))
    done = launched.run("list")
    assert done.returncode == 0 and "First" in done.stdout
    wait_until_warm(launched.client, launched.programs)


# --- signals ---


@pytest.fixture
def waiting(launched: Launched) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start commands that wait for a resource held by another agent."""
    name = f"gpu-{time.monotonic_ns()}"
    launched.client.ok("resource", "create", name, *ANA)
    launched.client.ok("resource", "acquire", name, "--actor", "agent:holder")
    started: list[subprocess.Popen[bytes]] = []

    def start(**options: object) -> subprocess.Popen[bytes]:
        before = launched.children()
        process = launched.start(
            "resource", "acquire", name, "--wait", "--timeout", "60", "--actor", "agent:waiter", **options
        )
        started.append(process)
        wait_for(lambda: len(launched.children()) > len(before), "the command to run")
        wait_for(lambda: _is_waiting(launched), "the command to wait")
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)
    wait_for(lambda: not launched.children(), "the commands to end")
    launched.client.ok("resource", "release", name, "--actor", "agent:holder")


def _is_waiting(launched: Launched) -> bool:
    """Return whether each command waits for the agent, with a connection besides its launcher's."""
    with contextlib.suppress(OSError):  # it is opening and closing files
        return all(_sockets(child) == 2 and _state(child) == "S" for child in launched.children())
    return False


def _sockets(pid: int) -> int:
    return sum(os.readlink(place).startswith("socket:") for place in Path(f"/proc/{pid}/fd").iterdir())


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_command_as_it_ends_lattice(
    launched: Launched, waiting: Callable[..., subprocess.Popen[bytes]], number: signal.Signals
) -> None:
    process = waiting()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert (process.returncode, stdout, stderr) == (1, b"", b"\nAborted!\n")
    else:
        assert process.returncode == -number
    wait_for(lambda: not launched.children(), "the command to end")


def test_a_signal_after_the_end_of_the_warm_process_acts_on_the_launcher(tmp_path: Path) -> None:
    code = """
import os, signal
from lattice_remote.client.launcher import script
signal.signal(signal.SIGHUP, signal.SIG_IGN)
script._may_be_warm = lambda *_: True
script._run = lambda *_: script._forward_signals(os.pidfd_open(os.getpid()))
script._execute = lambda *_: print(*[int(signal.getsignal(n)) for n in (*script._FORWARDED, signal.SIGTSTP)])
script.main("lattice", "python")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "1", "0", "0"]  # ignored signals stay ignored


def test_a_killed_launcher_leaves_no_command(
    launched: Launched, waiting: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = waiting()
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not launched.children(), "the command to end")


def test_a_command_is_suspended_and_continued(
    launched: Launched, waiting: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = waiting(process_group=0)
    (child,) = launched.children()
    os.killpg(process.pid, signal.SIGTSTP)
    wait_for(lambda: _state(process.pid) == "T" and _state(child) == "T", "both to stop")
    os.killpg(process.pid, signal.SIGCONT)
    wait_for(lambda: _state(process.pid) == "S" and _state(child) == "S", "both to continue")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_ctrl_c_at_a_terminal_aborts_once(launched: Launched, waiting: Callable[..., subprocess.Popen[bytes]]) -> None:
    parent, terminal = pty.openpty()
    process = waiting(
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=_take_terminal
    )
    os.close(terminal)
    os.write(parent, b"\x03")
    assert process.wait(30) == 1
    shown = b""
    with contextlib.suppress(OSError):
        while piece := os.read(parent, 4096):
            shown += piece
    os.close(parent)
    assert shown.count(b"Aborted!") == 1


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_receives_the_same_bytes(launched: Launched) -> None:
    """Covers colours, width and order."""

    def shown(program: Path, *argv: str) -> bytes:
        parent, terminal = pty.openpty()
        import fcntl
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        process = subprocess.Popen(
            [program, *argv],
            cwd=launched.client.dir,
            env={**launched.client.env, "TERM": "xterm-256color"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        found = b""
        with contextlib.suppress(OSError):
            while piece := os.read(parent, 4096):
                found += piece
        process.wait(30)
        os.close(parent)
        return found

    for argv in (("list", "--help"), ("list",), ("weather",), ("show", "LAT-9999")):
        assert shown(launched.programs.launcher, *argv) == shown(BIN / "lattice", *argv)


# --- the warm process ---


def test_the_warm_process_keeps_no_descriptor_of_its_first_command(launched: Launched, tmp_path: Path) -> None:
    """An open writing end of a pipe would block its reader for ever, and an inherited lock would stay locked."""
    launched.client.run("remote", "agent", "stop")
    lock = tmp_path / "lock"
    done = launched.run_in_shell(f"{{ flock 9; {launched.programs.launcher} list 3>&1; }} 9>{lock} | cat")
    assert "First" in done.stdout
    assert launched.run_in_shell(f"flock --nonblock {lock} true").returncode == 0
    fds = Path(f"/proc/{launched.warm_process()}/fd")
    places = {int(fd.name): os.readlink(fd) for fd in fds.iterdir()}
    assert [places[number] for number in range(3)] == ["/dev/null"] * 3
    assert all(place.startswith("socket:") or place.endswith(".lock") for fd, place in places.items() if fd > 2)
    assert str(lock) not in places.values()


def test_warm_process_and_agent_handle_signals_that_the_first_caller_blocked(launched: Launched) -> None:
    def deaf() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTSTP, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGCHLD})

    def signals(pid: int) -> list[int]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        of_libc = 1 << 32 - 1 | 1 << 33 - 1  # libc reserves these; no program can set them
        return [int(line.split()[1], 16) & ~of_libc for line in lines if line.startswith(("SigBlk", "SigIgn"))]

    launched.client.run("remote", "agent", "stop")
    launched.run("list", preexec_fn=deaf)
    agent = json.loads(launched.client.ok("remote", "agent", "status", "--json"))["data"]["pid"]
    warm_pid = launched.warm_process()
    blocked_and_ignored = [0, 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1]
    assert signals(agent) == signals(warm_pid) == blocked_and_ignored
    os.kill(warm_pid, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{warm_pid}").exists(), "the warm process to exit")


def test_a_new_warm_process_starts_while_a_stopped_one_finishes_its_commands(
    launched: Launched, waiting: Callable[..., subprocess.Popen[bytes]]
) -> None:
    before = launched.warm_process()
    waiting()
    os.kill(before, signal.SIGTERM)
    wait_for(lambda: launched.executes("list"), "the warm process to leave its socket")
    wait_until_warm(launched.client, launched.programs)
    assert Path(f"/proc/{before}").exists()
    assert launched.warm_process() != before


def test_a_killed_warm_process_loses_and_repeats_no_command(launched: Launched) -> None:
    """I6: the real ``lattice`` runs the command again under its request id."""
    server = launched.server
    for number in range(3):
        word = f"once-{number}"
        launched.run("list")
        wait_until_warm(launched.client, launched.programs)
        warm_pid = launched.warm_process()
        process = server.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            command = launched.start("comment", "LAT-1", word, *ANA)
            wait_for(lambda pid=warm_pid: _children_of(pid), "the command to run")  # type: ignore[misc]
            wait_for(
                lambda pid=warm_pid: all(_state(child) == "S" for child in _children_of(pid)),  # type: ignore[misc]
                "the command to wait for the server",
            )
            os.kill(warm_pid, signal.SIGKILL)
        finally:
            process.send_signal(signal.SIGCONT)
        stdout, stderr = command.communicate(timeout=60)
        assert command.returncode == 0, stderr
        assert stdout.startswith(b"Comment added")
        comments = json.loads(launched.client.ok("comments", "LAT-1", "--json"))["data"]
        assert [comment["body"] for comment in comments].count(word) == 1


def _children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def test_a_request_id_is_used_by_one_command_only(launched: Launched) -> None:
    """A program started by a command must not reuse the command's id."""
    env = {**launched.client.env, "LATTICE_REMOTE_REQUEST": "0" * 32}
    assert launched.run("comment", "LAT-1", "one", *ANA, env=env).returncode == 0
    assert launched.run("comment", "LAT-1", "two", *ANA, env=env).returncode == 0


def test_twenty_first_commands_start_one_warm_process(launched: Launched) -> None:
    launched.client.run("remote", "agent", "stop")
    commands = [launched.start("list") for _ in range(20)]
    for command in commands:
        stdout, stderr = command.communicate(timeout=60)
        assert (command.returncode, stderr) == (0, b"")
        assert b"First" in stdout
    wait_until_warm(launched.client, launched.programs)
    runtime = Path(launched.client.env["XDG_RUNTIME_DIR"])
    assert len(list(runtime.glob("warm-*.sock"))) <= 2  # an earlier test started one with another encoding


def test_an_idle_warm_process_exits_and_leaves_no_socket(launched: Launched, runtime: Path) -> None:
    env = {**launched.client.env, "LATTICE_REMOTE_RUNTIME_DIR": str(runtime), "LATTICE_REMOTE_AGENT_IDLE_S": "1"}
    launched.run("list", env=env)
    wait_for(lambda: any(lock.read_text() for lock in runtime.glob("warm-*.lock")), "the warm process")
    (lock,) = runtime.glob("warm-*.lock")
    wait_for(lambda: not Path(f"/proc/{lock.read_text().strip()}").exists(), "the warm process to exit")
    assert not list(runtime.glob("warm-*.sock"))
    launched.client.run("remote", "agent", "stop", env={"LATTICE_REMOTE_RUNTIME_DIR": str(runtime)})


def test_a_replaced_package_replaces_the_warm_process(launched: Launched, tmp_path: Path, runtime: Path) -> None:
    package = tmp_path / "site" / "lattice_remote"
    shutil.copytree(Path(script.__file__).parents[2], package, ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / "lattice"
    text = launched.programs.launcher.read_text()
    copy.write_text(text.replace(str(Path(script.__file__).parent), str(package / "client" / "launcher")))
    copy.chmod(0o755)
    env = {**launched.client.env, "PYTHONPATH": str(package.parent), "LATTICE_REMOTE_RUNTIME_DIR": str(runtime)}

    def executes() -> bool:
        before = len(launched.programs.executed())
        subprocess.run([copy, "list"], cwd=launched.client.dir, env=env, capture_output=True, check=True)
        return len(launched.programs.executed()) > before

    wait_for(lambda: not executes(), "the warm process")
    os.utime(package / "__init__.py")
    assert executes()
    wait_for(lambda: not executes(), "another warm process")
    for options in (env, {**env, "PYTHONPATH": ""}):
        launched.client.run("remote", "agent", "stop", env=options)


def test_a_package_replaced_while_it_is_loaded_is_never_served(
    launched: Launched, tmp_path: Path, runtime: Path
) -> None:
    package = tmp_path / "site" / "lattice_remote"
    shutil.copytree(Path(script.__file__).parents[2], package, ignore=shutil.ignore_patterns("__pycache__"))
    last = package / "client" / "attachments.py"  # loaded by the warm process only
    last.write_text(f"{last.read_text()}\nos.utime({str(package / '__init__.py')!r})\n")
    env = {**launched.client.env, "PYTHONPATH": str(package.parent), "LATTICE_REMOTE_RUNTIME_DIR": str(runtime)}
    for _ in range(3):
        for lock in runtime.glob("warm-*.lock"):
            lock.write_text("")
        assert launched.executes("list", env=env)
        wait_for(lambda: any(lock.read_text().strip() for lock in runtime.glob("warm-*.lock")), "a warm process", 60)
        [pid] = [lock.read_text().strip() for lock in runtime.glob("warm-*.lock")]
        wait_for(lambda pid=pid: not Path("/proc", pid).exists(), "it to exit", 60)  # type: ignore[misc]
    launched.client.run("remote", "agent", "stop", env=env)


def test_a_process_that_accepts_no_connection_delays_no_command(launched: Launched) -> None:
    """The kernel queues connections, and blocks further ones without a timeout."""
    stopped = launched.warm_process()
    env = {os.fsencode(name): os.fsencode(value) for name, value in launched.client.env.items()}
    path = script.socket_path(env, script.world(env))
    assert path is not None
    os.kill(stopped, signal.SIGSTOP)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(500):
                stream = stack.enter_context(socket.socket(socket.AF_UNIX))
                stream.setblocking(False)
                try:
                    stream.connect(path)
                except BlockingIOError:
                    break
            else:
                raise AssertionError("the queue has no bound")
            done = launched.run("list", timeout=60)
            assert done.returncode == 0 and "First" in done.stdout
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until_warm(launched.client, launched.programs)


def test_concurrent_commands_run_once_each(launched: Launched) -> None:
    """A command may end before its launcher is scheduled again. No answer is lost, and nothing runs twice."""
    launched.warm_process()
    before = launched.programs.executed()

    def run(number: int) -> bool:
        if number % 2:
            return launched.run("comment", "LAT-1", "--nonsense").stderr.count("Usage") == 1
        return launched.run("list").stdout.count("First") == 1

    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(run, range(400)))
    assert len(launched.programs.executed()) - len(before) < 20, "the launcher waits a second for a busy machine"


# --- security ---


def test_another_network_namespace_has_its_own_warm_process(launched: Launched) -> None:
    unshare = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
    before = len(launched.programs.executed())
    subprocess.run(
        [*unshare, str(launched.programs.launcher), "list"],
        cwd=launched.client.dir,
        env=launched.client.env,
        capture_output=True,
        check=False,
    )
    assert len(launched.programs.executed()) == before + 1


def test_a_directory_writable_by_others_is_not_trusted(launched: Launched, runtime: Path) -> None:
    runtime.chmod(0o777)
    env = {**launched.client.env, "LATTICE_REMOTE_RUNTIME_DIR": str(runtime)}
    path = script.socket_path(
        {os.fsencode(name): os.fsencode(value) for name, value in env.items()},
        script.world({os.fsencode(name): os.fsencode(value) for name, value in env.items()}),
    )
    assert path is not None
    with socket.socket(socket.AF_UNIX) as trap:
        trap.bind(path)
        trap.listen()
        trap.settimeout(0)
        assert launched.executes("list", env=env)
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_malformed_requests_run_nothing(launched: Launched) -> None:
    """The peer is a program of the same user. A malformed request runs no command."""
    env = {os.fsencode(name): os.fsencode(value) for name, value in launched.client.env.items()}
    launched.run("list")
    path = script.socket_path(env, script.world(env))
    assert path is not None
    here = os.open(launched.client.dir, os.O_RDONLY)
    for request in (b"", b"1", b"-1\0list", b"9\0list", b"1\0list\0NOVALUE", b"x\0list", b"\xff" * 40):
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(path)
            data, passed, _, _ = socket.recv_fds(stream, 1, 1)
            assert data == script.READY
            os.close(passed[0])
            socket.send_fds(stream, [len(request).to_bytes(4, "little") + request], [0, 1, 2, here])
            assert stream.recv(2) == script.LEAVE + b"\0"
    os.close(here)
    assert not launched.executes("list")


# --- installation ---


def test_install_status_and_remove_report_the_next_step(launched: Launched, tmp_path: Path) -> None:
    client, directory = launched.client, tmp_path / "bin"
    missing = client.run("remote", "launcher", "status", "--dir", str(directory))
    assert (missing.returncode, missing.stdout) == (
        1,
        "No launcher is installed; to install it: lattice remote launcher install\n",
    )
    installed = client.ok("remote", "launcher", "install", "--dir", str(directory))
    assert f"Installed {directory}/lattice." in installed
    assert f"  export PATH={directory}:$PATH" in installed
    first = {"PATH": f"{directory}:{client.env['PATH']}"}
    assert (
        "It is the first lattice on the PATH."
        in client.run("remote", "launcher", "status", "--dir", str(directory), env=first).stdout
    )
    behind = {"PATH": f"{client.env['PATH']}:{directory}"}
    shown = client.run("remote", "launcher", "status", "--dir", str(directory), env=behind)
    assert shown.returncode == 1
    assert f"Another lattice comes first on the PATH: {BIN}/lattice" in shown.stdout
    again = json.loads(client.ok("remote", "launcher", "install", "--dir", str(directory), "--json"))["data"]
    assert again["launcher"] == str(directory / "lattice")
    removed = client.ok("remote", "launcher", "remove", "--dir", str(directory))
    assert f"Removed {directory}/lattice." in removed
    assert not list(directory.iterdir())


def test_install_replaces_no_other_program(launched: Launched, tmp_path: Path) -> None:
    other = tmp_path / "lattice"
    other.write_text("#!/bin/sh\n")
    for command in ("install", "remove"):
        done = launched.client.run("remote", "launcher", command, "--dir", str(tmp_path))
        assert done.returncode == 1
        assert "Error: " in done.stderr
    assert other.read_text() == "#!/bin/sh\n"


def test_a_launcher_without_its_package_executes_lattice(launched: Launched, tmp_path: Path) -> None:
    copy = tmp_path / "lattice"
    text = launched.programs.launcher.read_text()
    copy.write_text(text.replace(str(Path(script.__file__).parent), str(tmp_path / "gone")))
    copy.chmod(0o755)
    done = subprocess.run(
        [copy, "list"], cwd=launched.client.dir, env=launched.client.env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, launched.run("list", real=True).stdout)
