"""Two machines, one board, on real input: ``make demo``. Exit code 1 if a step fails."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from sandbox import Client, Sandbox, Server, differences, wait_for


class Story:
    """One printed line a step, with its evidence; remembers whether a step failed."""

    def __init__(self) -> None:
        self.failed = 0
        self._began = time.monotonic()

    def chapter(self, title: str) -> None:
        print(f"\n{title}")

    def step(self, went_well: bool, what: str, *seen: str) -> None:
        self.failed += not went_well
        print(f"  {'ok ' if went_well else 'NOT OK'} {what}")
        for line in seen:
            print(f"       {line}")

    def end(self) -> int:
        verdict = f"{self.failed} steps went wrong" if self.failed else "Everything as it should be"
        print(f"\n{verdict}, {time.monotonic() - self._began:.1f} s")
        return 1 if self.failed else 0


def task_id(client: Client, short_id: str) -> str:
    return str(json.loads(client.ok("show", short_id, "--json"))["data"]["id"])


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "(nothing)"


def meet(story: Story, server: Server, ana: Client, ben: Client) -> None:
    story.chapter("A server starts, two machines add it as their remote")
    board = server.project("board", "LAT")
    tokens = {name: server.token(f"human:{name}", "agent:*") for name in ("ana", "ben")}
    server.start()
    story.step(board.is_dir(), f"server: Listening on {server.url}")
    for name, client in (("ana", ana), ("ben", ben)):
        said = client.add_remote(server, tokens[name])
        story.step(client.lattice_dir.is_dir(), f"{name}: lattice remote add origin ...", first_line(said))


def share(story: Story, ana: Client, ben: Client) -> None:
    story.chapter("Ana creates tasks, Ben sees and moves them")
    for title in ("Write the parser", "Draw the logo", "Ship it"):
        said = ana.ok("create", title, "--actor", "human:ana")
    story.step("LAT-3" in said, "ana: lattice create ... (three times)", first_line(said))
    listed = ben.ok("list")
    story.step(listed.count("LAT-") == 3, "ben: lattice list", *listed.strip().splitlines())
    said = ben.ok("status", "LAT-1", "in_planning", "--actor", "human:ben")
    story.step("in_planning" in ana.ok("show", "LAT-1", "--json"), "ben moves LAT-1, ana sees it", first_line(said))


def edit_a_plan(story: Story, ana: Client, ben: Client) -> None:
    story.chapter("Ana writes a plan in her editor, Ben gets it")
    plan = f"plans/{task_id(ana, 'LAT-1')}.md"
    text = (ana.lattice_dir / plan).read_text() + "\n## Steps\n\n1. Tokens\n2. Tree\n"
    (ana.lattice_dir / plan).write_text(text)
    ana.ok("status", "LAT-1", "planned", "--actor", "human:ana")
    gate = ana.run("status", "LAT-1", "in_progress", "--actor", "human:ana")
    story.step(gate.returncode == 0, "the plan gate sees the edited plan", first_line(gate.stdout + gate.stderr))
    wait_for(lambda: (ben.lattice_dir / plan).read_text() == text, "the plan on ben's side")
    story.step(True, "ben's copy of the plan is the same, byte for byte")


def race(story: Story, ana: Client, ben: Client) -> None:
    story.chapter("Ten processes on two machines race for one task")
    for short_id in ("LAT-2", "LAT-3"):
        ana.ok("status", short_id, "cancelled", "--actor", "human:ana")
    ana.ok("create", "The prize", "--actor", "human:ana")
    plan = ana.lattice_dir / "plans" / f"{task_id(ana, 'LAT-4')}.md"
    plan.write_text(plan.read_text() + "\nTake it and run.\n")
    ana.ok("remote", "push")
    racers = [
        (ana, ben)[n % 2].popen("next", "--claim", "--actor", f"agent:racer-{n}", "--status", "backlog", "--json")
        for n in range(10)
    ]
    winners = []
    for n, racer in enumerate(racers):
        out, _ = racer.communicate(timeout=60)
        answer = json.loads(out)
        if answer["ok"] and answer.get("data"):
            winners.append(f"agent:racer-{n}")
    owner = json.loads(ben.ok("show", "LAT-4", "--json"))["data"]["assigned_to"]
    story.step(winners == [owner], "exactly one wins", f"winners: {', '.join(winners)}; LAT-4 belongs to {owner}")


def cut(story: Story, server: Server, ana: Client, ben: Client) -> None:
    story.chapter("The server goes away, and comes back")
    server.stop()
    read = ben.run("list")
    story.step(read.returncode == 0 and "LAT-1" in read.stdout, "ben can still read", first_line(read.stderr))
    write = ben.run("comment", "LAT-1", "anybody there?", "--actor", "human:ben", "--json")
    error = json.loads(write.stdout)["error"]
    refused = write.returncode == 1 and error["code"] == "REMOTE_UNREACHABLE"
    story.step(refused, "a write says so, and nothing is queued", f"{error['code']}: {error['message']}")
    server.start()
    said = ben.ok("comment", "LAT-1", "here again", "--actor", "human:ben")
    story.step(True, "after the restart it works", first_line(said))
    seen = "here again" in ana.ok("comments", "LAT-1") and "anybody there?" not in ana.ok("comments", "LAT-1")
    story.step(seen, "ana sees that comment, and only that one")


def compare(story: Story, server: Server, *clients: Client) -> None:
    story.chapter("Nothing lost, nothing doubled, nothing different")
    for client in clients:
        verified = client.run("remote", "verify")
        story.step(verified.returncode == 0, f"{client.dir.name}: lattice remote verify", first_line(verified.stdout))
        found = differences(client.lattice_dir, server.lattice_dir())
        story.step(not found, f"{client.dir.name}: every file equals the server's", *found)
    doctor = clients[0].run("doctor")
    story.step(doctor.returncode == 0, "lattice doctor", doctor.stdout.strip().splitlines()[-1])


def main() -> int:
    story = Story()
    with Sandbox() as sandbox:
        server, ana, ben = sandbox.server(), sandbox.client("ana"), sandbox.client("ben")
        print(f"lattice-remote, two machines on one board (in {Path(sandbox.root).name}, removed afterwards)")
        meet(story, server, ana, ben)
        share(story, ana, ben)
        edit_a_plan(story, ana, ben)
        race(story, ana, ben)
        cut(story, server, ana, ben)
        compare(story, server, ana, ben)
    return story.end()


if __name__ == "__main__":
    sys.exit(main())
