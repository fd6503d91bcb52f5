"""A command and its agent: how long it waits for an answer, and how it says the age of the data."""

import socket
import threading
import time

import pytest

from lattice_remote.client import agent_client
from lattice_remote.client.agent_client import describe_age


def test_ages_are_in_the_largest_unit() -> None:
    ages = (8.4, 180, 18000, 200000)
    assert [describe_age(age) for age in ages] == ["8 s", "3 min", "5 h", "2 days"]


def test_an_agent_that_has_begun_to_answer_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_client, "FIRST_WORD_TIMEOUT_S", 0.2)
    ours, theirs = socket.socketpair()

    theirs.sendall(b'{"progress": null}\n')

    def answer() -> None:
        time.sleep(0.5)
        theirs.sendall(b'{"ok": true}\n')

    agent = threading.Thread(target=answer)
    agent.start()
    with ours, theirs:
        assert agent_client._exchange(ours, {}, None) == {"ok": True}
        agent.join()
