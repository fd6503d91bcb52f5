"""The README's trial works as printed, and the README stays short."""

import pytest

from readme import ROOT, run_trial, trial
from sandbox import Sandbox

pytestmark = pytest.mark.e2e


def test_the_trial_ends_with_the_task_in_the_other_cache() -> None:
    first, second = trial()
    assert (first.count("\n"), second.count("\n")) == (4, 1)
    with Sandbox() as sandbox:
        env = {**sandbox.environment("ana"), "XDG_STATE_HOME": str(sandbox.root / "state")}
        done = run_trial(sandbox.client("ana").dir, env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'BOA-1  backlog  medium  task  "Write the parser"  unassigned'


def test_the_readme_has_at_most_700_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700
