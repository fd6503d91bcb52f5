"""Log lines of a server, as text and as JSON, with untrusted content."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.server.logging import FORMAT_VARIABLE, _Json, _Text

CODE = "import logging; from lattice_remote.server.logging import log_to_stderr as f;"


def logged(
    message: str,
    *args: object,
    error: BaseException | None = None,
    make: Callable[[], logging.Formatter] = lambda: _Text("%(levelname)s %(message)s"),
    fields: dict[str, object] | None = None,
) -> str:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("name", logging.INFO, "file", 1, message, args, info)
    record.fields = fields or {}
    return make().format(record)


def as_json(message: str, *args: object, **options: object) -> str:
    return logged(message, *args, make=lambda: _Json({"process": "worker"}), **options)  # type: ignore[arg-type]


@given(st.text(max_size=3000))
def test_any_text_of_a_client_is_logged_as_one_short_line_of_plain_characters(text: str) -> None:
    line = logged("client said %s", text)
    assert line.startswith("INFO client said ")
    assert line.isprintable()
    assert len(line) < 12_000
    line.encode()


@given(st.text(max_size=3000))
def test_the_same_as_json_is_one_object_with_nothing_but_plain_ascii(text: str) -> None:
    line = as_json("client said %s", text, fields={"actor": text, "seq": 3, "level": "debug"}, error=ValueError(text))
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert found["msg"].startswith("client said ")
    assert (found["seq"], found["process"]) == (3, "worker")
    assert found["error"].startswith("ValueError")
    assert len(line) < 120_000


def test_a_field_can_not_stand_for_what_the_line_says_of_itself() -> None:
    found = json.loads(as_json("x", fields={"level": "debug", "ts": "never", "logger": "mine", "msg": "y"}))
    assert (found["level"], found["logger"], found["msg"]) == ("info", "name", "x")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["ts"])


def test_an_exception_can_write_no_line_of_its_own() -> None:
    error = ValueError("x\n2030-01-01 00:00:00 INFO root: all is well\x1b[2J\r")
    first, *rest = logged("failed", error=error).split("\n")
    assert first == "INFO failed"
    assert rest
    assert all(line.startswith("    | ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("write", [logged, as_json])
def test_credentials_are_masked_everywhere(write: Callable[..., str]) -> None:
    secret = "ltr_" + "s" * 43
    line = write("%s", f"Bearer {secret}", error=ValueError(secret), fields={"path": secret})
    line += write("%s", "x" * 990 + secret)  # cut in the middle of it
    assert "sss" not in line
    assert "ltr_***" in line


def test_the_line_has_what_its_pattern_says() -> None:
    code = CODE + "f('%(levelname)s %(message)s');"
    code += "logging.getLogger('a').info('b\\nc'); logging.getLogger('uvicorn.error').warning('noise')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"INFO b\\nc\n", done.stderr)


def test_the_environment_selects_format_and_level() -> None:
    code = CODE + "f('%(message)s', {'project': 'web'}); logging.info('quiet'); logging.warning('loud')"
    environment = {**os.environ, "LATTICE_REMOTE_LOG_FORMAT": "json", "LATTICE_REMOTE_LOG_LEVEL": "warning"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stderr)
    assert (found["msg"], found["level"], found["project"]) == ("loud", "warning", "web")


def test_a_log_that_is_not_read_blocks_no_request() -> None:
    code = CODE + "f('%(message)s')\nfor n in range(900): logging.warning('x' * 900)\n"
    code += "print('through', flush=True); input(); logging.warning('read again')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "through\n"  # with a pipe that was full after 70 lines
    os.set_blocking(process.stderr.fileno(), False)
    before = process.stderr.read()
    os.set_blocking(process.stderr.fileno(), True)
    _, after = process.communicate("\n", timeout=30)
    lines = (before + after).splitlines()
    left_out = next(int(line.split()[0]) for line in lines if "were dropped here" in line)
    assert left_out == 900 - sum(line.startswith("xx") for line in lines)
    assert lines[-1] == "read again"


def test_a_line_that_the_disk_takes_in_part_spoils_no_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = CODE + "from resource import RLIMIT_FSIZE as F, setrlimit as limit; f('');"
    code += "limit(F, (1000, -1))\nfor n in range(20): logging.info('x' * 100)\n"
    code += "limit(F, (-1, -1)); logging.info('room again')"
    with log.open("wb") as stderr:
        subprocess.run(
            [sys.executable, "-c", code],
            stderr=stderr,
            env=os.environ | {FORMAT_VARIABLE: "json"},
            check=True,
            timeout=60,
        )
    *whole, torn, left_out, last = log.read_text().splitlines()
    assert [json.loads(line)["msg"] for line in whole] == ["x" * 100] * len(whole)
    assert 0 < len(torn) < len(whole[0])
    assert json.loads(left_out)["msg"].startswith(f"{20 - len(whole)} lines were dropped here")
    assert json.loads(last)["msg"] == "room again"


def test_a_long_traceback_in_a_full_pipe_blocks_no_request() -> None:
    code = CODE + "f('%(message)s')\nfor n in range(300):\n  try: raise ValueError('\\n'.join(['y' * 500] * 60))\n"
    code += "  except ValueError: logging.exception('long')\nprint('through', flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "through\n"
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_flood_of_news_fills_no_disk_and_hides_no_warning() -> None:
    code = CODE + "f('%(message)s')\nfor n in range(20_000): logging.info('news')\nlogging.warning('serious')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    lines = done.stderr.splitlines()
    assert lines[-1] == "serious"
    left_out = sum(int(line.split()[0]) for line in lines if "were dropped here" in line)
    assert lines.count("news") + left_out == 20_000
    assert left_out > 1000
