"""Prints every frame of ``lattice.v1`` as JSON Schema, from the types in ``messages`` and ``operations``.

    python -m lattice_remote.protocol.schema

On the wire frames are msgpack maps of the same shape; what the schema shows as base64 is a msgpack binary there.
"""

import inspect
import sys
from typing import Any, get_args

import msgspec

from lattice_remote.errors import CODES
from lattice_remote.protocol.messages import SUBPROTOCOL, ClientFrame, ServerFrame
from lattice_remote.protocol.operations import canonical_json

__all__ = ["schema"]


def schema() -> dict[str, Any]:
    """Return the schema of a frame: one of those that a client sends, or one of those that a server sends."""
    client, server = get_args(ClientFrame), get_args(ServerFrame)
    frames, definitions = msgspec.json.schema_components((*client, *server), ref_template="#/$defs/{name}")
    for definition in definitions.values():
        # Python 3.13 takes the indentation out of docstrings, 3.12 leaves it in.
        definition["description"] = inspect.cleandoc(definition["description"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SUBPROTOCOL,
        "description": "One frame. Unknown fields are ignored. Strings with contentEncoding base64 are binary.",
        "oneOf": [{"$ref": "#/$defs/ClientFrame"}, {"$ref": "#/$defs/ServerFrame"}],
        "$defs": {
            "ClientFrame": {"oneOf": list(frames[: len(client)])},
            "ServerFrame": {"oneOf": list(frames[len(client) :])},
            "Code": {"description": "A code of Refused or Bye.", "enum": list(CODES)},
            **definitions,
        },
    }


if __name__ == "__main__":
    sys.stdout.write(canonical_json(schema()).decode())
