"""Seed after seed of random commands with everything breaking: ``make soak SEEDS=100``.

Each seed prints what was asked, what struck, and that nothing was lost, doubled or different; a seed that fails
prints the command that repeats it. Seeds choose commands and faults; the moments at which processes meet are
the machine's own.
"""

import argparse
import collections
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from faults import break_everything  # noqa: E402
from sandbox import Sandbox  # noqa: E402
from warm import warm  # noqa: E402


def one(seed: int, commands: int) -> bool:
    """Run one seed; return whether everything was as it must be."""
    began = time.monotonic()
    try:
        with Sandbox(warm()) as sandbox:
            outcome, struck = break_everything(sandbox, seed=seed, commands=commands)
    except Exception:  # noqa: BLE001 - whatever goes wrong is this seed's result
        traceback.print_exc()
        print(f"seed {seed}: FAILED; repeat it with: make soak SEEDS=1 FIRST={seed} COMMANDS={commands}", flush=True)
        return False
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(collections.Counter(struck).items()))
    print(
        f"seed {seed}: {len(outcome.acknowledged)} acknowledged, {len(outcome.unacknowledged)} not, "
        f"0 lost, 0 doubled, 0 different, {time.monotonic() - began:.0f} s; {faults or 'no fault'}",
        flush=True,
    )
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (default: %(default)s)")
    parser.add_argument("--commands", type=int, default=25, help="of each of three people (default: %(default)s)")
    options = parser.parse_args()
    failed = [n for n in range(options.first, options.first + options.seeds) if not one(n, options.commands)]
    print(f"{options.seeds - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
