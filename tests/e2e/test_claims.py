"""Claims: of many racing processes exactly one wins, and the others are notified (I1)."""

import pytest

from claims import RACES, racers
from sandbox import Sandbox

pytestmark = pytest.mark.e2e


def test_of_many_racing_processes_on_several_caches_exactly_one_wins(sandbox: Sandbox) -> None:
    with racers(sandbox, 32) as made:
        for number, kind in enumerate(RACES, 1):
            RACES[kind](made, number)
