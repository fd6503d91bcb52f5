"""Requests of the dashboard's page and more, for any server of them."""

import json
from typing import Protocol

from normaliser import Normaliser

__all__ = ["ANA", "GETS", "NO_TASK", "POSTS", "UNORDERED", "PageRequests"]

ANA = {"actor": "human:ana"}
BOT = {"actor": "agent:bot"}
NO_TASK = f"task_{'0' * 26}"

POSTS: list[tuple[str, object]] = [
    ("/api/tasks", {"title": "One", **ANA}),
    (
        "/api/tasks",
        {"title": "Zwei: größer", "priority": "high", "tags": ["a", "b"], "assigned_to": "agent:bot", **BOT},
    ),
    ("/api/tasks", {"title": "By the page", "actor": "dashboard:web", "urgency": "high", "description": "d" * 3000}),
    ("/api/tasks", {"title": "By nobody"}),
    ("/api/tasks", {"title": " "}),
    ("/api/tasks", {"title": "x", "status": "nowhere", **ANA}),
    ("/api/tasks", {"title": "x", "tags": "no list", **ANA}),
    ("/api/tasks", {"title": 7, **ANA}),
    ("/api/tasks", {"title": "x", "actor": "ana"}),
    ("/api/tasks", {"title": "x", "actor": ""}),
    ("/api/tasks", {"title": "x", "actor": ["human:ana"]}),
    ("/api/tasks", {"title": "x", "assigned_to": 7, **ANA}),
    ("/api/tasks", b"{"),
    ("/api/tasks", b""),
    ("/api/tasks/{0}/status", {"status": "in_planning", **ANA}),
    ("/api/tasks/{0}/status", {"status": "in_planning", **ANA}),
    ("/api/tasks/{0}/status", {"status": "done", **ANA}),
    ("/api/tasks/{0}/status", {"status": "done", "force": True, "reason": "because", **ANA}),
    ("/api/tasks/{0}/status", {}),
    ("/api/tasks/{0}/assign", {"assigned_to": "human:ana", **ANA}),
    ("/api/tasks/{0}/assign", {"assigned_to": None}),
    ("/api/tasks/{0}/assign", {"assigned_to": "nobody", **ANA}),
    ("/api/tasks/{0}/update", {"fields": {"title": "New", "tags": ["c"]}, **ANA}),
    ("/api/tasks/{0}/update", {"fields": {"colour": "blue"}, **ANA}),
    ("/api/tasks/{0}/comment", {"body": "First.\nIt is longer."}),
    ("/api/tasks/{0}/comment", {"body": "A reply", "parent_id": "{comment}", **BOT}),
    ("/api/tasks/{0}/comment", {"body": "", **ANA}),
    ("/api/tasks/{0}/comment", {"body": "x", "parent_id": "ev_none", **ANA}),
    ("/api/tasks/{0}/comment-edit", {"comment_id": "{comment}", "body": "Changed", **ANA}),
    ("/api/tasks/{0}/comment-edit", {"body": "Changed", **ANA}),
    ("/api/tasks/{0}/react", {"comment_id": "{comment}", "emoji": "thumbsup"}),
    ("/api/tasks/{0}/react", {"comment_id": "{comment}", "emoji": "no emoji!"}),
    ("/api/tasks/{0}/unreact", {"comment_id": "{comment}", "emoji": "thumbsup"}),
    ("/api/tasks/{0}/unreact", {"comment_id": "{comment}", "emoji": "thumbsup"}),
    ("/api/tasks/{0}/comment-delete", {"comment_id": "{comment}", **ANA}),
    ("/api/tasks/{0}/comment-delete", {"comment_id": "{comment}", **ANA}),
    ("/api/tasks/{0}/open-notes", {}),
    ("/api/tasks/{0}/open-plans", {}),
    ("/api/tasks/{1}/archive", {**ANA}),
    ("/api/tasks/{1}/archive", {}),
    ("/api/tasks/{1}/status", {"status": "done", **ANA}),
    ("/api/config/dashboard", {"theme": "noir", "column_width": 300, "lane_colors": {"backlog": "#111"}}),
    ("/api/config/dashboard", {"theme": None, "voice": "plain", "heat_map_enabled": True}),
    ("/api/config/dashboard", {"column_width": 1}),
    ("/api/config/dashboard", {"theme": "x", "tehme": "y", "actor": "human:ana"}),
    ("/api/config/dashboard", {"theme": 7}),
    (f"/api/tasks/{NO_TASK}/status", {"status": "done", **ANA}),
    ("/api/tasks/none/status", {"status": "done", **ANA}),
    ("/api/tasks/../../etc/status", {"status": "done", **ANA}),
    (f"/api/tasks/{NO_TASK}/none", {}),
    (f"/api/tasks/{NO_TASK}", {}),
    ("/api/none", {}),
    ("/none", {}),
    ("/", {}),
    ("/api/tasks/{0}/comment/?x=1", {"body": "with a query"}),
]
"""Requests of a page, and more; ``{0}`` is the first created task, ``{comment}`` the first comment."""

GETS = [
    *("/", "/api/config", "/api/tasks", "/api/stats", "/api/activity", "/api/archived", "/api/graph", "/api/git"),
    *("/api/activity?limit=3&type=comment_added", "/api/tasks/{0}", "/api/tasks/{0}/events", "/api/tasks/{0}/comments"),
    *("/api/tasks/{0}/full", "/api/tasks/{1}", f"/api/tasks/{NO_TASK}", "/api/tasks/none", "/api/none", "/none"),
    *("/static/cube3d.js", "/static/none.js", "/static/../server.py", "/stats-demo", "/api/git/branches/main/commits"),
]


UNORDERED = ("/api/stats", "/api/activity")
"""Lists sorted by time, with no order within a second."""


class _Dashboard(Protocol):
    def post(self, path: str, body: object) -> tuple[int, str]: ...


class PageRequests:
    """Table requests to one dashboard, with the ids that its responses contained."""

    def __init__(self, dashboard: _Dashboard, normalise: Normaliser, *, is_local: bool) -> None:
        self._dashboard, self.normalise, self._is_local = dashboard, normalise, is_local
        self.tasks: list[str] = []
        self.comment = ""

    def post(self, path: str, body: object) -> tuple[int, str]:
        """Return status and normalised text of the response."""
        if self._is_local and isinstance(body, dict) and body.get("actor", "dashboard:web") == "dashboard:web":
            body = {**body, **({} if path == "/api/config/dashboard" else ANA)}  # the actor of the token
        data = body if isinstance(body, bytes) else json.dumps(body).replace("{comment}", self.comment).encode()
        status, text = self._dashboard.post(path.format(*self.tasks or [""]), data)
        if path == "/api/tasks" and status == 201:
            self.tasks.append(json.loads(text)["data"]["id"])
        if path.endswith("/comment") and not self.comment:
            self.comment = json.loads(text)["data"]["last_event_id"]
        return status, self.said(text)

    def said(self, text: str) -> str:
        """Return a response without the parts that differ by nature."""
        return self.normalise(text)
