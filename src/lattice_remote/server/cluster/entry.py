"""Entry of a project into the cluster, with its epoch and numbers, under a name that is free."""

import secrets
from pathlib import Path

from lattice_remote.errors import Misuse
from lattice_remote.server.cluster.directory import Catalogue, ClusterDirectory, ProjectEntry
from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.member import CURSOR_FILE, Cursor, id_of, save_cursor
from lattice_remote.server.cluster.order import JetStreamOrder, StreamLost
from lattice_remote.server.journal.segment import next_number

__all__ = ["enter", "require_free"]


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
