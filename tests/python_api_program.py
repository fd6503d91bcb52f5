"""A program that comments on a task through ``resolve_backend``: TASK TEXT ACTOR. Its exit codes are those of commands.

It reads, builds on the result, and starts over if another writer was faster.
"""

import sys
import warnings

ATTEMPTS = 5


def main() -> int:
    from lattice.core.events import create_event

    from lattice_remote import Conflict, RemoteError, resolve_backend

    task_id, text, actor = sys.argv[1:]
    warnings.showwarning = lambda message, *_others, **_more: sys.stderr.write(f"lattice-remote: {message}\n")
    try:
        board = resolve_backend()
        for _ in range(ATTEMPTS):
            task = board.get_task(task_id)
            if task is None:
                sys.stderr.write(f"Error: no task {task_id}\n")
                return 1
            event = create_event("comment_added", task["id"], actor, {"body": text})
            if not isinstance(board.write_task(task["id"], [event], task["last_event_id"]), Conflict):
                return 0
    except RemoteError as error:
        sys.stderr.write(f"Error: {error.message}\n")
        return 1
    sys.stderr.write(f"Error: others were faster {ATTEMPTS} times\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
