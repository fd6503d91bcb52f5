"""Imports of whole projects that clients push: an isolated check of the uploaded bundle, then the worker's replacement.

    requested --> checking --refused--> answered
                           --passed---> with the worker --> answered

The worker decides whether the project is empty and whether the request was already done (I1, I6).
"""

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from lattice_remote.errors import RemoteError
from lattice_remote.protocol.messages import Bye, Push, Refused, encode
from lattice_remote.server.config import Config
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import ImportProject
from lattice_remote.server.project.bundle_check import ImportReport, quarantine
from lattice_remote.server.project.queue import Requester
from lattice_remote.server.project.uploads import Uploads
from lattice_remote.server.tokens import Token

__all__ = ["Pushes"]

_MAX_UNDER_WAY = 8
_log = logging.getLogger(__name__)

Submit = Callable[[ImportProject, Requester], None]


@dataclass(slots=True)
class _Push:
    frame: Push
    token: Token
    requesters: list[Requester] = field(default_factory=list)
    """Recipients of a refusal by the check."""
    task: "asyncio.Task[None] | None" = None
    request: ImportProject | None = None
    """Once the check has passed; repeated pushes join it."""


class Pushes:
    """Pushes of one project in progress. Belongs to the event loop's thread; ``close()`` it.

    ``submit`` queues a request for the worker; ``refused`` is called with the code of each refusal.
    """

    def __init__(
        self,
        paths: ProjectPaths,
        config: Config,
        uploads: Uploads,
        submit: Submit,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._refused = refused
        self._paths = paths
        self._config = config
        self._uploads = uploads
        self._submit = submit
        self._under_way: dict[str, _Push] = {}
        self._one_at_a_time = asyncio.Lock()
        self._is_clean = False  # leftovers of an earlier server were removed

    def take(
        self, frame: Push, token: Token, first_sent_at: float | None, used: str | None, requester: Requester
    ) -> None:
        """Start or join a push. Calls ``requester.answer()`` when it is done.

        ``first_sent_at`` as in ``ipc.RunCommand``; ``used`` is the project's first sign of use, None if it looks empty.
        """
        push = self._under_way.get(frame.id)
        if push is not None and push.token.id != token.id:
            self._refuse(requester, frame.id, "REMOTE_FORBIDDEN", "this request id belongs to another token")
        elif push is not None and push.frame.digest != frame.digest:
            why = "another project is being pushed with this request id: use a new one"
            self._refuse(requester, frame.id, "REMOTE_INVALID", why)
        elif push is not None and push.request is not None:
            self._submit(push.request, requester)
        elif push is not None:
            push.requesters.append(requester)
        elif used is not None or not self._has_bundle(frame, token):
            # It may have been done before: the worker decides.
            request = ImportProject(
                frame.id, token.id, token.actor, first_sent_at=first_sent_at, fingerprint=_fingerprint(frame)
            )
            self._submit(request, requester)
        elif sum(push.request is None for push in self._under_way.values()) >= _MAX_UNDER_WAY:
            self._refuse(requester, frame.id, "REMOTE_BUSY", "the server is checking other projects; try again later")
        else:
            push = self._under_way[frame.id] = _Push(frame, token, [requester])
            push.task = asyncio.get_running_loop().create_task(self._check(push, first_sent_at), name="push")

    def forget(self, requester: Requester) -> None:
        """Remove a closed connection. Its pushes continue."""
        for push in self._under_way.values():
            if requester in push.requesters:
                push.requesters.remove(requester)

    async def close(self) -> None:
        tasks = [push.task for push in self._under_way.values() if push.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _has_bundle(self, frame: Push, token: Token) -> bool:
        try:
            return os.stat(self._paths.upload(token.id, frame.digest), follow_symlinks=False).st_size == frame.size
        except OSError:
            return False

    async def _check(self, push: _Push, first_sent_at: float | None) -> None:
        frame, token, place = push.frame, push.token, self._paths.incoming / push.frame.id
        code, why = "REMOTE_UNSUPPORTED", ""
        try:
            report = await self._checked(frame, token, place)
            if report.refused:  # the same bundle would be refused again
                self._uploads.used(token.id, frame.digest)
                why = f"the server refused this project: {report.refused}"
        except RemoteError as error:
            code, why = error.code, error.message
        except OSError as error:
            code, why = "REMOTE_STORAGE", f"the server cannot store the project: {error.strerror}"
        except Exception:  # noqa: BLE001 - the client must get a reply
            _log.exception("%s: cannot check a push", self._paths.root.name)
            code, why = "REMOTE_FAILED", "the server failed to check the project; see the server's log"
        if why:
            del self._under_way[frame.id]
            _log.info("%s: a push of %s was refused: %s", self._paths.root.name, token.actor, why)
            for requester in push.requesters:
                self._refuse(requester, frame.id, code, why)
            return
        push.request = ImportProject(
            frame.id,
            token.id,
            token.actor,
            f"{self._paths.incoming.name}/{frame.id}",
            report.tasks,
            report.archived,
            report.files,
            report.notes(),
            first_sent_at,
            _fingerprint(frame),
        )
        for requester in (_Cleaner(lambda: self._settled(push, place)), *push.requesters):
            self._submit(push.request, requester)

    def _refuse(self, requester: Requester, request_id: str, code: str, message: str) -> None:
        self._refused(code)
        requester.answer(request_id, encode(Refused(request_id, code, message[:4096])))

    def _settled(self, push: _Push, place: Path) -> None:
        """Remove a rejected candidate, or the bundle of an accepted one."""
        self._under_way.pop(push.frame.id, None)
        if place.exists():
            asyncio.get_running_loop().run_in_executor(None, lambda: shutil.rmtree(place, ignore_errors=True))
        else:
            self._uploads.used(push.token.id, push.frame.digest)

    async def _checked(self, frame: Push, token: Token, place: Path) -> ImportReport:
        async with self._one_at_a_time:
            if not self._is_clean:
                await asyncio.to_thread(shutil.rmtree, self._paths.incoming, ignore_errors=True)
                self._is_clean = True
            return await quarantine(
                place,
                ["--pack", self._paths.upload(token.id, frame.digest)],
                max_bytes=self._config.limits.project_bytes,
                keep_hooks=self._config.pushed_hooks,
                hooks_of=self._paths.lattice / "config.json",
            )


def _fingerprint(frame: Push) -> bytes:
    return frame.digest[:16]


class _Cleaner:
    """Internal requester that runs a cleanup after the reply, since clients may be gone by then."""

    def __init__(self, settled: Callable[[], None]) -> None:
        self._settled = settled

    @property
    def fairness_key(self) -> Hashable:
        return self

    def answer(self, request_id: str, reply: bytes) -> None:
        del request_id, reply
        self._settled()

    def end(self, bye: Bye) -> None: ...
