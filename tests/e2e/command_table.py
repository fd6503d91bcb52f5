"""Every command of lattice-tracker with the lines that ``test_every_command.py`` runs, remote and local.

The rows run in this order, in one project on each side. A row may contain lines of other commands that prepare its own.
Each side fills in ``{...}``: ``{LAT-1}`` is a task's id, ``{comment 2}`` the id of LAT-1's second comment, ``{busy}`` a
port in use.
"""

from collections.abc import Mapping, Sequence

__all__ = ["EXCEPTIONS", "LOCAL", "ROWS", "SAID_BESIDES", "UNORDERED", "Line"]

Line = tuple[str, ...]

ANA = ("--actor", "human:ana")
RACER = ("--actor", "agent:racer")
WHY = ("--triggered-by", "ev_01HZXW5R3N8QJ6T2V9B4C7D1EF", "--on-behalf-of", "team:core", "--reason", "it was asked for")
EVERY = (*WHY, "--model", "m-1", "--session", "s-1", *ANA, "--name", "Argus-1", "--quiet")
"""Every common option of writing commands, except ``--json``."""
NO_EVENT = "ev_01HZXW5R3N8QJ6T2V9B4C7D1EF"
GIVEN = "task_01HZXW5R3N8QJ6T2V9B4C7D1EF"


def _in_both(*line: str) -> list[Line]:
    """Return a line, and the same line with ``--json``."""
    return [line, (*line, "--json")]


ROWS: Mapping[str, Sequence[Line]] = {
    "create": [
        ("create", "First", *ANA),
        ("create", "Second", "--description", "Two\nlines", "--tags", "a,b", "--priority", "high", *ANA, "--json"),
        ("create", "Third: naïve ☃", "--type", "bug", *ANA, "--quiet"),
        ("create", "Given id", "--id", GIVEN, *ANA),
        ("create", "Given id", "--id", GIVEN, *ANA),
        *_in_both("create", "Other text", "--id", GIVEN, *ANA),
        *_in_both("create", "No actor"),
        ("create", "Bad status", "--status", "nowhere", *ANA),
        ("create", "Bad status", "--status", "nowhere", *ANA, "--quiet"),
        ("create",),
        ("create", "--no-such-option"),
        ("create", "--help"),
    ],
    "session start": [
        ("session", "start", "--name", "Argus", "--model", "claude-opus-4", "--framework", "claude-code"),
        *_in_both("session", "start", "--model", "claude-opus-4"),
        ("session", "start", "--name", "Argus", "--model", "m", "--framework", "f", "--json"),
        (
            *("session", "start", "--agent-type", "advance", "--model", "m", "--framework", "f", "--quiet"),
            *("--prompt", "a skill", "--parent", "human:ana"),
        ),
    ],
    "create, with everything": [
        (
            *("create", "Everything", "--type", "chore", "--priority", "critical", "--urgency", "high", *EVERY),
            *("--complexity", "low", "--status", "planned", "--tags", "x, y", "--assigned-to", "agent:claude"),
        ),
    ],
    "update": [
        ("update", "LAT-1", "title=First, renamed", "priority=low", *ANA),
        ("update", "LAT-1", "title=First, renamed", *ANA, "--json"),
        ("update", "LAT-1", "custom_fields.size=a=b", "tags=x,y", *EVERY),
        *_in_both("update", "LAT-1", "nonsense", *ANA),
        ("update", "LAT-1", "status=done", *ANA),
    ],
    "status": [
        ("status", "LAT-1", "in_planning", *ANA),
        ("status", "LAT-1", "in_progress", *ANA),
        ("status", "LAT-1", "planned", *ANA, "--json"),
        *_in_both("status", "LAT-1", "in_progress", *ANA),
        ("status", "LAT-1", "in_progress", "--force", *EVERY),
        ("status", "LAT-1", "done", *ANA),
        ("status", "LAT-404", "done", *ANA),
        ("status", "what is this", "done", *ANA, "--json"),
    ],
    "assign": [
        ("assign", "LAT-1", "agent:claude", *ANA),
        ("assign", "LAT-1", "human:bob", *ANA, "--json"),
        ("assign", "LAT-1", "agent:claude", *EVERY),
        *_in_both("assign", "LAT-1", "nobody", *ANA),
    ],
    "comment": [
        ("comment", "LAT-1", "A comment with ünïcode and 'quotes' \"double\"", *ANA),
        ("comment", "LAT-1", "-- dashes", *ANA, "--quiet"),
        ("comment", "LAT-1", "--file", "notes.txt", *ANA),
        ("comment", "LAT-1", "--file=notes.txt", *ANA, "--json"),
        ("comment", "LAT-1", "a reply", "--reply-to", "{comment 1}", *ANA),
        ("comment", "LAT-1", "reviewed", "--role", "review", *EVERY),
        *_in_both("comment", "LAT-1", "", *ANA),
        *_in_both("comment", "LAT-1", "--file", "missing.txt", *ANA),
        ("comment", "LAT-1", *ANA),
        ("comment", "LAT-1", "who says", "--name", "Nobody-9"),
    ],
    "comment-edit": [
        ("comment-edit", "LAT-1", "{comment 1}", "edited", *ANA),
        ("comment-edit", "LAT-1", "{comment 2}", "edited", "--role", "review", *ANA, "--json"),
        ("comment-edit", "LAT-1", "{comment 1}", "edited again", *EVERY),
        *_in_both("comment-edit", "LAT-1", NO_EVENT, "edited", *ANA),
    ],
    "react": [
        ("react", "LAT-1", "{comment 1}", "thumbsup", *ANA),
        ("react", "LAT-1", "{comment 1}", "heart", *ANA, "--json"),
        ("react", "LAT-1", "{comment 1}", "fire", *EVERY),
        *_in_both("react", "LAT-1", "{comment 1}", "not an emoji", *ANA),
    ],
    "unreact": [
        ("unreact", "LAT-1", "{comment 1}", "thumbsup", *ANA),
        ("unreact", "LAT-1", "{comment 1}", "heart", *ANA, "--json"),
        ("unreact", "LAT-1", "{comment 1}", "fire", *EVERY),
        *_in_both("unreact", "LAT-1", "{comment 1}", "thumbsup", *ANA),
    ],
    "comments": [
        ("comments", "LAT-1"),
        ("comments", "LAT-1", "--json"),
        ("comments", "LAT-1", "--quiet"),
        *_in_both("comments", "LAT-404"),
    ],
    "comment-delete": [
        ("comment-delete", "LAT-1", "{comment 2}", *ANA),
        ("comment-delete", "LAT-1", "{comment 3}", *ANA, "--json"),
        ("comment-delete", "LAT-1", "{comment 4}", *EVERY),
        *_in_both("comment-delete", "LAT-1", "{comment 2}", *ANA),
    ],
    "attach": [
        ("attach", "LAT-1", "notes.txt", "--title", "The notes", *ANA),
        ("attach", "LAT-1", "deep/er/data.bin", *ANA, "--json"),
        ("attach", "LAT-1", "https://example.org/x?a=b", *ANA),
        ("attach", "LAT-1", "--inline", "some text", "--role", "review", *ANA),
        (
            *("attach", "LAT-1", "notes.txt", "--type", "log", "--summary", "In short", "--sensitive", *EVERY),
            *("--id", "art_01HZXW5R3N8QJ6T2V9B4C7D1EF"),
        ),
        *_in_both("attach", "LAT-1", "no/such/file.txt", *ANA),
        ("attach", "LAT-1", 'no/such/"file".txt', *ANA, "--json"),
        ("attach", "LAT-1", "/no/such/file.txt", *ANA),
        ("attach", "LAT-1", *ANA),
    ],
    "event": [
        ("event", "LAT-1", "x_custom", "--data", '{"a": [1, 2]}', *ANA),
        ("event", "LAT-1", "x_custom", *ANA, "--json"),
        ("event", "LAT-1", "x_custom", "--id", "ev_01HZXW5R3N8QJ6T2V9B4C7D1EG", *EVERY),
        *_in_both("event", "LAT-1", "task_created", *ANA),
        ("event", "LAT-1", "x_custom", "--data", "no json", *ANA),
    ],
    "link": [
        ("link", "LAT-1", "blocks", "LAT-2", "--note", "why", *ANA),
        ("link", "LAT-1", "depends_on", "LAT-3", *ANA, "--json"),
        ("link", "LAT-1", "related_to", "LAT-4", *EVERY),
        *_in_both("link", "LAT-1", "blocks", "LAT-1", *ANA),
    ],
    "unlink": [
        ("unlink", "LAT-1", "blocks", "LAT-2", *ANA),
        ("unlink", "LAT-1", "depends_on", "LAT-3", *ANA, "--json"),
        ("unlink", "LAT-1", "related_to", "LAT-4", *EVERY),
        *_in_both("unlink", "LAT-1", "blocks", "LAT-2", *ANA),
    ],
    "branch-link": [
        ("branch-link", "LAT-1", "feat/LAT-1-x", *ANA),
        ("branch-link", "LAT-1", "feat/LAT-1-x", "--repo", "other", *ANA, "--json"),
        ("branch-link", "LAT-1", "fix/LAT-1-y", *EVERY),
        *_in_both("branch-link", "LAT-1", "feat/LAT-1-x", *ANA),
    ],
    "branch-unlink": [
        ("branch-unlink", "LAT-1", "feat/LAT-1-x", *ANA),
        ("branch-unlink", "LAT-1", "feat/LAT-1-x", "--repo", "other", *ANA, "--json"),
        ("branch-unlink", "LAT-1", "fix/LAT-1-y", *EVERY),
        *_in_both("branch-unlink", "LAT-1", "feat/LAT-1-x", *ANA),
    ],
    "next": [
        ("next",),
        ("next", "--json"),
        ("next", "--quiet"),
        *_in_both("next", "--claim"),
        ("next", "--claim", *RACER, "--status", "planned,backlog"),
        ("next", "--name", "Argus-1"),
    ],
    "session list": [("session", "list"), ("session", "list", "--json")],
    "session show": [
        *_in_both("session", "show", "Argus-2"),
        *_in_both("session", "show", "Nobody-1"),
    ],
    "session end": [
        ("session", "end", "Argus-2", "--reason", "done"),
        *_in_both("session", "end", "Argus-2"),
        ("session", "end", "Advance-1", "--json"),
    ],
    "resource create": [
        ("resource", "create", "browser", "--description", "one at a time", "--ttl", "100", *ANA),
        ("resource", "create", "camera", "--max-holders", "2", *ANA, "--json"),
        ("resource", "create", "printer", "--id", "res_01HZXW5R3N8QJ6T2V9B4C7D1EF", *EVERY),
        *_in_both("resource", "create", "browser", *ANA),
    ],
    "resource acquire": [
        ("resource", "acquire", "browser", *ANA, "--task", "LAT-1"),
        ("resource", "acquire", "browser", *ANA, "--json"),
        ("resource", "acquire", "printer", *EVERY),
        *_in_both("resource", "acquire", "browser", *RACER),
        ("resource", "acquire", "browser", *RACER, "--wait", "--timeout", "1"),
        ("resource", "acquire", "printer", "--force", *ANA),
        ("resource", "acquire", "camera", *ANA),
        *_in_both("resource", "acquire", "nothing", *ANA),
    ],
    "resource heartbeat": [
        ("resource", "heartbeat", "browser", *ANA),
        ("resource", "heartbeat", "browser", *ANA, "--json"),
        ("resource", "acquire", "printer", "--force", *EVERY),
        ("resource", "heartbeat", "printer", *EVERY),
        *_in_both("resource", "heartbeat", "browser", *RACER),
    ],
    "resource status": [
        *_in_both("resource", "status", "browser"),
        *_in_both("resource", "status", "nothing"),
    ],
    "resource list": [("resource", "list"), ("resource", "list", "--json")],
    "resource release": [
        *_in_both("resource", "release", "browser", *RACER),
        ("resource", "release", "browser", *ANA),
        ("resource", "release", "camera", *ANA, "--json"),
        ("resource", "release", "printer", *EVERY),
    ],
    "complete": [
        *_in_both("complete", "LAT-2", "--review", "Too early", *ANA),
        ("complete", "LAT-1", "--review", "Looks good", *ANA),
        ("complete", "LAT-5", "--review", "Looks good", *ANA, "--json"),
        ("status", "LAT-3", "planned", *ANA),
        ("complete", "LAT-3", "--review", "Looks good", *EVERY),
    ],
    "archive": [
        ("status", "LAT-2", "cancelled", *ANA),
        ("archive", "LAT-2", *ANA),
        *_in_both("archive", "LAT-2", *ANA),
        ("archive", "LAT-1", "LAT-404", "LAT-3", *ANA),
        ("archive", "LAT-5", *ANA, "--json"),
        ("archive", "LAT-4", *EVERY),
        ("archive", "--stale", *ANA, "--json"),
        ("archive", *ANA),
    ],
    "unarchive": [
        ("unarchive", "LAT-2,LAT-3", *ANA),
        ("unarchive", "LAT-5", *ANA, "--json"),
        ("unarchive", "LAT-4", *EVERY),
        *_in_both("unarchive", "LAT-404", *ANA),
    ],
    "backfill-ids": [
        *_in_both("backfill-ids", "--code", "OTHER", *ANA),
        ("backfill-ids",),
        ("backfill-ids", "--json", *ANA),
        ("backfill-ids", "--code", "LAT", "--force", *ANA),
    ],
    "list": [
        ("list",),
        ("list", "--include-archived", "--json"),
        ("list", "--quiet"),
        ("list", "--compact", "--json"),
        ("list", "--status", "done", "--type", "bug", "--priority", "medium"),
        ("list", "--assigned", "agent:claude", "--tag", "x"),
        *_in_both("list", "--status", "nowhere"),
    ],
    "show": [
        ("show", "LAT-2"),
        ("show", "LAT-1", "--full"),
        ("show", "LAT-1", "--compact"),
        ("show", "LAT-1", "--json"),
        *_in_both("show", "LAT-404"),
    ],
    "plan": [
        *_in_both("plan", "LAT-5"),
        *_in_both("plan", "LAT-404"),
    ],
    "stats": [("stats",), ("stats", "--json")],
    "weather": [("weather",), ("weather", "--json"), ("weather", "--markdown")],
    "doctor": [
        ("doctor",),
        ("doctor", "--json"),
        ("doctor", "--fix"),
        ("doctor", "--fix", "--json"),
    ],
    "rebuild": [
        *_in_both("rebuild", "{LAT-1}"),
        ("rebuild", "--all"),
        ("rebuild", "--all", "--json"),
        *_in_both("rebuild"),
        *_in_both("rebuild", GIVEN.replace("EF", "EG")),
    ],
    "set-subproject-code": [
        ("set-subproject-code", "F"),
        ("set-subproject-code", "G"),
        ("set-subproject-code", "G", "--force"),
        ("create", "With a subproject", *ANA),
    ],
    "set-project-code": [
        ("set-project-code", "NEW"),
        ("set-project-code", "NEW", "--force"),
        ("set-project-code", "TOO-LONG-123"),
    ],
    "a command that there is not": [("no-such-command",)],
    # Commands that are local by nature work in a remote project as in any other, and leave its board unchanged.
    "init": [
        ("init",),
        ("init", "--path", "deep", "--project-code", "lower-case", *ANA),
        (
            *("init", "--path", "deep", "--project-code", "DEEP", "--subproject-code", "S", "--project-name", "Deep"),
            *("--model", "m", "--instance-name", "here", "--heartbeat", "--workflow", "opinionated", *ANA),
            *("--no-setup-claude", "--no-setup-agents", "--no-seed", "--description", "A project in a project"),
        ),
    ],
    "demo init": [
        ("demo", "init", "--path", "lighthouse", "--no-dashboard", "--quiet"),
        ("demo", "init", "--path", "lighthouse", "--no-dashboard"),
    ],
    "setup-claude": [("setup-claude",), ("setup-claude",), ("setup-claude", "--path", "deep", "--force")],
    "setup-claude-skill": [("setup-claude-skill",), ("setup-claude-skill", "--force")],
    "setup-codex": [("setup-codex",), ("setup-codex", "--force")],
    "setup-openclaw": [
        ("setup-openclaw",),
        ("setup-openclaw", "--path", "deep", "--force"),
        ("setup-openclaw", "--global"),
        ("setup-openclaw", "--path", "deep", "--global"),
    ],
    "setup-prompt": [("setup-prompt",), ("setup-prompt", "--claude-md")],
    "plugins": [("plugins",), ("plugins", "--json")],
    "dashboard": _in_both("dashboard", "--host", "127.0.0.1", "--port", "{busy}"),
    "restart": [("restart", "--port", "1")],
}
"""The lines of each command."""

LOCAL: Mapping[str, str] = {
    "init": "in the project it says that there is one; elsewhere it makes a local project, which has no remote",
    "demo init": "makes a local project of its own",
    "setup-claude": "writes CLAUDE.md beside the project",
    "setup-claude-skill": "writes into the user's home",
    "setup-codex": "writes into the user's home",
    "setup-openclaw": "writes beside the project, or into the user's home",
    "setup-prompt": "prints",
    "plugins": "prints",
    "dashboard": "serves pages from the copy; what it writes goes to the server",
    "restart": "signals a process of this machine",
    "remote": "this package's own",
}
"""Commands that do not concern the server, and the expected result of each in a remote project."""

EXCEPTIONS: Mapping[str, str] = {
    "remote": "this package's own: client/cli/test_commands.py",
    "dashboard: succeeds": "it serves until it is interrupted; here it finds its port taken",
    "dashboard: succeeds with --json": "the same",
    "demo init: succeeds": "each run makes a project of a hundred events; the one with --quiet is enough",
    **{
        f"{command}: fails": "it has no way to fail"
        for command in (
            *("session list", "resource list", "stats", "weather", "setup-claude", "setup-claude-skill"),
            *("setup-codex", "setup-prompt", "plugins"),
        )
    },
    **{
        f"{command}: fails with --json": "the same"
        for command in ("session list", "resource list", "stats", "weather", "plugins")
    },
    "doctor: fails": "it fails only on a project that is damaged, which no command makes",
    "doctor: fails with --json": "the same",
    "restart: succeeds": "it would signal whatever process has to do with that port",
    "list: fails": "a filter that fits nothing is no error",
    "list: fails with --json": "the same",
}
"""Commands and options that need no line, with the reason."""

UNORDERED = {"stats", "weather"}
"""Commands that list equal items in directory order."""

SAID_BESIDES: Mapping[str, str] = {"init": "a cache of project board"}
"""Commands to which a remote project adds a line, and its text."""
