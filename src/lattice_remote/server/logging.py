"""Server log on stderr: one line per event, as text or JSON.

Control characters, which may come from a client, are escaped, long lines cut and credentials masked. A log that is not
read (a stopped terminal, a full pipe) blocks nothing: lines are then dropped and counted.

Fields of an event travel in ``extra={"fields": {...}}`` and become members of a JSON line; the text format omits them.
"""

import contextlib
import json
import logging
import os
import re
import select
import stat
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

import msgspec

from lattice_remote.errors import printable

__all__ = ["FORMAT_VARIABLE", "LEVEL_VARIABLE", "log_to_stderr", "masked", "masked_output"]

_SECRETS = re.compile(r"(ltr_)[\w-]+|(://[^\s/@:]{0,100}:)[^\s/@]+(?=@)")
_NAMED = re.compile(
    r"(\b(?:bearer|basic|token|password|passwd|secret|api[_-]?key)\b['\"]?\s*[:= ]\s*)\S+", re.IGNORECASE
)


def masked(text: str) -> str:
    """Mask tokens, and passwords in URLs."""
    return text if _is_harmless(text) else _SECRETS.sub(lambda found: f"{found[1] or found[2]}***", text)


def masked_output(line: str) -> str:
    return _NAMED.sub(r"\1***", masked(line))


def _is_harmless(text: str) -> bool:
    """Return whether a text cannot contain a token or a URL: nearly every line of a log."""
    return "ltr_" not in text and "://" not in text


FORMAT_VARIABLE = "LATTICE_REMOTE_LOG_FORMAT"
LEVEL_VARIABLE = "LATTICE_REMOTE_LOG_LEVEL"
"""Inherited by workers and readers, as stderr is."""

_MAX_CHARACTERS = 1000
_MAX_TRACE_CHARACTERS = 16_000
_PIECE_BYTES = 4096
"""Bytes that a pipe takes at once when it takes any."""
_MOST_A_SECOND = 1000
"""Lines; more are dropped, so that a client refused a thousand times a second does not fill the disk."""


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        record.message = record.getMessage()
        if self.usesTime():
            record.asctime = self.formatTime(record)
        lines = [_short(self.formatMessage(record)), *(f"    | {_short(line)}" for line in trace.splitlines())]
        return "\n".join(lines)


class _Json(logging.Formatter):
    def __init__(self, context: Mapping[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        time_ = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: Mapping[str, object] = getattr(record, "fields", {})
        head: dict[str, object] = {
            "ts": time_.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line = {**head, **fields, **self._context, **head}  # the line's own members come first and count
        text = _as_json(line)
        if record.exc_info is None and len(text) <= _MAX_CHARACTERS and _is_harmless(text):
            return text  # nothing to mask or to cut
        for name, value in line.items():
            line[name] = _cut(value, _MAX_CHARACTERS) if isinstance(value, str) else value
        if record.exc_info:
            line["error"] = _cut(self.formatException(record.exc_info), _MAX_TRACE_CHARACTERS)
        return _as_json(line)


class _NonBlocking(logging.StreamHandler[TextIO]):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._descriptor = -1
        self._piece_bytes = sys.maxsize
        self._poll = select.poll()
        with contextlib.suppress(OSError):  # anything but a file takes every write
            self._poll.register(stream.fileno(), select.POLLOUT)
            self._descriptor = stream.fileno()
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                self._piece_bytes = _PIECE_BYTES
        self._second, self._lines, self._dropped = 0, 0, 0
        self._is_torn = False  # the last line is incomplete

    def emit(self, record: logging.LogRecord) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > _MOST_A_SECOND and record.levelno <= logging.INFO:
            self._dropped += 1
            return
        if self._dropped:
            text = "%d lines were dropped here: too many at once, or the log was not read"
            if self._write_line(logging.LogRecord(__name__, logging.WARNING, "", 0, text, (self._dropped,), None)):
                self._dropped = 0
        self._dropped += not self._write_line(record)

    def _write_line(self, record: logging.LogRecord) -> bool:
        if self._descriptor < 0:
            super().emit(record)
            return True
        if not self._poll.poll(0):
            return False
        try:
            self._write(f"{self.format(record)}\n".encode(self.stream.encoding, "backslashreplace"))
        except OSError:  # a full disk, a closed pipe
            return False
        except Exception:  # noqa: BLE001 - an event that cannot be logged ends nothing
            self.handleError(record)
        return not self._is_torn

    def _write(self, line: bytes) -> None:
        rest = memoryview(b"\n" + line if self._is_torn else line)
        while True:
            rest = rest[os.write(self._descriptor, rest[: self._piece_bytes]) :]
            self._is_torn = bool(rest)
            if not rest or not self._poll.poll(0):
                return


def log_to_stderr(pattern: str, context: Mapping[str, str] | None = None) -> None:
    """Log as the environment says. Libraries' messages about single connections are omitted."""
    handler = _NonBlocking(sys.stderr)
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    handler.setFormatter(_Json(context or {}) if is_json else _Text(pattern))
    level = os.environ.get(LEVEL_VARIABLE, "").upper()
    logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    # No line contains thread, process, task, file or line: they are not looked up.
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks", "_srcfile"):
        setattr(logging, name, None)  # "Optimization" in the how-to of logging names them
    sys.excepthook = _log_the_end
    for name in ("asyncio", "websockets", "watchfiles", "uvicorn", "multipart"):  # their details are private
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))
    for name in ("websockets.server", "watchfiles.main"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # any client can cause its warnings


def _log_the_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("ended by an error", exc_info=(kind, error, trace))


def _as_json(line: Mapping[str, object]) -> str:
    """Return an object in plain ASCII, nearly always by msgspec, which takes a tenth of the time."""
    with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair
        text = msgspec.json.encode(line).decode()
        if text.isascii() and "\x7f" not in text:
            return text
    return json.dumps(line).replace("\x7f", "\\u007f")


def _cut(text: str, most: int) -> str:
    return masked(text if len(text) <= most else text[:most] + "...")


def _short(text: str) -> str:
    return printable(_cut(text, _MAX_CHARACTERS))
