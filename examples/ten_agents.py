"""Ten agents on two machines work a backlog empty: each claims, comments and completes until nothing is left.

No agent talks to another, no task is done twice, none is forgotten. Run it with
``.venv/bin/python examples/ten_agents.py``; ``--agents`` and ``--tasks`` change the size.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from sandbox import Client, board, differences


def fill(client: Client, tasks: int) -> None:
    """Create the tasks with a plan each: without one, lattice lets nobody start."""
    for n in range(tasks):
        made = json.loads(client.ok("create", f"Task number {n + 1}", "--actor", "human:ana", "--json"))["data"]
        plan = client.lattice_dir / "plans" / f"{made['id']}.md"
        plan.write_text(plan.read_text() + "\n1. Do it.\n2. Say so.\n")
    client.ok("remote", "push")


def work(client: Client, name: str) -> list[str]:
    """Be one agent; return the short ids of what it completed."""
    completed = []
    while True:
        claimed = json.loads(client.run("next", "--claim", "--actor", name, "--json").stdout)
        task = claimed.get("data")
        if claimed["ok"] and task is None:
            return completed
        if not claimed["ok"]:  # somebody else was faster: take another one
            continue
        client.ok("comment", task["short_id"], f"{name} was here", "--actor", name)
        client.ok("complete", task["short_id"], "--review", "Done as planned.", "--actor", name)
        completed.append(task["short_id"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=20)
    options = parser.parse_args()
    with board("ana", "ben") as (server, machines):
        print(f"{options.tasks} tasks, {options.agents} agents on {len(machines)} machines")
        fill(machines[0], options.tasks)
        began = time.monotonic()
        with ThreadPoolExecutor(options.agents) as pool:
            names = [f"agent:worker-{n}" for n in range(options.agents)]
            results = list(pool.map(work, (machines[n % 2] for n in range(options.agents)), names))
        seconds = time.monotonic() - began
        for name, completed in zip(names, results, strict=True):
            print(f"  {name}: {', '.join(completed) or 'nothing left for it'}")
        times = collections.Counter(short_id for completed in results for short_id in completed)
        for machine in machines:
            machine.ok("remote", "pull")
        different = [path for machine in machines for path in differences(machine.lattice_dir, server.lattice_dir())]
    went_well = len(times) == options.tasks and set(times.values()) == {1} and not different
    print(f"{len(times)} of {options.tasks} completed, each once: {'yes' if went_well else 'NO'}; {seconds:.1f} s")
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main())
