"""What a server logs, on stderr: one line for each event, whatever is in it.

Much of what is logged was said by a client. Control characters are escaped and long lines cut, so that nobody writes
a line of his own into the log, or an escape sequence to the terminal that shows it.
"""

import logging
import sys

from lattice_remote.logtext import printable

__all__ = ["log_to_stderr"]

_MAX_CHARACTERS = 1000


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, and below it a traceback, of which every line begins with a bar."""
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        record = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        lines = [_short(super().format(record)), *(f"    | {_short(line)}" for line in trace.splitlines())]
        return "\n".join(lines)


def log_to_stderr(pattern: str) -> None:
    """Log from INFO upward, each line as ``pattern`` says. Libraries' news of single connections is left out."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(pattern))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("websockets.server", "watchfiles.main"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a warning is whatever somebody sends to the port


def _short(text: str) -> str:
    return printable(text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "...")
