"""Hooks: run in order outside the event loop; failures are logged without secrets."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop
from harness import until

from lattice_remote.server.ipc import HookCall
from lattice_remote.server.logging import masked_output
from lattice_remote.server.project.hooks import HookRunner

EVENT = json.dumps({"type": "task_created", "text": "é" * 5000})


def call(command: str, stdin: str = EVENT) -> HookCall:
    return HookCall(command, {**os.environ, "LATTICE_EVENT_TYPE": "task_created"}, stdin)


@pytest.fixture
async def hooks(tmp_path: Path) -> AsyncIterator[HookRunner]:
    (tmp_path / ".lattice").mkdir()
    runner = HookRunner("web", tmp_path, timeout_s=60.0)
    yield runner
    await runner.close()


def configure(directory: Path, **hooks: object) -> None:
    (directory / ".lattice" / "config.json").write_text(json.dumps({"hooks": hooks}))


async def test_hooks_run_in_order_one_at_a_time_with_the_event_on_stdin(hooks: HookRunner, tmp_path: Path) -> None:
    for n in range(20):
        hooks.submit(n, [call(f"read -r line; echo begin {n} >> out; echo end {n} >> out"), call("cat > event")])
    out = tmp_path / "out"
    await until(lambda: out.exists() and "end 19" in out.read_text())
    assert out.read_text().split("\n")[:-1] == [f"{what} {n}" for n in range(20) for what in ("begin", "end")]
    await until(lambda: (tmp_path / "event").read_text() == EVENT)


def test_a_hook_that_ignores_its_event_does_not_stop_the_next(tmp_path: Path) -> None:
    """As with the server's own event loop, under which writing to such a hook is an error."""

    async def run() -> None:
        runner = HookRunner("web", tmp_path)
        for n in range(100):
            runner.submit(n, [call(f"echo {n} >> out")])
            await until(lambda: runner._task is None)
        await runner.close()

    uvloop.run(run())
    assert (tmp_path / "out").read_text().split() == [str(n) for n in range(100)]


async def test_the_loop_goes_on_while_a_hook_runs(hooks: HookRunner, tmp_path: Path) -> None:
    release = tmp_path / "release"
    hooks.submit(1, [call("touch began; until test -e release; do sleep 0.05; done; touch ended")])
    await until((tmp_path / "began").exists)
    assert not (tmp_path / "ended").exists()
    release.touch()
    await until((tmp_path / "ended").exists)


async def test_a_hook_over_its_time_is_ended_with_all_its_processes(
    hooks: HookRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "echo soon >&2; sleep 600 & echo $! > written; mv written pid; wait"
    configure(tmp_path, on={"task_created": command})
    with monkeypatch.context() as patch:
        began = [0.0]
        clock = SimpleNamespace(
            monotonic=lambda: began.pop() if began else 61.0 if (tmp_path / "pid").exists() else 0.0
        )
        patch.setattr("lattice_remote.server.project.hooks.time", clock)
        hooks.submit(7, [call(command)])
        await until(lambda: hooks._task is None)
    hooks.submit(8, [call("touch next")])
    await until((tmp_path / "next").exists)
    pid = int((tmp_path / "pid").read_text())
    await until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    assert (
        "web: change 7: hook hooks.on.task_created of task_created took longer than 60 s and was ended: soon"
        in caplog.text
    )


async def test_a_failure_is_logged_with_its_change_and_place_and_without_its_secrets(
    hooks: HookRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = "echo 'no token=hunter2 for ltr_abc-def' >&2; echo more >&2; : topsecret; exit 3"
    configure(tmp_path, post_event="true", transitions={"* -> done": ["true", command]})
    hooks.submit(12, [call(command)])
    await until(lambda: "change 12" in caplog.text)
    (record,) = caplog.records
    assert record.getMessage() == (
        "web: change 12: hook hooks.transitions.* -> done of task_created ended with 3: no token=*** for ltr_***"
    )


async def test_a_hook_that_cannot_start_or_fills_stderr_or_is_killed_does_not_stop_the_next(
    hooks: HookRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(tmp_path)
    hooks.submit(1, [call("echo a\0b"), call("head -c 3000000 /dev/zero >&2; exit 1"), call("kill -9 $$")])
    hooks.submit(2, [call("touch next")])
    await until((tmp_path / "next").exists)
    said = [record.getMessage() for record in caplog.records]
    assert "could not start" in said[0] and "ended with 1" in said[1] and "ended by signal 9" in said[2]
    assert max(map(len, said)) < 500 and not any("\0" in line for line in said)


async def test_a_process_left_in_the_background_delays_nothing(hooks: HookRunner, tmp_path: Path) -> None:
    hooks.submit(1, [call("sleep 600 & echo $! > pid; exit 0"), call("touch next")])
    await until((tmp_path / "next").exists)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # fails if it has ended


async def test_excess_hooks_are_dropped_and_logged(
    hooks: HookRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lattice_remote.server.project.hooks._MAX_WAITING", 3)
    hooks.submit(1, [call("sleep 0.1")] * 3)
    hooks.submit(2, [call("echo never")] * 2)
    dropped = [record.getMessage() for record in caplog.records]
    assert len(dropped) == 2 and all("change 2" in line and "was dropped: 3 are waiting" in line for line in dropped)


async def test_closing_ends_the_running_hook_and_drops_the_others(tmp_path: Path) -> None:
    runner = HookRunner("web", tmp_path)
    runner.submit(1, [call("touch first; sleep 600"), call("touch second")])
    await until((tmp_path / "first").exists)
    async with asyncio.timeout(20):
        await runner.close()
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("https://bot:pw@host/x", "https://bot:***@host/x"),
        ("PASSWORD='x y", "PASSWORD=*** y"),
        ("nothing here", "nothing here"),
    ],
)
def test_apparent_secrets_are_masked(line: str, shown: str) -> None:
    assert masked_output(line) == shown
