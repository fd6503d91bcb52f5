"""Seed after seed of random commands with everything breaking: ``make soak SEEDS=1000 JOBS=2``.

Each seed prints its commands, its faults, and that nothing was lost, doubled or different; a failed seed prints the
command that repeats it. Seeds determine commands and faults, not the timing of processes.
"""

import argparse
import collections
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from account import Account, oldest_change  # noqa: E402
from command_mix import Mix  # noqa: E402
from epoch_account import Epochs  # noqa: E402
from event_stream_client import EventsWatcher  # noqa: E402
from faults import Faults, Strikes, three_people  # noqa: E402
from hook_record import Hooked  # noqa: E402
from observer import Observer  # noqa: E402
from preloaded_programs import warm  # noqa: E402
from programs import heed_signals  # noqa: E402
from sandbox import Sandbox, Server  # noqa: E402
from watch_command import Watcher  # noqa: E402

__all__ = ["Result", "one"]


@dataclass
class Result:
    """Result of one seed; ``failure`` is None if it passed."""

    seed: int
    seconds: float = 0.0
    figures: dict[str, int] = field(default_factory=dict)
    struck: list[str] = field(default_factory=list)
    failure: str | None = None


def one(seed: int, commands: int, *, only: str | None = None, every: int = 6) -> Result:
    """Run one seed. The directory of a failed one stays, except in ``CI``."""
    began = time.monotonic()
    sandbox = Sandbox(warm())
    try:
        figures, struck = break_everything(sandbox, seed=seed, commands=commands, every=every, only=only)
        sandbox.close()
    except Exception:  # noqa: BLE001 - whatever goes wrong is this seed's result
        failure = traceback.format_exc(chain=False)
        if os.environ.get("CI"):
            sandbox.close()
        else:
            sandbox.end()
            failure += f"what it left behind is in {sandbox.root}\n"
        return Result(seed, time.monotonic() - began, failure=failure)
    return Result(seed, time.monotonic() - began, figures, struck)


def break_everything(
    sandbox: Sandbox, *, seed: int, commands: int, every: int, only: str | None
) -> tuple[dict[str, int], list[str]]:
    """Run a mix with faults, and check the invariants afterwards.

    Returns the figures and the faults.

    Raises:
        AssertionError: something acknowledged is lost, done twice, or different; or an epoch is not as it must be.
    """
    with (
        three_people(sandbox, pushed=seed % 5 == 0) as (server, clients, proxy),
        Observer(server) as observer,
        Watcher(clients[-1], position=lambda: observer.position, oldest=lambda: oldest_change(server)) as watcher,
        EventsWatcher(
            server, proxy.port, clients[0].env["LATTICE_TOKEN"], position=lambda: observer.position
        ) as listener,
    ):
        mix = Mix(server, clients, seed=seed, commands=commands)
        epochs = Epochs(server, observer)
        faults = Faults(mix, sandbox, proxy, epochs, seed=seed).by_name()
        if only is not None:
            faults = {name: strike for name, strike in faults.items() if only in name}
        if not faults:
            raise ValueError(f"no fault has {only!r} in its name")
        with Strikes(mix, faults, seed=seed, every=every) as strikes:
            account = mix.run()
        proxy.flow()
        try:
            figures = _check(server, account, epochs, observer, watcher)
            figures["told over HTTP"] = listener.check()
        except (AssertionError, TimeoutError, RuntimeError) as error:
            shown = "\n  ".join(account.errors[-8:])
            raise AssertionError(f"{error}\nafter: {', '.join(strikes.struck)}\nlast errors:\n  {shown}") from error
    return figures, strikes.struck


def _check(server: Server, account: Account, epochs: Epochs, observer: Observer, watcher: Watcher) -> dict[str, int]:
    """Check the invariants of a server without further faults, and return the figures."""
    epochs.settle()
    figures = account.check()
    observer.check()
    attributed = account.check_who(observer.owners)
    hooks = Hooked(server).check_at_most_once(but=account.forgotten_events)
    watched = watcher.check()
    return {
        **figures,
        "attributed": attributed,
        "hooks": hooks,
        "seen": observer.changes,
        "watched": watched,
        "epochs begun": epochs.begun,
    }


def show(result: Result, options: argparse.Namespace) -> None:
    """Print one seed's line."""
    if result.failure is not None:
        print(result.failure, flush=True)
        only = f" ONLY='{options.only}'" if options.only else ""
        again = f"make soak SEEDS=1 FIRST={result.seed} COMMANDS={options.commands} EVERY={options.every}{only}"
        print(f"seed {result.seed}: FAILED; repeat it with: {again}", flush=True)
        return
    figures = ", ".join(f"{count} {name}" for name, count in result.figures.items())
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(collections.Counter(result.struck).items()))
    print(
        f"seed {result.seed}: {figures}; 0 lost, 0 doubled, 0 different, {result.seconds:.0f} s; "
        f"{faults or 'no fault'}",
        flush=True,
    )


def run(options: argparse.Namespace) -> Iterator[Result]:
    """Run the seeds, several processes at a time, and yield each result as it comes."""
    seeds = range(options.first, options.first + options.seeds)
    if options.jobs == 1:
        yield from (one(seed, options.commands, only=options.only, every=options.every) for seed in seeds)
        return
    with ProcessPoolExecutor(options.jobs) as pool:
        running = [pool.submit(one, seed, options.commands, only=options.only, every=options.every) for seed in seeds]
        for done in as_completed(running):
            yield done.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (default: %(default)s)")
    parser.add_argument("--commands", type=int, default=25, help="of each of three people (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: %(default)s)")
    parser.add_argument("--every", type=int, default=6, help="commands between two faults (default: %(default)s)")
    parser.add_argument("--only", help="only faults with this in their name")
    options = parser.parse_args()
    heed_signals()
    totals: collections.Counter[str] = collections.Counter()
    struck: collections.Counter[str] = collections.Counter()
    failed: list[int] = []
    for result in run(options):
        show(result, options)
        totals.update(result.figures)
        struck.update(result.struck)
        if result.failure is not None:
            failed.append(result.seed)
    for name, count in [*sorted(struck.items()), *totals.items()]:
        print(f"  {name:<32} {count:>8}")
    print(f"{options.seeds - len(failed)} passed, {len(failed)} failed{': ' if failed else ''}{failed or ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
