"""``lattice remote watch`` and ``history``: changes as they arrive, and earlier versions of plans and notes."""

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self

import msgspec
import typer

from lattice_remote import output
from lattice_remote.client.agent_client import send_request
from lattice_remote.client.cli.common import MAX_LISTED, Json, complete_tasks, here, print_result, request
from lattice_remote.client.tasks import task_of
from lattice_remote.errors import ConnectionFailed, Misuse, RemoteError, one_line, printable
from lattice_remote.protocol.messages import LogEntry, Position

__all__ = ["app", "as_line", "history_app", "run_for"]

_MAX_TASKS_SHOWN = 3
_MAX_TITLE_CHARS = 40


def as_line(record: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Return number, time, actor, tasks and description, as plain text."""
    tasks = [_named(task) for task in record["tasks"][:_MAX_TASKS_SHOWN]]
    more = len(record["tasks"]) - _MAX_TASKS_SHOWN
    names = [*record["resources"], *record["sessions"]] if not tasks else []
    shown = ", ".join([*tasks, *names]) + (f", +{more}" if more > 0 else "")
    actor, owner = record["actor"], record["token_actor"]
    who = f"{actor} (token of {owner})" if owner not in ("", actor) else actor
    by_hand = record["cause"] in ("edit", "recovery")
    what = f"{record['cause']}: {record['command']}" if by_hand else record["command"]
    cells = (str(record["seq"]), output.local_time(record["time"], "%H:%M:%S"), who, shown, what)
    number, time, who, shown, what = map(printable, cells)
    return number, time, who, shown, what


def _named(task: dict[str, Any]) -> str:
    title = task["title"] or ""
    short = title if len(title) <= _MAX_TITLE_CHARS else title[: _MAX_TITLE_CHARS - 1] + "…"
    return f"{task['short_id'] or task['id']} {short}".strip()


_LEAVE_S = 2.0


def run_for(command: str, record: dict[str, Any], line: str, timeout_s: float) -> str | None:
    """Run ``command`` in a shell with ``line`` on stdin; return an error message, None on success.

    Its process group ends after ``timeout_s`` or on Ctrl-C, which then passes through.
    """
    environment = {
        **os.environ,
        "LATTICE_CHANGE": str(record["seq"]),
        "LATTICE_EPOCH": record["epoch"],
        "LATTICE_POSITION": record["position"],
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        with _ctrl_c_held_back():
            started.append(
                subprocess.Popen(  # noqa: S602 - the user's own command, from the user's own command line
                    command, shell=True, stdin=subprocess.PIPE, env=environment, start_new_session=True
                )
            )
        process = started[0]
        process.communicate(line.encode(), timeout=timeout_s)
    except (OSError, ValueError) as error:
        return f"the command could not start: {error}"
    except subprocess.TimeoutExpired:
        _end(started[0], signal.SIGKILL)
        return f"the command took longer than {timeout_s:g} s and was ended"
    except BaseException:
        for process in started:
            _end(process, signal.SIGTERM)
        raise
    if process.returncode < 0:
        return f"the command was ended by signal {-process.returncode}"
    return f"the command ended with {process.returncode}" if process.returncode else None


def _end(process: "subprocess.Popen[bytes]", sign: signal.Signals) -> None:
    for each in (sign, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, each)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_LEAVE_S)
            return


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


GONE_EXIT_CODE = 3
INTERRUPTED_EXIT_CODE = 130
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.2, 15.0
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)

app = typer.Typer()


@dataclass
class _Handler:
    as_json: bool
    command: str
    timeout_s: float

    def __call__(self, record: dict[str, Any], show: "_Lines") -> None:
        line = output.strict_json(record)
        if self.as_json:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        elif not self.command:
            show.change(record)
        if self.command and (trouble := run_for(self.command, record, line + "\n", self.timeout_s)):
            show.note(f"change {record['seq']}: {trouble}")


class _Lines:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def change(self, record: dict[str, Any]) -> None:
        number, time, who, tasks, what = as_line(record)
        typer.echo("  ".join(filter(None, (number.rjust(5), time, who, tasks, what))))

    def note(self, text: str) -> None:
        typer.echo(f"lattice-remote: {one_line(text)}", err=True)

    def state(self, text: str) -> None: ...


class _View(_Lines):
    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._status = self._console.status("connecting", spinner="dots")

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def change(self, record: dict[str, Any]) -> None:
        from rich.text import Text

        number, time, who, tasks, what = as_line(record)
        parts = [(number.rjust(5), "bold"), (time, "dim"), (who, "cyan"), (tasks, "green"), (what, "")]
        line = Text("  ").join(Text(text, style) for text, style in parts if text)
        self._console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"lattice-remote: {one_line(text)}", style="yellow", markup=False, soft_wrap=True)

    def state(self, text: str) -> None:
        from rich.text import Text

        self._status.update(Text(one_line(text), "dim"))


@app.command()
def watch(
    *,
    since: Annotated[
        str,
        typer.Option("--since", metavar="N", help="Begin after this change, a number or position; else with the next."),
    ] = "",
    command: Annotated[
        str, typer.Option("--exec", metavar="CMD", help="Run this for each change, with its JSON on standard input.")
    ] = "",
    exec_timeout: Annotated[
        float, typer.Option("--exec-timeout", metavar="S", min=0.1, help="Time limit for one change.")
    ] = 600.0,
    task: Annotated[
        str, typer.Option("--task", metavar="ID", help="Only changes of this task.", autocompletion=complete_tasks)
    ] = "",
    count: Annotated[
        int, typer.Option("--count", "-n", metavar="N", min=0, help="End after this many changes; 0: never.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each change.")] = False,
) -> None:
    """Show changes as they arrive. Reconnects after a lost connection; none is skipped or repeated.

    Ends with Ctrl-C (exit code 130), after --count changes (0), or when requested changes are no longer kept (3).
    Prints on stderr how to resume.

    Example: lattice remote watch --task LAT-42

    Example: lattice remote watch --since 120 --exec 'jq -r .command >> changes.txt'
    """
    directory, _ = here()
    begin = _parse_since(since)
    with contextlib.suppress(RemoteError):
        send_request(request("ready", directory))  # the titles come from the cache
    only = _task_id(directory, task)
    handler = _Handler(as_json, command, exec_timeout)
    is_view = sys.stdout.isatty() and not as_json and not command
    with _View() if is_view else _Lines() as show:
        code = _Watch(directory, handler, show).run(begin, only, count)
    raise typer.Exit(code)


class _Gone(RemoteError):
    code = "REMOTE_GONE"


class _Watch:
    def __init__(self, directory: str, handler: _Handler, show: _Lines) -> None:
        self._directory, self._handler, self._show = directory, handler, show
        self._position: Position | None = None  # of the last handled change; None at the start of an epoch
        self._former: dict[str, Position] = {}  # the last ones of earlier epochs
        self._trouble: str | None = ""  # why the server cannot be reached; None while it can

    def run(self, begin: Position | int | None, only: str | None, count: int) -> int:
        try:
            return self._take(begin, only, count)
        except KeyboardInterrupt:
            return INTERRUPTED_EXIT_CODE
        except RemoteError as error:
            self._fail(error)
            return GONE_EXIT_CODE if isinstance(error, _Gone) else 1
        finally:
            if (last := self._position) is not None:
                self._show.note(f"watched up to change {last.seq}: resume with --since {last}")

    def _fail(self, error: RemoteError) -> None:
        if self._handler.as_json:
            envelope = {"ok": False, "error": {"code": error.code, "message": error.message}}
            typer.echo(output.strict_json(envelope))
        else:
            typer.echo(f"Error: {error.message}", err=True)

    def _take(self, begin: Position | int | None, only: str | None, count: int) -> int:
        handled = 0
        while True:
            answer = self._ask(begin)
            if answer["outcome"] != "kept":
                begin = self._begin_epoch(answer)
                continue
            begin = Position(answer["epoch"], answer["seq"], bytes.fromhex(answer["mark"]))
            self._connected(begin, answer["head"])
            for record in answer["changes"]:
                if only is None or any(task["id"] == only for task in record["tasks"]):
                    self._handler(record, self._show)
                    handled += 1
                begin = self._position = Position.parse(record["position"])
                self._show.state(f"change {record['seq']}")
                if count and handled >= count:
                    return 0

    def _ask(self, begin: Position | int | None) -> dict[str, Any]:
        where: dict[str, Any] = {"epoch": "", "seq": begin, "mark": ""}
        if isinstance(begin, Position):
            where = {"epoch": begin.epoch, "seq": begin.seq, "mark": begin.mark.hex()}
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                is_connected = self._trouble is None  # else it says first that it is
                return send_request({**request("changes", self._directory), **where, "wait": is_connected})
            except ConnectionFailed as error:
                self._lost(error.message)
            time.sleep(retry_s)
            retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    def _lost(self, why: str) -> None:
        if why != self._trouble:
            self._trouble = why
            self._show.note(f"{why}; trying again")
        at = f", at change {self._position.seq}" if self._position is not None else ""
        self._show.state(f"not connected{at}")

    def _connected(self, position: Position, head: int) -> None:
        if self._position is None:
            self._position = position
            more = f", the last is {head}" if head > position.seq else ""
            self._show.note(f"watching after change {position.seq}{more}")
        elif self._trouble is not None:
            self._show.note(f"connected again after change {position.seq}")
        self._trouble = None
        self._show.state(f"change {head}")

    def _begin_epoch(self, answer: dict[str, Any]) -> Position:
        """Return where to continue in another epoch.

        Raises:
            _Gone: the changes after the last one are not available.
        """
        last, epoch = self._position, answer["epoch"]
        if last is None or last.epoch == epoch:
            raise _Gone(_why_not(answer))
        self._former[last.epoch] = last
        self._position = self._former.get(epoch)
        if self._position is not None:
            return self._position
        why = "the server was restored or has lost its journal, and changes after that may be missing here"
        self._show.note(f"a new epoch begins on the server ({epoch}), with new numbers: {why}")
        return Position(epoch, max(answer["oldest"] - 1, 0), b"")


def _why_not(answer: dict[str, Any]) -> str:
    seq, start = answer["seq"], max(answer["oldest"] - 1, 0)
    if answer["outcome"] == "ahead":
        return f"there is no change {seq} yet, the last is {answer['head']}: resume with --since {answer['head']}"
    if answer["outcome"] == "epoch":
        return f"that change is not in the project's history, now epoch {answer['epoch']}: resume with --since {start}"
    return f"the changes after {seq} are no longer kept, the oldest is {answer['oldest']}: resume with --since {start}"


def _parse_since(text: str) -> Position | int | None:
    if not text:
        return None
    if _NUMBER.fullmatch(text):
        return int(text)
    position = Position.parse(text)
    if position is None:
        raise Misuse(f"--since takes the number of a change, or a position as 'watch' prints it, not {text[:60]!r}")
    return position


def _task_id(directory: str, name: str) -> str | None:
    task = task_of(directory, name) if name else None
    if task is not None and not task.startswith("task_"):
        raise Misuse(f"there is no task {name[:60]!r} in this project; see: lattice list", code="REMOTE_NOT_FOUND")
    return task


history_app = typer.Typer()

Plan = Annotated[bool, typer.Option("--plan", help="The plan; the default.")]
Notes = Annotated[bool, typer.Option("--notes", help="The notes.")]
Show = Annotated[str, typer.Option("--show", metavar="N", help="Print the text as of change N.")]
Restore = Annotated[
    str, typer.Option("--restore", metavar="N", help="Make the text of change N the newest, as an edit.")
]


@history_app.command()
def history(
    task: Annotated[str, typer.Argument(metavar="TASK", help="LAT-42, or a task's id.", autocompletion=complete_tasks)],
    *,
    plan: Plan = False,
    notes: Notes = False,
    show: Show = "",
    restore: Restore = "",
    number: Annotated[int, typer.Option("-n", metavar="N", min=1, max=MAX_LISTED, help="Number of versions.")] = 20,
    as_json: Json = False,
) -> None:
    """List, show or restore versions of a task's plan or notes.

    The list is newest first. The server keeps versions for as long as its journal reaches back. A number that two
    epochs share means the newer one; EPOCH-N names the other.

    Example: lattice remote history LAT-42 --restore 17
    """
    if plan and notes:
        raise Misuse("--plan and --notes exclude each other")
    if show and restore:
        raise Misuse("--show and --restore exclude each other")
    directory, _ = here()
    asked = {**request("log", directory), "task": task, "text": "notes" if notes else "plan"}
    if restore:
        _restored(send_request({**asked, "do": "restore", "version": restore}), restore, as_json=as_json)
    elif show:
        _shown(send_request({**asked, "do": "version", "version": show}), as_json=as_json)
    else:
        _listed(send_request({**asked, "limit": number}), task, asked["text"], as_json=as_json)


def _restored(answer: dict[str, Any], version: str, *, as_json: bool) -> None:
    for notice in answer["notices"]:
        typer.echo(f"lattice-remote: {one_line(notice)}", err=True)
    if as_json:
        print_result({"path": answer["path"], "outcome": answer["outcome"]})
    elif answer["outcome"] == "unchanged":
        typer.echo(f"{answer['path']} already has the text of change {version}.")
    else:
        typer.echo(f"Restored {answer['path']} to change {version}.")


def _shown(answer: dict[str, Any], *, as_json: bool) -> None:
    text = base64.b64decode(answer["text"])
    if as_json:
        print_result({"change": _name(answer), "text": text.decode(errors="replace")})
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text)


def _listed(answer: dict[str, Any], task: str, text: str, *, as_json: bool) -> None:
    entries = msgspec.convert(answer["entries"], list[LogEntry])
    if as_json:
        versions = [
            {
                "change": _name({"epoch": entry.epoch, "seq": entry.seq}),
                **{name: getattr(entry, name) for name in ("seq", "epoch", "time", "actor", "command")},
                "token_actor": entry.token_actor or entry.actor,
                "bytes": entry.text_bytes,
            }
            for entry in entries
        ]
        print_result({"versions": versions, "more": answer["more"]})
        return
    if not entries:
        typer.echo(f"No versions of the {text} of {task} are kept.")
        return
    rows = [("CHANGE", "TIME", "ACTOR", "SIZE", "COMMAND"), *map(_row, entries)]
    for line in output.columns(rows):
        typer.echo(line)


def _row(entry: LogEntry) -> tuple[str, ...]:
    size = "removed" if entry.text_bytes is None else output.counted(entry.text_bytes, "byte")
    cells = (str(entry.seq), output.local_time(entry.time), entry.actor, size, entry.command)
    return tuple(map(printable, cells))


def _name(fields: dict[str, Any]) -> str:
    return f"{fields['epoch']}-{fields['seq']}"
