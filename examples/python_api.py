"""The board of the current directory from Python, local or remote: python examples/python_api.py

Claims the first unassigned task, writes a plan for it, and comments on it. Others may do the same at that moment: a
write on a base that has changed returns a ``Conflict``, and is repeated.
"""

import sys
from typing import Any

from lattice.core.events import create_event
from lattice.core.ids import generate_task_id

from lattice_remote import Conflict, Merged, RemoteError, StorageBackend, Written, resolve_backend

type Task = dict[str, Any]


def make(board: StorageBackend, title: str, actor: str) -> Task:
    """Create a task. The storage assigns its short id."""
    task_id = generate_task_id()
    data = {"title": title, "status": "backlog", "type": "task", "priority": "medium"}
    match board.write_task(task_id, [create_event("task_created", task_id, actor, data)], None):
        case Written(task):
            return task
        case Conflict():
            raise AssertionError("nobody else has this id")


def claim(board: StorageBackend, actor: str) -> Task | None:
    """Assign an unassigned task, if there is one. Of several callers, each gets another task."""
    while free := [task for task in board.list_tasks() if task["assigned_to"] is None]:
        task = free[0]
        assign = create_event("assignment_changed", task["id"], actor, {"from": None, "to": actor})
        match board.write_task(task["id"], [assign], task["last_event_id"]):
            case Written(claimed):
                return claimed
            case Conflict():
                continue  # another caller was faster: look again
    return None


def plan(board: StorageBackend, task: Task, section: str) -> str:
    """Add a section to a task's plan; return the outcome."""
    base = board.read_plan(task["id"])
    match board.write_plan(task["id"], f"{base or ''}\n{section}\n", base):
        case Written():
            return "written"
        case Merged():
            return "merged with what others wrote"
        case Conflict():
            return "not written: others changed the same lines"


def say(board: StorageBackend, task: Task, words: str, actor: str) -> Task:
    """Comment on a task, also if it has changed since it was read."""
    while True:
        comment = create_event("comment_added", task["id"], actor, {"body": words})
        match board.write_task(task["id"], [comment], task["last_event_id"]):
            case Written(commented):
                return commented
            case Conflict():
                found = board.get_task(task["id"])
                if found is None:
                    raise LookupError(f"{task['id']} is gone")
                task = found


def main(actor: str = "agent:example") -> int:
    try:
        board = resolve_backend()
        while (task := claim(board, actor)) is None:
            make(board, "Written by a program", actor)
        print(f"{task['short_id']} {task['title']}: plan {plan(board, task, '## Steps')}")
        print(f"{say(board, task, 'On it.', actor)['comment_count']} comments on {task['short_id']}")
    except RemoteError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
