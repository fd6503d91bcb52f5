"""Places of the cluster's projects in a node's data directory, and the entry of a project into the cluster.

A project is known by the id beside its journal. It moves by way of ``projects/.moving-ID``, so two projects may
exchange their names. A crash leaves it at one of these places, and the next step of the node goes on.
"""

import os
import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.cluster.directory import Catalogue, ClusterDirectory, ProjectEntry
from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.member import CURSOR_FILE, Cursor, id_of, save_cursor
from lattice_remote.server.cluster.order import JetStreamOrder, StreamLost
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.journal.segment import next_number
from lattice_remote.server.tree.tree import sync_directory

__all__ = [
    "Place",
    "enter",
    "local_ids",
    "moves_of",
    "park",
    "parked",
    "place_parked",
    "require_free",
    "root_of",
    "staging",
]

_MOVING = ".moving-"


class Place(NamedTuple):
    """A project's name and whether it is archived; without a name it was deleted."""

    slug: str
    is_archived: bool


def root_of(data: DataDir, place: Place) -> Path:
    return (data.archived if place.is_archived else data.projects) / place.slug


def staging(data: DataDir, id_: str) -> Path:
    """Return the place of a project that moves, or enters the cluster; it stays there until the catalogue has it."""
    return data.projects / f"{_MOVING}{id_}"


def local_ids(data: DataDir) -> dict[Place, str]:
    """Return the ids of the projects here; "" for one that is in no cluster. Blocking."""
    places = [Place(slug, False) for slug in data.slugs()] + [Place(slug, True) for slug in data.archived_slugs()]
    return {place: id_of(root_of(data, place) / "journal") for place in places}


def moves_of(local: dict[Place, str], catalogue: Catalogue) -> dict[Place, Place]:
    """Return the projects that are not where the catalogue has them, with their places there."""
    moves = {}
    for place, id_ in local.items():
        wanted = _wanted(id_, catalogue)
        if id_ and wanted is not None and wanted != place:
            moves[place] = wanted
    return moves


def _wanted(id_: str, catalogue: Catalogue) -> Place | None:
    slug = catalogue.name_of(id_)
    if slug is not None:
        return Place(slug, catalogue.projects[slug].is_archived)
    return Place("", False) if id_ in catalogue.deleted else None


def park(data: DataDir, place: Place, id_: str) -> None:
    """Begin the move of a project that no worker uses. Raises StorageError."""
    _move(root_of(data, place), staging(data, id_))


def parked(data: DataDir, catalogue: Catalogue) -> dict[Path, Place]:
    """Return the projects between two places with their places in the catalogue. Blocking."""
    found = {}
    for root in sorted(data.projects.glob(f"{_MOVING}*")):
        id_ = root.name.removeprefix(_MOVING)
        wanted = _wanted(id_, catalogue)
        if wanted is not None and id_of(root / "journal") == id_:
            found[root] = wanted
    return found


def place_parked(data: DataDir, catalogue: Catalogue) -> list[Place]:
    """End all moves whose target is free; return the new places. Blocking. Raises StorageError."""
    placed = []
    for root, wanted in parked(data, catalogue).items():
        if not wanted.slug:
            data.trash.mkdir(mode=0o700, exist_ok=True)
            id_ = root.name.removeprefix(_MOVING)
            target = data.trash / f"{catalogue.deleted[id_]}-{id_}"
        else:
            target = root_of(data, wanted)
            target.parent.mkdir(mode=0o700, exist_ok=True)
        _remove_unfinished_copy(target)
        if not target.exists():
            _move(root, target)
            placed.append(wanted)
    return placed


def _remove_unfinished_copy(target: Path) -> None:
    """Remove a directory that has nothing but the beginning of a copy, of a project that has moved since."""
    if (target / "copying").is_dir() and os.listdir(target) == ["copying"]:
        shutil.rmtree(target)


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except FileNotFoundError:  # a command and the server do the same
        if not target.exists():
            raise StorageError(f"cannot move {source} to {target}: it is not there") from None
    except OSError as error:
        raise StorageError(f"cannot move {source} to {target}: {error.strerror}") from error
    sync_directory(source.parent)
    sync_directory(target.parent)


def require_free(catalogue: Catalogue, slug: str) -> None:
    """Raise Misuse if the cluster has a project of this name."""
    entry = catalogue.projects.get(slug)
    if entry is not None and entry.is_archived:
        raise Misuse(f"project {slug!r} is archived in the cluster; choose another name, or unarchive and rename it")
    if entry is not None:
        raise Misuse(f"project {slug!r} already exists in the cluster; choose another name")


async def enter(
    engine: Engine, directory: ClusterDirectory, slug: str, journal: Path, *, epoch: str, node: str, id_: str = ""
) -> Catalogue:
    """Put a project without a worker into the cluster; return the catalogue that has it. Repeatable after a crash.

    Args:
        engine, directory: of the cluster.
        slug, journal, epoch: of the project.
        node: this one.
        id_: of the project, if it has one already.

    Raises:
        Misuse: the name is taken; nothing was changed.
        EngineUnavailable: it may have entered.
    """
    catalogue = await directory.catalogue()
    known = id_of(journal)
    if known and catalogue.name_of(known) == slug:
        return catalogue
    require_free(catalogue, slug)
    order, is_created = JetStreamOrder(engine, slug, epoch), True
    try:
        await order.create()
    except StreamLost:  # an interrupted attempt has created it
        is_created = False
        await order.open()
        if (await order.bounds())[1] > 0:
            raise
    entry = ProjectEntry(known or id_ or secrets.token_hex(8), epoch, slug)
    save_cursor(journal, Cursor(epoch, 0, next_number(journal), node, 0, entry.id))

    def add(catalogue: Catalogue) -> Catalogue:
        require_free(catalogue, slug)
        return catalogue.with_entry(slug, entry)

    try:
        return await directory.change(add)
    except Misuse:
        (journal / CURSOR_FILE).unlink()
        if is_created:
            await order.delete()
        raise
