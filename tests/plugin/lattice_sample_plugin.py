"""A plugin of lattice as somebody else might write one; with this directory on PYTHONPATH it is installed.

``lattice deploy note`` comments on a task, ``deploy list`` only reads, ``deploy from FILE`` takes a file, and
``deploy escape`` tries what the server must not let it do.
"""

import os
import subprocess
from pathlib import Path

import click
from lattice.cli.helpers import (
    common_options,
    output_result,
    read_snapshot_or_exit,
    require_actor,
    require_root,
    resolve_task_id,
)
from lattice.core.events import create_event
from lattice.core.tasks import apply_event_to_snapshot
from lattice.storage.operations import write_task_event

__all__ = ["register"]


@click.group()
def deploy() -> None:
    """Say what was deployed."""


@deploy.command()
@click.argument("task_id")
@click.argument("where", type=click.Choice(["staging", "live"]))
@common_options
def note(task_id: str, where: str, output_json: bool, quiet: bool, **_: object) -> None:
    """Note on a task where it was deployed."""
    lattice_dir = require_root(output_json)
    actor = require_actor(output_json)
    task = resolve_task_id(lattice_dir, task_id, output_json)
    snapshot = read_snapshot_or_exit(lattice_dir, task, output_json)
    event = create_event(type="x_deployed", task_id=task, actor=actor, data={"where": where})
    write_task_event(lattice_dir, task, [event], apply_event_to_snapshot(snapshot, event), {})
    output_result(
        data=event, human_message=f"Deployed to {where}", quiet_value=task, is_json=output_json, is_quiet=quiet
    )


@deploy.command(name="list")
def list_() -> None:
    """Count tasks."""
    click.echo(f"{len(list((require_root(False) / 'tasks').glob('*.json')))} tasks")


@deploy.command(name="from")
@click.argument("file", type=click.Path())
def from_(file: str) -> None:
    """Take a file."""
    click.echo(Path(file).read_text())


@deploy.command()
@click.argument("how")
def escape(how: str) -> None:
    """Try to get out of the project."""
    if how == "read":
        click.echo(Path("/etc/hostname").read_text())
    elif how == "run":
        click.echo(subprocess.check_output(["id"], text=True))
    else:
        (require_root(False).parent.parent / "elsewhere").write_text(os.sep)


def register(cli: click.Group) -> None:
    """Called by lattice at its start."""
    cli.add_command(deploy)
