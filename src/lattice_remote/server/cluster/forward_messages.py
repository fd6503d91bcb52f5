"""Messages between a node and the owner of a project, for forwarded requests (``forward.py``)."""

import msgspec

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import Upload
from lattice_remote.server.ipc import Edit, ImportProject, RunCall, RunCommand
from lattice_remote.server.project.metrics import RequestOutcome

__all__ = [
    "Accepted",
    "Answer",
    "Forget",
    "ForwardedRequest",
    "FromOwner",
    "NotOwner",
    "Piece",
    "Submit",
    "ToOwner",
    "Withdraw",
    "decode_from_owner",
    "decode_to_owner",
    "encode_message",
]

ForwardedRequest = RunCommand | RunCall | Edit | ImportProject
"""A push only if its project is no longer here: the owner may have done it."""


class _Message(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class Submit(_Message, frozen=True, tag="submit"):
    """Run a request. ``age_s`` is the time since it was first sent, None if it was never sent before."""

    request: ForwardedRequest
    age_s: float | None = None


class Piece(_Message, frozen=True, tag="piece"):
    """A piece of an upload of this token."""

    upload: Upload
    token_id: str


class Forget(_Message, frozen=True, tag="forget"):
    """No requester waits any longer: end a wait for a resource. No answer follows."""

    id: str


class Withdraw(_Message, frozen=True, tag="withdraw"):
    """Withdraw a request of a revoked token if it has not had an effect."""

    id: str
    code: str


class Accepted(_Message, frozen=True, tag="accepted"):
    """This node is the owner: requests may follow."""


class NotOwner(_Message, frozen=True, tag="not-owner"):
    """This node is not, or no longer, the owner; unanswered requests get no answer."""


class Answer(_Message, frozen=True, tag="answer"):
    """The reply to a request or a piece; a request's is valid from change ``seq`` of ``epoch``."""

    id: str
    reply: bytes
    epoch: str = ""
    seq: int = 0
    outcome: RequestOutcome | None = None


ToOwner = Submit | Piece | Forget | Withdraw
FromOwner = Accepted | NotOwner | Answer

_to_owner: msgspec.msgpack.Decoder[ToOwner] = msgspec.msgpack.Decoder(ToOwner)
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)
_encoder = msgspec.msgpack.Encoder()


def encode_message(message: ToOwner | FromOwner) -> bytes:
    return _encoder.encode(message)


def decode_to_owner(data: str | bytes) -> ToOwner:
    """Return a message for the owner. Raises ProtocolError."""
    return _decode(_to_owner, data)


def decode_from_owner(data: str | bytes) -> FromOwner:
    """Return a message of the owner. Raises ProtocolError."""
    return _decode(_from_owner, data)


def _decode[T](decoder: "msgspec.msgpack.Decoder[T]", data: str | bytes) -> T:
    if isinstance(data, str):
        raise ProtocolError("received a text message; frames are binary")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"invalid message of a node: {error}") from error
