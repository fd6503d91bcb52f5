"""MCP surface: the writing tools of lattice's MCP server, called in this process.

``name`` is the tool's, ``payload`` its arguments, validated by the tool's own schema. The response is ``{"result":
...}`` with the tool's result, or status 400 and lattice's error envelope for its error.
"""

import json
from collections.abc import Coroutine, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lattice_remote.protocol.operations import canonical_json
from lattice_remote.server.worker.caller import Attached, unsupported
from lattice_remote.server.worker.calls import CallRequest, CallResponse, Operation, check_fields, json_object
from lattice_remote.server.worker.policy import Kind, check, check_new_task, shown

__all__ = ["load", "prepare"]


def _takes(*values: str, **others: Kind) -> Mapping[str, Kind]:
    return {**dict.fromkeys(values, Kind.JSON), "actor": Kind.ACTOR, **others}


_ID_ONLY = {"task_id": Kind.ID}
_COMMENT = {"comment_id": Kind.ID, **_ID_ONLY}
_LINK = {"source_id": Kind.ID, "target_id": Kind.ID}

_TOOLS: Mapping[str, Mapping[str, Kind]] = {
    "lattice_create": _takes(
        *("title", "task_type", "priority", "status", "description", "tags", "assigned_to"), task_id=Kind.NEW_ID
    ),
    "lattice_update": _takes("fields", **_ID_ONLY),
    "lattice_status": _takes("new_status", "force", "reason", **_ID_ONLY),
    "lattice_assign": _takes("assignee", **_ID_ONLY),
    "lattice_comment": _takes("text", "role", parent_id=Kind.ID, **_ID_ONLY),
    "lattice_comment_edit": _takes("new_text", **_COMMENT),
    "lattice_comment_delete": _takes(**_COMMENT),
    "lattice_react": _takes("emoji", **_COMMENT),
    "lattice_unreact": _takes("emoji", **_COMMENT),
    "lattice_link": _takes("relationship_type", "note", **_LINK),
    "lattice_unlink": _takes("relationship_type", **_LINK),
    "lattice_attach": _takes("title", "art_type", "summary", source=Kind.FILE, **_ID_ONLY),
    "lattice_archive": _takes(**_ID_ONLY),
    "lattice_unarchive": _takes(**_ID_ONLY),
    "lattice_branch_link": _takes("branch", "repo", **_ID_ONLY),
    "lattice_branch_unlink": _takes("branch", "repo", **_ID_ONLY),
    "lattice_event": _takes("event_type", "data", **_ID_ONLY),
    "lattice_doctor": {"fix": Kind.JSON},
}
"""The tools that a client may call here, with all their arguments. ``lattice_root`` is excluded: the root is this
project. Reading tools run on the client's cache.
"""


def load() -> None:
    """Import lattice's MCP server with all its tools; takes about a second."""
    import_module("lattice.mcp.server")


def prepare(request: CallRequest) -> Operation:
    from lattice.core.ids import validate_actor

    takes = _TOOLS.get(request.name)
    if takes is None:
        raise unsupported(f"the server does not know an MCP tool {shown(request.name)} that writes")
    arguments = _arguments(request.name, request.payload)
    for name, value in arguments.items():
        if name not in takes:
            raise unsupported(f"the server does not know this argument of {request.name}: {shown(name)}")
        if isinstance(value, str) and takes[name] is not Kind.JSON:
            check(takes[name], name, value)
    check_fields(arguments.get("fields"))
    actor = request.identity.actor
    if isinstance(arguments.get("actor"), str):  # anything else is refused by the tool's schema
        actor = arguments["actor"]
        if validate_actor(actor):  # else the tool refuses it
            request.identity.require(actor)
    if request.name == "lattice_create":
        check_new_task(arguments.get("task_id"), request.lattice_dir)
    attached = _attach(request, arguments) if "source" in takes else None
    run = partial(_call, request.name, arguments, request.lattice_dir)
    return Operation(f"mcp: {request.name}", actor, run, attached)


def _arguments(name: str, payload: bytes) -> dict[str, Any]:
    """Return the arguments as the tool will get them, without nulls. Raises Rejected.

    The MCP library parses a text as JSON where a tool takes no text, so the parsed values are checked.
    """
    given = json_object(payload)
    try:
        read = _tool(name).fn_metadata.pre_parse_json(given)
        sound = json_object(json.dumps(read).encode())
    except (ValueError, RecursionError) as error:
        raise unsupported(f"an argument of {name} contains JSON that not every program can read") from error
    return {key: value for key, value in sound.items() if value is not None}


def _attach(request: CallRequest, arguments: dict[str, Any]) -> Attached:
    source = arguments.get("source")
    if not isinstance(source, str):
        return request.attach([])  # the tool's schema refuses it
    attached = request.attach([source])
    if not attached.paths and not source.startswith(("http://", "https://")):
        raise unsupported(f"the file {shown(source)} was not attached to the call")
    arguments["source"] = attached.argv[0]
    return attached


def _call(name: str, arguments: dict[str, Any], lattice_dir: Path) -> CallResponse:
    from mcp.server.fastmcp.exceptions import ToolError

    try:
        result = _finish(_tool(name).run(arguments))
    except ToolError as error:
        message = str(error.__cause__ or error).replace(str(lattice_dir), ".lattice")
        return CallResponse(400, canonical_json({"ok": False, "error": {"code": "TOOL_ERROR", "message": message}}))
    return CallResponse(200, json.dumps({"result": result}).encode())


def _tool(name: str) -> Any:
    """Return a tool of lattice's MCP server. Raises Rejected: the installed lattice has none."""
    from lattice.mcp.server import mcp

    tool = mcp._tool_manager.get_tool(name)
    if tool is None:
        raise unsupported(f"the server's lattice has no MCP tool {name}")
    return tool


def _finish(work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never suspends, without an event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise RuntimeError("the tool suspended, which is not supported here")
