"""Fixtures of all tests: a started server with two connected clients, made once a module."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from preloaded_programs import warm
from programs import heed_signals, skipped_line
from sandbox import Client, Sandbox, Server, board

# The duration of an example depends on the machine's load.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

heed_signals()

gc.disable()
"""A collection while the tests are loaded takes seconds and frees nothing."""


LONG = [
    "test_installation",
    "test_planted_faults",
    "test_conformance",
    "test_soak",
    "test_every_command",
    "test_board_in_browser",
    "test_texts_in_browser",
    "test_mcp",
    "test_dashboard",
    "test_greedy",
    "test_order_faults",
    "test_node",
    "test_launcher",
    "test_malicious_server",
    "test_fsck",
    "test_worker",
    "test_commands",
    "test_replica",
    "test_arguments",
    "test_claims",
    "test_app",
    "test_backup",
    "test_load",
    "test_faults",
    "test_install_page",
    "test_proxies",
]
"""The files that take longest: with one of these at the end, one core would work alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files; the order within a file and that of all others stay."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish() -> None:
    """Collect garbage, but freeze the loaded modules."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the skipped tests, and how to run them."""
    skipped = terminalreporter.stats.get("skipped", [])
    if line := skipped_line(report.longrepr[-1] for report in skipped):
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the state of commands in this process out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """An empty sandbox: servers and clients as the test needs them."""
    with Sandbox(warm()) as made:
        yield made


@pytest.fixture(scope="module")
def shared_board() -> Iterator[tuple[Server, Client, Client]]:
    """One server and two machines, shared by the tests of a module, which must not stop the server."""
    with board("ana", "ben", programs=warm()) as (server, (ana, ben)):
        yield server, ana, ben
