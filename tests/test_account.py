"""The account of a mix notices lost, doubled and misattributed effects."""

import subprocess
from collections import Counter

import pytest

from account import Account, Effect
from sandbox import Client, Sandbox

ENDED = Effect("Argus-1", "session_ended")


def ended(client: Client, account: Account, code: int, said: str = "") -> None:
    argv = ("session", "end", "Argus-1")
    account.record(client, argv, ENDED, subprocess.CompletedProcess(argv, code, "", said))


@pytest.fixture
def clients(sandbox: Sandbox) -> tuple[Client, Client]:
    return sandbox.client("ana"), sandbox.client("ben")


def test_who_is_refused_has_not_done_what_another_has(sandbox: Sandbox, clients: tuple[Client, Client]) -> None:
    account = Account(sandbox.server(), list(clients))
    ana, ben = clients
    ended(ben, account, 1, "Error: it belongs to another token")
    with pytest.raises(AssertionError, match=r"the command took effect.*ben: session end Argus-1"):
        account._check_effects(Counter({ENDED.key: 1}))
    ended(ana, account, 0)
    account._check_effects(Counter({ENDED.key: 1}))
    with pytest.raises(AssertionError, match="acknowledged and lost"):
        account._check_effects(Counter())
    with pytest.raises(AssertionError, match="done twice"):
        account._check_effects(Counter({ENDED.key: 2}))


def test_what_came_under_anothers_token_is_misattributed(sandbox: Sandbox, clients: tuple[Client, Client]) -> None:
    account = Account(sandbox.server(), list(clients))
    ana, ben = clients
    argv = ("comment", "LAT-1", "x", "--actor", "agent:w1")
    effect = Effect("w1", "comment_added")
    account.record(ben, argv, effect, subprocess.CompletedProcess(argv, 0, "", ""))
    account.edited(ana, "e1", kept=True)
    account.acknowledge(Effect("h1", "comment_added"), "")
    assert account.check_who({effect.key: {"human:ben"}, "e1": {"human:ana"}, "word": {"human:eve"}}) == 2
    for what, owner in ((effect.key, "human:ana"), ("e1", "human:ben"), (("h1", "comment_added"), "human:ana")):
        with pytest.raises(AssertionError, match="under another token than meant"):
            account.check_who({what: {owner}})
    account.share(ana, "human:dora")
    assert account.check_who({"e1": {"human:dora"}}) == 1, "the file does not say who saved it"
    with pytest.raises(AssertionError, match="under another token than meant"):
        account.check_who({effect.key: {"human:dora"}})
