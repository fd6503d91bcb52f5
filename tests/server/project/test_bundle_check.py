"""Second process of a project's check: its reason counts, and it never outlives the check."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, signal
from lattice_remote.errors import Misuse
from lattice_remote.server.project.bundle_check import beside

def refuse(): raise Misuse("no list")
def die(): os.kill(os.getpid(), signal.SIGKILL)
def fail(): raise ValueError("a fault")
def block(): raise Misuse("no doctor")

def outcome(work, block=lambda: None):
    alive, inherited = os.pipe()
    try:
        with beside(work):
            block()
    except (Misuse, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        found = "passed"
    os.close(inherited)
    assert os.read(alive, 1) == b"", "its end of the pipe is closed once it is gone"
    return found

print(json.dumps({
    "nothing": outcome(lambda: None),
    "a reason": outcome(refuse),
    "both": outcome(refuse, block),
    "the block while it waits": outcome(signal.pause, block),
    "killed": outcome(die),
    "a fault": outcome(fail),
}))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    argv = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Traceback") == 1 and "ValueError: a fault" in done.stderr, "for the server's log"
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_the_first_commands_are_refused_with_their_reason(outcomes: dict[str, str]) -> None:
    assert outcomes["nothing"] == "passed"
    assert outcomes["a reason"] == "Misuse: no list"
    assert outcomes["killed"].startswith("Misuse: the check exceeded its limits")


def test_a_refusal_of_the_block_comes_first_and_ends_the_process(outcomes: dict[str, str]) -> None:
    assert outcomes["both"] == outcomes["the block while it waits"] == "Misuse: no doctor"


def test_a_fault_of_the_check_is_no_refusal(outcomes: dict[str, str]) -> None:
    assert outcomes["a fault"].startswith("RuntimeError: ")
