"""Commands for whole projects of a cluster: create, import, rename, archive and delete, on any node for all of them.

Each is decided by one write of the cluster's catalogue. The nodes that run follow within a second, the others when
they start. All commands may be repeated after a crash.
"""

import asyncio
import secrets
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.cluster.commands import require_newest, run_in_cluster, until
from lattice_remote.server.cluster.directory import Catalogue, ClusterDirectory, ProjectEntry
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.order import JetStreamOrder
from lattice_remote.server.cluster.places import (
    Place,
    enter,
    local_ids,
    moves_of,
    parked,
    place_parked,
    require_free,
    root_of,
    staging,
)
from lattice_remote.server.cluster.settings import ClusterSettings
from lattice_remote.server.cluster.shared_state import shared_tokens
from lattice_remote.server.datadir import DataDir, ProjectPaths
from lattice_remote.server.maintenance.fsck import recover
from lattice_remote.server.maintenance.project_commands import check_candidate
from lattice_remote.server.project.bundle_check import ImportReport
from lattice_remote.server.project.journal_log import present_epoch
from lattice_remote.server.tokens import TokenFile

__all__ = ["SharedProjects"]


class SharedProjects:
    """Commands on one node's data directory. ``is_running`` returns whether its server runs.

    Each method stands for a function of the same name, of a server that is alone, see ``admin_cli``.

    Methods raise Misuse: nothing was changed; StorageError: the engine is out of reach, or a file cannot be written.
    """

    def __init__(self, data: DataDir, settings: ClusterSettings, is_running: Callable[[], bool]) -> None:
        self._data = data
        self._is_running = is_running
        self._settings = settings
        self._tokens = TokenFile(data.tokens, lambda: shared_tokens(settings))

    # --- new projects ---

    def create_project(self, slug: str, *, code: str | None, name: str | None, actor: str | None) -> str:
        """Create a project, see ``DataDir.create_project``; return its code."""
        self._require_running()
        id_ = secrets.token_hex(8)
        self._data.require_free(slug)
        self._require_free(slug)
        return self._enter(
            slug, id_, lambda place: self._data.init_project(place, slug, code=code, name=name, actor=actor)
        )

    def import_project(self, slug: str, source: Path, *, keep_hooks: bool, dry_run: bool) -> ImportReport:
        """Import a directory's project under a new name, see ``project_commands.import_project``."""
        self._require_running()
        id_ = secrets.token_hex(8)
        try:
            self._data.require_free(slug)
            self._require_free(slug)
        except Misuse as error:
            raise Misuse(f"{error.message}; in a cluster a project is imported under a new name") from error
        if dry_run:
            place = staging(self._data, id_)
            try:
                return check_candidate(place, source, keep_hooks=keep_hooks)
            finally:
                shutil.rmtree(place, ignore_errors=True)
        return self._enter(slug, id_, lambda place: check_candidate(place, source, keep_hooks=keep_hooks))

    def _enter[T](self, slug: str, id_: str, make: Callable[[Path], T]) -> T:
        place = staging(self._data, id_)
        paths = ProjectPaths(place)
        try:
            made = make(place)
            asyncio.run(recover(slug, paths, self._data.config().journal))
            epoch = present_epoch(paths)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            raise StorageError(f"cannot write project {slug!r}: {error.strerror or error}") from error
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise

        async def add(engine: Engine, directory: ClusterDirectory) -> Catalogue:
            return await enter(engine, directory, slug, paths.journal, epoch=epoch, node=self._settings.node, id_=id_)

        try:
            catalogue = self._run(add)
        except Misuse:  # after other errors it may have entered: then the node puts it in place
            shutil.rmtree(place, ignore_errors=True)
            raise
        place_parked(self._data, catalogue)
        self._wait_for_copy(slug)
        return made

    def _require_free(self, slug: str) -> None:
        async def check(engine: Engine, directory: ClusterDirectory) -> None:
            del engine
            require_free(await directory.catalogue(), slug)

        run_in_cluster(self._settings, check)

    def _require_running(self) -> None:
        self._data.config()
        if not self._is_running():
            raise Misuse(
                f"the server on {self._data.path} does not run; start it, so that the other nodes get the project"
            )

    def _wait_for_copy(self, slug: str) -> None:
        """Return once this node has opened the project, and one of the others that run has a copy."""

        async def wait(engine: Engine, directory: ClusterDirectory) -> None:
            del engine

            async def is_safe() -> bool:
                nodes = {name: node for name, node in (await directory.nodes()).items() if not node.is_silent}
                having = [name for name, node in nodes.items() if slug in node.projects]
                return len(having) >= min(2, len(nodes)) and self._settings.node in having

            await until(
                is_safe, f"{slug} is in the cluster, but on no other node yet; see: lattice-remote cluster status"
            )

        run_in_cluster(self._settings, wait)

    # --- present projects ---

    def require_project(self, slug: str) -> None:
        """Raise Misuse if the cluster has no such project; this node may not have a copy yet."""
        if self._data.has_project(slug):
            return

        async def check(engine: Engine, directory: ClusterDirectory) -> None:
            del engine
            self._active(await directory.catalogue(), slug)

        run_in_cluster(self._settings, check)

    def rename_project(self, old: str, new: str) -> int:
        """Rename a project; return the number of updated tokens."""
        self._data.require_name(new)
        with shared_tokens(self._settings) as there:
            tokens = sum(old in token.projects and token.revoked is None for token in there.load())

        def edit(catalogue: Catalogue) -> Catalogue:
            if old not in catalogue.projects and catalogue.renamed.get(old) == new and new in catalogue.projects:
                return catalogue  # repeated
            entry = self._active(catalogue, old)
            require_free(catalogue, new)
            projects = {slug: each for slug, each in catalogue.projects.items() if slug != old}
            renamed = {was: new if to == old else to for was, to in catalogue.renamed.items() if was != new}
            return msgspec.structs.replace(catalogue, projects={**projects, new: entry}, renamed={**renamed, old: new})

        self._change(edit)
        self._tokens.rename_projects({old: new})
        self._wait_until_placed()
        return tokens

    def archive_project(self, slug: str) -> None:
        """Stop serving a project."""

        def edit(catalogue: Catalogue) -> Catalogue:
            return catalogue.with_entry(slug, msgspec.structs.replace(self._active(catalogue, slug), is_archived=True))

        self._change(edit)
        self._wait_until_placed()

    def unarchive_project(self, slug: str) -> None:
        """Serve an archived project again."""

        def edit(catalogue: Catalogue) -> Catalogue:
            return catalogue.with_entry(
                slug, msgspec.structs.replace(self._archived(catalogue, slug), is_archived=False)
            )

        self._change(edit)
        self._wait_until_placed()

    def delete_project(self, slug: str) -> tuple[Path, int]:
        """Move an archived project to the trash of each node, and remove it from all tokens, see ``delete_project``."""

        async def check(engine: Engine, directory: ClusterDirectory) -> ProjectEntry:
            catalogue = await directory.catalogue()
            entry = catalogue.require(slug)
            if not entry.is_archived:
                raise Misuse(f"project {slug!r} is in use; first: lattice-remote project archive {slug}")
            await require_newest(engine, ProjectPaths(root_of(self._data, Place(slug, True))), slug, entry)
            return entry

        entry = run_in_cluster(self._settings, check)
        tokens = self._tokens.forget_project(slug)

        def edit(catalogue: Catalogue) -> Catalogue:
            if self._archived(catalogue, slug) != entry:
                raise Misuse(f"project {slug!r} was changed by another command; look at it again")
            projects = {name: each for name, each in catalogue.projects.items() if name != slug}
            renamed = {old: new for old, new in catalogue.renamed.items() if new != slug}
            return Catalogue(projects, renamed, {**catalogue.deleted, entry.id: slug})

        async def remove(engine: Engine, directory: ClusterDirectory) -> None:
            await directory.change(edit)
            await JetStreamOrder(engine, entry.stream, entry.epoch).delete()

        self._run(remove)
        self._wait_until_placed()
        return self._data.trash / f"{slug}-{entry.id}", tokens

    def _active(self, catalogue: Catalogue, slug: str) -> ProjectEntry:
        entry = catalogue.require(slug)
        if entry.is_archived:
            raise Misuse(f"project {slug!r} is archived; restore it with: lattice-remote project unarchive {slug}")
        return entry

    def _archived(self, catalogue: Catalogue, slug: str) -> ProjectEntry:
        entry = catalogue.require(slug)
        if not entry.is_archived:
            raise Misuse(f"there is no archived project {slug!r}; see: lattice-remote project list")
        return entry

    # --- the catalogue ---

    def _change(self, edit: Callable[[Catalogue], Catalogue]) -> None:
        async def change(engine: Engine, directory: ClusterDirectory) -> Catalogue:
            del engine
            return await directory.change(edit)

        self._run(change)

    def _run[T](self, work: Callable[[Engine, ClusterDirectory], Awaitable[T]]) -> T:
        try:
            return run_in_cluster(self._settings, work)
        except EngineUnavailable as error:
            why = "it is unknown whether the cluster has the change; look at it with: lattice-remote cluster status"
            raise StorageError(f"{error.message}; {why}", code="REMOTE_UNKNOWN_OUTCOME") from error

    def _wait_until_placed(self) -> None:
        """Wait until this node, if it runs, has followed the catalogue."""
        if not self._is_running():
            return

        async def wait(engine: Engine, directory: ClusterDirectory) -> None:
            del engine
            catalogue = await directory.catalogue()

            async def is_placed() -> bool:
                local = await asyncio.to_thread(local_ids, self._data)
                return not moves_of(local, catalogue) and not parked(self._data, catalogue)

            await until(is_placed, f"node {self._settings.node} has not followed yet; see its log")

        run_in_cluster(self._settings, wait)
