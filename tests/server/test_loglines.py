"""What a server logs: a line is a line, whoever said what is in it."""

import logging
import re
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.server.data.loglines import _OneLine


def logged(message: str, *args: object, error: BaseException | None = None) -> str:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("name", logging.INFO, "file", 1, message, args, info)
    return _OneLine("%(levelname)s %(message)s").format(record)


@given(st.text(max_size=3000))
def test_whatever_a_client_says_is_one_short_line_of_plain_characters(text: str) -> None:
    line = logged("client said %s", text)
    assert line.startswith("INFO client said ")
    assert line.isprintable()
    assert len(line) < 12_000
    line.encode()


def test_an_exception_can_write_no_line_of_its_own() -> None:
    error = ValueError("x\n2030-01-01 00:00:00 INFO root: all is well\x1b[2J\r")
    first, *rest = logged("failed", error=error).split("\n")
    assert first == "INFO failed"
    assert rest
    assert all(line.startswith("    | ") and line.isprintable() for line in rest)


def test_the_line_has_what_its_pattern_says() -> None:
    code = "import logging; from lattice_remote.server.data.loglines import log_to_stderr as f;"
    code += "f('%(levelname)s %(message)s');"
    code += "logging.getLogger('a').info('b\\nc'); logging.getLogger('uvicorn.error').warning('noise')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"INFO b\\nc\n", done.stderr)
