"""Order of a project's changes: one JetStream stream per project and epoch.

A message holds a batch of journal records, or the record of a new owner. The owner has one append outstanding and
names the number that it expects before it, so an owner that was replaced is refused at its next append. With several
outstanding it would not be: the one behind a refused append may expect just the number that the successor's has.
"""

import asyncio
import logging
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import nats.errors
from nats.aio.subscription import Subscription

from lattice_remote.errors import StorageError
from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.jetstream import (
    FULL,
    NAME_IN_USE,
    NO_STREAM,
    REQUEST_S,
    WRONG_SEQUENCE,
    Ack,
    EngineFull,
    EngineRefused,
    EngineUnavailable,
    StoredMessage,
    StreamInfo,
    cancellable,
)

__all__ = ["Batch", "Fenced", "JetStreamOrder", "StreamLost", "TooOld"]

_RETRY_S = 0.1
_RESEND_S = 0.25
"""Before a message is sent again for the first time: a leader that stops in order may lose it; doubled each time."""
_LATE_ANSWERS = 30
"""An answer counts for so many times the time after which the message is sent again."""
_LOST_S = 10.0
"""A loss must be seen for so long: a server that was replaced as the leader, or that restarts, may see less."""
_IDLE_S = 1.0
_READ_BYTES = 8 << 20
_FOLLOW_BYTES = 64 << 20
_WRONG_STREAM = 10060
_DUPLICATES_S = 120

_log = logging.getLogger(__name__)


class Fenced(Exception):
    """Another node has become the owner; nothing of this append is in the stream, nor will be."""


class StreamLost(StorageError):
    """The stream is missing, was replaced, is shorter than acknowledged, or has a foreign message.

    The project must stop until an operator has looked: its nodes have the data.
    """


class TooOld(StreamLost):
    """The stream begins behind the number asked for; a copy from another node is needed, nothing is lost."""


@dataclass(frozen=True)
class Batch:
    """A message of the stream; that of a new owner has no records."""

    seq: int
    term: int
    node: str
    records: tuple[bytes, ...]


class _Payload(msgspec.Struct, array_like=True, frozen=True):
    """Content of a message. ``parts`` names the stored parts that hold it, if it is too large for a message."""

    node: str
    term: int
    records: list[bytes] = []
    parts: str = ""


@dataclass(frozen=True)
class _Owner:
    node: str
    term: int
    token: str
    seq: int


class JetStreamOrder:
    """The stream of one project and epoch. ``take_over()`` before ``append()``.

    Args:
        engine: the connection.
        slug, epoch: of the project.
        answer_s: time for an answer to an append, which is then in doubt; copies of it are sent before and after.
        lost_s: for how long a loss must be seen before StreamLost.
    """

    def __init__(
        self, engine: Engine, slug: str, epoch: str, *, answer_s: float = REQUEST_S, lost_s: float = _LOST_S
    ) -> None:
        self._engine = engine
        self.name = f"lattice-{slug}-{epoch}"
        """Of the stream."""
        self.subject = f"lattice.order.{slug}.{epoch}"
        """Of its messages, followed by ``.log`` or ``.owner``. Only this class may publish there."""
        self._live = f"lattice.live.{slug}.{epoch}"
        self._answer_s = answer_s
        self._lost_s = lost_s
        self._created: str | None = None
        self._owner: _Owner | None = None
        self.in_doubt = 0
        """Appends, ever, whose answer was late or missing."""

    async def create(self, *, max_bytes: int = -1) -> None:
        """Create the stream. Raises StreamLost if there is one of this name, EngineUnavailable, EngineRefused."""
        marker = secrets.token_hex(8)
        config = {
            "subjects": [f"{self.subject}.log", f"{self.subject}.owner"],
            "max_bytes": max_bytes,
            "deny_delete": True,
            "allow_direct": True,
            "duplicate_window": _DUPLICATES_S * 1_000_000_000,
            "republish": {"src": f"{self.subject}.*", "dest": self._live},
            "metadata": {"lattice-remote": marker},
        }
        try:
            info = await self._engine.create_stream(self.name, config)
        except EngineRefused as error:
            if error.number != NAME_IN_USE:
                raise
            raise StreamLost(f"NATS already has a stream {self.name}") from error
        self._created = info.created

    async def open(self) -> None:
        """Find the stream. Raises StreamLost if it is missing, EngineUnavailable."""
        self._created = (await self._info(0)).created

    async def bounds(self) -> tuple[int, int]:
        """Return the first and last number without a gap in between; an empty stream has (last + 1, last).

        Of a leader that a majority followed within the last 3 s. The proof that ``last`` is the end is a ``take_over``
        with this number. Raises StreamLost if the stream is missing or was replaced; waits while there is no leader.
        """
        info = await self._info(0)
        return _first_of(info), info.state.last_seq

    async def require(self, seq: int) -> None:
        """Return once a leader has message ``seq``.

        Raises StreamLost if the stream ends before it for some seconds; EngineUnavailable: there is no leader.
        """
        await self._seen(seq)

    async def take_over(self, expected: int, *, node: str, term: int) -> int:
        """Append the record of a new owner behind number ``expected`` and return its number.

        Raises Fenced if the stream has a message behind ``expected``: read on and try again. Raises StreamLost.
        Resolves doubt itself, however long.
        """
        token = f"{node}-{term}-{secrets.token_hex(6)}"
        payload = msgspec.msgpack.encode(_Payload(node, term))
        seq = await self._put("owner", expected, payload, token, {})
        self._owner = _Owner(node, term, token, seq)
        return seq

    async def append(self, expected: int, records: Sequence[bytes]) -> int:
        """Append a batch behind number ``expected`` and return its number. One append at a time.

        Once this returns, the batch is on the disks of a majority and no other node can remove it. Without an answer
        the same message is sent again, until it is known whether it is in the stream, however long. A cancelled append
        may be in the stream, now or later.

        Raises:
            Fenced: another node is the owner.
            StreamLost: the stream is missing, was replaced or is shorter than ``expected``.
            EngineFull: the batch is not in the stream.
        """
        owner = self._owner
        assert owner is not None, "take_over() comes first"
        payload = msgspec.msgpack.encode(_Payload(owner.node, owner.term, list(records)))
        id_ = f"{owner.token}-{expected + 1}-{zlib.crc32(payload):08x}"
        if len(payload) > self._engine.max_message_bytes:
            payload = await self._put_aside(expected + 1, owner, payload)
        condition = {
            "Nats-Expected-Last-Subject-Sequence": str(owner.seq),
            "Nats-Expected-Last-Subject-Sequence-Subject": f"{self.subject}.owner",
        }
        return await self._put("log", expected, payload, id_, condition)

    async def read(self, after: int) -> list[Batch]:
        """Return the batches behind number ``after``, some 8 MiB at once; an empty list: the leader has none behind it.

        Raises TooOld, StreamLost; waits while the engine is unavailable.
        """
        while True:
            if found := await self._stored(after + 1):
                return found
            info = await self._info(after)
            if info.state.last_seq == after:
                return []
            await asyncio.sleep(_RETRY_S)  # the replica that answered lags behind

    async def follow(self, after: int) -> AsyncIterator[Batch]:
        """Yield every batch behind number ``after``, without a gap, for ever; works through restarts of the engine.

        Raises TooOld, StreamLost.
        """
        follower = _Follower(self._engine, self._live)
        try:
            looked = time.monotonic()
            while True:
                # The start, and each message that was not received live.
                while found := await self._stored(after + 1):
                    for batch in found:
                        yield batch
                        after = batch.seq
                if time.monotonic() - looked > self._lost_s / 2:
                    await self._check(after)
                    looked = time.monotonic()
                async for message in follower.messages(after + 1):
                    yield await self._decode(message)
                    after = message.seq
        finally:
            await follower.close()

    async def purge(self, upto: int) -> None:
        """Remove the batches up to number ``upto``; the current owner's record stays. Idempotent.

        Raises EngineUnavailable, StreamLost.
        """
        owner = await self._engine.message(self.name, last_of=f"{self.subject}.owner")
        if owner is not None:
            await self._engine.purge(self.name, subject=f"{self.subject}.owner", before=min(owner.seq, upto + 1))
        await self._engine.purge(self.name, subject=f"{self.subject}.log", before=upto + 1)
        for name in await self._engine.parts.part_names(self._parts_prefix):
            if int(name.rpartition(".")[2].partition("-")[0]) <= upto:
                await self._engine.parts.drop_parts(name)

    async def delete(self) -> None:
        """Delete the stream with all that belongs to it; a missing one is no error."""
        await self._engine.delete_stream(self.name)
        for name in await self._engine.parts.part_names(self._parts_prefix):
            await self._engine.parts.drop_parts(name)

    @property
    def _parts_prefix(self) -> str:
        return f"order.{self.name}"

    async def _put_aside(self, seq: int, owner: _Owner, payload: bytes) -> bytes:
        """Store a payload that is too large for a message, and return the one that refers to it."""
        name = f"{self._parts_prefix}.{seq}-{secrets.token_hex(6)}"
        while True:
            with suppress(EngineUnavailable):
                await self._engine.parts.put_parts(
                    name, len(payload), lambda offset, count: payload[offset : offset + count]
                )
                return msgspec.msgpack.encode(_Payload(owner.node, owner.term, [], name))

    async def _put(self, kind: str, expected: int, payload: bytes, id_: str, condition: dict[str, str]) -> int:
        """Send one message until it is known whether it is at number ``expected + 1``."""
        headers = {
            "Nats-Msg-Id": id_,
            "Nats-Expected-Stream": self.name,
            "Nats-Expected-Last-Sequence": str(expected),
            **condition,
        }
        began = time.monotonic()
        attempts = _Attempts(self._engine, f"{self.subject}.{kind}", payload, headers, self._answer_s)
        try:
            is_in_doubt = False
            while True:
                ack = await attempts.answer()
                if ack is None:
                    is_late = time.monotonic() - began >= self._answer_s
                    if not is_in_doubt and (is_late or attempts.lost):
                        self.in_doubt, is_in_doubt = self.in_doubt + 1, True
                    if is_late:
                        await self._check(expected)
                elif ack.error is None:
                    if ack.seq != expected + 1:  # the same id, long ago or in a stream that was put here
                        raise StreamLost(f"NATS stored change {expected + 1} of {self.name} as {ack.seq}")
                    return ack.seq
                elif ack.error.err_code == _WRONG_STREAM:
                    raise StreamLost(f"another stream has taken the subjects of {self.name}")
                elif ack.error.err_code in FULL and attempts.are_answered:
                    raise EngineFull(ack.error.err_code, ack.error.description)
                elif ack.error.err_code in WRONG_SEQUENCE:
                    with suppress(EngineUnavailable):
                        if await self._is_there(expected + 1, id_):
                            return expected + 1
                # Else: a message with this id is under way, or the answer of a server that is the leader no longer.
                await asyncio.sleep(_RETRY_S)
        finally:
            attempts.close()

    async def _is_there(self, seq: int, id_: str) -> bool:
        """Return whether message ``seq`` has this id; False: there is none, according to the leader.

        Raises Fenced if it is another owner's, StreamLost if it is foreign or the stream ends before ``seq - 1``.
        """
        try:
            found = await self._engine.message(self.name, seq=seq)
        except EngineRefused as error:
            if error.number != NO_STREAM:
                raise
            found = None
        if found is None:
            info = await self._info(seq - 1)
            if _first_of(info) > seq:
                raise Fenced(f"another node has purged {self.name} up to {_first_of(info) - 1}")
            await self._check_owner()
            return False
        if found.headers.get("Nats-Msg-Id") == id_:
            return True
        payload = self._payload_of(found)
        raise Fenced(f"message {seq} of {self.name} is of {payload.node}, term {payload.term}")

    async def _check_owner(self) -> None:
        """Raise Fenced if the stream's last record of an owner is not ours."""
        if self._owner is None:
            return
        last = await self._engine.message(self.name, last_of=f"{self.subject}.owner")
        if last is None:
            raise Fenced(f"the owner's record of {self.name} was removed")
        if last.seq > self._owner.seq:
            raise Fenced(f"{self._payload_of(last).node} has taken {self.name} over")

    def _payload_of(self, message: StoredMessage) -> _Payload:
        try:
            if "Nats-Msg-Id" not in message.headers:
                raise msgspec.ValidationError("no id")
            return msgspec.msgpack.decode(message.data, type=_Payload)
        except msgspec.MsgspecError as error:
            raise StreamLost(
                f"message {message.seq} of {self.name} was not written by a node of the cluster"
            ) from error

    async def _decode(self, message: StoredMessage) -> Batch:
        payload = self._payload_of(message)
        while payload.parts:
            try:
                data = b"".join([part async for part in self._engine.parts.get_parts(payload.parts)])
            except KeyError:
                raise StreamLost(f"the content of message {message.seq} of {self.name} is missing") from None
            except EngineUnavailable:
                continue
            payload = msgspec.msgpack.decode(data, type=_Payload)
        return Batch(message.seq, payload.term, payload.node, tuple(payload.records))

    async def _stored(self, first: int) -> list[Batch]:
        """Return stored batches from number ``first`` on; an empty list: none, or the engine does not answer."""
        try:
            found = await self._engine.messages(self.name, first, max_bytes=_READ_BYTES)
        except EngineUnavailable:
            return []
        if found and found[0].seq != first:
            await self._check(first - 1)
            with suppress(EngineUnavailable):
                if await self._engine.message(self.name, seq=first) is not None:
                    return []
            raise TooOld(f"message {first} of {self.name} is no longer there; it begins at {found[0].seq}")
        batches: list[Batch] = []
        size = 0
        for each in found:
            batches.append(await self._decode(each))
            size += sum(map(len, batches[-1].records))
            if size > _READ_BYTES:  # the messages may refer to much more
                break
        return batches

    async def _check(self, last: int) -> None:
        """Look whether the stream is still there with its messages up to ``last``. Without an answer: it is.

        Raises StreamLost.
        """
        with suppress(EngineUnavailable):
            await self._seen(last)

    async def _info(self, last: int) -> StreamInfo:
        """Return the view of a leader that has message ``last``. Waits while there is none.

        Raises StreamLost if the stream was replaced, or for some seconds is missing or shorter.
        """
        while True:
            with suppress(EngineUnavailable):
                return await self._seen(last)
            await asyncio.sleep(_RETRY_S)

    async def _seen(self, last: int) -> StreamInfo:
        since = time.monotonic()
        while True:
            lost = ""
            try:
                info = await self._engine.stream_info(self.name)
            except EngineRefused as error:
                if error.number != NO_STREAM:
                    raise
                lost = "is missing"
            else:
                if self._created is not None and info.created != self._created:
                    lost = "was deleted and created again"
                elif not info.is_fresh:
                    raise EngineUnavailable(f"{self.name} has no leader with a majority")
                elif info.state.last_seq < last:
                    lost = f"ends at {info.state.last_seq}; {last} was acknowledged"
                else:
                    return info
            if time.monotonic() - since > self._lost_s:
                raise StreamLost(f"the stream {self.name} {lost}")
            await asyncio.sleep(_RETRY_S)


class _Attempts:
    """One message, sent until there is an answer. Of several copies the engine stores the first; any answer counts.

    Attributes:
        lost: copies that will get no answer.
    """

    def __init__(self, engine: Engine, subject: str, payload: bytes, headers: dict[str, str], answer_s: float) -> None:
        self.lost = 0
        self._engine = engine
        self._message = (subject, payload, headers)
        self._answer_s = answer_s
        self._resend_s = min(_RESEND_S, answer_s)
        self._waiting: set[asyncio.Task[Ack]] = set()

    async def answer(self) -> Ack | None:
        """Send a copy, and return an answer to any copy; None: there is none yet."""
        publish = self._engine.publish(*self._message, timeout_s=_LATE_ANSWERS * self._answer_s)
        self._waiting.add(asyncio.create_task(publish))
        done, self._waiting = await asyncio.wait(
            self._waiting, timeout=self._resend_s, return_when=asyncio.FIRST_COMPLETED
        )
        self._resend_s = min(2 * self._resend_s, self._answer_s)
        answers = [each.result() for each in done if each.exception() is None]
        for each in done:
            if (error := each.exception()) is not None and not isinstance(error, EngineUnavailable):
                raise error
        self.lost += len(done) - len(answers)
        return next((each for each in answers if each.error is None), answers[0] if answers else None)

    @property
    def are_answered(self) -> bool:
        """Whether each copy has its answer: if that is an error, no copy will be stored."""
        return not (self._waiting or self.lost)

    def close(self) -> None:
        """Wait for no further answers."""
        for each in self._waiting:
            if each.done():
                each.exception()
            each.cancel()


class _Follower:
    """Live messages of the core, which the engine sends as it stores them; they may be lost."""

    def __init__(self, engine: Engine, subject: str) -> None:
        self._engine = engine
        self._subject = subject
        self._subscription: Subscription | None = None

    async def messages(self, first: int) -> AsyncIterator[StoredMessage]:
        """Yield live messages from number ``first`` on; end at a gap, at an error and after a second without any."""
        try:
            if self._subscription is None:
                self._subscription = await self._engine.subscribe(self._subject, max_bytes=_FOLLOW_BYTES)
                return  # the caller reads the messages that were stored before
            while True:
                with cancellable():
                    message = await self._subscription.next_msg(timeout=_IDLE_S)
                headers = message.headers or {}
                seq = int(headers.get("Nats-Sequence", 0))
                if seq > first:
                    return
                if seq == first:
                    yield StoredMessage(headers["Nats-Subject"], seq, headers, message.data)
                    first += 1
        except nats.errors.TimeoutError:
            return
        except (nats.errors.Error, EngineUnavailable, OSError):
            await self.close()
            await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        """End the subscription."""
        if self._subscription is not None:
            with suppress(nats.errors.Error, OSError):
                await self._subscription.unsubscribe()
            self._subscription = None


def _first_of(info: StreamInfo) -> int:
    """Return the first number with no gap behind it. Of older messages only the owner's record may be left."""
    state = info.state
    if state.messages == 0:
        return state.last_seq + 1
    without_gap = state.last_seq - state.first_seq + 1 == state.messages
    return state.first_seq if without_gap else state.last_seq - state.messages + 2
