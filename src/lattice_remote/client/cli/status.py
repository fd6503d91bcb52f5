"""``lattice remote status`` and ``show``."""

from typing import Annotated, Any

import typer

from lattice_remote.client.agent_client import describe_age, send_if_running
from lattice_remote.client.cli.common import (
    Json,
    Name,
    here,
    print_result,
    send_request,
    show_unpushed,
    unpushed,
)
from lattice_remote.client.config import Remote
from lattice_remote.errors import REFUSALS, ConnectionFailed, one_line
from lattice_remote.output import counted

__all__ = ["app"]

app = typer.Typer()

_MIB = 1024 * 1024
_MAX_EDITS = 10
"""Edits that ``status`` names."""


@app.command()
def status(
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 unless the cache is current and nothing is pending.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the state of the connection and the cache.

    Exits with 1 if the server refuses this cache or user.

    Example: lattice remote status --exit-code
    """
    if (waiting := unpushed()) is not None:
        show_unpushed(waiting[1], as_json=as_json)
        return
    directory, found = here()
    answer = send_request("status", directory)
    try:
        answer["agent"] = send_if_running({"do": "agent-status"})
    except ConnectionFailed as silent:
        answer["agent"] = {"error": silent.message}
    if as_json:
        print_result(answer)
    else:
        _show_status(found, answer)
    pending = any(answer[what] for what in ("unsent_edits", "withheld_edits", "conflicts", "rescued"))
    if (not answer["connected"] and answer["code"] in REFUSALS) or (exit_code and (pending or not answer["current"])):
        raise typer.Exit(1)


def _show_status(found: Remote, answer: dict[str, Any]) -> None:
    versions, (first_edit, *edits) = answer["versions"], _edits(answer)
    conflict_copies = [copy for conflict in answer["conflicts"] for copy in conflict["copies"]]
    rows = [
        ("remote", f"{found.name} {found.url} project {found.project}"),
        ("connection", _connection(answer)),
        ("cache", _cache(answer)),
        ("large files", _payloads(answer["payloads"])),
        ("acting as", _acting(answer)),
        ("unsent edits", first_edit),
        *(("", line) for line in edits),
        ("conflicts", _conflicts(answer["conflicts"])),
        *(("", f"your text is in .lattice/{copy}") for copy in conflict_copies),
        ("rescued", _rescued(answer["rescued"])),
        ("repaired", _repaired(answer["repaired"])),
        ("agent", _agent(answer["agent"])),
        ("versions here", _versions(versions["here"])),
        ("versions there", _versions(versions["server"]) if versions["server"] else "unknown: not connected"),
    ]
    rows += [("note", f"{name} {advice}") for name, advice in (versions["differences"] or {}).items()]
    for label, text in rows:
        typer.echo(f"{label and label + ':':16}{one_line(text)}")


@app.command()
def show(name: Name = "", as_json: Json = False) -> None:
    """Show the remote and the state of the cache.

    Example: lattice remote show
    """
    if (waiting := unpushed(name)) is not None:
        show_unpushed(waiting[1], as_json=as_json)
        return
    directory, found = here(name)
    answer = send_request("status", directory)
    if as_json:
        print_result(answer)
        return
    typer.echo(f"* remote {found.name}\n  URL: {found.url}\n  Project: {found.project}")
    for label, text in (
        ("Acting as", _acting(answer)),
        ("Connection", _connection(answer)),
        ("Cache", _cache(answer)),
    ):
        typer.echo(f"  {label}: {one_line(text)}")


def _connection(answer: dict[str, Any]) -> str:
    heard = answer["last_heard_s"]
    if answer["connected"]:
        return f"connected (last frame {heard} s ago)"
    ago = "no frame from the server yet" if heard is None else f"last frame {describe_age(heard)} ago"
    return f"not connected: {answer['error'] or 'connecting'} ({ago})"


def _cache(answer: dict[str, Any]) -> str:
    here, there = answer["seq"], answer["server_seq"]
    if answer["trouble"]:
        return f"stuck at change {here}: {answer['trouble']}"
    if answer["current"]:
        return f"current (change {here} here, {there} on the server)"
    if there is None:
        age = "never filled" if answer["age_s"] is None else f"{describe_age(answer['age_s'])} old"
        return f"{age} (change {here} here, unknown on the server)"
    return f"catching up (change {here} here, {there} on the server, {counted(answer['missing'], 'file')} to fetch)"


def _payloads(found: dict[str, Any]) -> str:
    how = "fetched in the background" if found["mode"] == "background" else "fetched on demand"
    if not found["deferred"]:
        return f"all here ({how})"
    text = f"{counted(found['deferred'], 'file')} of {found['deferred_bytes'] / _MIB:.1f} MiB not here ({how})"
    if (now := found["fetching"]) is not None:
        text += f"; fetching {now['path']}, {now['done'] / _MIB:.1f} of {now['total'] / _MIB:.1f} MiB"
    return text + (f"; {found['trouble']}" if found["trouble"] else "")


def _acting(answer: dict[str, Any]) -> str:
    if answer["actor"] is not None:
        return ", ".join([answer["actor"], *answer["act_as"]])
    if answer["has_token"]:
        return f"unknown: {answer['actor_error'] or 'not connected'}"
    return "none: no token; log in with: lattice remote login"


def _edits(answer: dict[str, Any]) -> list[str]:
    waits_for, paths = answer["edits_wait_for"], answer["unsent_edits"]
    usual = f"waits for {waits_for}" if waits_for else "sent as soon as it is saved"
    if not paths:
        return [f"none ({f'an edit {usual}' if waits_for else 'each is sent as soon as it is saved'})"]
    why = {path: f"withheld: {reason}" for path, reason in answer["withheld_edits"].items()}
    why |= {path: f"refused: {reason}" for path, reason in answer["refused_edits"].items()}
    lines = [str(len(paths)), *(f"{path}: {why.get(path, usual)}" for path in paths[:_MAX_EDITS])]
    if (more := len(paths) - _MAX_EDITS) > 0:
        lines.append(f"and {more} more; all: lattice remote status --json")
    if answer["withheld_edits"]:
        lines.append("to send withheld edits: lattice remote push --confirm")
        lines.append("to restore the server's texts: lattice remote resolve --all --theirs")
    elif answer["refused_edits"]:
        lines.append("to restore the server's texts, and keep yours for lattice remote rescued:")
        lines.append("lattice remote resolve TASK --theirs")
    return lines


def _conflicts(conflicts: list[dict[str, Any]]) -> str:
    named = ", ".join(f"{each['what']} of {each['short_id']}" for each in conflicts)
    return f"{len(conflicts)}: {named}; see: lattice remote resolve" if conflicts else "none"


def _rescued(entries: list[dict[str, Any]]) -> str:
    files = counted(sum(len(entry["files"]) for entry in entries), "file")
    return f"{files} in {counted(len(entries), 'entry', 'entries')}; see: lattice remote rescued" if entries else "none"


def _repaired(repaired: dict[str, Any]) -> str:
    text = f"{counted(repaired['count'], 'file')} since the agent started"
    if repaired["last_path"] is not None:
        text += f", last {repaired['last_path']} {describe_age(repaired['last_age_s'])} ago"
    if repaired["contested"]:
        text += f"; another process keeps writing {', '.join(repaired['contested'][:5])}"
    return f"{text} ({repaired['watched'] or 'not watched: no agent'})"


def _agent(agent: dict[str, Any] | None) -> str:
    if agent is None:
        return "not used"
    return str(agent.get("error") or f"pid {agent['pid']}, {counted(len(agent['caches']), 'cache')}")


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
