"""A short soak; ``make soak`` runs longer ones. A failing seed prints the command that repeats it."""

import pytest

from soak import one

pytestmark = pytest.mark.e2e

SEEDS, COMMANDS = 25, 5


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_nothing_is_lost_duplicated_or_different_under_all_faults(seed: int) -> None:
    result = one(seed, COMMANDS, every=3)
    assert result.failure is None, f"{result.failure}\nmake soak SEEDS=1 FIRST={seed} COMMANDS={COMMANDS} EVERY=3"
    assert result.figures["acknowledged"] + result.figures["refused"] + result.figures["unknown"] > 0
