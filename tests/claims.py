"""Round after round, many processes on several caches race for one thing: ``make claims ROUNDS=200``.

Exactly one process claims a task, or acquires a resource. Each loser gets the message of the loser of two local
commands, and finds the winner's name in its own cache as soon as its command has returned. Assignments of one task
all succeed, one after the other: none is lost.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "examples")]

from preloaded_programs import warm  # noqa: E402
from sandbox import Client, Sandbox, Server, differences, wait_for  # noqa: E402

__all__ = ["RACES", "Racers", "racers"]

ANA = ("--actor", "human:ana")


@dataclass
class Racers:
    """Caches, two on each machine, and a local project for comparison."""

    server: Server
    caches: list[Client]
    local: Client
    count: int

    def race(self, *argv: str) -> list[tuple[str, Client, CompletedProcess[str]]]:
        """Run one command line as several actors at once, in turn on each cache."""
        actors = [f"agent:r{number}" for number in range(self.count)]
        caches = [self.caches[number % len(self.caches)] for number in range(self.count)]
        with ThreadPoolExecutor(self.count) as pool:
            done = pool.map(lambda actor, cache: cache.run(*argv, "--actor", actor, "--json"), actors, caches)
            return list(zip(actors, caches, done, strict=True))

    def prepare(self, *lines: tuple[str, ...]) -> None:
        """Run these command lines, on the server's project and on the local one."""
        for line in lines:
            self.caches[0].ok(*line, *ANA)
            self.local.ok(*line, *ANA)

    def local_loser(self, *argv: str) -> CompletedProcess[str]:
        """Return the message of the second of two local commands."""
        self.local.ok(*argv, "--actor", "agent:r0")
        return self.local.run(*argv, "--actor", "agent:r1", "--json")


def claim(racers: Racers, number: int) -> None:
    """Let all claim the next task; there is one."""
    name = f"LAT-{number}"
    racers.prepare(("create", f"Prize {number}"), ("status", name, "in_planning"))
    plan = f"plans/{_task(racers.caches[0], name)['id']}.md"
    with (racers.caches[0].lattice_dir / plan).open("a") as file:
        file.write("\nA plan.\n")
    (racers.local.lattice_dir / f"plans/{_task(racers.local, name)['id']}.md").write_text("A plan.\n")
    racers.prepare(("status", name, "planned"))
    ran = racers.race("next", "--claim")
    told = racers.local_loser("next", "--claim")
    winners = [actor for actor, _, done in ran if json.loads(done.stdout)["data"]]
    assert len(winners) == 1, winners
    for actor, cache, done in ran:
        if actor not in winners:
            assert (done.stdout, done.stderr, done.returncode) == (told.stdout, told.stderr, told.returncode)
        assert _task(cache, name)["assigned_to"] == winners[0]
    racers.prepare(("status", name, "cancelled", "--force", "--reason", "next round"))


def acquire(racers: Racers, number: int) -> None:
    """Let all acquire one resource."""
    name = f"resource-{number}"
    racers.prepare(("create", f"Unused {number}"), ("status", f"LAT-{number}", "cancelled"))
    racers.prepare(("resource", "create", name))
    ran = racers.race("resource", "acquire", name)
    told = json.loads(racers.local_loser("resource", "acquire", name).stdout)["error"]
    winners = [actor for actor, _, done in ran if done.returncode == 0]
    assert len(winners) == 1, winners
    for actor, cache, done in ran:
        if actor not in winners:
            error = json.loads(done.stdout)["error"]
            assert error["code"] == told["code"] == "RESOURCE_HELD"
            assert _words(error["message"]) == _words(told["message"].replace("agent:r0", winners[0]))
        held = json.loads((cache.lattice_dir / "resources" / name / "resource.json").read_text())
        assert [holder["actor"] for holder in held["holders"]] == winners


def assign(racers: Racers, number: int) -> None:
    """Let all take over one task, each from the one before."""
    name = f"LAT-{number}"
    racers.prepare(("create", f"Taken over {number}"))
    actors = [f"agent:r{n}" for n in range(racers.count)]
    with ThreadPoolExecutor(racers.count) as pool:
        caches = [racers.caches[n % len(racers.caches)] for n in range(racers.count)]
        done = list(pool.map(lambda actor, cache: cache.run("assign", name, actor, *ANA), actors, caches))
    assert not [one.stderr for one in done if one.returncode]
    task = _task(racers.caches[0], name)["id"]
    log = racers.server.lattice_dir() / f"events/{task}.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    taken = [event["data"] for event in events if event["type"] == "assignment_changed"]
    assert sorted(data["to"] for data in taken) == sorted(actors)
    assert [data["from"] for data in taken] == [None, *(data["to"] for data in taken[:-1])]
    racers.prepare(("status", name, "cancelled"))


RACES = {"claim": claim, "acquire": acquire, "assign": assign}


def _task(client: Client, name: str) -> dict[str, Any]:
    """Return a task as the files of this directory have it."""
    ids = json.loads((client.lattice_dir / "ids.json").read_text())["map"]
    found: dict[str, Any] = json.loads((client.lattice_dir / "tasks" / f"{ids[name]}.json").read_text())
    return found


def _words(message: str) -> list[str]:
    """Return a message without its times."""
    return [word for word in message.split() if not any(character.isdigit() for character in word) or ":r" in word]


@contextlib.contextmanager
def racers(sandbox: Sandbox, count: int) -> Iterator[Racers]:
    """Four caches on two machines of one server."""
    server = sandbox.started_server()
    local = sandbox.client("local")
    local.ok("init", "--project-code", "LAT", *ANA, "--no-setup-agents", "--no-setup-claude")
    token = server.token("human:ana", "agent:*")
    caches = [sandbox.client(f"cache-{number}", f"machine-{number % 2}") for number in range(4)]
    for cache in caches:
        cache.add_remote(server, token)
    made = Racers(server, caches, local, count)
    yield made
    for cache in caches:
        wait_for(lambda: not differences(cache.lattice_dir, server.lattice_dir()), "every cache to be equal")  # noqa: B023


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--racers", type=int, default=32, help="processes in each (default: %(default)s)")
    options = parser.parse_args()
    kinds = ["claim", "claim", "acquire", "assign"]
    began = time.monotonic()
    with Sandbox(warm()) as sandbox, racers(sandbox, options.racers) as made:
        for number in range(1, options.rounds + 1):
            RACES[kinds[number % len(kinds)]](made, number)
            if number % 10 == 0:
                print(f"{number} rounds of {options.racers} processes, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{options.rounds} rounds: one winner each, everybody else told; no assignment lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
