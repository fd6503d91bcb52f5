"""``lattice remote status``, ``pull``, ``sync``, ``verify``, ``log``: the copy and the server's tree."""

from typing import Annotated, Any

import typer

from lattice_remote.client.agent import history
from lattice_remote.client.agent_client import ask
from lattice_remote.client.commands import describe
from lattice_remote.client.commands.agent import running_agent
from lattice_remote.client.commands.shared import (
    Json,
    count,
    here,
    print_result,
    progress,
    request,
    show_unpushed,
    unpushed,
)
from lattice_remote.errors import ConnectionFailed, one_line

__all__ = ["app"]

app = typer.Typer()


@app.command()
def status(as_json: Json = False) -> None:
    """Say whether the copy is connected and current, and how that is known.

    Example: lattice remote status --json
    """
    if (waiting := unpushed()) is not None:
        show_unpushed(waiting[1], as_json=as_json)
        return
    directory, found = here()
    answer = ask(request("status", directory))
    try:
        answer["agent"] = running_agent()
    except ConnectionFailed as silent:
        answer["agent"] = {"error": silent.message}
    if as_json:
        print_result(answer)
        return
    versions = answer["versions"]
    rows = [
        ("remote", f"{found.name} {found.url} project {found.project}"),
        ("connection", describe.connection(answer)),
        ("copy", describe.copy(answer)),
        ("large files", describe.payloads(answer["payloads"])),
        ("acting as", describe.acting(answer)),
        ("unsent edits", describe.edits(answer)),
        ("conflicts", describe.conflicts(answer["conflicts"])),
        ("set aside", ", ".join(answer["set_aside"]) or "none"),
        ("rescued", describe.rescued(answer["rescued"])),
        ("healed", describe.healed(answer["healed"])),
        ("agent", describe.agent(answer["agent"])),
        ("versions here", describe.versions(versions["here"])),
        ("versions there", describe.versions(versions["server"]) if versions["server"] else "unknown: not connected"),
    ]
    rows += [("note", f"{name} {advice}") for name, advice in (versions["differences"] or {}).items()]
    for label, text in rows:
        typer.echo(f"{label + ':':16}{one_line(text)}")


@app.command()
def pull(as_json: Json = False) -> None:
    """Bring the copy up to date now.

    Example: lattice remote pull
    """
    directory, _ = here()
    with progress("fetching") as show:
        answer = ask(request("pull", directory), show)
    if as_json:
        print_result(answer)
    else:
        typer.echo(f"Up to date at change {answer['seq']}.")


@app.command()
def sync(as_json: Json = False) -> None:
    """Compare every file with the server's and mend what differs.

    Example: lattice remote sync
    """
    directory, _ = here()
    with progress("comparing") as show:
        answer = ask(request("sync", directory), show)
    if as_json:
        print_result(answer)
        return
    for label, key in (
        ("fetched", "differing"),
        ("restored", "missing"),
        ("removed", "surplus"),
        ("kept edit", "edited"),
    ):
        for path in answer[key]:
            typer.echo(f"{label}: {one_line(path)}")
    for notice in answer["notices"]:
        typer.echo(f"lattice-remote: {one_line(notice)}", err=True)
    _tell_away(answer)
    mended = sum(len(answer[key]) for key in ("differing", "missing", "surplus"))
    what = f"mended {count(mended, 'file')} of" if mended else "nothing to mend in"
    typer.echo(f"Compared with the server at change {answer['seq']}: {what} {count(answer['total'], 'file')}.")


def _tell_away(answer: dict[str, Any]) -> None:
    """Name the contents of artifacts that are left out: they are no difference."""
    for path in answer["away"]:
        typer.echo(f"not here yet, see lattice remote fetch: {one_line(path)}")


@app.command()
def verify(as_json: Json = False) -> None:
    """Compare every file with the server's; change nothing. Exits with 1 when anything differs.

    Example: lattice remote verify --json
    """
    directory, _ = here()
    with progress("comparing") as show:
        answer = ask(request("verify", directory), show)
    differences = sum(len(answer[key]) for key in ("differing", "missing", "surplus", "edited"))
    if as_json:
        print_result({**answer, "equal": not differences})
    else:
        for label, key in (
            ("differs", "differing"),
            ("missing here", "missing"),
            ("not on the server", "surplus"),
            ("edited, not sent yet", "edited"),
        ):
            for path in answer[key]:
                typer.echo(f"{label}: {one_line(path)}")
        _tell_away(answer)
        but = f", but for {count(len(answer['away']), 'file')} not here" if answer["away"] else ""
        outcome = f"{count(differences, 'difference')} in" if differences else f"equal{but}, all"
        typer.echo(f"Compared with the server at change {answer['seq']}: {outcome} {count(answer['total'], 'file')}.")
    if differences:
        raise typer.Exit(1)


@app.command()
def log(
    task: Annotated[str, typer.Option(metavar="ID", help="Only what touched this task: LAT-42 or task_...")] = "",
    number: Annotated[int, typer.Option("-n", min=1, max=history.MAX_ENTRIES, help="How many changes.")] = 20,
    as_json: Json = False,
) -> None:
    """Show who changed what, when, and through which token; newest first.

    Example: lattice remote log --task LAT-42 -n 5
    """
    directory, _ = here()
    answer = ask({**request("log", directory), "task": task, "limit": number})
    if as_json:
        print_result(history.records(answer, directory))
        return
    for line in history.lines(answer, directory) or ["No changes are kept."]:
        typer.echo(line)
