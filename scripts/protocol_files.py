"""Write protocol/schema.json, protocol/vectors/ and openapi.json from the code; with --check, only compare them.

Inputs are fixed, so that the files change only when the protocol or the REST interface does.
"""

import base64
import inspect
import json
import runpy
import sys
import zlib
from pathlib import Path
from typing import Any, get_args

import msgspec

from lattice_remote.errors import CODES
from lattice_remote.protocol import bundle as b
from lattice_remote.protocol import messages as m
from lattice_remote.protocol import operations as o
from lattice_remote.protocol.operations import MemoryTree

ROOT = Path(__file__).parent.parent / "protocol"
REJECTED_BY_SERVERS = ROOT.parent / "src" / "lattice_remote" / "conformance" / "rejected.json"
"""The frames that ``lattice-remote conformance`` sends to a server; it is installed without ``protocol/``."""
OPENAPI = ROOT.parent / "src" / "lattice_remote" / "server" / "http" / "rest" / "openapi.json"
ID = "00112233445566778899aabbccddeeff"
MARK = bytes(range(8))
TASK = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV"
EVENTS, PLAN, SNAPSHOT = f"events/{TASK}.jsonl", f"plans/{TASK}.md", f"tasks/{TASK}.json"
LINE = b'{"type":"comment_added"}\n'
LONG = b"".join(b"%07d\n" % number for number in range(600))
IDS = o.canonical_json({"map": {"LAT-1": "task_a", "LAT-2": "task_b"}, "next_seq": 3})
IDS_AFTER = o.canonical_json({"map": {"LAT-1": "task_a", "LAT-3": "task_c"}, "next_seq": 4})
PATCH = b'{"map":{"LAT-2":null,"LAT-3":"task_c"},"next_seq":4}'

Files = dict[str, bytes]

# Sorted by code points: U+FF21 comes before U+1F600, by UTF-16 units after it.
_ODD: dict[str, Any] = {
    "a": {"b": {"c": [1, {"d": None}], "e": {}}, "f": []},
    "gr\u00f6\u00dfe": '\u00e9 \u20ac \U0001f600 \u007f " \\ / \b\f\n\r\t\u0001',
    "integers": [0, -1, 12345678901234567890, -0],
    "kept": [1.0, -0.0, 1.5e300, 1e-07, 0.1],
    "numbers": [1.0, -0.0, 1.5e300, 1e-07, 0.1],
    "truth": [True, False, None],
    "\uff21": 1,
    "\U0001f600": 2,
}
_ODD_PATCH = {
    "a": {"b": {"c": [], "e": None, "new": {"gone": None, "kept": {"x": 0}}}, "f": {"g": [None]}},
    "gr\u00f6\u00dfe": {"\U0001f601": "\ud83d"},
    "numbers": [2.50, 1e16, 3],
    "truth": None,
    "\uff22": "\u200b",
}


def _merge(before: Any, patch: Any, path: str = "config.json") -> tuple[o.MergeJson, bytes]:
    """Return the operation that patches a canonical file, and the file."""
    after = o.canonical_json(o.merge_patch(before, patch))
    data = json.dumps(patch, separators=(",", ":")).encode()
    return o.MergeJson(path, patch=data, digest=o.digest_of(after)), o.canonical_json(before)


def _append(path: str, before: bytes, data: bytes) -> o.AppendBytes:
    return o.AppendBytes(path, offset=len(before), tail=o.digest_of(before[-o.TAIL_BYTES :]), data=data)


MERGE = o.MergeJson("ids.json", patch=PATCH, digest=o.digest_of(IDS_AFTER))
MOVE = o.MoveFile(PLAN, to=f"archive/{PLAN}", digest=o.digest_of(b"# Plan\n"))
ANNOUNCE = o.AnnounceFile("artifacts/payload/art_1.bin", size=len(LONG), digest=o.digest_of(LONG))
PUT = o.PutFile(SNAPSHOT, b'{\n  "title": "T"\n}\n')

OPERATIONS: list[tuple[str, o.Operation, Files]] = [
    ("put: a new file", PUT, {}),
    ("put: replaces whatever is there", PUT, {SNAPSHOT: b"old", PLAN: b"other"}),
    ("append: the first line creates the file", _append(EVENTS, b"", LINE), {}),
    ("append: the next line", _append(EVENTS, LINE, LINE), {EVENTS: LINE}),
    ("append: the tail is the last 4096 bytes", _append(EVENTS, LONG, LINE), {EVENTS: LONG}),
    ("append: already there", _append(EVENTS, LINE, LINE), {EVENTS: LINE + LINE}),
    ("append: torn by a crash, completed", _append(EVENTS, LINE, LINE), {EVENTS: LINE + LINE[:5]}),
    ("append: the file is too short", _append(EVENTS, LINE, LINE), {EVENTS: LINE[:5]}),
    ("append: the file is too long", _append(EVENTS, LINE, LINE), {EVENTS: LINE * 3}),
    ("append: another tail", _append(EVENTS, LINE, LINE), {EVENTS: b"x" * len(LINE)}),
    ("append: something else follows", _append(EVENTS, LINE, LINE), {EVENTS: LINE + b"x"}),
    ("merge: members set, replaced and removed", MERGE, {"ids.json": IDS}),
    *[
        (f"merge: {name}", made := _merge(before, patch)[0], {made.path: _merge(before, patch)[1]})
        for name, before, patch in (
            ("text outside ASCII, numbers, nesting", _ODD, _ODD_PATCH),
            (
                "an object instead of a value, a value instead of an object",
                {"a": 1, "b": {"c": 1}},
                {"a": {"x": 1}, "b": 2},
            ),
            ("an empty patch", {"b": 1, "a": {}}, {}),
            ("nothing is left", {"a": 1}, {"a": None}),
        )
    ],
    (
        "merge: a file in another form becomes canonical",
        _merge({"a": 1, "b": 2}, {"b": 3})[0],
        {"config.json": b'{"b":2, "a":1}'},
    ),
    (
        "merge: of a member that occurs twice the last counts",
        _merge({"a": 1}, {"b": 2})[0],
        {"config.json": b'{"a": 0, "a": 1}'},
    ),
    ("merge: already there", MERGE, {"ids.json": IDS_AFTER}),
    ("merge: the result is another", MERGE, {"ids.json": b'{"x": 1}\n'}),
    ("merge: not JSON", MERGE, {"ids.json": b"\xff"}),
    ("merge: no file", MERGE, {}),
    ("move", MOVE, {PLAN: b"# Plan\n"}),
    ("move: replaces what is at the target", MOVE, {PLAN: b"# Plan\n", MOVE.to: b"old"}),
    ("move: already there", MOVE, {MOVE.to: b"# Plan\n"}),
    ("move: another content", MOVE, {PLAN: b"# Mine\n"}),
    ("move: nothing there", MOVE, {}),
    ("delete", o.DeleteFile(PLAN), {PLAN: b"# Plan\n"}),
    ("delete: nothing there", o.DeleteFile(PLAN), {}),
    ("announce: already there", ANNOUNCE, {ANNOUNCE.path: LONG}),
    ("announce: to be fetched", ANNOUNCE, {}),
    ("announce: another content", ANNOUNCE, {ANNOUNCE.path: b"x"}),
    ("announce: another content of the same size", ANNOUNCE, {ANNOUNCE.path: LONG[:-2] + b"x\n"}),
    ("append: to nothing, where there is a file", _append(EVENTS, b"", LINE), {EVENTS: b"x"}),
    ("append: bytes that are no text", _append(EVENTS, b"\xff\x00", b"\x00\xfe"), {EVENTS: b"\xff\x00"}),
]

_CHANGE = m.Change(
    seq=42,
    mark=MARK,
    time="2026-01-02T03:04:05.678Z",
    actor="human:ana",
    token_id="tok_1",  # noqa: S106 - a token's public name
    cause=ID,
    command="comment",
    ops=[_append(EVENTS, b"", LINE), PUT, MERGE, MOVE, o.DeleteFile("notes/old.md"), ANNOUNCE],
)
_ENTRY = m.LogEntry(
    seq=42,
    epoch="8f2c",
    time="2026-01-02T03:04:05.678Z",
    actor="agent:bot",
    token_id="tok_1",  # noqa: S106 - a token's public name
    token_actor="human:ana",  # noqa: S106 - a person
    cause=ID,
    command="set-project-code LAT",
    tasks=[],
)


def _zlib(data: bytes) -> bytes:
    """Return a zlib stream of one stored block: the same bytes with every zlib."""
    size = len(data).to_bytes(2, "little")
    return b"\x78\x01\x01" + size + bytes(255 - byte for byte in size) + data + zlib.adler32(data).to_bytes(4)


def _parts(*files: Any) -> dict[str, Any]:
    data = msgspec.msgpack.encode(files)
    return {"type": "parts", "seq": 42, "size": len(data), "data": _zlib(data)}


_FILES = [m.WholeFile(path, o.digest_of(data), data) for path, data in ((EVENTS, LINE), (PLAN, b""))]
_PARTS = _parts(*_FILES)

FRAMES: list[tuple[str, m.ClientFrame | m.ServerFrame]] = [
    ("hello: a first connection", m.Hello([1], "0.1.0", "0.2.0", list(m.CAPABILITIES))),
    ("hello: goes on at a number", m.Hello([1], "0.1.0", "0.2.0", ["call:mcp"], "8f2c", 41, MARK)),
    ("hello: only writes", m.Hello([1], "0.1.0", "0.2.0", follow=False)),
    ("run", m.Run(ID, ["comment", "LAT-1", "größer", "--actor", "human:ana"])),
    (
        "run: with files",
        m.Run(
            ID,
            ["attach", "LAT-1", "log.txt", "--actor", "human:ana"],
            [m.Attachment(2, "log.txt", b"\x00\xff"), m.Attachment(1, "missing.txt")],
        ),
    ),
    ("put: of a new file", m.Put(ID, PLAN, None, b"# Plan\n")),
    ("put: of an edited file whose base has this digest", m.Put(ID, PLAN, None, b"# Mine\n", 0.0, bytes(range(32)))),
    ("put: of an edited file", m.Put(ID, PLAN, b"# Plan\n", b"# My plan\n")),
    (
        "run: with a file that was uploaded",
        m.Run(
            ID,
            ["attach", "LAT-1", "big.bin", "--actor", "human:ana"],
            [m.Attachment(2, "big.bin", digest=o.digest_of(LONG), size=len(LONG))],
        ),
    ),
    ("push", m.Push(ID, o.digest_of(LONG), len(LONG))),
    ("upload: how much is there", m.Upload(ID, o.digest_of(LONG), len(LONG))),
    ("upload: a piece", m.Upload(ID, o.digest_of(LONG), len(LONG), 4096, LONG[4096:])),
    ("download: whatever the file holds", m.Download(ID, ANNOUNCE.path)),
    ("download: a piece of known content", m.Download(ID, ANNOUNCE.path, o.digest_of(LONG), 4096, 700)),
    ("fetch", m.Fetch([SNAPSHOT, "config.json"])),
    ("manifest", m.Manifest()),
    ("applied", m.Applied(42)),
    ("applied: a while ago", m.Applied(42, 0.5)),
    ("run: sent again", m.Run(ID, ["comment", "LAT-1", "x"], age_s=2.5)),
    ("call: a POST of the dashboard", m.Call(ID, "dashboard", f"/api/tasks/{TASK}/status", b'{"status":"done"}')),
    (
        "call: an MCP tool that takes a file",
        m.Call(
            ID,
            "mcp",
            "lattice_attach",
            b'{"task_id":"LAT-1","source":"log.txt","actor":"human:ana"}',
            [m.Attachment(0, "log.txt", b"\x00\xff")],
            2.5,
        ),
    ),
    ("log: the newest changes", m.Log(ID)),
    ("log: of a task, going on", m.Log(ID, "LAT-42", 5, 17)),
    ("log: the versions of a plan", m.Log(ID, "LAT-42", text="plan")),
    ("read-version: the newest with its number", m.ReadVersion(ID, "LAT-42", "notes", 7)),
    ("read-version: of an epoch", m.ReadVersion(ID, TASK, "plan", 7, "e1")),
    ("replay: where is the head", m.Replay(ID)),
    ("replay: after a number", m.Replay(ID, seq=41)),
    ("replay: after a change", m.Replay(ID, "8f2c", 41, MARK)),
    (
        "welcome: the missing changes follow",
        m.Welcome(
            1,
            "0.1.0",
            "0.2.0",
            "p",
            "human:ana",
            "8f2c",
            42,
            3,
            False,
            m.Limits(1 << 25, 1 << 24),
            ["agent:*"],
            ["call:mcp"],
        ),
    ),
    (
        "welcome: the copy can't be continued",
        m.Welcome(1, "0.1.0", "0.2.0", "p", "human:ana", "8f2c", 0, 1, True, m.Limits(1 << 25, 1 << 24)),
    ),
    (
        "welcome: something was done in the project",
        m.Welcome(1, "0.1.0", "0.2.0", "p", "human:ana", "8f2c", 3, 1, False, m.Limits(1, 1), used="3 tasks"),
    ),
    ("change: every operation", _CHANGE),
    (
        "change: by a token of somebody else",
        msgspec.structs.replace(_CHANGE, actor="agent:bot", token_actor="human:ana"),  # noqa: S106 - a person
    ),
    ("change: no operation", m.Change(1, MARK, "2026-01-02T03:04:05.678Z", "server", "", "recovery", "", [])),
    ("replayed", m.Replayed(ID, "kept", "8f2c", 42, 3, 41, MARK, [_CHANGE])),
    ("replayed: nothing yet", m.Replayed(ID, "kept", "8f2c", 42, 3, 42, MARK)),
    *[(f"replayed: {outcome}", m.Replayed(ID, outcome, "8f2c", 42, 3, 1)) for outcome in ("expired", "ahead", "epoch")],
    ("reply", m.Reply(ID, 42, 0, b"Comment added\n", b"")),
    ("reply: a failed command", m.Reply(ID, 42, 1, b"", b"Error: no such task\n")),
    *[(f"stored: {outcome}", m.Stored(ID, 43, outcome)) for outcome in ("stored", "merged", "unchanged", "conflict")],
    ("uploaded: some of it", m.Uploaded(ID, 4096)),
    ("returned", m.Returned(ID, 43, 200, b'{"ok":true,"data":{}}')),
    ("returned: a failure, which changed nothing", m.Returned(ID, 42, 404, b'{"ok":false,"error":{}}')),
    ("pushed", m.Pushed(ID, 1, 12, 3, 61, ["its hooks were left out"])),
    ("downloaded", m.Downloaded(ID, 42, len(LONG), o.digest_of(LONG), LONG[4096:4796])),
    ("entries: one of several pieces", m.Entries(42, MARK, [m.Entry(EVENTS, 25, o.digest_of(LINE))], False)),
    ("entries: of an empty project", m.Entries(0, b"", [], True)),
    ("part: a whole file", m.Part(EVENTS, 42, len(LINE), o.digest_of(LINE), 0, LINE)),
    ("part: the second piece", m.Part(EVENTS, 42, len(LINE), o.digest_of(LINE), 20, LINE[20:])),
    ("part: an empty file", m.Part(EVENTS, 42, 0, o.digest_of(b""))),
    ("part: no such file", m.Part(EVENTS, 42, gone=True)),
    ("parts", m.Parts(42, _PARTS["size"], _PARTS["data"])),
    ("log-page", m.LogPage(ID, [_ENTRY, msgspec.structs.replace(_ENTRY, seq=7, tasks=[TASK], more_tasks=2)], 17)),
    ("log-page: the end", m.LogPage(ID, [], None)),
    ("log-page: versions", m.LogPage(ID, [msgspec.structs.replace(_ENTRY, text_bytes=120)], None)),
    ("version", m.Version(ID, "e1", 7, b"# Plan\n")),
    ("refused", m.Refused(ID, "REMOTE_FORBIDDEN", "token may act as human:ana, agent:*; not as human:bob")),
    ("bye: come back", m.Bye("REMOTE_SHUTDOWN", "the server is stopping", 1.0)),
    ("bye: do not come back", m.Bye("REMOTE_UNAUTHORIZED", "the token was revoked")),
]

_HELLO = {"type": "hello", "versions": [1], "client_version": "1", "lattice_version": "1"}
_REPLY = {"type": "reply", "id": ID, "seq": 1, "exit_code": 0, "stdout": b"", "stderr": b""}
_DELETE = {"seq": 1, "mark": b"", "time": "", "actor": "", "token_id": "", "cause": "", "command": "", "type": "change"}


def _head(entry: Any) -> bytes:
    """Return a head in a form that is not canonical, and the end."""
    data = entry if isinstance(entry, bytes) else msgspec.msgpack.encode(entry)
    return len(data).to_bytes(4) + data + bytes(4)


_BAD_PATHS = (
    *("", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../config.json", "a/../b", "a/./b", ".base/x", "a/.b"),
    *("locks/x", "LOCKS/x", "remote.json", "Remote.json", "cache_state.json", "CACHE_STATE.JSON", "plans/x.md~"),
    *("a\\b", "a:b", "C:x", "a\x00b", "a\nb", "a\x1fb", "a\x7fb", "a\x85b", "a\x9fb"),
    *("a\u200bb", "a\u200fb", "a\u202ab", "a\u202eb", "a\u2060b", "a\u206fb", "\ufeffa"),
    *("a/b/c/d/e/f/g/h/i", "x" * 256, "\u00e9" * 128, "a" * 200 + "/" + "b" * 200 + "/" + "c" * 111),
)
"""Each breaks one rule of section 2.5."""


def _listed(path: str) -> dict[str, Any]:
    return {
        "type": "entries",
        "seq": 1,
        "mark": b"",
        "entries": [{"path": path, "size": 0, "digest": bytes(32)}],
        "last": True,
    }


_NOTHING = {"op": "append", "path": "a", "offset": 0, "tail": o.digest_of(b""), "data": b""}
REJECTED: list[tuple[str, str, Any]] = [
    ("client", "an unknown kind", {"type": "shout"}),
    ("client", "no kind", {"seq": 1}),
    ("client", "a frame of the other side", _REPLY),
    ("client", "not a map", [1, 2]),
    ("client", "no versions", {**_HELLO, "versions": []}),
    ("client", "a negative number", {**_HELLO, "seq": -1}),
    ("client", "a string where a number belongs", {**_HELLO, "seq": "1"}),
    ("client", "a long mark", {**_HELLO, "mark": bytes(33)}),
    ("client", "an id of 31 digits", {"type": "run", "id": ID[1:], "argv": ["list"]}),
    ("client", "an id that ends in a line break", {"type": "run", "id": ID + "\n", "argv": ["list"]}),
    ("client", "an empty argv", {"type": "run", "id": ID, "argv": []}),
    ("client", "an argument that is no string", {"type": "run", "id": ID, "argv": [b"list"]}),
    ("client", "a log of nothing", {"type": "log", "id": ID, "limit": 0}),
    ("client", "a log of too much", {"type": "log", "id": ID, "limit": 201}),
    ("client", "a download of nothing", {"type": "download", "id": ID, "path": "ids.json", "limit": 0}),
    ("client", "a download from outside", {"type": "download", "id": ID, "path": "../tokens.json"}),
    ("client", "an upload with a short digest", {"type": "upload", "id": ID, "digest": bytes(31), "size": 1}),
    ("client", "an upload of less than nothing", {"type": "upload", "id": ID, "digest": bytes(32), "size": -1}),
    (
        "client",
        "a piece before the first",
        {"type": "upload", "id": ID, "digest": bytes(32), "size": 9, "offset": -1},
    ),
    ("client", "an age before its time", {"type": "run", "id": ID, "argv": ["list"], "age_s": -1.0}),
    (
        "client",
        "a surface that is no name",
        {"type": "call", "id": ID, "surface": "a/b", "name": "x", "payload": b"{}"},
    ),
    ("client", "a payload that is text", {"type": "call", "id": ID, "surface": "mcp", "name": "x", "payload": "{}"}),
    *[
        (side, f"{frame}: a path that is not allowed: {path!a}"[:120], make(path))
        for side, frame, make in (
            ("client", "fetch", lambda path: {"type": "fetch", "paths": ["config.json", path]}),
            ("server", "part", lambda path: {"type": "part", "path": path, "seq": 1, "gone": True}),
            ("server", "entries", _listed),
            ("server", "delete", lambda path: {**_DELETE, "ops": [{"op": "delete", "path": path}]}),
        )
        for path in _BAD_PATHS
    ],
    *[
        ("server", f"{operation['op']}: a path that is not allowed", {**_DELETE, "ops": [operation]})
        for operation in (
            {"op": "put", "path": "cache_state.json", "data": b""},
            {"op": "append", "path": "events/../x", "offset": 0, "tail": bytes(32), "data": b"x"},
            {"op": "merge", "path": "a:b", "patch": b"{}", "digest": bytes(32)},
            {"op": "move", "path": "a\u200bb", "to": "b", "digest": bytes(32)},
            {"op": "move", "path": "b", "to": "a/b/c/d/e/f/g/h/i", "digest": bytes(32)},
            {"op": "announce", "path": "x" * 256, "size": 1, "digest": bytes(32)},
        )
    ],
    (
        "client",
        "put: a path that is not allowed",
        {"type": "put", "id": ID, "path": "plans/../x.md", "base": None, "text": b""},
    ),
    ("client", "an id in upper case", {"type": "run", "id": ID.upper(), "argv": ["list"]}),
    ("server", "an id in upper case", {**_REPLY, "id": ID.upper()}),
    ("client", "a key that is not a string", {"type": "manifest", 1: 2}),
    ("server", "a key that is not a string", {**_REPLY, b"x": 1}),
    ("client", "an integer where a bool belongs", {**_HELLO, "follow": 1}),
    ("server", "an integer where a bool belongs", {**_listed("config.json"), "last": 1}),
    ("client", "null where a bool belongs", {**_HELLO, "follow": None}),
    ("client", "a bool where an integer belongs", {**_HELLO, "seq": True}),
    ("server", "a float where an integer belongs", {**_REPLY, "seq": 1.0}),
    ("server", "a bool where an integer belongs", {**_REPLY, "seq": True}),
    ("client", "null where a default would apply", {"type": "log", "id": ID, "limit": None}),
    ("client", "binary where a string belongs", {"type": "log", "id": ID.encode()}),
    ("server", "a string where binary belongs", {**_REPLY, "stdout": "x"}),
    ("client", "a list where a map belongs", {"type": "run", "id": ID, "argv": ["list"], "files": [[0, "x"]]}),
    ("client", "a string that is not UTF-8", b"\x82\xa4type\xa3log\xa2id\xa2\xed\xa0"),
    (
        "server",
        "a surrogate in a string",
        msgspec.msgpack.encode({"type": "bye", "code": "x"})[:-1] + b"\xa6reason\xa3\xed\xa0\xbd",
    ),
    ("client", "bytes after the map", msgspec.msgpack.encode({"type": "manifest"}) + b"\xc0"),
    ("client", "nothing", b""),
    ("client", "a kind that comes twice, each another", b"\x82\xa4type\xa8manifest\xa4type\xa5shout"),
    ("server", "an unknown operation", {**_DELETE, "ops": [{"op": "chmod", "path": "a"}]}),
    ("server", "a path that is not allowed", {**_DELETE, "ops": [{"op": "delete", "path": "../a"}]}),
    (
        "server",
        "a move out of the tree",
        {**_DELETE, "ops": [{"op": "move", "path": "a", "to": "/a", "digest": bytes(32)}]},
    ),
    ("server", "a short digest", {**_DELETE, "ops": [{"op": "announce", "path": "a", "size": 1, "digest": bytes(31)}]}),
    ("server", "an append of nothing", {**_DELETE, "ops": [_NOTHING]}),
    ("server", "a long mark", {**_DELETE, "mark": bytes(33), "ops": []}),
    ("server", "a change without a number", {**_DELETE, "seq": 0, "ops": []}),
    ("server", "a field is missing", {"type": "reply", "id": ID, "seq": 1}),
    ("server", "a status of no answer", {"type": "returned", "id": ID, "seq": 1, "status": 100, "payload": b"{}"}),
    (
        "server",
        "a replayed change out of the tree",
        {
            "type": "replayed",
            "id": ID,
            "outcome": "kept",
            "epoch": "8f2c",
            "head": 1,
            "oldest": 1,
            "seq": 0,
            "changes": [{**_DELETE, "ops": [{"op": "delete", "path": "../a"}]}],
        },
    ),
    ("server", "parts: no file", _parts()),
    ("server", "parts: a path that is not allowed", _parts(m.WholeFile("../a", bytes(32), b""))),
    ("server", "parts: a short digest", _parts({"path": "a", "digest": bytes(31), "data": b""})),
    ("server", "parts: another size", {**_PARTS, "size": _PARTS["size"] - 1}),
    ("server", "parts: more than 2 MiB", {**_PARTS, "size": (2 << 20) + 1}),
    ("server", "parts: a stream without its end", {**_PARTS, "data": _PARTS["data"][:-1]}),
    ("server", "parts: bytes after the stream", {**_PARTS, "data": _PARTS["data"] + b"x"}),
    ("server", "parts: another checksum", {**_PARTS, "data": _PARTS["data"][:-4] + bytes(4)}),
    ("server", "parts: no zlib stream", {**_PARTS, "data": msgspec.msgpack.encode(_FILES)}),
    ("server", "parts: no array", {**_PARTS, "size": 1, "data": _zlib(b"\x80")}),
    ("client", "an epoch that is no name", {**_HELLO, "epoch": "8f2c-1"}),
    ("client", "an epoch that ends in a line break", {**_HELLO, "epoch": "8f2c\n"}),
    ("server", "an outcome that does not exist", {"type": "stored", "id": ID, "seq": 1, "outcome": "lost"}),
]


_LONGEST = "a" * 200 + "/" + "b" * 200 + "/" + "c" * 110
ACCEPTED: list[tuple[str, m.ClientFrame | m.ServerFrame, bytes]] = [
    ("fields in another order", m.Log(ID, limit=5), msgspec.msgpack.encode({"limit": 5, "id": ID, "type": "log"})),
    (
        "a field that comes twice: the last counts",
        m.Log(ID, limit=7),
        b"\x84\xa4type\xa3log\xa5limit\x05\xa2id\xd9 " + ID.encode() + b"\xa5limit\x07",
    ),
    ("an unknown field", m.Log(ID), msgspec.msgpack.encode({"type": "log", "id": ID, "sort": {"by": ["time", None]}})),
    (
        "an unknown capability",
        m.Hello([1, 2], "1", "1", ["later"]),
        msgspec.msgpack.encode({**_HELLO, "versions": [1, 2], "capabilities": ["later"]}),
    ),
    ("an integer for a float", m.Applied(1, 2.0), msgspec.msgpack.encode({"type": "applied", "seq": 1, "held_s": 2})),
    ("an integer in a long form", m.Applied(1), b"\x82\xa4type\xa7applied\xa3seq\xcf\0\0\0\0\0\0\0\x01"),
    (
        "missing fields have their defaults",
        m.Part("config.json", 3, 0, b"", 0, b"", False),
        msgspec.msgpack.encode({"type": "part", "path": "config.json", "seq": 3}),
    ),
    (
        "an integer for a float, from a server",
        m.Bye("REMOTE_BUSY", "later", 5.0),
        msgspec.msgpack.encode({"type": "bye", "code": "REMOTE_BUSY", "reason": "later", "retry_after_s": 5}),
    ),
    *[
        (
            f"a path at its limit: {path!a}"[:60],
            m.Part(path, 1, gone=True),
            msgspec.msgpack.encode(m.Part(path, 1, gone=True)),
        )
        for path in (
            _LONGEST,
            "x" * 255,
            "a/b/c/d/e/f/g/h",
            "a..b/c. d",
            "gr\u00f6\u00dfe/\U0001f600",
            "Plans/x.md~",
            "a\xa0b",
            "\u2010",
        )
    ],
]


def _pack(files: Files, *, end: bytes = bytes(4)) -> bytes:
    """Return a pack of these files, in this order."""
    heads = ((b.head_of(m.Entry(path, len(data), o.digest_of(data))), data) for path, data in files.items())
    return b.MAGIC + b"".join(head + data for head, data in heads) + end


_PROJECT = {
    "config.json": b"{}\n",
    EVENTS: LINE,
    PLAN: b"# Plan\n",
    "ids.json": IDS,
    "resources/\uff21/x": b"",
    "resources/\U0001f600/x": b"\x00\xff",
}
_TWO = {"a": b"1", "b": b"2"}
PACKS: list[tuple[str, bytes, Files | None]] = [
    ("a project", _pack(dict(sorted(_PROJECT.items()))), _PROJECT),
    ("a project without files", _pack({}), {}),
    ("another first line", b"lattice-pack 2\n" + bytes(4), None),
    ("files out of order", _pack({"b": b"2", "a": b"1"}), None),
    ("sorted by UTF-16 units", _pack({"\U0001f600": b"", "\uff21": b""}), None),
    ("a file twice", _pack({"a": b"1"}, end=b"") + _pack({"a": b"1"})[len(b.MAGIC) :], None),
    ("another digest", _pack(_TWO)[:-5] + b"3" + bytes(4), None),
    ("no end", _pack(_TWO, end=b""), None),
    ("cut within a file", _pack({"a": b"12345"}, end=b"")[:-1], None),
    ("bytes after the end", _pack(_TWO) + b"x", None),
    ("a head that is too long", b.MAGIC + (1025).to_bytes(4) + bytes(1025), None),
    (
        "a head with its fields in another order",
        _pack({}, end=_head({"size": 0, "path": "a", "digest": o.digest_of(b"")})),
        None,
    ),
    (
        "a head with a size in a longer form",
        _pack({}, end=_head(b"\x83\xa4path\xa1a\xa4size\xcc\x00\xa6digest\xc4 " + o.digest_of(b""))),
        None,
    ),
    (
        "a head with another field",
        _pack({}, end=_head({"path": "a", "size": 0, "digest": o.digest_of(b""), "mode": 1})),
        None,
    ),
]


def _text(files: Files) -> dict[str, str]:
    return {path: base64.b64encode(data).decode() for path, data in files.items()}


def _operation_vector(name: str, operation: o.Operation, before: Files) -> dict[str, Any]:
    tree = MemoryTree(dict(before))
    drifted = o.apply(operation, tree)
    return {
        "name": name,
        "operation": msgspec.to_builtins(operation),
        "msgpack": msgspec.msgpack.encode(operation).hex(),
        "before": _text(before),
        "after": _text(tree.files),
        "drifted": sorted(drifted),
    }


def _frame_vector(name: str, frame: m.ClientFrame | m.ServerFrame) -> dict[str, Any]:
    return {
        "name": name,
        "from": "client" if isinstance(frame, get_args(m.ClientFrame)) else "server",
        "frame": msgspec.to_builtins(frame),
        "msgpack": msgspec.msgpack.encode(frame).hex(),
    }


def schema() -> dict[str, Any]:
    """Return the schema of a frame: one of those that a client sends, or one of those that a server sends."""
    client, server = get_args(m.ClientFrame), get_args(m.ServerFrame)
    frames, definitions = msgspec.json.schema_components((*client, *server), ref_template="#/$defs/{name}")
    for definition in definitions.values():
        # Python 3.13 takes the indentation out of docstrings, 3.12 leaves it in.
        definition["description"] = inspect.cleandoc(definition["description"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": m.SUBPROTOCOL,
        "description": "One frame. Unknown fields are ignored. Strings with contentEncoding base64 are binary.",
        "oneOf": [{"$ref": "#/$defs/ClientFrame"}, {"$ref": "#/$defs/ServerFrame"}],
        "$defs": {
            "ClientFrame": {"oneOf": list(frames[: len(client)])},
            "ServerFrame": {"oneOf": list(frames[len(client) :])},
            "Code": {"description": "A code of Refused or Bye.", "enum": list(CODES)},
            **definitions,
        },
    }


def files() -> dict[Path, bytes]:
    """Return the content of each generated file."""
    rejected = [
        {
            "name": name,
            "from": side,
            "msgpack": (data if isinstance(data, bytes) else msgspec.msgpack.encode(data)).hex(),
        }
        for side, name, data in REJECTED
    ]
    packs = [
        {"name": name, "pack": data.hex(), "files": None if found is None else _text(found)}
        for name, data, found in PACKS
    ]
    contents = {
        "schema.json": schema(),
        "vectors/accepted.json": [
            {**_frame_vector(name, frame), "msgpack": data.hex()} for name, frame, data in ACCEPTED
        ],
        "vectors/frames.json": [_frame_vector(*case) for case in FRAMES],
        "vectors/packs.json": packs,
        "vectors/operations.json": [_operation_vector(*case) for case in OPERATIONS],
        "vectors/rejected.json": rejected,
        "vectors/sessions.json": runpy.run_path(str(Path(__file__).with_name("protocol_sessions.py")))["sessions"](),
    }
    by_servers = {each["name"]: each["msgpack"] for each in rejected if each["from"] == "client"}
    openapi = runpy.run_path(str(Path(__file__).with_name("openapi.py")))["description"]()
    return {ROOT / name: o.canonical_json(content) for name, content in contents.items()} | {
        OPENAPI: o.canonical_json(openapi),
        REJECTED_BY_SERVERS: o.canonical_json(by_servers),
    }


def main(arguments: list[str]) -> int:
    """Write what differs, or with --check name it; return the exit code."""
    outdated = [path for path, data in files().items() if not path.exists() or path.read_bytes() != data]
    if arguments == ["--check"]:
        for path in outdated:
            sys.stderr.write(f"{path} does not agree with the code; run: make protocol\n")
        return 1 if outdated else 0
    for path in outdated:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files()[path])
        sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
