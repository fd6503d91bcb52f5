"""Random hostile calls: operations of every surface with hostile names, values, actors and files."""

import json
import random
import secrets
from typing import Any

from values import ACTORS, JSONS, PATHS, STATUSES, Known, Lines

from lattice_remote.protocol.messages import MAX_PAYLOAD_BYTES, Attachment
from lattice_remote.server.ipc import RunCall
from lattice_remote.server.worker.calls.dashboard import _ROUTES
from lattice_remote.server.worker.calls.mcp import _TOOLS
from lattice_remote.server.worker.policy import Kind

__all__ = ["Calls"]

_READS = ("lattice_show", "lattice_list", "lattice_config", "lattice_none")
_IN_TEXTS = ('{"title": 7}', '{"custom_fields.k": NaN}', '{"custom_fields.k": "\\ud800"}', '{"title": "t"}', "[1]")
"""JSON objects as texts, which MCP's library accepts for an object."""


class Calls:
    """Makes calls from ``rng``; ``lines`` has the hostile texts, ``known`` the existing objects."""

    def __init__(self, rng: random.Random, known: Known, lines: Lines) -> None:
        self._rng, self._known, self._lines = rng, known, lines

    def call(self, actor: str, act_as: tuple[str, ...]) -> RunCall:
        """Return the next call. Most are ordinary except for one or two values."""
        rng = self._rng
        surface = rng.choice(["commands", "dashboard", "mcp"]) if rng.random() < 0.97 else self._text()[:32]
        made = {"commands": self._commands, "dashboard": self._post}.get(surface, self._tool)
        name, values = made()
        for key in rng.sample(sorted(values), min(len(values), rng.choice([0, 0, 1, 1, 2]))):
            values[key] = self._hostile()
        if rng.random() < 0.05:
            values[self._text()[:50]] = self._hostile()
        if rng.random() < 0.04:
            name = self._text()[:256]
        return RunCall(
            secrets.token_hex(16), surface, name, self._payload(values), self._files(name), "tok_1", actor, list(act_as)
        )

    def _post(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        route = rng.choice(list(_ROUTES))
        values = {key: self._ordinary(key) for key in _ROUTES[route] if rng.random() < 0.85}
        path = route.replace("…", rng.choice([self._task()] * 9 + [self._text()[:100]]))
        return path + rng.choice([""] * 9 + ["/", "?x", "/open-plans", "/../x", "\n"]), values

    def _commands(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        if rng.random() < 0.3:
            line = ["next", "--claim", "--json", *rng.choice([["--actor", "agent:x"], ["--actor=human:ana"], []])]
            return "claim", {"task": self._ordinary("task_id"), "line": line if rng.random() < 0.9 else self._line()}
        return "together", {"lines": [self._line() for _ in range(rng.choice([1, 2, 2, 3, 17]))]}

    def _line(self) -> list[str]:
        """Return a command line; most print JSON, as required."""
        path, *arguments = self._lines.line().argv or [""]
        return [path, *arguments[:1], "--json", *arguments[1:]] if self._rng.random() < 0.9 else [path, *arguments]

    def _tool(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        name = rng.choice(list(_TOOLS)) if rng.random() < 0.95 else rng.choice(_READS)
        takes = _TOOLS.get(name, {"task_id": Kind.ID})
        values = {key: self._ordinary(key, takes[key]) for key in takes if rng.random() < 0.85}
        if rng.random() < 0.05:
            values["lattice_root"] = rng.choice([None, *PATHS, *self._known.outside[:2]])
        return name, values

    def _task(self) -> str:
        return self._rng.choice(self._known.tasks[-8:] + self._known.archived[-1:] or ["task_x"])

    def _ordinary(self, key: str, kind: Kind | None = None) -> Any:
        rng = self._rng
        if kind is Kind.NEW_ID:
            end = "".join(rng.choices("0123456789ABCDEFGHJKMNPQRSTVWXYZ", k=4))
            return rng.choice([None, f"task_01M8173J64RGGH4YR2NPR2{end}", self._task()])
        choices: dict[str, list[Any]] = {
            "actor": ["human:ana", "agent:x", "agent:x", "dashboard:web"],
            "task_id": [self._task(), "LAT-1", "LAT-3"],
            "source_id": [self._task(), "LAT-1"],
            "target_id": [self._task(), "LAT-2"],
            "comment_id": self._known.events[-6:] or ["ev_x"],
            "parent_id": [None, *self._known.events[-3:]],
            "status": list(STATUSES),
            "new_status": list(STATUSES),
            "fields": [
                {"title": "t"},
                {"tags": ["a"]},
                {"custom_fields.k": {"a": [1]}},
                {self._text()[:60]: 1},
                *_IN_TEXTS,
            ],
            "tags": [["a", "b"], "a,b", None],
            "data": [{"a": 1}, None, *_IN_TEXTS],
            "event_type": ["x_seen"],
            "relationship_type": ["blocks", "related_to"],
            "emoji": ["thumbsup"],
            "force": [True, False],
            "fix": [True],
            "source": ["given.txt", "https://example.org/x", *self._known.outside[:2]],
            "assignee": ["human:bob", "agent:x"],
            "assigned_to": ["human:bob", None],
            "priority": ["high"],
            "urgency": ["low", None],
            "column_width": [200, None, 1e300],
            "font_size": [12],
            "heat_map_enabled": [True],
            "lane_colors": [{"backlog": "#fff"}],
            "background_image": ["https://example.org/x.png", ""],
            "type": ["task"],
            "task_type": ["task"],
            "art_type": ["file", None],
            "role": [None],
        }
        return rng.choice(choices.get(key) or [f"words {rng.randrange(1000)}"])

    def _hostile(self) -> Any:
        rng, text = self._rng, self._text()
        if rng.random() < 0.4:
            return text
        return rng.choice([rng.choice(ACTORS), None, True, -1, 2**63, 1e308, [], [text], {}, {text: text}, [[[]]] * 9])

    def _text(self) -> str:
        return self._lines.hostile()

    def _payload(self, values: dict[str, Any]) -> bytes:
        rng = self._rng
        match rng.randrange(40):
            case 0:
                return rng.choice(JSONS).encode("utf-8", "surrogatepass")
            case 1:
                return rng.randbytes(200)
            case 2:
                return b"[" * rng.choice([10, 100_000])
            case 3:
                return b" " * (MAX_PAYLOAD_BYTES - 2) + b"{}"
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")[:MAX_PAYLOAD_BYTES]

    def _files(self, name: str) -> list[Attachment]:
        rng = self._rng
        if rng.random() > (0.7 if name == "lattice_attach" else 0.02):
            return []
        called = rng.choice(["a.txt", "x.tar.gz", ".x", "x.\n", "../x", self._text()[:200] or "y"])
        file = Attachment(
            rng.choice([0, 0, 0, 0, 1, 1023]), called, rng.choice([None, b"", b"text", rng.randbytes(999)])
        )
        return [file] if rng.random() < 0.97 else [file, file]
